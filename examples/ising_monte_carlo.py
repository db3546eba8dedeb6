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
    """Spins (L, L) of a periodic lattice in equilibrium, after one cluster update each."""
    generator, length = np.random.default_rng(seed), target.length
    sites = np.arange(target.sites).reshape(length, length)
    heads = np.concatenate([sites.ravel(), sites.ravel()])
    tails = np.concatenate([np.roll(sites, -1, 0).ravel(), np.roll(sites, -1, 1).ravel()])
    spins = np.ones(target.sites)
    for sweep in range(-(sweeps // 10), sweeps):
        # equal neighbours stick together with probability 1 - e^(-2/T), and clusters flip alike
        stuck = generator.random(len(heads)) < -math.expm1(-2 / target.temperature)
        bonds = stuck & (spins[heads] == spins[tails])
        ones = np.ones(int(bonds.sum()))
        graph = coo_array((ones, (heads[bonds], tails[bonds])), (target.sites, target.sites))
        count, cluster = connected_components(graph, directed=False)
        spins = generator.choice([-1.0, 1.0], count)[cluster]
        if sweep >= 0:
            yield torch.from_numpy(spins).float().view(length, length)


@dataclass(frozen=True)
class Reference:
    """Means over Monte Carlo sweeps, with standard errors from blocks.

    Attributes:
        energy: for each site, with its error.
        structure: S(k) of every mode, shape (L, L), and its error.
    """

    energy: Estimate
    structure: tuple[Tensor, Tensor]


def reference(target: Ising, sweeps: int, seed: int, blocks: int = 50) -> Reference:
    """Energy and structure factor by cluster Monte Carlo."""
    spins = torch.stack(list(swendsen_wang(target, sweeps, seed)))
    energy = -target.neighbour_products(spins) / target.sites
    structure = torch.fft.fft2(spins).abs().square() / target.sites

    def mean(values: Tensor) -> tuple[Tensor, Tensor]:
        length = sweeps // blocks
        means = values[: blocks * length].view(blocks, length, *values.shape[1:]).mean(1)
        return means.mean(0), means.std(0) / math.sqrt(blocks)

    value, error = mean(energy)
    return Reference(Estimate(value.item(), error.item()), mean(structure))
