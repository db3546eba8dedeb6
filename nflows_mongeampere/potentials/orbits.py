r"""Averages of potentials over finite groups, by images and by orbits of ridges."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nflows_mongeampere.dynamics import (
    Dynamics,
    Field,
    FieldDynamics,
    Time,
    as_rows,
    field_of,
    start,
)
from nflows_mongeampere.groups import Group
from nflows_mongeampere.potentials.activations import ACTIVATIONS
from nflows_mongeampere.potentials.ridges import Ridges

if TYPE_CHECKING:
    from nflows_mongeampere.potentials.base import Potential
    from nflows_mongeampere.potentials.ridge import RidgePotential

# Sites of the smallest lattice whose ridges are moved in Fourier space; below it one product with
# all rows of the orbits is faster.
FOURIER_SITES = 256


class Average(ABC):
    r"""The average of a potential over a finite group, :math:`\langle u(gx) \rangle_g`."""

    by_hand: bool = False

    @abstractmethod
    def value(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        """The value, shape (B,)."""

    @abstractmethod
    def dynamics(
        self, inputs: Tensor, context: Tensor | None, evaluations: int, costs: bool
    ) -> Dynamics:
        """The equations of motion of a batch."""


class ImageAverage(Average):
    """The average of any potential, by its values at all images: a batch of |G| B rows."""

    def __init__(self, potential: Potential, group: Group) -> None:
        self._potential, self._group = potential, group

    def value(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        values = self._potential._value(*self._images(x, t, context))
        mean: Tensor = values.unflatten(0, (len(self._group), -1)).mean(0)
        return mean

    def dynamics(
        self, inputs: Tensor, context: Tensor | None, evaluations: int, costs: bool
    ) -> Dynamics:
        return FieldDynamics(self._field(inputs), inputs, context, self._potential, costs)

    def _field(self, inputs: Tensor) -> Field:
        field = self._potential._field(self._images(inputs, None, None)[0])

        def average(x: Tensor, t: Time | None, context: Tensor | None) -> tuple[Tensor, Tensor]:
            gradients, laplacians = field(*self._images(x, t, context))
            gradients = gradients.reshape(len(self._group), -1, self._group.features)
            mean = self._group.act_back(gradients).mean(0)
            return mean.view_as(x), laplacians.unflatten(0, (len(self._group), -1)).mean(0)

        return average

    def _images(
        self, x: Tensor, t: Time | None, context: Tensor | None
    ) -> tuple[Tensor, Time | None, Tensor | None]:
        """The images of a batch under the group, as one batch of |G| B rows."""
        n, images = len(self._group), self._group.act(x.flatten(1))
        if isinstance(t, Tensor) and t.dim() == 1:
            t = t.repeat(n)
        context = None if context is None else context.repeat(n, *[1] * (context.dim() - 1))
        return images.flatten(0, 1).unflatten(1, x.shape[1:]), t, context


class RidgeOrbits(Average):
    r"""The average of a ridge potential: a ridge potential whose rows are the orbits of its rows.

    Since :math:`w \cdot gx = g^{-1}w \cdot x`, each row is turned by the group. Where the group
    holds the translations of a large lattice they are made by convolution
    (:class:`LatticeDynamics`), and the rows are turned by the rest alone.
    """

    by_hand = True

    def __init__(self, ridge: RidgePotential, group: Group) -> None:
        self._ridge = ridge
        self._lattice = group.lattice if group.features >= FOURIER_SITES else None
        chosen = torch.ones(len(group), dtype=torch.bool, device="cpu")
        if self._lattice is not None:
            # g = q τ with a translation τ and one q that keeps the first site
            chosen &= group.permutations[:, 0] == 0
        if ridge.even and group.odd:
            chosen &= group.signs[:, 0] == 1  # u(-g x) = u(g x)
        self._elements = group.some(chosen)

    def value(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        ridges, points = self._orbits(context), x.flatten(1)
        activation = ACTIVATIONS[ridges.activation]
        offset = ridges.offset
        if ridges.speed is not None:
            offset = offset + ridges.speed[:, None] * (0.0 if t is None else t)
        if self._lattice is None:
            return ridges.amplitude @ activation.value(torch.addmm(offset, ridges.weight, points.T))
        kernels = kernel_pairs(ridges.weight, self._lattice)
        h = correlate(spectrum(points, self._lattice), kernels) + spread(offset, self._lattice)
        return activation.value(h) @ spread(ridges.amplitude[:, None], self._lattice)[0]

    def dynamics(
        self, inputs: Tensor, context: Tensor | None, evaluations: int, costs: bool
    ) -> Dynamics:
        if self._lattice is None:
            return self._orbits(context).dynamics(inputs, evaluations, costs)
        if costs:
            return FieldDynamics(self._field, inputs, context, self._ridge, costs)
        return LatticeDynamics(self._orbits(context), inputs, self._lattice)

    def _field(self, x: Tensor, t: Time | None, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return field_of(self.dynamics(x, context, evaluations=1, costs=False), t)

    def _orbits(self, context: Tensor | None) -> Ridges:
        """The ridges of the orbits, row by row of the potential."""
        ridge, n = self._ridge, len(self._elements)
        rows = self._elements.act(ridge.weight).transpose(0, 1).flatten(0, 1)
        terms = n * math.prod(self._lattice or ())

        def repeated(values: Tensor) -> Tensor:
            return values.repeat_interleave(n, 0)

        speed = None if ridge.time_weight is None else repeated(ridge.time_weight)
        amplitude, offset = repeated(ridge.amplitude / terms), repeated(ridge.offset(context))
        return Ridges(rows, amplitude, offset, speed, ridge.activation)


class LatticeTensors(NamedTuple):
    """What the equations of motion on a lattice are made of, with F entries: each row, each site.

    Attributes:
        kernels: Fourier coefficients of pairs of rows, complex, shape (pairs, L, ...).
        amplitude: shape (F,).
        curvature: amplitude times squared length of the rows, shape (F,).
        offset: shape (B, F) or (1, F).
        speed: shape (F,), or None.
    """

    kernels: Tensor
    amplitude: Tensor
    curvature: Tensor
    offset: Tensor
    speed: Tensor | None


class LatticeDynamics(Dynamics):
    r"""The equations of motion of ridges at every site of a periodic lattice.

    The products with all translates of a row are a correlation, those with their transpose a
    convolution; both are products in Fourier space. Two real rows w and w' share one complex
    transform, as :math:`w + i w'`. The state is :math:`[x; \ell]`, shape (D + 1, B); the equations
    are those of :class:`~nflows_mongeampere.potentials.ridges.RidgeDynamics`.
    """

    by_hand = True
    tensors: LatticeTensors

    def __init__(self, ridges: Ridges, inputs: Tensor, lattice: tuple[int, ...]) -> None:
        self._lattice, self._event_shape = lattice, inputs.shape[1:]
        self._activation = ACTIVATIONS[ridges.activation]
        self.coordinates = math.prod(lattice)
        self.state = start(inputs, 1)
        curvature = ridges.amplitude * ridges.weight.square().sum(1)
        self.tensors = LatticeTensors(
            kernel_pairs(ridges.weight, lattice),
            spread(ridges.amplitude[:, None], lattice)[0],
            spread(curvature[:, None], lattice)[0],
            spread(ridges.offset, lattice),
            None if ridges.speed is None else spread(ridges.speed[:, None], lattice)[0],
        )

    def rate(self, t: Time, state: Tensor) -> Tensor:
        return self.stage(t, state)[0]

    def stage(self, t: Time, state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        kernels, amplitude, curvature, offset, speed = self.tensors
        modes = spectrum(state[: self.coordinates].T, self._lattice)
        h = correlate(modes, kernels) + offset
        if speed is not None:
            h = h + torch.as_tensor(t, dtype=h.dtype, device=h.device).reshape(-1, 1) * speed
        p = self._activation.first(h)
        velocity = convolve(paired_spectrum(amplitude * p, kernels), kernels)
        laplacian = self._activation.second(p) @ curvature
        return torch.cat([velocity.T, laplacian[None]]), (modes, p)

    def pullback(
        self,
        t: Time,
        kept: tuple[Tensor, ...],
        adjoint: Tensor,
        gradients: list[Tensor | None],
    ) -> Tensor:
        modes, p = kept
        kernels, amplitude, curvature, _, _ = self.tensors
        of_l = adjoint[self.coordinates :]
        of_modes = spectrum(adjoint[: self.coordinates].T, self._lattice)
        projected = correlate(of_modes, kernels)
        bend = of_l.T * curvature if len(of_l) else None
        g, second = self._activation.pull_back(p, amplitude * projected, bend)
        g_modes = paired_spectrum(g, kernels)
        d_kernels, d_amplitude, d_curvature, d_offset, d_speed = gradients
        if d_kernels is not None:
            pushed = paired_spectrum(amplitude * p, kernels)
            total = (modes.conj() * g_modes).sum(0) + (of_modes.conj() * pushed).sum(0)
            d_kernels.add_(total, alpha=1 / self.coordinates)
        if d_amplitude is not None:
            d_amplitude.add_((p * projected).sum(0))
        if d_curvature is not None and len(of_l):
            d_curvature.add_(of_l[0] @ second)
        if d_offset is not None:
            d_offset.add_(g if len(d_offset) > 1 else g.sum(0))
        if d_speed is not None:
            d_speed.add_(g.sum(0) * t)
        return convolve(g_modes, kernels).T

    def points(self, state: Tensor) -> Tensor:
        return as_rows(state[: self.coordinates], self._event_shape)


def spectrum(points: Tensor, lattice: tuple[int, ...]) -> Tensor:
    """Fourier coefficients of fields of shape (B, D), complex, shape (B, 1, L, ...)."""
    fields = points.reshape(-1, 1, *lattice)
    modes: Tensor = torch.fft.fftn(fields, dim=_sites(lattice))
    return modes


def kernel_pairs(rows: Tensor, lattice: tuple[int, ...]) -> Tensor:
    """Rows of shape (M, D), two by two as one complex kernel in Fourier space: (M / 2, L, ...)."""
    if len(rows) % 2:
        rows = F.pad(rows, (0, 0, 0, 1))
    pairs = torch.complex(rows[::2], -rows[1::2]).unflatten(1, lattice)
    kernels: Tensor = torch.fft.fftn(pairs, dim=_sites(lattice)).conj()
    return kernels


def spread(columns: Tensor, lattice: tuple[int, ...]) -> Tensor:
    """Numbers of each row, (M, B), at every site, in the order of :func:`correlate`: (B, F)."""
    if len(columns) % 2:
        columns = F.pad(columns, (0, 0, 0, 1))
    pairs: Tensor = columns.T.unflatten(1, (len(columns) // 2, 1, 2))
    return pairs.expand(-1, -1, math.prod(lattice), -1).flatten(1)


def correlate(modes: Tensor, kernels: Tensor) -> Tensor:
    """Products of the fields with every translate of every row, (B, F)."""
    dims = _sites(kernels.shape[1:])
    return torch.view_as_real(torch.fft.ifftn(modes * kernels, dim=dims)).flatten(1)


def paired_spectrum(values: Tensor, kernels: Tensor) -> Tensor:
    """Fourier coefficients of (B, F) numbers at every site, pairs of rows as complex numbers."""
    pairs = torch.view_as_complex(values.view(-1, *kernels.shape, 2))
    modes: Tensor = torch.fft.fftn(pairs, dim=_sites(kernels.shape[1:]))
    return modes


def convolve(modes: Tensor, kernels: Tensor) -> Tensor:
    """The sum of all translates of all rows, each times its number; from (B, pairs, L, ...)."""
    total = (modes * kernels.conj()).sum(1)
    fields: Tensor = torch.fft.ifftn(total, dim=_sites(kernels.shape[1:]))
    return fields.real.flatten(1)


def _sites(lattice: tuple[int, ...] | torch.Size) -> tuple[int, ...]:
    return tuple(range(-len(lattice), 0))
