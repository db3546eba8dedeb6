"""Deep convolutional potentials: a second layer at each pixel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_mongeampere import validation
from nflows_mongeampere.dynamics import Dynamics, FieldDynamics, Time, as_rows, start
from nflows_mongeampere.potentials.activations import ACTIVATIONS
from nflows_mongeampere.potentials.convolutional import (
    ConvolutionalPotential,
    ConvolutionalTensors,
    _Lines,
)
from nflows_mongeampere.potentials.units import (
    Evaluation,
    Gradients,
    Units,
    evaluate,
    gram_forms,
    pull_back,
)


class DeepConvolutionalPotential(ConvolutionalPotential):
    r"""A convolutional potential with a second layer of units at each pixel.

    .. math:: u(x) = \sum_{k,i} a_{ki}\, \sigma(h_{ki}) + \sum_{m,i} c_{mi}\, \sigma(z_{mi}),
              \qquad h_{ki} = (w_k \star x)_i + b_{ki}, \qquad
              z_{mi} = \sum_{j \sim m} K_{mj}\, \sigma'(h_{ji}) + d_{mi},

    where :math:`j \sim m` are the g kernels of the group of m, at the same pixel. There are
    :math:`N = K / g` groups, each of which M units of the second layer read. The Laplacian
    needs the overlaps of the kernels of a group, :math:`w_j \cdot w_k`, of those parts that lie
    inside the image (:mod:`~nflows_mongeampere.potentials.units`).

    Both amplitudes start at zero: a new flow is the identity map.

    Args:
        shape: (C, H, W) of one image; events may have this shape or be flattened.
        kernels: K, the number of kernels.
        group_size: g, the number of kernels in a group, which divides K.
        group_units: M, the number of units that read a group at each pixel.
        kernel_size: their side in pixels, odd.
        activation: ``"logcosh"``, so that units are hyperbolic tangents, or ``"softplus"``,
            sigmoids.

    Attributes:
        weight: w, shape (K, C, kernel_size, kernel_size).
        bias: b, shape (K, H, W).
        amplitude: a, shape (K, H, W).
        hidden_weight: K, shape (N, M, g).
        hidden_bias: d, shape (N M, H, W).
        hidden_amplitude: c, shape (N M, H, W).

    Raises:
        TypeError, ValueError: for arguments that do not fit.

    Example:
        >>> import torch
        >>> potential = DeepConvolutionalPotential((1, 8, 8), kernels=8, kernel_size=3)
        >>> x = torch.randn(5, 1, 8, 8)
        >>> potential(x).shape, potential.gradient(x).shape, potential.laplacian(x).shape
        (torch.Size([5]), torch.Size([5, 1, 8, 8]), torch.Size([5]))
    """

    def __init__(
        self,
        shape: Sequence[int],
        kernels: int,
        group_size: int = 4,
        *,
        group_units: int = 1,
        kernel_size: int = 5,
        activation: str = "logcosh",
    ) -> None:
        super().__init__(shape, kernels, kernel_size=kernel_size, activation=activation)
        self.group_size = size = validation.divisor("group_size", group_size, "kernels", kernels)
        self.group_units = units = validation.integer("group_units", group_units)
        groups = self.kernels // size
        self.hidden_weight = nn.Parameter(torch.empty(groups, units, size))
        self.hidden_bias = nn.Parameter(torch.empty(groups * units, *self.shape[1:]))
        self.hidden_amplitude = nn.Parameter(torch.empty_like(self.hidden_bias))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both layers anew, for standardised data; amplitudes of zero."""
        super().reset_parameters()
        nn.init.normal_(self.hidden_weight, std=1 / math.sqrt(self.group_size))
        self.hidden_bias.copy_(
            torch.randn_like(self.hidden_bias[:, :1, :1]).expand_as(self.hidden_bias)
        )
        nn.init.zeros_(self.hidden_amplitude)

    def dynamics(
        self, inputs: Tensor, context: Tensor | None, evaluations: int, costs: bool = False
    ) -> Dynamics:
        if costs:
            return FieldDynamics(self._gradient_and_laplacian, inputs, None, self, costs)
        return DeepConvolutionalDynamics(self, inputs)

    def _value(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        images, sigma = x.reshape(-1, *self.shape), ACTIVATIONS[self.activation]
        h = F.conv2d(images, self.weight, padding=self.kernel_size // 2) + self.bias
        kernels = torch.block_diag(*self.hidden_weight)[:, :, None, None]
        z = F.conv2d(sigma.first(h), kernels) + self.hidden_bias
        amplitudes = torch.cat([self.amplitude, self.hidden_amplitude])
        return (amplitudes * sigma.value(torch.cat([h, z], 1))).flatten(1).sum(1)


class DeepConvolutionalTensors(NamedTuple):
    """What the equations of motion are made of.

    Attributes:
        weight: the kernels w, shape (K, C, k, k).
        bias: b, shape (N, g, H, W).
        amplitude: a, shape (N, g, H, W).
        lengths: squared lengths of the kernels inside the image, shape (N, g, H, W).
        hidden_amplitude: c, shape (N, M, H, W).
        hidden_offset: d, shape (N, M, H, W).
        hidden_weight: K, shape (N, M, g).
        forms: :math:`K_{mj} K_{mk} G_{jk}`, with the overlaps of kernels, shape
            (runs of lines, runs of columns, N, M g, g).
    """

    weight: Tensor
    bias: Tensor
    amplitude: Tensor
    lengths: Tensor
    hidden_amplitude: Tensor
    hidden_offset: Tensor
    hidden_weight: Tensor
    forms: Tensor


class DeepConvolutionalDynamics(Dynamics):
    r"""The equations of motion of two layers at every pixel: the state is :math:`[x; \ell]`.

    Between the correlation with the kernels and the transposed one stand, at each pixel, the
    equations of :mod:`~nflows_mongeampere.potentials.units`. By hand one line of the images is
    worked on after another, as in
    :class:`~nflows_mongeampere.potentials.convolutional.ConvolutionalDynamics`.
    """

    by_hand = True
    tensors: DeepConvolutionalTensors

    def __init__(self, potential: DeepConvolutionalPotential, inputs: Tensor) -> None:
        self._shape, self._side = potential.shape, potential.kernel_size
        self._activation, self._event_shape = ACTIVATIONS[potential.activation], inputs.shape[1:]
        self.coordinates = potential.features
        self.state = start(inputs, 1)
        weight, hidden = potential.weight, potential.hidden_weight
        self._groups = groups = (len(hidden), -1)
        kernels = weight.unflatten(0, groups)
        products = (kernels[:, :, None] * kernels[:, None]).flatten(0, 2)
        inside = F.conv2d(weight.new_ones(1, *self._shape), products, padding=self._side // 2)
        overlap = inside[0].unflatten(0, (*kernels.shape[:2], -1))
        self._lines_alike, self._columns = (runs(n, self._side // 2) for n in self._shape[1:])
        firsts = [[run.start for run in alike] for alike in (self._lines_alike, self._columns)]
        gram = overlap[..., firsts[0], :][..., firsts[1]].permute(3, 4, 0, 1, 2).contiguous()
        self.tensors = DeepConvolutionalTensors(
            weight,
            potential.bias.unflatten(0, groups),
            potential.amplitude.unflatten(0, groups),
            overlap.diagonal(0, 1, 2).movedim(-1, 1),
            potential.hidden_amplitude.unflatten(0, groups),
            potential.hidden_bias.unflatten(0, groups),
            hidden,
            gram_forms(hidden, gram),
        )

    def rate(self, t: Time, state: Tensor) -> Tensor:
        weight, bias = self.tensors[:2]
        images, margin = state[: self.coordinates].T.unflatten(1, self._shape), self._side // 2
        h = F.conv2d(images, weight, padding=margin).unflatten(1, self._groups) + bias
        h, pushes, laplacian = h.movedim(0, -1), [], torch.zeros_like(state[-1])
        for number in range(self._shape[1]):
            push, thinning, _ = self._evaluate(number, h[:, :, number])
            pushes.append(push)
            laplacian = laplacian + thinning
        pushed = torch.stack(pushes, 2).movedim(-1, 0).flatten(1, 2)
        velocity = F.conv_transpose2d(pushed, weight, padding=margin)
        return torch.cat([velocity.flatten(1).T, laplacian[None]])

    def stage(self, t: Time, state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        lines, x = self._lines, state[: self.coordinates]
        lines.look_at(x, 0)
        laplacian = torch.zeros_like(x[0])
        for number, line in enumerate(lines):
            h = self._at_pixels(lines.rows @ line.seen[0]).add_(self._bias(number))
            push, thinning, _ = self._evaluate(number, h, in_place=True)
            laplacian += thinning
            line.pushed.addmm_(lines.transposed, self._flat(push))
        return torch.cat([lines.gather(), laplacian[None]]), (x,)

    def pullback(
        self,
        t: Time,
        kept: tuple[Tensor, ...],
        adjoint: Tensor,
        gradients: list[Tensor | None],
    ) -> Tensor:
        lines, (x,) = self._lines, kept
        of_l = adjoint[-1] if len(adjoint) > self.coordinates else torch.zeros_like(x[0])
        lines.look_at(x, 0)
        lines.look_at(adjoint[: self.coordinates], 1)
        d_weight, d_bias, *d_units = gradients
        d_rows = torch.zeros_like(lines.transposed)
        for number, line in enumerate(lines):
            h, of_push = self._at_pixels(lines.rows @ line.seen[1]).chunk(2, 2)
            h = h + self._bias(number)
            push, _, evaluation = self._evaluate(number, h, in_place=True)
            of_units = Gradients(*self._line(number, d_units))
            of_h = pull_back(
                self._units(number),
                evaluation,
                self._activation,
                of_push,
                of_l,
                of_units,
                self._columns,
            )
            line.pushed.addmm_(lines.transposed, self._flat(of_h))
            if d_bias is not None:
                d_bias[:, :, number] += of_h.sum(-1)
            if d_weight is not None:
                d_rows.addmm_(line.seen[1], torch.cat([self._flat(of_h), self._flat(push)], 1).T)
        if d_weight is not None:
            d_weight += d_rows.T.unflatten(1, (self._side, -1, self._side)).transpose(1, 2)
        return lines.gather()

    def points(self, state: Tensor) -> Tensor:
        return as_rows(state[: self.coordinates], self._event_shape)

    @cached_property
    def _lines(self) -> _Lines:
        weight, *others = self.tensors[:4]
        tensors = ConvolutionalTensors(weight, *(other.flatten(0, 1) for other in others))
        return _Lines(tensors, self._shape, self._side, self.state.shape[1])

    def _bias(self, number: int) -> Tensor:
        return self.tensors.bias[:, :, number, :, None]

    def _evaluate(
        self, number: int, h: Tensor, in_place: bool = False
    ) -> tuple[Tensor, Tensor, Evaluation]:
        """The two layers at the pixels of a line."""
        return evaluate(self._units(number), h, self._activation, self._columns, in_place)

    def _units(self, number: int) -> Units:
        line: Any = self._line(number, self.tensors[2:])
        return Units(*line)

    def _line(self, number: int, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Of tensors in the order of :class:`Units` those of one line."""
        *places, weight, forms = tensors
        (run,) = (i for i, r in enumerate(self._lines_alike) if r.start <= number < r.stop)
        return [
            *(None if p is None else p[:, :, number, :, None] for p in places),
            weight,
            None if forms is None else forms[run],
        ]

    def _at_pixels(self, flat: Tensor) -> Tensor:
        """Numbers of each kernel, (K, W·B), or twice as many, as (N, g, W, B)."""
        grouped: Tensor = flat.unflatten(1, (-1, self.state.shape[1])).unflatten(0, self._groups)
        return grouped

    def _flat(self, units: Tensor) -> Tensor:
        return units.flatten(2).flatten(0, 1)


def runs(length: int, margin: int) -> list[slice]:
    """Runs of pixels in a row whose kernels are cut off by the borders alike."""
    cuts = [(max(0, margin - i), max(0, i + margin - length + 1)) for i in range(length)]
    ends = [i for i in range(1, length) if cuts[i] != cuts[i - 1]]
    return [slice(*pair) for pair in itertools.pairwise([0, *ends, length])]
