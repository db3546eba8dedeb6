"""Grouped potentials: two hidden layers at the matrix products of one, for many features."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nflows_mongeampere import validation
from nflows_mongeampere.dynamics import Dynamics, FieldDynamics, Time, as_rows, start
from nflows_mongeampere.potentials.activations import ACTIVATIONS, Activation
from nflows_mongeampere.potentials.base import ClosedFormPotential
from nflows_mongeampere.potentials.layers import at, basis, number_of_modes
from nflows_mongeampere.potentials.ridges import reduces, start_from
from nflows_mongeampere.potentials.units import (
    Evaluation,
    Gradients,
    Units,
    evaluate,
    gram_forms,
    pull_back,
)


class GroupedPotential(ClosedFormPotential):
    r"""Two hidden layers, the second of which reads disjoint groups of the first.

    .. math:: u(x, t; c) = \sum_{j=1}^{H} a_j(t)\, \sigma(h_j)
                           + \sum_m c_m(t)\, \sigma(z_m)
                           + \tfrac12 \sum_{i=1}^{r} q_i(t)\, h_{H+i}^2,

    .. math:: h = Wx + vt + Vc + b, \qquad
              z_m = \sum_{j \sim m} K_{mj}\, \sigma'(h_j) + d_m,

    where :math:`j \sim m` are the g ridges of the group of m. There are :math:`N = H / g` groups,
    each of which M units of the second layer read. The first H rows of W are ridges, the
    last r parabolas: a quadratic form of rank r, whose minimum the context moves.

    The Laplacian needs no more than the Gram matrix of each group, and trajectories stay in the row
    space of W. So depth costs what a :class:`~nflows_mongeampere.RidgePotential` of H + r ridges
    costs, and O(H g) beside it for each of the M units, however many features there are.

    All amplitudes start at zero: a new flow is the identity map.

    Args:
        features: D, the number of entries of one event, whatever its shape.
        hidden_features: H, the number of ridges.
        group_size: g, the number of ridges in a group, which divides H.
        group_units: M, the number of units that read a group; as many as its ridges where it is
            None.
        rank: r, the number of parabolas; min(10, D) where it is None.
        context_features: width of the context :math:`c`, or None for none.
        time_dependent: whether the first layer moves in time (:math:`v \ne 0`), and the amplitudes
            :math:`a(t) = \sum_k a_k \cos \pi k t` with k up to ``modes - 1``.
        modes: numbers of functions of time for each amplitude of a time-dependent potential.
        activation: ``"logcosh"``, so that units are hyperbolic tangents, or ``"softplus"``,
            sigmoids.

    Attributes:
        weight: W, shape (H + r, D).
        bias: b, shape (H + r,).
        hidden_weight: K, shape (N, M, g).
        hidden_bias: d, shape (N M,).
        amplitude: a, q and c, one below the other, shape (H + r + N M, modes).
        time_weight: v, shape (H + r,), or None.
        context_weight: V, shape (H + r, C), or None.

    Raises:
        TypeError, ValueError: for arguments that do not fit.

    Example:
        >>> import torch
        >>> potential = GroupedPotential(100, 32)
        >>> x = torch.randn(5, 100)
        >>> potential(x).shape, potential.gradient(x).shape, potential.laplacian(x).shape
        (torch.Size([5]), torch.Size([5, 100]), torch.Size([5]))
    """

    features: int

    def __init__(
        self,
        features: int,
        hidden_features: int,
        group_size: int = 8,
        *,
        group_units: int | None = None,
        rank: int | None = None,
        context_features: int | None = None,
        time_dependent: bool = False,
        modes: int = 1,
        activation: str = "logcosh",
    ) -> None:
        super().__init__()
        self.features = validation.integer("features", features)
        self.hidden_features = hidden = validation.integer("hidden_features", hidden_features)
        self.group_size = size = validation.divisor(
            "group_size", group_size, "hidden_features", hidden
        )
        if group_units is None:
            group_units = size
        self.group_units = units = validation.integer("group_units", group_units)
        if rank is None:
            rank = min(10, self.features)
        self.rank = validation.integer("rank", rank, minimum=0)
        self.context_features = validation.optional_integer("context_features", context_features)
        self.time_dependent = bool(time_dependent)
        self.modes = number_of_modes(modes, self.time_dependent)
        self.activation = validation.choice("activation", activation, ACTIVATIONS)
        rows = hidden + self.rank
        self.weight = nn.Parameter(torch.empty(rows, self.features))
        self.bias = nn.Parameter(torch.empty(rows))
        self.hidden_weight = nn.Parameter(torch.empty(hidden // size, units, size))
        self.hidden_bias = nn.Parameter(torch.empty(hidden // size * units))
        self.amplitude = nn.Parameter(torch.empty(rows + len(self.hidden_bias), self.modes))
        self.time_weight = nn.Parameter(torch.empty(rows)) if self.time_dependent else None
        self.context_weight = (
            None if context_features is None else nn.Parameter(torch.empty(rows, context_features))
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the units anew, for standardised data; amplitudes of zero."""
        nn.init.zeros_(self.amplitude)
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.features))
        nn.init.normal_(self.hidden_weight, std=1 / math.sqrt(self.group_size))
        for offset in (self.bias, self.hidden_bias, self.time_weight):
            if offset is not None:
                nn.init.normal_(offset)
        if self.context_weight is not None:
            nn.init.normal_(self.context_weight, std=1 / math.sqrt(self.context_weight.shape[1]))

    def initialize(self, data: Tensor, *, sharpness: float = 1.0) -> None:
        r"""Draw the ridges anew to suit data; parabolas, second layer and amplitudes stay.

        Rows and bends as in :meth:`RidgePotential.initialize
        <nflows_mongeampere.RidgePotential.initialize>`.

        Args:
            data: rows as the potential will meet them, behind the layers in front, shape (N, ...).
            sharpness: how much sharper than the data ridges start.

        Raises:
            TypeError, ValueError: for arguments that do not fit.
        """
        hidden = self.hidden_features
        start_from(data, self.weight.detach()[:hidden], self.bias.detach()[:hidden], sharpness)

    def dynamics(
        self, inputs: Tensor, context: Tensor | None, evaluations: int, costs: bool = False
    ) -> Dynamics:
        if costs:
            return FieldDynamics(self._gradient_and_laplacian, inputs, context, self, costs)
        return GroupedDynamics(self, inputs, context, reduces(self.weight, inputs, evaluations))

    def offset(self, context: Tensor | None) -> Tensor:
        """Vc + b, with a column for each row of context: shape (H + r, B) or (H + r, 1)."""
        if self.context_weight is None or context is None:
            return self.bias[:, None]
        return torch.addmm(self.bias[:, None], self.context_weight, context.T)

    def _value(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        sigma, t, hidden = ACTIVATIONS[self.activation], 0.0 if t is None else t, self.hidden_weight
        h = torch.addmm(self.offset(context), self.weight, x.flatten(1).T)
        if self.time_weight is not None:
            h = h + self.time_weight[:, None] * t
        h, parabolas = h.split([self.hidden_features, self.rank])
        units = hidden @ sigma.first(h).unflatten(0, (len(hidden), -1))
        z = units.flatten(0, 1) + self.hidden_bias[:, None]
        values = torch.cat([sigma.value(h), parabolas.square() / 2, sigma.value(z)])
        return (at(t, self.amplitude) * values).sum(0)


class GroupedTensors(NamedTuple):
    r"""What the equations of motion are made of.

    Attributes:
        rows: W, shape (H + r, D); in reduced coordinates :math:`G = WW^T`, (H + r, H + r).
        offset: :math:`Vc + b`, and :math:`Wx(0)` in reduced coordinates, (H + r, B) or (H + r, 1).
        speed: v, shape (H + r, 1), or None.
        lengths: :math:`\|w_j\|^2`, shape (H + r, 1).
        amplitude: a, q and c, shape (H + r + N M, modes).
        hidden_offset: d, shape (N, M, 1).
        weight: K, shape (N, M, g).
        forms: :math:`K_{mj} K_{mk} G_{jk}`, shape (1, N, M g, g).
    """

    rows: Tensor
    offset: Tensor
    speed: Tensor | None
    lengths: Tensor
    amplitude: Tensor
    hidden_offset: Tensor
    weight: Tensor
    forms: Tensor


class GroupedDynamics(Dynamics):
    r"""The equations of motion of a grouped potential, in x or in reduced coordinates.

    With :math:`e_j = \partial u / \partial h_j` of
    :mod:`~nflows_mongeampere.potentials.units`, and :math:`e_{H+i} = q_i h_{H+i}` of
    parabolas,

    .. math:: \dot x = W^T e, \quad h = Wx + vt + o \qquad \text{or} \qquad
              \dot s = e, \quad h = h_0 + Gs + vt,

    as in :class:`~nflows_mongeampere.potentials.ridges.ReducedDynamics`. The state is
    :math:`[x; \ell]` or :math:`[s; \ell]`. The adjoint of h goes back into the state by the
    transposed product.
    """

    by_hand = True
    tensors: GroupedTensors

    def __init__(
        self, potential: GroupedPotential, inputs: Tensor, context: Tensor | None, reduced: bool
    ) -> None:
        weight, hidden = potential.weight, potential.hidden_weight
        self._activation: Activation = ACTIVATIONS[potential.activation]
        self._inputs, self._weight, self._reduced = inputs, weight, reduced
        self._hidden = potential.hidden_features
        speed, offset = potential.time_weight, potential.offset(context)
        rows: Tensor = weight
        if reduced:
            offset = torch.addmm(offset, weight, inputs.flatten(1).T)
            rows = weight @ weight.T
        self.coordinates = rows.shape[1]
        self.state = (
            torch.zeros_like(offset[:1]).repeat(len(rows) + 1, 1) if reduced else start(inputs, 1)
        )
        groups = weight[: self._hidden].unflatten(0, (len(hidden), -1))
        gram = groups @ groups.mT
        self.tensors = GroupedTensors(
            rows,
            offset,
            None if speed is None else speed[:, None],
            weight.square().sum(1, keepdim=True),
            potential.amplitude,
            potential.hidden_bias.view(*hidden.shape[:2], 1),
            hidden,
            gram_forms(hidden, gram)[None],
        )

    def rate(self, t: Time, state: Tensor) -> Tensor:
        return self._evaluate(t, state)[0]

    def stage(self, t: Time, state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self._evaluate(t, state, in_place=True)

    def _evaluate(
        self, t: Time, state: Tensor, in_place: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        rows, offset, speed, lengths, amplitude, *_ = self.tensors
        y, hidden = state[: self.coordinates], self._hidden
        h = torch.addmm(offset if speed is None else offset + speed * t, rows, y)
        parabolas, amplitudes = h[hidden:], at(t, amplitude)
        push, laplacian, kept = evaluate(
            self._units(amplitudes), self._grouped(h[:hidden]), self._activation, in_place=in_place
        )
        stiffness = amplitudes[hidden : len(rows)]
        pushes = torch.cat([push.flatten(0, 1), stiffness * parabolas])
        laplacian = laplacian + (stiffness * lengths[hidden:]).sum(0)
        velocity = pushes if self._reduced else rows.T @ pushes
        return torch.cat([velocity, laplacian[None]]), (y, parabolas, pushes, *kept)

    def pullback(
        self,
        t: Time,
        kept: tuple[Tensor, ...],
        adjoint: Tensor,
        gradients: list[Tensor | None],
    ) -> Tensor:
        rows, _, _, lengths, amplitude, *_ = self.tensors
        y, parabolas, pushes, *evaluation = kept
        of_y, hidden, number = adjoint[: self.coordinates], self._hidden, len(rows)
        whole = len(adjoint) > self.coordinates
        of_l = adjoint[-1] if whole else torch.zeros_like(adjoint[-1])
        d_rows, d_offset, d_speed, d_lengths, d_amplitude, *d_second = gradients
        amplitudes = at(t, amplitude)
        of_amplitudes = None if d_amplitude is None else torch.zeros_like(amplitudes)
        of_push = of_y if self._reduced else rows @ of_y

        def part(of: Tensor | None, rows: slice) -> Tensor | None:
            return None if of is None else self._grouped(of[rows])

        first, parabolic, second = slice(hidden), slice(hidden, number), slice(number, None)
        of_h = pull_back(
            self._units(amplitudes),
            Evaluation(*evaluation),
            self._activation,
            self._grouped(of_push[first]),
            of_l,
            Gradients(
                part(of_amplitudes, first),
                part(d_lengths, first),
                part(of_amplitudes, second),
                *d_second,
            ),
        ).flatten(0, 1)
        stiffness, of_parabolas, total = amplitudes[parabolic], of_push[parabolic], of_l.sum()
        of_h = torch.cat([of_h, stiffness * of_parabolas])
        if of_amplitudes is not None and d_amplitude is not None:
            of_stiffness = (parabolas * of_parabolas).sum(1, keepdim=True)
            of_amplitudes[parabolic] = of_stiffness.add_(lengths[parabolic] * total)
            one = amplitude.shape[1] == 1
            d_amplitude.add_(of_amplitudes if one else of_amplitudes @ basis(t, amplitude).T)
        if d_lengths is not None:
            d_lengths[parabolic] += stiffness * total
        if d_rows is not None:
            d_rows.addmm_(of_h, y.T)
            if not self._reduced:
                d_rows.addmm_(pushes, of_y.T)
        if d_offset is not None:
            d_offset.add_(of_h if d_offset.shape[1] > 1 else of_h.sum(1, keepdim=True))
        if d_speed is not None:
            d_speed.add_(of_h.sum(1, keepdim=True) * t)
        return rows.T @ of_h

    def points(self, state: Tensor) -> Tensor:
        shape, moved = self._inputs.shape[1:], state[: self.coordinates]
        if not self._reduced:
            return as_rows(moved, shape)
        return self._inputs + as_rows(self._weight.T @ moved, shape)

    def _units(self, amplitudes: Tensor) -> Units:
        hidden, number = self._hidden, len(self.tensors.rows)
        return Units(
            self._grouped(amplitudes[:hidden]),
            self._grouped(self.tensors.lengths[:hidden]),
            self._grouped(amplitudes[number:]),
            self.tensors.hidden_offset,
            self.tensors.weight,
            self.tensors.forms,
        )

    def _grouped(self, units: Tensor) -> Tensor:
        """Units of the first layer or the second, (H, ...), in groups: (N, H / N, ...)."""
        grouped: Tensor = units.unflatten(0, (len(self.tensors.weight), -1))
        return grouped
