"""Deep convolutional potentials: a second layer at each pixel."""

from __future__ import annotations

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
from nflows_mongeampere.potentials.units import Gradients, Units, evaluate, pull_back


class DeepConvolutionalPotential(ConvolutionalPotential):
    r"""A convolutional potential with a second layer of units at each pixel.

    .. math:: u(x) = \sum_{k,i} \big( a_{ki}\, \sigma(h_{ki}) + c_{ki}\, \sigma(z_{ki}) \big),
              \qquad h_{ki} = (w_k \star x)_i + b_{ki}, \qquad
              z_{ki} = \sum_{j \sim k} K_{kj}\, \sigma'(h_{ji}) + d_{ki},

    where :math:`j \sim k` are the g kernels of the group of k, at the same pixel. The Laplacian
    needs the overlaps of the kernels of a group, :math:`w_j \cdot w_k`, of those parts that lie
    inside the image (:mod:`~nflows_mongeampere.potentials.units`).

    Both amplitudes start at zero: a new flow is the identity map.

    Args:
        shape: (C, H, W) of one image; events may have this shape or be flattened.
        kernels: K, the number of kernels, and of units in the second layer of a pixel.
        group_size: g, the number of kernels in a group, which divides K.
        kernel_size: their side in pixels, odd.
        activation: ``"logcosh"``, so that units are hyperbolic tangents, or ``"softplus"``,
            sigmoids.

    Attributes:
        weight: w, shape (K, C, kernel_size, kernel_size).
        bias: b, shape (K, H, W).
        amplitude: a, shape (K, H, W).
        hidden_weight: K, shape (K / g, g, g).
        hidden_bias: d, shape (K, H, W).
        hidden_amplitude: c, shape (K, H, W).

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
        kernel_size: int = 5,
        activation: str = "logcosh",
    ) -> None:
        super().__init__(shape, kernels, kernel_size=kernel_size, activation=activation)
        self.group_size = size = validation.divisor("group_size", group_size, "kernels", kernels)
        self.hidden_weight = nn.Parameter(torch.empty(self.kernels // size, size, size))
        self.hidden_bias = nn.Parameter(torch.empty_like(self.bias))
        self.hidden_amplitude = nn.Parameter(torch.empty_like(self.amplitude))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both layers anew, for standardised data; amplitudes of zero."""
        super().reset_parameters()
        if hasattr(self, "hidden_weight"):  # not yet, where the constructor above draws the first
            nn.init.normal_(self.hidden_weight, std=1 / math.sqrt(self.group_size))
            self.hidden_bias.copy_(torch.randn_like(self.bias[:, :1, :1]).expand_as(self.bias))
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
        values = self.amplitude * sigma.value(h) + self.hidden_amplitude * sigma.value(z)
        return values.flatten(1).sum(1)


class DeepConvolutionalTensors(NamedTuple):
    """What the equations of motion are made of.

    Attributes:
        weight: the kernels w, shape (K, C, k, k).
        bias: b, shape (N, g, H, W).
        amplitude: a, shape (N, g, H, W).
        lengths: squared lengths of the kernels inside the image, shape (N, g, H, W).
        hidden_amplitude: c, shape (N, g, H, W).
        hidden_offset: d, shape (N, g, H, W).
        hidden_weight: K, shape (N, g, g).
        forms: products of two numbers of a row of K, shape (N, g, g g).
        overlap: products of kernels of a group, inside the image, shape (N, g, g, H, W).
    """

    weight: Tensor
    bias: Tensor
    amplitude: Tensor
    lengths: Tensor
    hidden_amplitude: Tensor
    hidden_offset: Tensor
    hidden_weight: Tensor
    forms: Tensor
    overlap: Tensor


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
        self._groups = groups = hidden.shape[:2]
        kernels = weight.unflatten(0, groups)
        products = (kernels[:, :, None] * kernels[:, None]).flatten(0, 2)
        inside = F.conv2d(weight.new_ones(1, *self._shape), products, padding=self._side // 2)
        overlap = inside[0].unflatten(0, (*groups, -1))
        self.tensors = DeepConvolutionalTensors(
            weight,
            potential.bias.unflatten(0, groups),
            potential.amplitude.unflatten(0, groups),
            overlap.diagonal(0, 1, 2).movedim(-1, 1),
            potential.hidden_amplitude.unflatten(0, groups),
            potential.hidden_bias.unflatten(0, groups),
            hidden,
            (hidden[:, :, :, None] * hidden[:, :, None]).flatten(2),
            overlap,
        )

    def rate(self, t: Time, state: Tensor) -> Tensor:
        weight, bias = self.tensors[:2]
        images, margin = state[: self.coordinates].T.unflatten(1, self._shape), self._side // 2
        h = F.conv2d(images, weight, padding=margin).unflatten(1, self._groups) + bias
        units = self._units(slice(None))
        push, laplacian, _ = evaluate(units, h.movedim(0, -1), self._activation)
        pushed = push.movedim(-1, 0).flatten(1, 2)
        velocity = F.conv_transpose2d(pushed, weight, padding=margin)
        return torch.cat([velocity.flatten(1).T, laplacian[None]])

    def stage(self, t: Time, state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        lines, x = self._lines, state[: self.coordinates]
        lines.look_at(x, 0)
        laplacian = torch.zeros_like(x[0])
        for number, line in enumerate(lines):
            h = self._at_pixels(lines.rows @ line.seen[0]).add_(self._bias(number))
            push, thinning, _ = evaluate(self._units(number), h, self._activation, in_place=True)
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
            units = self._units(number)
            push, _, evaluation = evaluate(units, h, self._activation, in_place=True)
            of_units = Gradients(*_line(d_units, number))
            of_h = pull_back(units, evaluation, self._activation, of_push, of_l, of_units)
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

    def _units(self, lines: int | slice) -> Units:
        whole: Any = _line(self.tensors[2:], lines)
        return Units(*whole)

    def _at_pixels(self, flat: Tensor) -> Tensor:
        """Numbers of each kernel, (K, W·B), or twice as many, as (N, g, W, B)."""
        grouped: Tensor = flat.unflatten(1, (-1, self.state.shape[1])).unflatten(0, self._groups)
        return grouped

    def _flat(self, units: Tensor) -> Tensor:
        return units.flatten(2).flatten(0, 1)


def _line(tensors: Sequence[Tensor | None], lines: int | slice) -> list[Tensor | None]:
    """Of tensors in the order of :class:`Units` the numbers of one line, or of several."""
    *places, weight, forms, overlap = tensors
    return [
        *(None if p is None else p[:, :, lines, :, None] for p in places),
        weight,
        forms,
        None if overlap is None else overlap[:, :, :, lines, :, None],
    ]
