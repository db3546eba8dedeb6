"""Convolutional potentials: the ridges of an image, the same at every place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_mongeampere import validation
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
        self.reset_parameters()

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
            return FieldDynamics(field, inputs, None, tuple(self.parameters()), costs)
        return ConvolutionalDynamics(self, inputs)

    def _value(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        images = x.reshape(-1, *self.shape)
        h = F.conv2d(images, self.weight, padding=self.kernel_size // 2) + self.bias
        return (self.amplitude * ACTIVATIONS[self.activation].value(h)).flatten(1).sum(1)


class ConvolutionalTensors(NamedTuple):
    """What the equations of motion are made of, with F = K·H·W entries: each kernel, each pixel.

    Attributes:
        rows: the kernels as rows, shape (K, C·k·k).
        amplitude: shape (F, 1).
        curvature: amplitude times squared length of the kernels inside the image, shape (1, F).
        bias: shape (F, 1).
    """

    rows: Tensor
    amplitude: Tensor
    curvature: Tensor
    bias: Tensor


class ConvolutionalDynamics(Dynamics):
    r"""The equations of motion of kernels at every pixel: the state is :math:`[x; \ell]`, (D + 1, B).

    The equations are those of :class:`~nflows_mongeampere.potentials.ridges.RidgeDynamics`. A
    correlation is one product of the kernels with the neighbourhoods of all pixels, a transposed
    one the product with their transpose, added up where neighbourhoods overlap.
    """

    by_hand = True
    tensors: ConvolutionalTensors

    def __init__(self, potential: ConvolutionalPotential, inputs: Tensor) -> None:
        self._shape, self._side = potential.shape, potential.kernel_size
        self._activation, self._event_shape = ACTIVATIONS[potential.activation], inputs.shape[1:]
        self.coordinates = potential.features
        self.state = start(inputs, 1)
        rows, amplitude = potential.weight.flatten(1), potential.amplitude.reshape(-1, 1)
        inside = self._patches(rows.new_ones(self.coordinates, 1))
        lengths = (rows.square() @ inside).view(-1, 1)
        self.tensors = ConvolutionalTensors(
            rows, amplitude, (amplitude * lengths).T, potential.bias.reshape(-1, 1)
        )

    def rate(self, t: Time, state: Tensor) -> Tensor:
        return self.stage(t, state)[0]

    def stage(self, t: Time, state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        _, amplitude, curvature, bias = self.tensors
        x = state[: self.coordinates]
        p = self._activation.first(self._correlate(self._patches(x)) + bias)
        velocity = self._transposed(amplitude * p)
        return torch.cat([velocity, curvature @ self._activation.second(p)]), (x, p)

    def pullback(
        self,
        t: Time,
        kept: tuple[Tensor, ...],
        adjoint: Tensor,
        gradients: list[Tensor | None],
    ) -> Tensor:
        x, p = kept
        rows, amplitude, curvature, _ = self.tensors
        of_l = adjoint[self.coordinates :]
        of_patches = self._patches(adjoint[: self.coordinates])
        projected = self._correlate(of_patches)
        second = self._activation.second(p)
        g = amplitude * projected
        g.addcmul_(curvature.T * of_l, self._activation.steepness(p)).mul_(second)
        d_rows, d_amplitude, d_curvature, d_bias = gradients
        if d_rows is not None:
            d_rows.addmm_(g.view(len(rows), -1), self._patches(x).T)
            d_rows.addmm_((amplitude * p).view(len(rows), -1), of_patches.T)
        if d_amplitude is not None:
            d_amplitude.add_(projected.mul_(p).sum(1, keepdim=True))
        if d_curvature is not None:
            d_curvature.addmm_(of_l, second.T)
        if d_bias is not None:
            d_bias.add_(g.sum(1, keepdim=True))
        return self._transposed(g)

    def points(self, state: Tensor) -> Tensor:
        return as_rows(state[: self.coordinates], self._event_shape)

    def _patches(self, x: Tensor) -> Tensor:
        """Neighbourhoods of the pixels of images that are columns, shape (C·k·k, H·W·B)."""
        patches: Tensor = _Patches.apply(x.reshape(*self._shape, -1), self._side)
        return patches

    def _correlate(self, patches: Tensor) -> Tensor:
        """The product of every kernel with every neighbourhood, shape (F, B)."""
        products = self.tensors.rows @ patches
        return products.view(len(products) * self._shape[1] * self._shape[2], -1)

    def _transposed(self, push: Tensor) -> Tensor:
        """The sum of all kernels at all pixels, each times its entry of (F, B); shape (D, B)."""
        rows, (_, height, width) = self.tensors.rows, self._shape
        batch = push.shape[1]
        patches = rows.T @ push.reshape(len(rows), height * width * batch)
        images: Tensor = _Overlap.apply(patches, (*self._shape, batch), self._side)
        return images.view(self.coordinates, batch)


class _Patches(torch.autograd.Function):
    """The neighbourhood of each pixel: (C, H, W, B) to (C·k·k, H·W·B), zero beyond the border.

    With the batch last each row is a few contiguous copies, an order of magnitude faster on a CPU
    than ``F.unfold``, whose neighbourhoods interleave.
    """

    generate_vmap_rule = True

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

    @staticmethod
    def jvp(ctx: Any, images: Tensor, _: None) -> Tensor:
        tangent: Tensor = _Patches.apply(images, ctx.side)
        return tangent


class _Overlap(torch.autograd.Function):
    """The transpose of :class:`_Patches`: what neighbourhoods hold adds up, pixel by pixel."""

    generate_vmap_rule = True

    @staticmethod
    def forward(patches: Tensor, shape: tuple[int, int, int, int], side: int) -> Tensor:
        channels, height, width, batch = shape
        margin = side // 2
        patches = patches.reshape(channels, side, side, height, width, batch)
        if torch.compiler.is_compiling():  # compilers take long over writes into parts of a tensor
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

    @staticmethod
    def jvp(ctx: Any, patches: Tensor, _: None, __: None) -> Tensor:
        tangent: Tensor = _Overlap.apply(patches, ctx.shape, ctx.side)
        return tangent
