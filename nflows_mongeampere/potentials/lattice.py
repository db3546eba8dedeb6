"""Potentials of fields on a lattice, with a function of its own for each kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nflows_mongeampere import validation
from nflows_mongeampere.dynamics import Dynamics, FieldDynamics, Time, as_rows, start
from nflows_mongeampere.groups import BOUNDARIES, Group, lattice_shape, point_group
from nflows_mongeampere.invariants import Invariants
from nflows_mongeampere.potentials.base import ClosedFormPotential

# Sites of the largest lattice on which one product with all translates of the kernels is faster
# than Fourier transforms (float32, one thread of a Xeon, batches of 64).
DENSE_SITES = 100


class LatticePotential(ClosedFormPotential):
    r"""A sum over the sites of a periodic lattice, with a function of its own for each kernel.

    .. math:: u(x; c) = \sum_{k=1}^{K} \sum_i g_k(h_{ki}; c), \qquad
              h_{ki} = \sum_j w_{k, j - i}\, x_j

    is invariant under translations, and under a point group that the kernels are kept invariant
    under. The function of a kernel is a combination of

    .. math:: \ln \cosh h, \; \tanh^2 h, \; \tanh^4 h, \ldots
              \quad \text{and, unless } u(-x) = u(x), \quad h, \; \tanh h, \; \tanh^3 h, \ldots

    so that all derivatives are polynomials of :math:`p = \tanh h`: one transcendental function for
    each kernel and site. On an open lattice the field is zero beyond the border, and translations
    no longer leave u alone. Perturbation theory wants this form: to first order in an interaction
    :math:`\sum_i V(x_i)` the flow from a Gaussian with precision M has
    :math:`u = -\int_0^\infty ds \sum_i V_s\big((e^{-Ms} x)_i\big)`, kernels that spread with s and
    functions that are V, smeared out.

    The amplitude starts at zero: a new flow is the identity map.

    Args:
        shape: of the lattice, in any number of dimensions.
        kernels: K.
        powers: P, the functions of each parity for each kernel.
        even: whether :math:`u(-x) = u(x)`.
        group: what leaves the kernels alone, and must keep the first entry of :attr:`frame`, on
            which it acts; the point group of the lattice unless given.
        context_features: width of the context c, or None: amplitudes are :math:`a (1 + V c)`.
        boundary: ``"periodic"`` or ``"open"``.

    Attributes:
        frame: the shape of a kernel, a number for each distance of two sites: that of a periodic
            lattice, and twice as long in each direction for an open one.
        weight: the kernels by their :class:`~nflows_mongeampere.invariants.Invariants`, shape
            (K, O) for O orbits of the group.
        amplitude: of each function of each kernel, shape (P, K) or, unless even, (2P, K). The
            functions are mixed so that their slopes are orthonormal for normal h.
        mixing: the coefficients of the mixtures, a column for each function.
        unit: by which each kernel's functions are scaled, shape (K,).
        context_weight: V, shape (C, P or 2P, K), or None.

    Raises:
        TypeError, ValueError: for arguments that do not fit.

    Example:
        >>> import torch
        >>> potential = LatticePotential((4, 4), 3)
        >>> _ = torch.nn.init.normal_(potential.amplitude)
        >>> x = torch.randn(2, 16)
        >>> turned = x.view(2, 4, 4).rot90(dims=(1, 2)).roll(1, 2).flatten(1)
        >>> torch.allclose(potential(-turned), potential(x), atol=1e-5)
        True
    """

    features: int
    unit: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        kernels: int,
        *,
        powers: int = 3,
        even: bool = True,
        group: Group | None = None,
        context_features: int | None = None,
        boundary: str = "periodic",
    ) -> None:
        super().__init__()
        self.shape = lattice_shape("shape", shape)
        self.boundary = validation.choice("boundary", boundary, BOUNDARIES)
        self.frame = frame(self.shape, boundary)
        self.features = math.prod(self.shape)
        self.kernels = validation.integer("kernels", kernels)
        self.powers = validation.integer("powers", powers)
        self.even = validation.boolean("even", even)
        self.group = lattice_group(self.frame, group)
        self.context_features = validation.optional_integer("context_features", context_features)
        functions = self.powers if self.even else 2 * self.powers
        self.invariants = Invariants(self.group)
        self.weight = nn.Parameter(torch.empty(self.kernels, self.invariants.coordinates))
        self.amplitude = nn.Parameter(torch.empty(functions, self.kernels))
        self.context_weight = (
            None
            if context_features is None
            else nn.Parameter(torch.empty(context_features, functions, self.kernels))
        )
        self.register_buffer("unit", torch.empty(self.kernels))
        self.reset_parameters()
        # follow from the arguments, and stay on the CPU where models are built without numbers
        self.mixing = torch.from_numpy(_mixing(self.powers, self.even))
        dense = self.features <= DENSE_SITES
        self._places = _places(self.shape, self.frame) if dense else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the kernels anew, bells from one site wide to the whole lattice, amplitudes zero."""
        kernels = smooth_kernels(self.frame, self.kernels).to(self.amplitude)
        self.weight.copy_(self.invariants.right_inverse(kernels))
        nn.init.zeros_(self.amplitude)
        if self.context_weight is not None:
            nn.init.normal_(self.context_weight, std=0.3 / math.sqrt(len(self.context_weight)))
        # a wide kernel pushes all sites at once: its functions are scaled by its largest mode
        modes = torch.fft.fftn(
            self.symmetric_weight.unflatten(1, self.frame), dim=_sides(self.frame)
        )
        self.unit.copy_(modes.abs().square().flatten(1).amax(1).reciprocal())

    @property
    def symmetric_weight(self) -> Tensor:
        """The kernels w, shape (K, F) with F entries of the frame."""
        kernels: Tensor = self.invariants(self.weight)
        return kernels

    def dynamics(
        self, inputs: Tensor, context: Tensor | None, evaluations: int, costs: bool = False
    ) -> Dynamics:
        if costs:
            return FieldDynamics(self._gradient_and_laplacian, inputs, context, self, costs)
        tensors = self._tensors(context)
        return SiteDynamics(tensors, inputs, self.shape, self.frame, self.even)

    def _tensors(self, context: Tensor | None) -> SiteTensors:
        """What the equations of motion are made of."""
        weight = self.symmetric_weight
        if self._places is not None:
            rows = weight[:, self._places.to(weight.device)]
            kernels, lengths = rows.flatten(0, 1), rows.square().sum(2)
        else:
            kernels = torch.fft.rfftn(
                weight.unflatten(1, self.frame), dim=_sides(self.frame)
            ).conj()
            lengths = weight.square().sum(1, keepdim=True)
            if self.boundary == "open":  # of what of each kernel lies within
                lengths = _overlaps(weight.square(), self.shape, self.frame)
        if self.boundary == "periodic":
            lengths = lengths[:, :1]
        return SiteTensors(kernels, self._coefficients(context), lengths[..., None])

    def _coefficients(self, context: Tensor | None) -> Tensor:
        """Of the powers of p², those of odd functions behind, shape (P or 2P, K, 1, B or 1)."""
        amplitude = self.amplitude[..., None]
        if self.context_weight is not None and context is not None:
            change = torch.einsum("bc,cfk->fkb", context, self.context_weight)
            amplitude = amplitude * (1 + change)
        mixing = self.mixing.to(amplitude)
        mixed: Tensor = torch.einsum("mf,fkb->mkb", mixing, amplitude * self.unit[:, None])
        return mixed[:, :, None]

    def _value(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        motion = self.dynamics(x, context, evaluations=1)
        assert isinstance(motion, SiteDynamics)
        return motion.value(motion.state)


class SiteTensors(NamedTuple):
    r"""What the equations of motion of a :class:`LatticePotential` are made of.

    Attributes:
        kernels: every translate of every kernel, shape (K D, D); or, on large lattices, the
            conjugate Fourier coefficients of the kernels, complex, shape (K, ..., M // 2 + 1).
        coefficients: of the slopes of :math:`g_k` in powers of :math:`p^2`, shape
            (P or 2P, K, 1, B or 1).
        lengths: squared length of each kernel, shape (K, 1, 1), or (K, D, 1) where it depends on
            the site.
    """

    kernels: Tensor
    coefficients: Tensor
    lengths: Tensor


class SiteDynamics(Dynamics):
    r"""The equations of motion of a :class:`LatticePotential`: the state is :math:`[x; \ell]`.

    With :math:`p = \tanh h`, :math:`q = p^2` and two polynomials P and Q for each kernel,

    .. math:: g' = p\,P(q) + Q(q), \qquad g'' = (1 - q)\,S, \qquad S = P + 2q P' + 2p Q',

    .. math:: \dot x = \sum_k C_k^T g_k'(h_k), \qquad
              \dot\ell = \sum_k \|w_k\|^2 \sum_i g_k''(h_{ki}), \qquad h_k = C_k x,

    with :math:`C_k` the matrix of all translates of :math:`w_k`. The Jacobian's product with an
    adjoint :math:`[\lambda; \lambda_\ell]` is :math:`\sum_k C_k^T \gamma_k` with
    :math:`\gamma_k = g_k'' \odot C_k \lambda + \|w_k\|^2 \lambda_\ell\, g_k'''`.
    """

    by_hand = True
    tensors: SiteTensors

    def __init__(
        self,
        tensors: SiteTensors,
        inputs: Tensor,
        shape: tuple[int, ...],
        frame: tuple[int, ...],
        even: bool,
    ) -> None:
        self._shape, self._frame, self._even = shape, frame, even
        self._event_shape = inputs.shape[1:]
        self.coordinates = math.prod(shape)
        self.state = start(inputs, 1)
        self.tensors = tensors

    def rate(self, t: Time, state: Tensor) -> Tensor:
        return self.stage(t, state)[0]

    def stage(self, t: Time, state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        x = self._modes(state[: self.coordinates])
        p = self._correlate(x).tanh()
        q = p * p
        even, odd = self._parts()
        slope = _polynomial(even, q) * p
        bend = _polynomial(_weighed(even, 2, 1), q)
        if odd is not None:
            slope = slope + _polynomial(odd, q)
            bend = torch.addcmul(bend, _polynomial(_derivative(odd), q), p, value=2)
        curvature = bend * (1 - q)
        pushed = self._modes(slope)
        laplacian = self._weighed_by_lengths(curvature)
        return (
            torch.cat([self._convolve(pushed), laplacian[None]]),
            (x, p, q, bend, curvature, pushed),
        )

    def pullback(
        self,
        t: Time,
        kept: tuple[Tensor, ...],
        adjoint: Tensor,
        gradients: list[Tensor | None],
    ) -> Tensor:
        x, p, q, bend, curvature, pushed = kept
        lengths = self.tensors.lengths
        of_l = adjoint[self.coordinates :]
        of_x = self._modes(adjoint[: self.coordinates])
        projected = self._correlate(of_x)
        gamma = curvature * projected
        weighed = None
        if len(of_l):
            weighed = lengths * of_l  # (K, 1 or D, B)
            gamma = gamma.addcmul_(weighed, self._third(p, q, bend))
        modes = self._modes(gamma)
        d_kernels, d_coefficients, d_lengths = gradients
        if d_kernels is not None:
            self._add_kernels(d_kernels, modes, x, pushed, of_x)
        if d_coefficients is not None:
            self._add_coefficients(d_coefficients, p, q, projected, weighed)
        if d_lengths is not None and len(of_l):
            each = curvature @ of_l.T
            d_lengths.add_(each if len(lengths[0]) > 1 else each.sum(1, keepdim=True))
        return self._convolve(modes)

    def value(self, state: Tensor) -> Tensor:
        """The potential, shape (B,), from the slopes of its functions, term by term."""
        h = self._correlate(self._modes(state[: self.coordinates]))
        even, odd = self._parts()
        q = h.tanh().square()
        total, term = torch.zeros_like(h), nn.functional.softplus(-2 * h) + h - math.log(2)
        for m, coefficient in enumerate(even):  # the integral of p^(2m + 1)
            total = total + coefficient * term
            term = term - q ** (m + 1) / (2 * m + 2)
        if odd is not None:
            p, term = h.tanh(), h
            for m, coefficient in enumerate(odd):  # the integral of p^(2m)
                total = total + coefficient * term
                term = term - p * q**m / (2 * m + 1)
        return total.sum((0, 1))

    def points(self, state: Tensor) -> Tensor:
        return as_rows(state[: self.coordinates], self._event_shape)

    def _weighed_by_lengths(self, curvature: Tensor) -> Tensor:
        """The sum over kernels and sites, (B,), each times its squared length."""
        lengths = self.tensors.lengths
        if len(lengths[0]) > 1:
            total: Tensor = (lengths * curvature).sum((0, 1))
            return total
        return lengths[:, 0, 0] @ curvature.sum(1)

    def _parts(self) -> tuple[Tensor, Tensor | None]:
        """The coefficients of P, and of Q where there are odd functions."""
        coefficients = self.tensors.coefficients
        if self._even:
            return coefficients, None
        even, odd = coefficients.chunk(2)
        return even, odd

    def _third(self, p: Tensor, q: Tensor, bend: Tensor) -> Tensor:
        """The third derivative of the functions, (1 - q) dS(1 - q)/dp."""
        even, odd = self._parts()
        slope = _polynomial(_derivative(_weighed(even, 2, 1)), q) * p
        if odd is not None:
            slope = slope + _polynomial(_weighed(_derivative(odd), 2, 1), q)
        rest = 1 - q
        return (slope * rest - p * bend).mul_(2).mul_(rest)

    def _add_coefficients(
        self, total: Tensor, p: Tensor, q: Tensor, projected: Tensor, weighed: Tensor | None
    ) -> None:
        """Add the gradient of the coefficients, power by power."""
        rest = None if weighed is None else (1 - q) * weighed
        powers = len(total) if self._even else len(total) // 2
        shared = total.shape[-1] == 1
        force, rise, dip = p * projected, rest, None if rest is None else p * rest
        odd_force = projected
        for m in range(powers):
            part = force if rise is None else torch.add(force, rise, alpha=2 * m + 1)
            total[m].add_(part.sum((1, 2) if shared else 1, keepdim=True))
            if not self._even:
                # the slope of q^m is 2m p^(2m - 1) (1 - q)
                part = (
                    odd_force if dip is None or m == 0 else torch.add(odd_force, dip, alpha=2 * m)
                )
                total[powers + m].add_(part.sum((1, 2) if shared else 1, keepdim=True))
                odd_force = odd_force * q
                dip = dip if dip is None or m == 0 else dip * q
            if m + 1 < powers:
                force, rise = force * q, None if rise is None else rise * q

    def _add_kernels(
        self, total: Tensor, modes: Tensor, x: Tensor, pushed: Tensor, of_x: Tensor
    ) -> None:
        """Add the gradient of the kernels, in the form in which they are kept."""
        if not total.is_complex():
            total.addmm_(modes.flatten(0, 1), x.T).addmm_(pushed.flatten(0, 1), of_x.T)
            return
        product = (modes * x.conj() + pushed * of_x.conj()).sum(-1)
        last = self._frame[-1]
        # the half of the modes that is kept stands for the other half too
        twice = torch.full((last // 2 + 1,), 2.0, dtype=self.state.dtype, device=total.device)
        twice[0] = 1
        if last % 2 == 0:
            twice[-1] = 1
        total.add_(product * twice, alpha=1 / math.prod(self._frame))

    @property
    def _fourier(self) -> bool:
        return self.tensors.kernels.is_complex()

    def _modes(self, fields: Tensor) -> Tensor:
        """Fields of shape (..., D, B), as they are or as Fourier coefficients (..., L, ..., B)."""
        if not self._fourier:
            return fields
        sides = tuple(side - 1 for side in _sides(self._frame))
        modes: Tensor = torch.fft.rfftn(fields.unflatten(-2, self._shape), s=self._frame, dim=sides)
        return modes

    def _fields(self, modes: Tensor) -> Tensor:
        sides = tuple(side - 1 for side in _sides(self._frame))
        fields: Tensor = torch.fft.irfftn(modes, s=self._frame, dim=sides)
        within: tuple[Any, ...] = (..., *map(slice, self._shape), slice(None))
        return fields[within].flatten(-1 - len(self._shape), -2)

    def _correlate(self, x: Tensor) -> Tensor:
        """The products with all translates of all kernels, (K, D, B)."""
        kernels = self.tensors.kernels
        if not self._fourier:
            products: Tensor = kernels @ x
            return products.view(-1, self.coordinates, x.shape[-1])
        return self._fields(x * kernels[..., None])

    def _convolve(self, g: Tensor) -> Tensor:
        """The sum of all translates, each times its number, (D, B)."""
        kernels = self.tensors.kernels
        if not self._fourier:
            return kernels.T @ g.flatten(0, 1)
        return self._fields((g * kernels.conj()[..., None]).sum(0))


def frame(shape: tuple[int, ...], boundary: str) -> tuple[int, ...]:
    """The shape that holds a number for each distance of two sites of a lattice."""
    return shape if boundary == "periodic" else tuple(2 * side for side in shape)


def lattice_group(shape: tuple[int, ...], group: Group | None) -> Group:
    """The point group of a lattice, or another that acts on its sites."""
    group = point_group(shape) if group is None else group
    validation.kind("group", group, isinstance(group, Group), "a Group")
    if group.features != math.prod(shape):
        raise ValueError(
            f"group: got one that acts on {group.features} entries, expected {math.prod(shape)}, "
            f"the sites of {shape}"
        )
    return group


def smooth_kernels(shape: Sequence[int], count: int) -> Tensor:
    """Noisy bells around the first site, from one site wide to the whole lattice, (count, D)."""
    distance = torch.zeros(tuple(shape))
    for dimension, length in enumerate(shape):
        site = torch.arange(length)
        along = torch.minimum(site, length - site).square()
        distance = distance + along.reshape([-1, *[1] * (len(shape) - 1 - dimension)])
    widths = 0.4 * max(shape) ** torch.linspace(0, 1, count)
    bells = torch.exp(-distance.flatten() / (2 * widths[:, None].square()))
    return nn.functional.normalize(bells * (1 + 0.3 * torch.randn(bells.shape)))


def _polynomial(coefficients: Tensor, q: Tensor) -> Tensor:
    """The value at q of the polynomial with these coefficients along the first dimension."""
    if len(coefficients) == 0:
        return torch.zeros_like(q)
    value = coefficients[-1].expand_as(q)
    for coefficient in coefficients[:-1].flip(0):
        value = torch.addcmul(coefficient, value, q)
    return value


def _weighed(coefficients: Tensor, slope: int, start: int) -> Tensor:
    """The coefficients, each times (slope * m + start)."""
    powers = torch.arange(len(coefficients), dtype=coefficients.dtype, device=coefficients.device)
    return coefficients * (slope * powers + start)[:, None, None, None]


def _derivative(coefficients: Tensor) -> Tensor:
    """The coefficients of the derivative of a polynomial."""
    return _weighed(coefficients, 1, 0)[1:]


def _mixing(powers: int, even: bool) -> np.ndarray:
    """Coefficients of polynomials in p whose values are orthonormal for p = tanh h, h normal.

    Powers of p² times p, and of p² where there are odd functions, of which the mixture of each
    function is a column.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    exponents = 2 * np.arange(powers)
    blocks = []
    for first in (1,) if even else (1, 0):
        slopes = np.tanh(nodes)[:, None] ** (exponents + first)
        gram = slopes.T @ (weights[:, None] / weights.sum() * slopes)
        blocks.append(np.linalg.inv(np.linalg.cholesky(gram)).T)
    mixing = np.zeros((len(blocks) * powers,) * 2)
    for i, block in enumerate(blocks):
        mixing[i * powers : (i + 1) * powers, i * powers : (i + 1) * powers] = block
    return mixing


def _places(shape: tuple[int, ...], frame: tuple[int, ...]) -> Tensor:
    """Which entry of a kernel at site i meets site j, shape (D, D)."""
    sites = np.indices(shape).reshape(len(shape), -1)
    distances = sites[:, None, :] - sites[:, :, None]
    wrapped = distances % np.array(frame)[:, None, None]
    return torch.from_numpy(np.ravel_multi_index(tuple(wrapped), frame))


def _overlaps(kernels: Tensor, shape: tuple[int, ...], frame: tuple[int, ...]) -> Tensor:
    """How much of each kernel (K, F) lies on the lattice when it stands at a site, (K, D)."""
    sides = _sides(frame)
    modes = torch.fft.rfftn(kernels.unflatten(1, frame), dim=sides).conj()
    lattice = torch.fft.rfftn(kernels.new_ones(shape), s=frame, dim=sides)
    within: tuple[Any, ...] = (..., *map(slice, shape))
    overlaps: Tensor = torch.fft.irfftn(lattice * modes, s=frame, dim=sides)[within]
    return overlaps.flatten(1)


def _sides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(-len(shape), 0))
