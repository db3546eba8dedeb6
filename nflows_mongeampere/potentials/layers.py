"""The equations of motion of deep potentials: Laplacians that are carried through the layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nflows_mongeampere.dynamics import Dynamics, Time, as_rows, start
from nflows_mongeampere.potentials.activations import ACTIVATIONS, Activation


class Layer(NamedTuple):
    r"""One layer of a deep potential, of M units.

    Attributes:
        weight: K, shape (M, units of the layer before); W of the first layer, shape (H, D).
        offset: d, shape (M, 1); of the first layer also (H, B), different from point to point.
        amplitude: a, shape (M, modes).
    """

    weight: Tensor
    offset: Tensor
    amplitude: Tensor


class Layers(NamedTuple):
    r"""A deep potential as a batch meets it.

    Attributes:
        layers: from the first to the last.
        speed: v of the first layer, shape (H, 1), or None.
        slope: :math:`[S \mid o]`, the slope of the quadratic part, shape (D, D + 1), or None.
        activation: name of :math:`\sigma`.
    """

    layers: Sequence[Layer]
    speed: Tensor | None
    slope: Tensor | None
    activation: str


class LayersDynamics(Dynamics):
    r"""The equations of motion of a deep potential: the state is :math:`[x; \ell]`.

    A unit h of any layer carries its gradient J and its Laplacian e with respect to x. Through a
    function f of one unit they go as

    .. math:: \nabla f(h) = f'(h)\, J, \qquad \Delta f(h) = f'(h)\, e + f''(h)\, \|J\|^2,

    through the weights of a layer as the units themselves do, at D + 2 columns for each point (a
    *forward Laplacian*, Li et al., `arXiv:2307.08214 <https://arxiv.org/abs/2307.08214>`_). The
    rates are the sums of :math:`a \odot \nabla \sigma(h)` and :math:`a \odot \Delta \sigma(h)` over
    the units of all layers; the next layer reads :math:`y = \sigma'(h)`. The pullback carries the
    adjoints of h, J and e back through the same products.
    """

    by_hand = True

    def __init__(self, potential: Layers, inputs: Tensor) -> None:
        self._activation: Activation = ACTIVATIONS[potential.activation]
        self._event_shape = inputs.shape[1:]
        self.coordinates = self._event_shape.numel()
        self.state = start(inputs, 1)
        squares = potential.layers[0].weight.square().sum(1, keepdim=True)
        layers = (tensor for layer in potential.layers for tensor in layer)
        self.tensors = (squares, potential.speed, potential.slope, *layers)

    def rate(self, t: Time, state: Tensor) -> Tensor:
        return self.stage(t, state)[0]

    def stage(self, t: Time, state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        squares, speed, slope, *_ = self.tensors
        layers = self._layers()
        x, weight, offset = state[: self.coordinates], layers[0].weight, layers[0].offset
        h = torch.addmm(offset if speed is None else offset + speed * t, weight, x)
        gradient, laplacian, square = weight[:, :, None], torch.zeros_like(squares), squares
        rate = torch.zeros_like(state) if slope is None else _quadratic(slope, x)
        kept = [x]
        for i, layer in enumerate(layers):
            if i:
                y, y_gradient, y_laplacian = kept[-3:]
                h = torch.addmm(layer.offset, layer.weight, y)
                gradient = _product(layer.weight, y_gradient)
                laplacian = layer.weight @ y_laplacian
                square = gradient.square().sum(1)
            p = self._activation.first(h)
            second = self._activation.second(p)
            a = layer.amplitude @ modes(t, layer.amplitude)
            push = a * p
            velocity = _sum(push, gradient)
            thinning = (push * laplacian + a * second * square).sum(0, keepdim=True)
            rate = rate + torch.cat([velocity, thinning])
            kept += [gradient, laplacian, square, p]
            if i + 1 < len(layers):
                third = self._activation.third(p)
                kept += [second[:, None] * gradient, second * laplacian + third * square]
        return rate, tuple(kept)

    def pullback(
        self,
        t: Time,
        kept: tuple[Tensor, ...],
        adjoint: Tensor,
        gradients: list[Tensor | None],
    ) -> Tensor:
        _, _, slope, *_ = self.tensors
        d_squares, d_speed, d_slope, *d_layers = gradients
        of_x, of_l = adjoint[: self.coordinates], adjoint[self.coordinates :]
        if not len(of_l):
            of_l = torch.zeros_like(adjoint[:1])
        x, *units = kept
        of_y = of_y_gradient = of_y_laplacian = None
        layers = self._layers()
        for i in reversed(range(len(layers))):
            weight, _, amplitude = layers[i]
            gradient, laplacian, square, p = units[6 * i : 6 * i + 4]
            second, third = self._activation.second(p), self._activation.third(p)
            basis = modes(t, amplitude)
            a = amplitude @ basis
            along = (gradient * of_x).sum(1) + laplacian * of_l
            thinning = second * of_l
            d_a = p * along + thinning * square
            of_h = a * (second * along + third * of_l * square)
            push = a * p
            of_gradient, of_laplacian, of_square = push[:, None] * of_x, push * of_l, a * thinning
            if of_y is not None:
                along = (gradient * of_y_gradient).sum(1) + laplacian * of_y_laplacian
                bend = third * of_y_laplacian
                of_h += second * of_y + third * along
                of_h += self._activation.fourth(p) * square * of_y_laplacian
                of_gradient += second[:, None] * of_y_gradient
                of_laplacian += second * of_y_laplacian
                of_square += bend
            d_weight, d_offset, d_amplitude = d_layers[3 * i : 3 * i + 3]
            if d_amplitude is not None:
                d_amplitude.addmm_(d_a.sum(1, keepdim=True), basis.T)
            if d_offset is not None:
                d_offset.add_(of_h if d_offset.shape[1] > 1 else of_h.sum(1, keepdim=True))
            if i == 0:
                break
            of_gradient.addcmul_(gradient, of_square[:, None], value=2)
            if d_weight is not None:
                y, y_gradient, y_laplacian = units[6 * i - 3 : 6 * i]
                d_weight.addmm_(of_h, y.T)
                d_weight.addmm_(of_gradient.flatten(1), y_gradient.flatten(1).T)
                d_weight.addmm_(of_laplacian, y_laplacian.T)
            of_y, of_y_laplacian = weight.T @ of_h, weight.T @ of_laplacian
            of_y_gradient = _product(weight.T, of_gradient)
        if d_weight is not None:
            d_weight.addmm_(of_h, x.T).add_(of_gradient.sum(2))
        if d_squares is not None:
            d_squares.add_(of_square.sum(1, keepdim=True))
        if d_speed is not None:
            d_speed.add_(of_h.sum(1, keepdim=True) * t)
        along_x = layers[0].weight.T @ of_h
        if slope is not None:
            along_x.addmm_(slope[:, :-1].T, of_x)
            if d_slope is not None:
                d_slope[:, :-1].addmm_(of_x, x.T).diagonal().add_(of_l.sum())
                d_slope[:, -1].add_(of_x.sum(1))
        return along_x

    def points(self, state: Tensor) -> Tensor:
        return as_rows(state[: self.coordinates], self._event_shape)

    def _layers(self) -> list[Layer]:
        parts = iter(self.tensors[3:])
        return [Layer(*three) for three in zip(parts, parts, parts, strict=True)]  # type: ignore[arg-type]


def _product(weight: Tensor, gradients: Tensor) -> Tensor:
    """The product with gradients of units, (M, H) times (H, D, B)."""
    product: Tensor = (weight @ gradients.flatten(1)).unflatten(1, gradients.shape[1:])
    return product


def _sum(push: Tensor, gradients: Tensor) -> Tensor:
    """The sum over units of their gradients, (M, D, B) or (M, D, 1), each times a number (M, B)."""
    if gradients.shape[2] == 1:
        return gradients[:, :, 0].T @ push
    total: Tensor = (push[:, None] * gradients).sum(0)
    return total


def _quadratic(slope: Tensor, x: Tensor) -> Tensor:
    r"""Gradient and Laplacian of :math:`x^T S x / 2 + o \cdot x`, shape (D + 1, B)."""
    gradient = torch.addmm(slope[:, -1:], slope[:, :-1], x)
    return torch.cat([gradient, slope.diagonal().sum().expand_as(x[:1])])


def modes(t: Time, like: Tensor) -> Tensor:
    r"""The functions :math:`\cos \pi k t`, k = 0, 1, ..., of which amplitudes are made, (modes, 1)."""
    k = torch.arange(like.shape[1], dtype=like.dtype, device=like.device)
    modes: Tensor = torch.cos(math.pi * t * k)[:, None]
    return modes
