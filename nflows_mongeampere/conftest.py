"""What the unit tests measure the package against: other arithmetic, from the definitions."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_mongeampere import AutogradPotential, Potential, RidgePotential

SHAPES = [(3,), (2, 1, 3)]
POTENTIALS = ["softplus", "logcosh", "network"]

Value = Callable[[Tensor, "float | Tensor"], Tensor]

# stages of the textbook: (time, weights of the earlier stages), then the weights of the step
TABLEAUS: dict[str, tuple[list[tuple[float, list[float]]], list[float]]] = {
    "euler": ([(0, [])], [1]),
    "midpoint": ([(0, []), (1 / 2, [1 / 2])], [0, 1]),
    "rk4": (
        [(0, []), (1 / 2, [1 / 2]), (1 / 2, [0, 1 / 2]), (1, [0, 0, 1])],
        [1 / 6, 1 / 3, 1 / 3, 1 / 6],
    ),
}


class Network(nn.Module):
    """A smooth potential with a skewed Hessian, in any event shape."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, 8)
        self.output = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self._value(x)

    def _value(self, x: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        return self.output(torch.sin(self.hidden(x.flatten(1)) + shift)).squeeze(1)


class TimeNetwork(Network):
    """The same with waves that run in time."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self._value(x, t.reshape(-1, 1))


class ContextNetwork(Network):
    """The same with waves whose phase is the context."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self._value(x, context.sum(1, keepdim=True))


class TimeContextNetwork(Network):
    """The same with both."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self._value(x, context.sum(1, keepdim=True) * torch.cos(t).reshape(-1, 1))


NETWORKS = {
    (False, False): Network,
    (True, False): TimeNetwork,
    (False, True): ContextNetwork,
    (True, True): TimeContextNetwork,
}


def ridge(
    features: int, hidden_features: int, *, scale: float = 1.0, **options: object
) -> RidgePotential:
    """A ridge potential in float64 that is not the identity any more."""
    potential = RidgePotential(features, hidden_features, **options).double()  # type: ignore[arg-type]
    nn.init.normal_(potential.amplitude, std=scale / hidden_features**0.5)
    return potential


def make_potential(
    kind: str,
    features: int,
    *,
    hidden: int = 4,
    time_dependent: bool = False,
    context_features: int | None = None,
) -> Potential:
    """A random potential in float64: a ridge potential of that activation, or a network."""
    if kind == "network":
        network = NETWORKS[time_dependent, context_features is not None](features)
        return AutogradPotential(network.double())
    return ridge(
        features,
        hidden,
        activation=kind,
        time_dependent=time_dependent,
        context_features=context_features,
    )


def ridge_value(
    potential: RidgePotential, x: Tensor, t: float | Tensor = 0.0, context: Tensor | None = None
) -> Tensor:
    """The definition: the sum of a_j σ(w_j·x + v_j t + (Vc)_j + b_j), ridge by ridge."""
    value = torch.zeros(len(x), dtype=x.dtype)
    for j in range(len(potential.weight)):
        h = (x.flatten(1) * potential.weight[j]).sum(1)
        if potential.bias is not None:
            h = h + potential.bias[j]
        if potential.time_weight is not None:
            h = h + potential.time_weight[j] * t
        if potential.context_weight is not None and context is not None:
            h = h + (context * potential.context_weight[j]).sum(1)
        if potential.activation == "softplus":
            sigma = F.softplus(h, threshold=100)
        else:
            sigma = torch.log(torch.cosh(h))
        value = value + potential.amplitude[j] * sigma
    return value


def definition(potential: Potential, context: Tensor | None = None) -> Value:
    """The value of a potential as a function of (x, t) that shares no line with the package."""
    if isinstance(potential, RidgePotential):
        return lambda x, t: ridge_value(potential, x, t, context)
    assert isinstance(potential, AutogradPotential)
    arguments: dict[str, Tensor | None] = {} if context is None else {"context": context}

    def value(x: Tensor, t: float | Tensor) -> Tensor:
        if potential.time_dependent:
            arguments["t"] = torch.as_tensor(t, dtype=x.dtype)
        return potential.module(x, **arguments)

    return value


def differentiate(value: Value, x: Tensor, t: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
    """Gradient and Laplacian of ``value`` by autograd, the latter from the whole Hessian."""

    def total(points: Tensor) -> Tensor:
        return value(points.unflatten(1, x.shape[1:]), t).sum()

    points = x.detach().flatten(1)
    gradient = torch.autograd.functional.jacobian(total, points)
    hessian = torch.autograd.functional.hessian(total, points, vectorize=True)
    return gradient.view_as(x), torch.einsum("bibi->b", hessian)


def brute_force(
    value: Value, x: Tensor, grid: list[float], solver: str = "rk4"
) -> tuple[Tensor, Tensor]:
    """Follow dx/dt = ∇u, dℓ/dt = Δu over ``grid`` in x-space by the textbook's method."""
    stages, weights = TABLEAUS[solver]
    logabsdet = torch.zeros(len(x), dtype=x.dtype)
    for t, t_next in itertools.pairwise(grid):
        dt = t_next - t
        slopes: list[tuple[Tensor, Tensor]] = []
        for node, earlier in stages:
            point = x + sum(
                (dt * a * k for a, (k, _) in zip(earlier, slopes, strict=True)),
                torch.zeros_like(x),
            )
            slopes.append(differentiate(value, point, t + node * dt))
        for weight, (gradient, laplacian) in zip(weights, slopes, strict=True):
            x = x + dt * weight * gradient
            logabsdet = logabsdet + dt * weight * laplacian
    return x, logabsdet


def uniform_grid(start: float, stop: float, steps: int) -> list[float]:
    """The times of ``steps`` equal steps."""
    return [start + (stop - start) * i / steps for i in range(steps + 1)]


def log_determinant(transform: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """ln|det ∂transform/∂x| of each row, from the Jacobian that autograd gives."""
    rows = []
    for row in x:
        jacobian = torch.autograd.functional.jacobian(
            lambda point: transform(point.reshape(1, *x.shape[1:])).flatten(), row.flatten()
        )
        rows.append(torch.linalg.slogdet(jacobian)[1])
    return torch.stack(rows)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Assert that every entry agrees, relative to 1 or to its size."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
