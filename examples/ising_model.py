"""A flow on a square lattice that has the symmetries of the Ising model exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, Transform
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from nflows_mongeampere import MongeAmpereTransform, RidgePotential, SymmetrizedPotential
from nflows_mongeampere.averages import Average
from nflows_mongeampere.groups import point_group, translations
from nflows_mongeampere.modes import LatticeModes
from nflows_mongeampere.targets import Ising


@dataclass(frozen=True)
class Settings:
    """A flow with the settings of its training.

    Attributes:
        pieces: Monge-Ampère transforms, one after the other.
        kernels: ridges of each for L from 16, before they are moved over the lattice; smaller
            lattices, where they cost less, have more, as 1 / L.
        steps: of each solve, at least.
        samples: fields in each step of the training.
        learning_rate: the highest, for L up to 16; larger lattices learn more slowly, as 1 / L.
        interval: training steps between two validations.
    """

    pieces: int = 12
    kernels: int = 4
    steps: int = 2
    samples: int = 64
    learning_rate: float = 1e-2
    interval: int = 50


def best_gaussian(target: Ising) -> Tensor:
    r"""Variances of the Fourier modes, (L, L), of the Gaussian of lowest free energy.

    With :math:`\lambda_k` the eigenvalues of :math:`K + \alpha I`, they solve
    :math:`1 / s_k = 1 / \lambda_k - c` with :math:`c = E\,\mathrm{sech}^2 x`, where x is normal
    with the mean of :math:`s` as its variance.
    """
    wave = (2 * math.pi * torch.arange(target.length, dtype=torch.float64) / target.length).cos()
    widths: Tensor = 2 * (wave[:, None] + wave) / target.temperature + target.alpha
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(150))

    def variances(curvature: float) -> Tensor:
        return (1 / widths - curvature).reciprocal()

    def excess(curvature: float) -> float:
        x = variances(curvature).mean().sqrt() * nodes
        return float(weights @ x.cosh().pow(-2) / weights.sum()) - curvature

    curvature: float = brentq(excess, 0, (1 - 1e-9) / float(widths.max()))
    return variances(curvature).float()


def smooth_kernels(length: int, count: int) -> Tensor:
    """Noisy bells around the first site, from one site wide to the whole lattice, (count, L^2)."""
    site = torch.arange(length)
    along = torch.minimum(site, length - site).square()
    distance = (along[:, None] + along).flatten()
    widths = 0.4 * length ** torch.linspace(0, 1, count)
    bells = torch.exp(-distance / (2 * widths[:, None].square()))
    return nn.functional.normalize(bells * (1 + 0.3 * torch.randn(bells.shape)))


def make_flow(target: Ising, settings: Settings) -> Flow:
    """The best Gaussian's modes, behind potentials of every translate of symmetric kernels."""
    shape = (target.length, target.length)
    kernels = max(settings.kernels, settings.kernels * 16 // target.length)
    moves, square = translations(shape), Average(point_group(shape))

    def piece() -> Transform:
        ridges = RidgePotential(target.sites, kernels, activation="logcosh", bias=False)
        with torch.no_grad():
            ridges.weight.copy_(smooth_kernels(target.length, kernels))
        # kernels that the square leaves alone: its symmetries cost no further terms
        register_parametrization(ridges, "weight", square)
        return MongeAmpereTransform(SymmetrizedPotential(ridges, moves), steps=settings.steps)

    pieces = [piece() for _ in range(settings.pieces)]
    modes = LatticeModes(0.5 * best_gaussian(target).log())
    return Flow(CompositeTransform([modes, *pieces]), StandardNormal([target.sites]))


def make_optimizer(settings: Settings, sites: int, flow: nn.Module) -> torch.optim.Optimizer:
    """Adam; amplitudes, which are divided by the number of sites, learn as many times faster."""
    named = dict(flow.named_parameters())
    amplitudes = [p for name, p in named.items() if name.endswith("amplitude")]
    rest = [p for name, p in named.items() if not name.endswith("amplitude")]
    rate = settings.learning_rate * min(1.0, 16 / math.sqrt(sites))
    groups = [{"params": amplitudes, "lr": rate * sites}, {"params": rest, "lr": rate}]
    return torch.optim.Adam(groups, betas=(0.9, 0.99))
