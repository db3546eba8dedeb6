"""What the speed benchmark computes: one batch and one flow, evaluated in several ways."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nflows_mongeampere import MongeAmpereTransform, RidgePotential
from nflows_mongeampere.integration import Solve
from published_flow import plain_loop, published_transform

VARIANTS = ("published", "plain loop", "autograd", "recompute")

FlowMap = Callable[[Tensor], "tuple[Tensor, Tensor]"]


@dataclass(frozen=True)
class Size:
    """The size of a problem: D, H, B, the number of RK4 steps, T and the precision."""

    features: int = 784
    hidden: int = 1024
    batch: int = 100
    steps: int = 100
    time: float = 10.0
    dtype: str = "float32"

    def __str__(self) -> str:
        return (
            f"D = {self.features}, H = {self.hidden}, batch {self.batch}, {self.steps} RK4 steps, "
            f"T = {self.time:g}, {self.dtype}"
        )

    @property
    def state_bytes(self) -> int:
        """The size of the reduced state of the batch between two steps, (H + 1) × B numbers."""
        return (self.hidden + 1) * self.batch * torch.finfo(getattr(torch, self.dtype)).bits // 8


class Problem:
    """A batch and a softplus ridge potential, the same for every way to evaluate the flow.

    ``published`` and ``plain loop`` are the published arithmetic, as it is and without waste;
    ``autograd`` and ``recompute`` are ``MongeAmpereTransform`` with that sensitivity.
    """

    def __init__(self, size: Size) -> None:
        self.size = size
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, size.dtype)

        def normal(*shape: int, scale: float) -> Tensor:
            return (scale * torch.randn(*shape, generator=generator)).to(dtype)

        self.data = normal(size.batch, size.features, scale=1.0)
        self.potential = RidgePotential(size.features, size.hidden).to(dtype)
        self.potential.load_state_dict(
            {
                "weight": normal(size.hidden, size.features, scale=1 / math.sqrt(size.features)),
                "bias": normal(size.hidden, scale=1.0),
                "amplitude": normal(size.hidden, scale=0.05),
            }
        )
        self._maps = {variant: self._flow_map(variant) for variant in VARIANTS}

    def log_density(self, variant: str) -> Tensor:
        """The log-density of each sample under the flow with a standard normal base."""
        return log_density(self._maps[variant], self.data)

    @torch.no_grad()
    def evaluate(self, variant: str) -> Tensor:
        """The log-density without a graph."""
        return self.log_density(variant)

    def train(self, variant: str) -> list[Tensor]:
        """The gradient of the negative log-likelihood, one tensor for each parameter."""
        return gradients(self._maps[variant], self.potential, self.data)

    def _flow_map(self, variant: str) -> FlowMap:
        potential, time, steps = self.potential, self.size.time, self.size.steps
        if variant == "published":
            return lambda x: published_transform(potential, x, time=time, steps=steps)
        if variant == "plain loop":
            return lambda x: plain_loop(potential, x, time=time, steps=steps)
        return MongeAmpereTransform(potential, time=time, steps=steps, sensitivity=variant)


def log_density(flow_map: FlowMap, data: Tensor) -> Tensor:
    """The log-density of each sample, with a standard normal base."""
    noise, logabsdet = flow_map(data)
    normalizer = data.shape[1] / 2 * math.log(2 * math.pi)
    return logabsdet - noise.square().sum(1) / 2 - normalizer


def gradients(flow_map: FlowMap, potential: torch.nn.Module, data: Tensor) -> list[Tensor]:
    """The gradient of the negative log-likelihood, one tensor for each parameter."""
    loss = -log_density(flow_map, data).mean()
    return list(torch.autograd.grad(loss, list(potential.parameters())))


def through_every_stage(transform: MongeAmpereTransform) -> FlowMap:
    """The same map from data to noise, which autograd differentiates stage by stage."""
    integrator, potential, time = transform.integrator, transform.potential, transform.time

    def flow_map(x: Tensor) -> tuple[Tensor, Tensor]:
        dynamics = potential.dynamics(x, None, integrator.evaluations)
        solve = Solve(integrator, dynamics, (time, 0.0), time)
        state = solve.march(dynamics.state).states[-1]
        return dynamics.points(state), dynamics.logabsdet(state)

    return flow_map


class _Kept:
    """A tensor that autograd keeps for the backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """The size of the tensors that a forward pass keeps for the backward pass."""
    alive: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        result = forward()
    storages = [kept.tensor.untyped_storage() for kept in alive]
    total = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    del result
    return total
