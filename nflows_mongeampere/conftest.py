"""What the unit tests measure the package against: other arithmetic, from the definitions."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_mongeampere import (
    AutogradPotential,
    ConvolutionalPotential,
    DeepConvolutionalPotential,
    DeepPotential,
    GroupedPotential,
    LatticePotential,
    PixelwisePotential,
    Potential,
    RidgePotential,
    SymmetrizedPotential,
)
from nflows_mongeampere.dynamics import FieldDynamics
from nflows_mongeampere.groups import Group, point_group, reflections, translations
from nflows_mongeampere.potentials import lattice as lattice_module
from nflows_mongeampere.potentials import orbits
from nflows_mongeampere.potentials.convolutional import ConvolutionalDynamics
from nflows_mongeampere.potentials.deep_convolutional import DeepConvolutionalDynamics
from nflows_mongeampere.potentials.grouped import GroupedDynamics
from nflows_mongeampere.potentials.lattice import SiteDynamics
from nflows_mongeampere.potentials.layers import LayersDynamics
from nflows_mongeampere.potentials.orbits import LatticeDynamics
from nflows_mongeampere.potentials.pixelwise import PixelwiseDynamics
from nflows_mongeampere.potentials.ridges import ReducedDynamics, RidgeDynamics

Value = Callable[[Tensor, "float | Tensor"], Tensor]
Row = tuple[Hashable, ...]

# torchdyn's explicit solvers
FIXED = ["euler", "midpoint", "rk4", "alf"]
ADAPTIVE = ["dopri5", "tsit5"]

# stages of the textbook: (time, weights of the earlier stages), then the weights of the step
TABLEAUS: dict[str, tuple[list[tuple[float, list[float]]], list[float]]] = {
    "euler": ([(0, [])], [1]),
    "midpoint": ([(0, []), (1 / 2, [1 / 2])], [0, 1]),
    "rk4": (
        [(0, []), (1 / 2, [1 / 2]), (1 / 2, [0, 1 / 2]), (1, [0, 0, 1])],
        [1 / 6, 1 / 3, 1 / 3, 1 / 6],
    ),
}


def covering(rows: Sequence[Row], together: int = 2) -> Sequence[Row]:
    """Few of the rows that show every pair of entries of all of them, chosen greedily."""
    pairs = {row: set(itertools.combinations(enumerate(row), together)) for row in rows}
    missing = set().union(*pairs.values())
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(pairs[row] & missing))
        missing -= pairs[best]
        chosen.append(best)
    return chosen


def walked(rows: Sequence[Row], together: int = 2) -> Sequence[Row]:
    """Rows that show every pair, or every entry; `make test-all` walks all."""
    return rows if "ALL_CASES" in os.environ else covering(rows, together)


def every_pair(*axes: Iterable[Hashable]) -> Sequence[Row]:
    """Rows with an entry of each axis: every pair of entries meets in one of them."""
    return walked(list(itertools.product(*axes)))


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


class ContextNetwork(Network):
    """The same with waves whose phase is the context."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self._value(x, context.sum(1, keepdim=True))


class TimeContextNetwork(Network):
    """The same with both."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self._value(x, context.sum(1, keepdim=True) * torch.cos(t).reshape(-1, 1))


def ridge(
    features: int, hidden_features: int, *, scale: float = 1.0, **options: object
) -> RidgePotential:
    """A ridge potential in float64 that is not the identity any more."""
    potential = RidgePotential(features, hidden_features, **options).double()  # type: ignore[arg-type]
    nn.init.normal_(potential.amplitude, std=scale / hidden_features**0.5)
    return potential


def convolutional(shape: Sequence[int], **options: object) -> ConvolutionalPotential:
    """Three kernels in float64, with numbers that differ from place to place."""
    potential = ConvolutionalPotential(shape, 3, **{"kernel_size": 3, **options}).double()  # type: ignore[arg-type]
    for parameter in potential.parameters():
        nn.init.normal_(parameter, std=0.3)
    return potential


def deep_convolutional(
    shape: Sequence[int], size: int = 2, **options: object
) -> DeepConvolutionalPotential:
    """Four kernels in groups, in float64, with numbers that differ from place to place."""
    options = {"kernel_size": 3, **options}
    potential = DeepConvolutionalPotential(shape, 4, size, **options).double()  # type: ignore[arg-type]
    for parameter in potential.parameters():
        nn.init.normal_(parameter, std=0.3)
    return potential


def deep(features: int, widths: int | Sequence[int], **options: object) -> DeepPotential:
    """A deep potential in float64 with numbers that differ from place to place."""
    potential = DeepPotential(features, widths, **options).double()  # type: ignore[arg-type]
    for parameter in potential.parameters():
        nn.init.normal_(parameter, std=0.4)
    return potential


def grouped(
    features: int, hidden: int, size: int, rank: int = 1, **options: object
) -> GroupedPotential:
    """A grouped potential in float64 with numbers that differ from place to place."""
    potential = GroupedPotential(features, hidden, size, rank=rank, **options).double()  # type: ignore[arg-type]
    for parameter in potential.parameters():
        nn.init.normal_(parameter, std=0.4)
    nn.init.normal_(potential.weight, std=0.8 / features**0.5)
    return potential


def pixelwise(shape: Sequence[int], **options: object) -> PixelwisePotential:
    """Three ridges at every pixel in float64, with numbers that differ."""
    potential = PixelwisePotential(shape, 3, **options).double()  # type: ignore[arg-type]
    for parameter in potential.parameters():
        nn.init.normal_(parameter, std=0.6)
    return potential


def sites(shape: Sequence[int], *, fourier: bool = False, **options: object) -> LatticePotential:
    """Kernels with functions of their own, moved by products or in Fourier space."""
    with mock.patch.object(lattice_module, "DENSE_SITES", 0 if fourier else 100):
        potential = LatticePotential(shape, 2, **options).double()  # type: ignore[arg-type]
    for name, parameter in potential.named_parameters():
        nn.init.normal_(parameter, std=0.3 if name == "weight" else 0.2)
    return potential


def lattice(potential: Potential, group: Group) -> SymmetrizedPotential:
    """A symmetrized potential whose rows move in Fourier space, however small the lattice."""
    with mock.patch.object(orbits, "FOURIER_SITES", 1):
        return SymmetrizedPotential(potential, group)


@dataclass(frozen=True)
class Example:
    """How to build a potential in float64 that bends paths, and what it takes.

    Attributes:
        build: makes one with random numbers.
        shape: of an event.
        dynamics: the equations of motion that it has for batches of a few rows.
    """

    build: Callable[[], Potential]
    shape: tuple[int, ...]
    dynamics: type

    def batch(self, potential: Potential, rows: int = 3) -> tuple[Tensor, Tensor | None]:
        """Random points, and a context where the potential takes one."""
        x = torch.randn(rows, *self.shape, dtype=torch.float64)
        takes = potential.context_features or (2 if getattr(potential, "_context", None) else 0)
        return x, torch.randn(rows, takes, dtype=torch.float64) if takes else None


ALL = {"time_dependent": True, "context_features": 2}
# A new potential joins by being added here. Batches of a few rows, and some evaluations.
POTENTIALS = {
    "ridge": Example(lambda: ridge(2, 5), (2,), RidgeDynamics),
    "ridge-all": Example(
        lambda: ridge(4, 9, activation="logcosh", **ALL), (1, 2, 2), RidgeDynamics
    ),
    "reduced": Example(lambda: ridge(6, 2, activation="logcosh"), (6,), ReducedDynamics),
    "reduced-all": Example(lambda: ridge(6, 3, **ALL), (2, 1, 3), ReducedDynamics),
    "images": Example(lambda: convolutional((2, 3, 2)), (2, 3, 2), ConvolutionalDynamics),
    "small-images": Example(
        lambda: convolutional((2, 1, 3), kernel_size=5, activation="logcosh"),
        (6,),
        ConvolutionalDynamics,
    ),
    "deep-images": Example(
        lambda: deep_convolutional((2, 3, 2), group_units=3), (2, 3, 2), DeepConvolutionalDynamics
    ),
    "deep-small-images": Example(
        lambda: deep_convolutional((2, 1, 3), 4, kernel_size=5, activation="softplus"),
        (6,),
        DeepConvolutionalDynamics,
    ),
    "pixels": Example(lambda: pixelwise((1, 2, 2)), (4,), PixelwiseDynamics),
    "pixels-all": Example(
        lambda: pixelwise((2, 2, 1), context_channels=3, activation="softplus"),
        (2, 2, 1),
        PixelwiseDynamics,
    ),
    "pixel": Example(lambda: pixelwise((2, 1, 1), context_channels=3), (2,), PixelwiseDynamics),
    "deep": Example(lambda: deep(2, 3), (2,), LayersDynamics),
    "deep-rank": Example(lambda: deep(4, 3, rank=2), (4,), LayersDynamics),
    "deeper-all": Example(
        lambda: deep(4, [3, 4, 2], modes=3, activation="softplus", **ALL), (1, 2, 2), LayersDynamics
    ),
    "grouped": Example(lambda: grouped(2, 6, 3), (2,), GroupedDynamics),
    "grouped-all": Example(
        lambda: grouped(4, 8, 2, 2, modes=2, activation="softplus", **ALL),
        (1, 2, 2),
        GroupedDynamics,
    ),
    "grouped-reduced": Example(lambda: grouped(12, 4, 2, 0, group_units=1), (12,), GroupedDynamics),
    "grouped-reduced-all": Example(
        lambda: grouped(12, 3, 3, modes=3, activation="softplus", **ALL), (12,), GroupedDynamics
    ),
    "orbits": Example(
        lambda: SymmetrizedPotential(ridge(4, 3, scale=3, **ALL), translations((2, 2))),
        (2, 2),
        RidgeDynamics,
    ),
    "chain": Example(
        lambda: lattice(ridge(4, 1, scale=3), translations((4,))), (4,), LatticeDynamics
    ),
    "lattice": Example(
        lambda: lattice(ridge(6, 3, scale=4, **ALL), translations((2, 3))), (2, 3), LatticeDynamics
    ),
    "square": Example(
        lambda: lattice(
            ridge(4, 2, scale=3, activation="logcosh", bias=False),
            translations((2, 2)) * point_group((2, 2)),
        ),
        (4,),
        LatticeDynamics,
    ),
    "cube": Example(
        lambda: lattice(ridge(12, 2, scale=5), translations((2, 3, 2))), (12,), LatticeDynamics
    ),
    "sites": Example(lambda: sites((2, 3)), (2, 3), SiteDynamics),
    "sites-all": Example(lambda: sites((2, 2), even=False, context_features=2), (4,), SiteDynamics),
    "sites-fourier": Example(lambda: sites((3, 2), fourier=True, powers=2), (6,), SiteDynamics),
    "sites-open": Example(lambda: sites((3, 2), boundary="open", even=False), (6,), SiteDynamics),
    "sites-open-fourier": Example(
        lambda: sites((2, 3), boundary="open", fourier=True, context_features=1),
        (2, 3),
        SiteDynamics,
    ),
    "sites-fourier-all": Example(
        lambda: sites((2, 1, 3), fourier=True, even=False, context_features=2),
        (2, 1, 3),
        SiteDynamics,
    ),
    "mirrored-images": Example(
        lambda: SymmetrizedPotential(convolutional((1, 2, 3)), reflections((1, 2, 3))),
        (1, 2, 3),
        FieldDynamics,
    ),
    "network": Example(lambda: AutogradPotential(Network(3).double()), (3,), FieldDynamics),
    "network-all": Example(
        lambda: AutogradPotential(TimeContextNetwork(4).double()), (1, 2, 2), FieldDynamics
    ),
}
BY_HAND = [name for name, example in POTENTIALS.items() if example.dynamics.by_hand]


def make(name: str, rows: int = 3) -> tuple[Potential, Tensor, Tensor | None]:
    """A potential of the list, points and a context."""
    potential = POTENTIALS[name].build()
    return potential, *POTENTIALS[name].batch(potential, rows)


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


def convolutional_value(potential: ConvolutionalPotential, x: Tensor) -> Tensor:
    """The definition, by PyTorch's convolution."""
    images = x.reshape(len(x), *potential.shape)
    h = F.conv2d(images, potential.weight, padding=potential.kernel_size // 2) + potential.bias
    sigma = F.softplus(h, threshold=100) if potential.activation == "softplus" else h.cosh().log()
    return (potential.amplitude * sigma).flatten(1).sum(1)


def deep_convolutional_value(potential: DeepConvolutionalPotential, x: Tensor) -> Tensor:
    """The definition: what PyTorch's convolution gives, and units above it kernel by kernel."""
    images, softplus = x.reshape(len(x), *potential.shape), potential.activation == "softplus"
    h = F.conv2d(images, potential.weight, padding=potential.kernel_size // 2) + potential.bias
    y = h.sigmoid() if softplus else h.tanh()
    value, size = convolutional_value(potential, x), potential.group_size
    for k in range(len(potential.hidden_bias)):
        group, row = divmod(k, potential.group_units)
        weights = potential.hidden_weight[group, row]
        z = sum(w * y[:, group * size + j] for j, w in enumerate(weights))
        z = z + potential.hidden_bias[k]
        sigma = F.softplus(z, threshold=100) if softplus else z.cosh().log()
        value = value + (potential.hidden_amplitude[k] * sigma).flatten(1).sum(1)
    return value


def deep_value(
    potential: DeepPotential, x: Tensor, t: float | Tensor = 0.0, context: Tensor | None = None
) -> Tensor:
    """The definition: units one by one, tanh or sigmoid from layer to layer, all read out."""
    softplus = potential.activation == "softplus"
    units = [(x.flatten(1) * row).sum(1) for row in potential.weight]
    units = [h + b for h, b in zip(units, potential.bias, strict=True)]
    if potential.time_weight is not None:
        units = [h + v * t for h, v in zip(units, potential.time_weight, strict=True)]
    if potential.context_weight is not None and context is not None:
        rows = (context @ potential.context_weight.T).T
        units = [h + row for h, row in zip(units, rows, strict=True)]
    layers = [units]
    for weight, bias in zip(potential.hidden_weights, potential.hidden_biases, strict=True):
        y = torch.stack([h.sigmoid() if softplus else h.tanh() for h in layers[-1]])
        layers.append(list(weight @ y + bias[:, None]))
    if potential.stiffness is None:
        value = 0.5 * torch.einsum("bi,ij,bj->b", x.flatten(1), potential.quadratic, x.flatten(1))
    else:
        value = (x.flatten(1) @ potential.quadratic.T).square() @ potential.stiffness / 2
    value = value + x.flatten(1) @ potential.drift
    for row, h in zip(potential.amplitude, [h for layer in layers for h in layer], strict=True):
        time = torch.as_tensor(t, dtype=torch.float64)
        a = sum(a * torch.cos(time * math.pi * k) for k, a in enumerate(row))
        value = value + a * (F.softplus(h, threshold=100) if softplus else h.cosh().log())
    return value


def grouped_value(
    potential: GroupedPotential, x: Tensor, t: float | Tensor = 0.0, context: Tensor | None = None
) -> Tensor:
    """The definition: a deep potential whose second layer is a matrix of blocks, and parabolas."""
    softplus, hidden = potential.activation == "softplus", potential.hidden_features
    h = x.flatten(1) @ potential.weight.T + potential.bias
    if potential.time_weight is not None:
        h = h + potential.time_weight * torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1)
    if potential.context_weight is not None and context is not None:
        h = h + context @ potential.context_weight.T
    first, parabolas = h[:, :hidden], h[:, hidden:]
    y = first.sigmoid() if softplus else first.tanh()
    z = y @ torch.block_diag(*potential.hidden_weight).T + potential.hidden_bias
    sigma = [F.softplus(u, threshold=100) if softplus else u.cosh().log() for u in (first, z)]
    value = torch.zeros(len(x), dtype=x.dtype)
    for k, modes in enumerate(potential.amplitude.T):
        time = torch.cos(torch.as_tensor(t, dtype=torch.float64) * math.pi * k)
        a, q, c = modes.split([hidden, potential.rank, len(potential.hidden_bias)])
        value = value + time * (sigma[0] @ a + parabolas.square() @ q / 2 + sigma[1] @ c)
    return value


def pixelwise_value(potential: PixelwisePotential, x: Tensor, context: Tensor | None) -> Tensor:
    """The definition, pixel by pixel and ridge by ridge."""
    channels, height, width = potential.shape
    images, value = x.reshape(len(x), *potential.shape), torch.zeros(len(x), dtype=x.dtype)
    numbers = [potential.bias, potential.amplitude, potential.drift, potential.scale[None]]
    for i, j in itertools.product(range(height), range(width)):
        pixel, coefficients = images[:, :, i, j], torch.cat(numbers).expand(len(x), -1)
        if context is not None and potential.context_weight is not None:
            maps = context.view(len(x), -1, height, width)[:, :, i, j]
            coefficients = coefficients + maps @ potential.context_weight.T
        offset, amplitude = coefficients[:, :3], coefficients[:, 3:6]
        drift, scale = coefficients[:, 6 : 6 + channels], coefficients[:, -1]
        lengths = potential.weight.square().sum(1)
        bound = (lengths * amplitude.abs()).sum(1) + scale.abs()
        damping = potential.stiffness / (potential.stiffness + bound)
        amplitude, scale = amplitude * damping[:, None], scale * damping
        value = value + scale * pixel.square().sum(1) / 2 + (drift * pixel).sum(1)
        for ridge in range(3):
            h = pixel @ potential.weight[ridge] + offset[:, ridge]
            soft = potential.activation == "softplus"
            value = value + amplitude[:, ridge] * (F.softplus(h) if soft else h.cosh().log())
    return value


def lattice_value(potential: LatticePotential, x: Tensor, context: Tensor | None) -> Tensor:
    """The definition: kernel by kernel and site by site, with the integrals of tanh^n."""
    shape, count = potential.shape, potential.powers
    fields, value = x.new_zeros(len(x), *potential.frame), torch.zeros(len(x), dtype=x.dtype)
    fields[(slice(None), *map(slice, shape))] = x.reshape(len(x), *shape)
    amplitude = potential.amplitude.expand(len(x), -1, -1)
    if potential.context_weight is not None and context is not None:
        amplitude = amplitude * (1 + torch.tensordot(context, potential.context_weight, 1))
    dims = tuple(range(1, len(shape) + 1))
    for k, kernel in enumerate(potential.symmetric_weight):
        for shift in itertools.product(*map(range, shape)):
            moved = kernel.view(1, *potential.frame).roll(shift, dims)
            h = (fields * moved).flatten(1).sum(1)
            p, log_cosh = h.tanh(), h.cosh().log()
            even = [log_cosh, log_cosh - p**2 / 2, log_cosh - p**2 / 2 - p**4 / 4]
            functions = [*even[:count], *(() if potential.even else (h, h - p, h - p - p**3 / 3))]
            mixed = torch.stack(functions, 1) @ potential.mixing
            value = value + potential.unit[k] * (mixed * amplitude[:, :, k]).sum(1)
    return value


def definition(potential: Potential, context: Tensor | None = None) -> Value:
    """The value of a potential as a function of (x, t) that shares no line with the package."""
    if isinstance(potential, RidgePotential):
        return lambda x, t: ridge_value(potential, x, t, context)
    if isinstance(potential, DeepPotential):
        return lambda x, t: deep_value(potential, x, t, context)
    if isinstance(potential, GroupedPotential):
        return lambda x, t: grouped_value(potential, x, t, context)
    if isinstance(potential, DeepConvolutionalPotential):
        return lambda x, t: deep_convolutional_value(potential, x)
    if isinstance(potential, ConvolutionalPotential):
        return lambda x, t: convolutional_value(potential, x)
    if isinstance(potential, PixelwisePotential):
        return lambda x, t: pixelwise_value(potential, x, context)
    if isinstance(potential, LatticePotential):
        return lambda x, t: lattice_value(potential, x, context)
    if isinstance(potential, SymmetrizedPotential):
        inner, group = definition(potential.potential, context), potential.group

        def average(x: Tensor, t: float | Tensor) -> Tensor:
            images = [
                (x.flatten(1)[:, place] * sign).view_as(x)
                for place, sign in zip(group.permutations, group.signs, strict=True)
            ]
            return torch.stack([inner(image, t) for image in images]).mean(0)

        return average
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


class Growth(Potential):
    """u = rate |x|^(power + 1) / (power + 1) in one dimension: dx/dt = rate x^power."""

    def __init__(self, rate: float = 1.0, power: int = 1) -> None:
        super().__init__()
        self.rate, self.power = rate, power

    def _value(self, x: Tensor, t: object, context: Tensor | None) -> Tensor:
        return self.rate * x.pow(self.power + 1).sum(1) / (self.power + 1)

    def _gradient(self, x: Tensor, t: object, context: Tensor | None) -> Tensor:
        return self.rate * x.pow(self.power)

    def _laplacian(self, x: Tensor, t: object, context: Tensor | None) -> Tensor:
        return self.rate * self.power * x.pow(self.power - 1).sum(1)
