"""What the promises are tested on. A new potential joins by being added to ``POTENTIALS``."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import normflows
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from torch import Tensor, nn

from nflows_mongeampere import (
    AutogradPotential,
    ConvolutionalPotential,
    DeepConvolutionalPotential,
    DeepPotential,
    GroupedPotential,
    LatticePotential,
    MongeAmpereTransform,
    PixelwisePotential,
    Potential,
    RidgePotential,
    SymmetrizedPotential,
)
from nflows_mongeampere.conftest import walked
from nflows_mongeampere.groups import translations
from nflows_mongeampere.normflows import MongeAmpere

ACTIVATIONS = {"softplus": nn.functional.softplus, "logcosh": lambda h: h.cosh().log()}
FACES = ("nflows", "normflows")
BATCH = 3

# What a round trip may miss with the settings below, relative to how far it goes.
ROUND_TRIP = {
    "euler": 0.15,
    "midpoint": 2e-4,
    "rk4": 1e-5,
    "dopri5": 1e-5,
    "tsit5": 1e-5,
    "ieuler": 0.4,
    "alf": 1e-5,
}
SENSITIVITIES = ("autograd", "recompute", "adjoint", "interpolated_adjoint")


class Network(nn.Module):
    """u(x) with one hidden layer; flattens whatever the event shape is."""

    def __init__(self, features: int, activation: str, inputs: int = 0) -> None:
        super().__init__()
        self.hidden = nn.Linear(features + inputs, 4)
        self.amplitude = nn.Parameter(torch.randn(4) / 2)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](self.hidden(x.flatten(1))) @ self.amplitude


class ConditionalNetwork(Network):
    """u(x, t; c) for images with one number of context."""

    def __init__(self, features: int, activation: str) -> None:
        super().__init__(features, activation, inputs=2)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return super().forward(torch.cat([x.flatten(1), t.expand(len(x), 1), context], dim=1))


@dataclass(frozen=True)
class Example:
    """How to build a potential for one activation, and what it takes."""

    build: Callable[[str], Potential]
    shape: tuple[int, ...]
    context_features: int | None = None


def _ridge(features: int, hidden: int, **keywords: Any) -> Callable[[str], Potential]:
    return lambda activation: RidgePotential(features, hidden, activation=activation, **keywords)


def _convolutional(
    shape: tuple[int, ...], kernels: int, **keywords: Any
) -> Callable[[str], Potential]:
    return lambda activation: ConvolutionalPotential(
        shape, kernels, activation=activation, **keywords
    )


def _deep(
    *arguments: Any, kind: Any = DeepPotential, **keywords: Any
) -> Callable[[str], Potential]:
    def build(activation: str) -> Potential:
        potential: Potential = kind(*arguments, activation=activation, **keywords)
        for parameter in potential.parameters():
            nn.init.normal_(parameter, std=0.3)
        nn.init.normal_(potential.weight, std=0.7 / potential.weight.shape[1] ** 0.5)
        return potential

    return build


def _pixelwise(shape: tuple[int, ...], hidden: int, **keywords: Any) -> Callable[[str], Potential]:
    def build(activation: str) -> Potential:
        potential = PixelwisePotential(shape, hidden, activation=activation, **keywords)
        for parameter in potential.parameters():
            nn.init.normal_(parameter, std=0.2)
        return potential

    return build


# With these batches few ridges in many dimensions move in reduced coordinates, the others in x.
POTENTIALS = {
    "reduced": Example(_ridge(6, 2), (6,)),
    "direct": Example(_ridge(2, 8), (2,)),
    "reduced-time": Example(_ridge(6, 2, time_dependent=True), (6,)),
    "reduced-context": Example(_ridge(6, 2, context_features=1), (6,), 1),
    "reduced-image": Example(_ridge(8, 2), (2, 2, 2)),
    "direct-everything": Example(
        _ridge(4, 9, time_dependent=True, context_features=2), (1, 2, 2), 2
    ),
    "convolutional": Example(_convolutional((2, 1, 3), 2, kernel_size=3), (2, 1, 3)),
    "deep": Example(_deep(2, 4), (2,)),
    "deep-everything": Example(
        _deep(4, [5, 4], context_features=2, time_dependent=True, modes=2), (1, 2, 2), 2
    ),
    "grouped": Example(_deep(6, 2, 2, rank=1, kind=GroupedPotential), (6,)),
    "grouped-everything": Example(
        _deep(4, 6, 3, context_features=2, time_dependent=True, modes=2, kind=GroupedPotential),
        (1, 2, 2),
        2,
    ),
    "deep-convolutional": Example(
        _deep((2, 1, 3), 2, 2, kernel_size=3, kind=DeepConvolutionalPotential), (2, 1, 3)
    ),
    "pixelwise": Example(_pixelwise((1, 2, 2), 2, context_channels=1), (1, 2, 2), 4),
    "symmetrized": Example(
        lambda a: SymmetrizedPotential(RidgePotential(4, 2, activation=a), translations((2, 2))),
        (2, 2),
    ),
    "lattice": Example(lambda a: LatticePotential((2, 2), 1, powers=1), (2, 2)),
    "lattice-context": Example(
        lambda a: LatticePotential((6,), 1, powers=1, even=False, context_features=1), (6,), 1
    ),
    "network": Example(lambda a: AutogradPotential(Network(3, a)), (3,)),
    "network-everything": Example(
        lambda a: AutogradPotential(ConditionalNetwork(4, a)), (1, 2, 2), 1
    ),
    "hutchinson": Example(lambda a: AutogradPotential(Network(3, a), laplacian="hutchinson"), (3,)),
}


@dataclass(frozen=True)
class Case:
    """A flow: potential x activation x solver x sensitivity x face."""

    potential: str
    activation: str = "softplus"
    solver: str = "rk4"
    sensitivity: str = "autograd"
    face: str = "nflows"
    keywords: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        names = self.potential, self.activation, self.solver, self.sensitivity, self.face
        return "-".join(names)

    @property
    def shape(self) -> tuple[int, ...]:
        return POTENTIALS[self.potential].shape

    @property
    def settings(self) -> dict[str, Any]:
        steps = {"ieuler": 2, "rk4": 2}.get(self.solver, 4)
        return {
            "solver": self.solver,
            "sensitivity": self.sensitivity,
            "time": 0.25,
            "steps": steps,
            "atol": 1e-5,
            "rtol": 1e-5,
            **self.keywords,
        }

    def build_potential(self, seed: int = 0) -> Potential:
        """The potential in float64, with weights that move points and parameters of every kind."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            potential = POTENTIALS[self.potential].build(self.activation).double()
            if not isinstance(potential, AutogradPotential):
                closed = getattr(potential, "potential", potential)
                nn.init.normal_(closed.amplitude, std=0.5)
        return potential

    def batch(self, size: int = BATCH) -> tuple[Tensor, Tensor | None]:
        """Points and their context."""
        generator = torch.Generator().manual_seed(1)
        width = POTENTIALS[self.potential].context_features
        x = torch.randn(size, *self.shape, generator=generator, dtype=torch.float64)
        if width is None:
            return x, None
        return x, torch.randn(size, width, generator=generator, dtype=torch.float64)


class Model:
    """A density whose transport is a case, through the eyes of its face or of another one."""

    def __init__(self, case: Case, face: str | None = None, seed: int = 0) -> None:
        potential = case.build_potential(seed)
        self.density: nn.Module
        if (face or case.face) == "nflows":
            transform = MongeAmpereTransform(potential, **case.settings)
            self.transport = transform
            self.to_noise, self.to_data = transform.forward, transform.inverse
            self.density = Flow(transform, StandardNormal(case.shape))
        else:
            flow = MongeAmpere(potential, **case.settings)
            self.transport = flow
            self.to_noise, self.to_data = flow.inverse, flow.forward
            base = normflows.distributions.DiagGaussian(case.shape, trainable=False).double()
            self.density = normflows.ConditionalNormalizingFlow(base, [flow])
        self.potential = potential

    def log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        """With the same Hutchinson probe in every call."""
        torch.manual_seed(2)
        return self.density.log_prob(x, context)


AXES = (POTENTIALS, ACTIVATIONS, ROUND_TRIP, SENSITIVITIES, FACES)
COMBINATIONS = [
    row for row in itertools.product(*AXES) if not (row[2] == "alf" and "adjoint" in row[3])
]
CASES = [Case(*row) for row in walked(COMBINATIONS)]  # every pair
# every entry, for what a solve does not know of: how a batch comes in and its results go out
FEW_CASES = [Case(*row) for row in walked(COMBINATIONS, together=1)]
