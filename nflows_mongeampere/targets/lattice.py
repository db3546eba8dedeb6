"""Scalar fields on a square lattice."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from normflows.distributions import Target
from torch import Tensor

from nflows_mongeampere import validation
from nflows_mongeampere.groups import BOUNDARIES


class Lattice(Target):
    """A density of a scalar field on a square lattice.

    Args:
        length: L, the number of sites along one side.
        boundary: ``"periodic"``, where opposite sides are neighbours, or ``"open"``.

    Attributes:
        sites: L², the number of entries of one field.
        shape: (L, L).
    """

    def __init__(self, length: int, boundary: str) -> None:
        super().__init__()
        self.length = validation.integer("length", length, minimum=2)
        self.boundary = validation.choice("boundary", boundary, BOUNDARIES)
        self.sites = self.length**2
        self.shape = (self.length, self.length)

    def field(self, x: Tensor) -> Tensor:
        """A checked batch as fields, shape (B, L, L)."""
        validation.batch("x", x, None)
        if x.shape[1:].numel() != self.sites:
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, expected (B, {self.sites}), a number for each of "
                f"the {self.length} x {self.length} sites"
            )
        return x.reshape(len(x), self.length, self.length)

    @staticmethod
    def side(shape: Sequence[int]) -> int:
        """The length of a square lattice of a shape (L, L)."""
        first, *others = validation.shape("shape", shape, 2)
        if others != [first]:
            raise ValueError(f"shape: got {tuple(shape)}, expected that of a square, (L, L)")
        return first

    @staticmethod
    def vanishing(log_prob: Tensor) -> Tensor:
        """A log-density, -infinity where finite fields are so large that its terms overflow."""
        return log_prob.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)

    def neighbour_products(self, field: Tensor, weights: Sequence[float] = (1.0, 1.0)) -> Tensor:
        """The sum of f(i) f(j) over the bonds, with a weight for each axis, shape (B,)."""
        total = field.new_zeros(len(field))
        for dimension, weight in enumerate(weights, 1):
            if self.boundary == "periodic":
                products = field * field.roll(-1, dimension)
            else:
                ends = self.length - 1
                products = field.narrow(dimension, 0, ends) * field.narrow(dimension, 1, ends)
            total = total + weight * products.flatten(1).sum(1)
        return total


def chain_adjacency(length: int, boundary: str) -> Tensor:
    """How often two sites of one row of the lattice are neighbours, shape (L, L), float64."""
    adjacency = torch.zeros(length, length, dtype=torch.float64)
    for i in range(length if boundary == "periodic" else length - 1):
        j = (i + 1) % length
        adjacency[i, j] += 1
        adjacency[j, i] += 1
    return adjacency
