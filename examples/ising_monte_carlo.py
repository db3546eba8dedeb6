"""Cluster Monte Carlo of the Ising model, to compare a flow with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from nflows_mongeampere.targets import Ising
from nflows_mongeampere.variational import Estimate


def swendsen_wang(target: Ising, sweeps: int, seed: int) -> Iterator[Tensor]:
    """Spins (L, L) in equilibrium, after one cluster update each."""
    generator, length = np.random.default_rng(seed), target.length
    sites = np.arange(target.sites).reshape(length, length)
    ends = length if target.boundary == "periodic" else length - 1
    heads = np.concatenate([sites[:ends].ravel(), sites[:, :ends].ravel()])
    moved = np.roll(sites, -1, 0)[:ends], np.roll(sites, -1, 1)[:, :ends]
    tails = np.concatenate([neighbours.ravel() for neighbours in moved])
    kappa = np.repeat(np.array(target.couplings) / target.temperature, length * ends)
    spins = np.ones(target.sites)
    for sweep in range(-(sweeps // 10), sweeps):
        # bonds that are satisfied stick with probability 1 - e^(-2|J|/T)
        stuck = generator.random(len(heads)) < -np.expm1(-2 * np.abs(kappa))
        bonds = stuck & (kappa * spins[heads] * spins[tails] > 0)
        ones = np.ones(int(bonds.sum()))
        graph = coo_array((ones, (heads[bonds], tails[bonds])), (target.sites, target.sites))
        count, cluster = connected_components(graph, directed=False)
        # each cluster keeps or changes its sign by its weight in the field
        total = np.bincount(cluster, spins, count)
        signs = np.where(generator.random(count) < 1 / (1 + np.exp(-2 * target.h * total)), 1, -1)
        spins = spins * signs[cluster]
        if sweep >= 0:
            yield torch.from_numpy(spins).float().view(length, length)


@dataclass(frozen=True)
class Reference:
    """Means over Monte Carlo sweeps, with standard errors from blocks.

    Attributes:
        energy: for each site, with its error.
        magnetisation: the mean of its size for each site, with its error.
        structure: S(k) of every mode, shape (L, L), and its error.
    """

    energy: Estimate
    magnetisation: Estimate
    structure: tuple[Tensor, Tensor]


def reference(target: Ising, sweeps: int, seed: int, blocks: int = 50) -> Reference:
    """Energy and structure factor by cluster Monte Carlo."""
    spins = torch.stack(list(swendsen_wang(target, sweeps, seed)))
    energy, size = target.spin_energy(spins), spins.mean((1, 2)).abs()
    structure = torch.fft.fft2(spins).abs().square() / target.sites

    def mean(values: Tensor) -> tuple[Tensor, Tensor]:
        length = sweeps // blocks
        means = values[: blocks * length].view(blocks, length, *values.shape[1:]).mean(1)
        return means.mean(0), means.std(0) / math.sqrt(blocks)

    def estimate(values: Tensor) -> Estimate:
        value, error = mean(values)
        return Estimate(value.item(), error.item())

    return Reference(estimate(energy), estimate(size), mean(structure))
