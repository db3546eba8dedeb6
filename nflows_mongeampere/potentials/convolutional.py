"""Convolutional potentials: the ridges of an image, the same at every place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_mongeampere import validation
from nflows_mongeampere.differentiation import compiling, transformed
from nflows_mongeampere.dynamics import Dynamics, Field, FieldDynamics, Time, as_rows, start
from nflows_mongeampere.potentials.activations import ACTIVATIONS
from nflows_mongeampere.potentials.base import ClosedFormPotential


class ConvolutionalPotential(ClosedFormPotential):
    r"""A ridge potential whose ridges are one set of kernels, at every pixel of an image.

    .. math:: u(x) = \sum_{k=1}^{K} \sum_{i} a_{ki}\, \sigma(h_{ki}), \qquad
              h_{ki} = (w_k \star x)_i + b_{ki},

    where :math:`\star` is the cross-correlation, with zeros beyond the border, and :math:`i` runs
    over the pixels. The gradient is the transposed convolution of :math:`a \odot \sigma'(h)` and
    the Laplacian :math:`\sum_{ki} a_{ki} r_{ki} \sigma''(h_{ki})`, with :math:`r_{ki}` the squared
    length of that part of the kernel :math:`w_k` at pixel :math:`i` that lies inside the image.
    It is a :class:`~nflows_mongeampere.RidgePotential` of K·H·W sparse rows, at the cost of its
    few distinct numbers: neighbouring pixels gate each other, which is how images differ from
    Gaussian noise.

    The amplitude starts at zero: a new flow is the identity map.

    Args:
        shape: (C, H, W) of one image; events may have this shape or be flattened.
        kernels: K, the number of kernels.
        kernel_size: their side in pixels, odd.
        activation: ``"softplus"``, :math:`\ln(1 + e^h)`, or ``"logcosh"``, :math:`\ln \cosh h`.

    Attributes:
        weight: w, shape (K, C, kernel_size, kernel_size).
        bias: b, shape (K, H, W).
        amplitude: a, shape (K, H, W).

    Raises:
        TypeError, ValueError: for arguments that do not fit.

    Example:
        >>> import torch
        >>> potential = ConvolutionalPotential((1, 8, 8), kernels=4, kernel_size=3)
        >>> x = torch.randn(5, 1, 8, 8)
        >>> potential(x).shape, potential.gradient(x).shape, potential.laplacian(x).shape
        (torch.Size([5]), torch.Size([5, 1, 8, 8]), torch.Size([5]))
    """

    features: int

    def __init__(
        self,
        shape: Sequence[int],
        kernels: int,
        *,
        kernel_size: int = 5,
        activation: str = "softplus",
    ) -> None:
        super().__init__()
        self.shape = channels, height, width = validation.shape("shape", shape, 3)
        self.kernels = validation.integer("kernels", kernels)
        self.kernel_size = side = validation.integer("kernel_size", kernel_size)
        if side % 2 == 0:
            raise ValueError(
                f"kernel_size: got {side}, expected an odd number of pixels, so that a kernel has "
                f"a centre; use {side - 1} or {side + 1}"
            )
        self.activation = validation.choice("activation", activation, ACTIVATIONS)
        self.features = channels * height * width
        self.weight = nn.Parameter(torch.empty(self.kernels, channels, side, side))
        self.bias = nn.Parameter(torch.empty(self.kernels, height, width))
        self.amplitude = nn.Parameter(torch.empty(self.kernels, height, width))
        ConvolutionalPotential.reset_parameters(self)  # subclasses draw what they add

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the kernels anew: unit vectors on average, amplitudes of zero."""
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        self.bias.copy_(torch.randn_like(self.bias[:, :1, :1]).expand_as(self.bias))
        nn.init.zeros_(self.amplitude)

    def dynamics(
        self, inputs: Tensor, context: Tensor | None, evaluations: int, costs: bool = False
    ) -> Dynamics:
        if costs:
            field: Field = self._gradient_and_laplacian
            return FieldDynamics(field, inputs, None, self, costs)
        return ConvolutionalDynamics(self, inputs)

    def _value(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        images = x.reshape(-1, *self.shape)
        h = F.conv2d(images, self.weight, padding=self.kernel_size // 2) + self.bias
        return (self.amplitude * ACTIVATIONS[self.activation].value(h)).flatten(1).sum(1)


class ConvolutionalTensors(NamedTuple):
    """What the equations of motion are made of.

    Attributes:
        weight: the kernels w, shape (K, C, k, k).
        amplitude: shape (K, H, W).
        curvature: amplitude times squared length of the kernels inside the image, (K, H, W).
        bias: shape (K, H, W).
    """

    weight: Tensor
    amplitude: Tensor
    curvature: Tensor
    bias: Tensor


class ConvolutionalDynamics(Dynamics):
    r"""The equations of motion of kernels at every pixel: the state is :math:`[x; \ell]`.

    The equations are those of :class:`~nflows_mongeampere.potentials.ridges.RidgeDynamics`. A
    correlation is a product of the kernels with the neighbourhoods of pixels, a transposed one a
    product with their transpose, added up where neighbourhoods overlap. By hand both are made for
    one line of the images after another (:class:`_Lines`), whose numbers stay in the cache.
    """

    by_hand = True
    tensors: ConvolutionalTensors

    def __init__(self, potential: ConvolutionalPotential, inputs: Tensor) -> None:
        self._shape, self._side = potential.shape, potential.kernel_size
        self._activation, self._event_shape = ACTIVATIONS[potential.activation], inputs.shape[1:]
        self.coordinates = potential.features
        self.state = start(inputs, 1)
        weight, amplitude = potential.weight, potential.amplitude
        ones = weight.new_ones(1, *self._shape)
        lengths = F.conv2d(ones, weight.square(), padding=self._side // 2)[0]
        self.tensors = ConvolutionalTensors(weight, amplitude, amplitude * lengths, potential.bias)

    def rate(self, t: Time, state: Tensor) -> Tensor:
        weight, amplitude, curvature, bias = self.tensors
        if compiling() or transformed(state, *self.tensors):
            return self._rate_by_convolutions(state)
        batch, rows = state.shape[1], weight.flatten(1)
        images = state[: self.coordinates].reshape(*self._shape, batch)
        h = (rows @ _Patches.apply(images, self._side)).view(amplitude.numel(), batch)
        p = self._activation.first(h + bias.reshape(-1, 1))
        push = (amplitude.reshape(-1, 1) * p).view(len(rows), -1)
        velocity = _Overlap.apply(rows.T @ push, (*self._shape, batch), self._side)
        laplacian = curvature.reshape(1, -1) @ self._activation.second(p)
        return torch.cat([velocity.view(self.coordinates, batch), laplacian])

    def _rate_by_convolutions(self, state: Tensor) -> Tensor:
        """The same in torch's convolutions, which transforms and compilers know."""
        weight, amplitude, curvature, bias = self.tensors
        images, margin = state[: self.coordinates].T.unflatten(1, self._shape), self._side // 2
        p = self._activation.first(F.conv2d(images, weight, padding=margin) + bias)
        velocity = F.conv_transpose2d(amplitude * p, weight, padding=margin)
        laplacian = (curvature * self._activation.second(p)).flatten(1).sum(1)
        return torch.cat([velocity.flatten(1).T, laplacian[None]])

    def stage(self, t: Time, state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        lines, x, activation = self._lines, state[: self.coordinates], self._activation
        lines.look_at(x, 0)
        laplacian = x.new_zeros(x.shape[1])
        for line in lines:
            torch.mm(lines.rows, line.seen[0], out=lines.h.flat)
            p = activation.first(lines.h.full.add_(line.bias), out=lines.h.full)
            activation.second(p, out=lines.second.full)
            laplacian.addmv_(lines.second.flat.T, line.curvature)
            p.mul_(line.amplitude)
            line.pushed.addmm_(lines.transposed, lines.h.flat)
        return torch.cat([lines.gather(), laplacian[None]]), (x,)

    def pullback(
        self,
        t: Time,
        kept: tuple[Tensor, ...],
        adjoint: Tensor,
        gradients: list[Tensor | None],
    ) -> Tensor:
        lines, (x,), activation = self._lines, kept, self._activation
        of_l = adjoint[self.coordinates :]
        lines.look_at(x, 0)
        lines.look_at(adjoint[: self.coordinates], 1)
        g, second, projected = lines.g.full, lines.second.full, lines.projected
        d_rows, d_amplitude, d_curvature, d_bias = parts = lines.parts(gradients)
        for number, line in enumerate(lines):
            torch.mm(lines.rows, line.seen[1], out=lines.products)
            p = activation.first(lines.h.full.add_(line.bias), out=lines.h.full)
            torch.mul(projected, line.amplitude, out=g)
            bend = torch.mul(line.bend, of_l[0], out=lines.push) if len(of_l) else None
            activation.pull_back(p, g, bend, second)
            line.pushed.addmm_(lines.transposed, lines.g.flat)
            if d_curvature is not None and len(of_l):
                d_curvature[number].addmv_(lines.second.flat, of_l[0])
            if d_amplitude is not None:
                d_amplitude[number] = projected.mul_(p).sum(2)
            if d_bias is not None:
                d_bias[number] = g.sum(2)
            if d_rows is not None:
                torch.mul(p, line.amplitude, out=lines.push)
                d_rows.addmm_(line.seen[1], lines.pushes.T)
        lines.collect(parts, gradients)
        return lines.gather()

    def points(self, state: Tensor) -> Tensor:
        return as_rows(state[: self.coordinates], self._event_shape)

    @cached_property
    def _lines(self) -> _Lines:
        return _Lines(self.tensors, self._shape, self._side, self.state.shape[1])


class _Line(NamedTuple):
    """What one line of all images is made of, as views of larger tensors.

    Attributes:
        seen: what its pixels see of the points, shape (k·C·k, W·B), and of the points and their
            adjoints, (k·C·k, 2·W·B).
        pushed: where its pixels push, shape (k·C·k, W·B).
        amplitude, bias, bend: shape (K, W, 1); the last is the curvature.
        curvature: shape (K·W,).
    """

    seen: tuple[Tensor, Tensor]
    pushed: Tensor
    amplitude: Tensor
    bias: Tensor
    bend: Tensor
    curvature: Tensor


class _Room(NamedTuple):
    """Room for a number of each kernel at each pixel of a line, in two shapes."""

    full: Tensor
    flat: Tensor


class _Lines:
    """Images cut into lines, with room for all that an evaluation makes of a line.

    Neighbourhoods of a batch are kept as (H + k - 1, C·k, 2, W·B): of each line, the pixels of each
    channel shifted by 0 ... k - 1 columns, of the points and of their adjoints. What a line of
    pixels sees is k lines of that, which lie side by side in memory: a matrix of k·C·k rows,
    without a copy.

    Attributes:
        rows: the kernels as rows, shape (K, k·C·k).
        transposed: the same, shape (k·C·k, K).
        products: of the kernels with what a line sees, points and adjoints, shape (K, 2·W·B).
        h, projected: the two halves of ``products``.
        pushes: numbers by which kernels are pushed, shape (K, 2·W·B).
        g, push: the two halves of ``pushes``.
        second: room for the second derivative.
    """

    def __init__(
        self, tensors: ConvolutionalTensors, shape: tuple[int, ...], side: int, batch: int
    ) -> None:
        channels, height, width = self._shape = shape
        self._side, self._batch = side, batch
        weight, *others = (tensor.detach() for tensor in tensors)
        self.rows = weight.transpose(1, 2).flatten(1)
        self.transposed = self.rows.T.contiguous()
        kernels, patch = self.rows.shape
        self._seen = weight.new_zeros(height + side - 1, channels * side, 2, width * batch)
        self._pushed = weight.new_empty(height + side - 1, channels * side, width * batch)
        room = weight.new_empty(2, kernels, 2, width * batch)
        self.products, self.pushes = room.flatten(2)
        self.h, self.g = (_Room(r[:, 0].unflatten(1, (width, batch)), r[:, 0]) for r in room)
        self.projected, self.push = (r[:, 1].unflatten(1, (width, batch)) for r in room)
        second = weight.new_empty(kernels, width, batch)
        self.second = _Room(second, second.flatten(0, 1))
        amplitude, curvature, bias = (v.transpose(0, 1).contiguous() for v in others)
        self._lines = [
            _Line(
                (
                    self._seen[i : i + side, :, 0].flatten(0, 1),
                    self._seen[i : i + side].view(patch, -1),
                ),
                self._pushed[i : i + side].view(patch, -1),
                amplitude[i, :, :, None],
                bias[i, :, :, None],
                curvature[i, :, :, None],
                curvature[i].flatten(),
            )
            for i in range(height)
        ]

    def __iter__(self) -> Iterator[_Line]:
        return iter(self._lines)

    def look_at(self, x: Tensor, slot: int) -> None:
        """Take in columns of points (0) or of adjoints (1), and forget what is pushed."""
        inside, images = self._inside(self._seen[:, :, slot]), self._images(x)
        for column, here, there in self._shifts():
            inside[:, :, column, here] = images[:, :, there]
        self._pushed.zero_()

    def gather(self) -> Tensor:
        """The images that the pushed kernels add up to, as columns, shape (D, B)."""
        inside = self._inside(self._pushed)
        total = inside.new_zeros(math.prod(self._shape), self._batch)
        images = self._images(total)
        for column, here, there in self._shifts():
            images[:, :, there] += inside[:, :, column, here]
        return total

    def parts(self, gradients: list[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Room for each gradient that is wanted: of the rows, then line by line."""
        (kernels, patch), (_, height, width) = self.rows.shape, self._shape
        shapes = (
            (patch, kernels), (height, kernels, width), (height, kernels * width),
            (height, kernels, width),
        )  # fmt: skip
        return tuple(
            None if gradient is None else gradient.new_zeros(shape)
            for gradient, shape in zip(gradients, shapes, strict=True)
        )

    def collect(self, parts: tuple[Tensor | None, ...], gradients: list[Tensor | None]) -> None:
        """Add parts to the gradients."""
        for number, (part, gradient) in enumerate(zip(parts, gradients, strict=True)):
            if part is None or gradient is None:
                continue
            if number == 0:
                side = self._side
                gradient += part.T.unflatten(1, (side, -1, side)).transpose(1, 2)
            else:
                gradient += part.view(len(part), *gradient.shape[::2]).transpose(0, 1)

    def _inside(self, lines: Tensor) -> Tensor:
        """Lines within the border, (H, C, k, W, B), of a tensor (H + k - 1, C·k, W·B)."""
        margin, (channels, height, width) = self._side // 2, self._shape
        inside = lines[margin : margin + height].unflatten(1, (channels, self._side))
        pixels: Tensor = inside.unflatten(3, (width, self._batch))
        return pixels

    def _images(self, columns: Tensor) -> Tensor:
        """Images that are columns, (D, B), line by line: (H, C, W, B)."""
        images: Tensor = columns.unflatten(0, self._shape).transpose(0, 1)
        return images

    def _shifts(self) -> Iterator[tuple[int, slice, slice]]:
        """Each column of a kernel, the pixels that it reaches from, and those that it reaches."""
        margin, width = self._side // 2, self._shape[2]
        for column in range(self._side):
            shift = column - margin
            first, last = max(0, -shift), width - max(0, shift)
            if first < last:
                yield column, slice(first, last), slice(first + shift, last + shift)


class _Patches(torch.autograd.Function):
    """The neighbourhood of each pixel: (C, H, W, B) to (C·k·k, H·W·B), zero beyond the border.

    With the batch last each row is a few contiguous copies, an order of magnitude faster on a CPU
    than ``F.unfold``, whose neighbourhoods interleave.
    """

    @staticmethod
    def forward(images: Tensor, side: int) -> Tensor:
        channels, height, width, batch = images.shape
        margin = side // 2
        padded = F.pad(images, (0, 0, margin, margin, margin, margin))
        windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # (C, k, k, B, H, W)
        return windows.movedim(3, -1).reshape(channels * side**2, height * width * batch)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        images, ctx.side = inputs
        ctx.shape = images.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Overlap.apply(grad, ctx.shape, ctx.side), None


class _Overlap(torch.autograd.Function):
    """The transpose of :class:`_Patches`: what neighbourhoods hold adds up, pixel by pixel."""

    @staticmethod
    def forward(patches: Tensor, shape: tuple[int, ...], side: int) -> Tensor:
        channels, height, width, batch = shape
        margin = side // 2
        patches = patches.reshape(channels, side, side, height, width, batch)
        if compiling():  # compilers take long over writes into parts of a tensor
            shifts = [
                F.pad(patches[:, i, j], (0, 0, j, side - 1 - j, i, side - 1 - i))
                for i in range(side)
                for j in range(side)
            ]
            padded = torch.stack(shifts).sum(0)
        else:
            padded = patches.new_zeros(channels, height + 2 * margin, width + 2 * margin, batch)
            for i in range(side):
                for j in range(side):
                    padded[:, i : i + height, j : j + width] += patches[:, i, j]
        return padded[:, margin : margin + height, margin : margin + width].contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Any, int], output: Tensor) -> None:
        _, ctx.shape, ctx.side = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Patches.apply(grad.contiguous(), ctx.side), None, None
