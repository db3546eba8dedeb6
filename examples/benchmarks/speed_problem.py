"""What the speed benchmark computes: one batch and one flow, evaluated in several ways."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nflows_mongeampere import Integrator, MongeAmpereTransform, RidgePotential, dynamics
from published_flow import State, classical_rk4, published_transform

VARIANTS = ("published", "autograd", "recompute")
SOLVERS = ("hand loop", "torchdyn")

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

    ``published`` is the plain published arithmetic. ``autograd`` and ``recompute`` are
    ``MongeAmpereTransform`` with that sensitivity. ``hand loop`` and ``torchdyn`` integrate the
    reduced equations of motion, by a loop written by hand and by the package's integrator.
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

    def log_density(self, variant: str) -> Tensor:
        """The log-density of each sample under the flow with a standard normal base."""
        noise, logabsdet = self._flow_map(variant)(self.data)
        normalizer = self.size.features / 2 * math.log(2 * math.pi)
        return logabsdet - noise.square().sum(1) / 2 - normalizer

    @torch.no_grad()
    def evaluate(self, variant: str) -> Tensor:
        """The log-density without a graph."""
        return self.log_density(variant)

    def train(self, variant: str) -> list[Tensor]:
        """The gradient of the negative log-likelihood, one tensor for each parameter."""
        parameters = list(self.potential.parameters())
        return list(torch.autograd.grad(-self.log_density(variant).mean(), parameters))

    def _flow_map(self, variant: str) -> FlowMap:
        size, potential = self.size, self.potential
        if variant == "published":
            return lambda x: published_transform(potential, x, time=size.time, steps=size.steps)
        if variant == "hand loop":
            return self._hand_loop
        if variant == "torchdyn":
            return self._integrator
        return MongeAmpereTransform(
            potential, time=size.time, steps=size.steps, sensitivity=variant
        )

    def _hand_loop(self, x: Tensor) -> tuple[Tensor, Tensor]:
        motion = self.potential.dynamics(x, None, 4 * self.size.steps)

        def field(state: State) -> State:
            return (motion(0.0, state[0]),)

        steps, dt = self.size.steps, -self.size.time / self.size.steps
        return motion.outputs(classical_rk4(field, (motion.state,), dt=dt, steps=steps)[0])

    def _integrator(self, x: Tensor) -> tuple[Tensor, Tensor]:
        motion = self.potential.dynamics(x, None, 4 * self.size.steps)
        times = (self.size.time, 0.0)
        states = Integrator(steps=self.size.steps).solve(motion, times, self.size.time)
        return motion.outputs(states[-1])


@contextmanager
def plain_products() -> Iterator[None]:
    """Within it the reduced equations multiply by ``@``, like the published arithmetic."""
    fast = dynamics._gram_product
    dynamics._gram_product = torch.matmul  # type: ignore[assignment]
    try:
        yield
    finally:
        dynamics._gram_product = fast


def saved_bytes(problem: Problem, variant: str) -> int:
    """The size of the tensors that the forward pass keeps for the backward pass."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        problem.log_density(variant)
    return sum(storage.nbytes() for storage in kept.values())
