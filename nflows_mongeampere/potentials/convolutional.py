"""Convolutional potentials: the ridges of an image, the same at every place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_mongeampere import validation
from nflows_mongeampere.activations import ACTIVATIONS
from nflows_mongeampere.potentials.base import Potential, Time


class ConvolutionalPotential(Potential):
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
        self.shape = validation.shape("shape", shape, 3)
        self.kernels = validation.integer("kernels", kernels)
        self.kernel_size = validation.integer("kernel_size", kernel_size)
        if self.kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size: got {kernel_size}, expected an odd number of pixels, so that a "
                f"kernel has a centre; use {self.kernel_size - 1} or {self.kernel_size + 1}"
            )
        self.activation = validation.choice("activation", activation, ACTIVATIONS)
        channels, height, width = self.shape
        self.features = channels * height * width
        patch = channels * self.kernel_size**2
        try:
            self.weight = nn.Parameter(
                torch.randn(self.kernels, channels, self.kernel_size, self.kernel_size) / patch**0.5
            )
            self.bias = nn.Parameter(
                torch.randn(self.kernels, 1, 1).expand(-1, height, width).clone()
            )
            self.amplitude = nn.Parameter(torch.zeros(self.kernels, height, width))
        except RuntimeError as error:
            raise ValueError(
                f"kernels: {self.kernels} kernels on images of shape {self.shape} do not fit into "
                f"memory; use fewer or smaller ones ({error})"
            ) from error

    def _value(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        h = self._preactivation(self._patches(x))
        return self._flat(self.amplitude)[:, 0] @ ACTIVATIONS[self.activation].value(h)

    def _gradient(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        return self._gradient_and_laplacian(x, t, context)[0]

    def _laplacian(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        return self._gradient_and_laplacian(x, t, context)[1]

    def _gradient_and_laplacian(
        self, x: Tensor, t: Time | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # the batch is the last dimension, so that shifted images are contiguous pieces of memory
        activation, batch = ACTIVATIONS[self.activation], len(x)
        p = activation.first(self._preactivation(self._patches(x)))
        push = (self._flat(self.amplitude) * p).view(self.kernels, -1)
        gradient = _Overlap.apply(self._rows.T @ push, (*self.shape, batch), self.kernel_size)
        laplacian = self._flat(self.amplitude * self._radii)[:, 0] @ activation.second(p)
        return gradient.movedim(-1, 0).reshape(x.shape), laplacian

    @property
    def _rows(self) -> Tensor:
        """The kernels as rows, shape (K, C·k·k)."""
        return self.weight.flatten(1)

    @property
    def _radii(self) -> Tensor:
        """r, the squared length of each kernel where it lies inside the image, shape (K, H, W)."""
        inside = _Patches.apply(self.weight.new_ones(*self.shape, 1), self.kernel_size)
        radii: Tensor = self._rows.square() @ inside
        return radii.view_as(self.amplitude)

    def _patches(self, x: Tensor) -> Tensor:
        images = x.reshape(len(x), *self.shape).movedim(0, -1).contiguous()
        patches: Tensor = _Patches.apply(images, self.kernel_size)
        return patches

    def _preactivation(self, patches: Tensor) -> Tensor:
        """h, shape (K·H·W, B)."""
        places = self.bias[0].numel()
        h = (self._rows @ patches).view(self.kernels * places, -1)
        return h + self._flat(self.bias)

    @staticmethod
    def _flat(parameter: Tensor) -> Tensor:
        """A parameter of shape (K, H, W) as (K·H·W, 1)."""
        return parameter.reshape(-1, 1)

    def extra_repr(self) -> str:
        return (
            f"shape={self.shape}, kernels={self.kernels}, kernel_size={self.kernel_size}, "
            f"activation={self.activation!r}"
        )


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


class _Overlap(torch.autograd.Function):
    """The transpose of :class:`_Patches`: what neighbourhoods hold adds up, pixel by pixel."""

    generate_vmap_rule = True

    @staticmethod
    def forward(patches: Tensor, shape: tuple[int, int, int, int], side: int) -> Tensor:
        channels, height, width, batch = shape
        margin = side // 2
        patches = patches.reshape(channels, side, side, height, width, batch)
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
