"""The equations of motion of deep potentials: Laplacians that are carried through the layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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
        quadratic: S, symmetric, shape (D, D).
        drift: o, shape (D,).
        activation: name of :math:`\sigma`.
    """

    layers: Sequence[Layer]
    speed: Tensor | None
    quadratic: Tensor
    drift: Tensor
    activation: str


class LayersDynamics(Dynamics):
    r"""The equations of motion of a deep potential: the state is :math:`[x; \ell]`.

    A unit h of any layer carries its derivatives :math:`T = [\nabla h; \Delta h]` along the state.
    Through a function f of one unit they go as

    .. math:: T_{f(h)} = f'(h)\, T + [0;\; f''(h)\, \|\nabla h\|^2],

    through the weights of a layer as the units themselves do, at D + 2 columns for each point (a
    *forward Laplacian*, Li et al., `arXiv:2307.08214 <https://arxiv.org/abs/2307.08214>`_). The
    rate is :math:`T` of :math:`a \cdot \sigma(h)`, summed over the layers; the next layer reads
    :math:`y = \sigma'(h)`. The pullback takes the adjoints of h and T back through the same
    products.
    """

    by_hand = True

    def __init__(self, potential: Layers, inputs: Tensor) -> None:
        self._activation: Activation = ACTIVATIONS[potential.activation]
        self._event_shape = inputs.shape[1:]
        self.coordinates = self._event_shape.numel()
        self.state = start(inputs, 1)
        weight = potential.layers[0].weight
        nothing = torch.zeros_like(weight[:, :1])
        trace = potential.quadratic.diagonal().sum()
        self.tensors = (
            torch.cat([potential.quadratic, torch.zeros_like(potential.quadratic[:1])]),
            torch.cat([potential.drift, trace[None]])[:, None],
            torch.cat([weight, nothing], 1),
            weight.square().sum(1, keepdim=True),
            potential.speed,
            *(tensor for layer in potential.layers for tensor in layer),
        )

    def rate(self, t: Time, state: Tensor) -> Tensor:
        return self._evaluate(t, state)[0]

    def stage(self, t: Time, state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self._evaluate(t, state, in_place=True)

    def _evaluate(
        self, t: Time, state: Tensor, in_place: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        quadratic, drift, first, square, speed = self._whole()
        sigma, layers, x = self._activation, self._layers(), state[: self.coordinates]
        rate, kept = torch.addmm(drift, quadratic, x), [x]
        y, units = x, first[:, :, None]
        for i, (weight, offset, amplitude) in enumerate(layers):
            if i:
                tangent = _product(weight, units)
                square = tangent[:, :-1].square().sum(1)
                kept += [units, tangent, square]
            else:
                tangent, offset = units, offset if speed is None else offset + speed * t
            h = torch.addmm(offset, weight, y)
            y = sigma.first(h, out=h if in_place else None)
            kept += [y]
            second, a = sigma.second(y), at(t, amplitude)
            rate += _combine(a * y, tangent)
            rate[-1] += (a * second * square).sum(0)
            if i + 1 < len(layers):
                units = second[:, None] * tangent
                units[:, -1] += second * sigma.steepness(y) * square
        return rate, tuple(kept)

    def pullback(
        self,
        t: Time,
        kept: tuple[Tensor, ...],
        adjoint: Tensor,
        gradients: list[Tensor | None],
    ) -> Tensor:
        quadratic, _, first, squares, _ = self._whole()
        d_quadratic, d_drift, d_first, d_square, d_speed, *d_layers = gradients
        sigma, layers = self._activation, self._layers()
        if len(adjoint) == self.coordinates:
            adjoint = torch.cat([adjoint, torch.zeros_like(adjoint[:1])])
        of_l = adjoint[-1:]
        x, p0, *deeper = kept
        of_y = of_units = None
        for i in reversed(range(len(layers))):
            weight, _, amplitude = layers[i]
            if i:
                units, tangent, square, p = deeper[4 * i - 4 : 4 * i]
                along = (tangent * adjoint).sum(1)
            else:
                tangent, square, p = first[:, :, None], squares, p0
                along = first @ adjoint
            second, a = sigma.second(p), at(t, amplitude)
            third = second * sigma.steepness(p)
            thinning, push = second * of_l, a * p
            d_weight, d_offset, d_amplitude = d_layers[3 * i : 3 * i + 3]
            if d_amplitude is not None:
                d_a = (p * along).addcmul_(thinning, square).sum(1, keepdim=True)
                d_amplitude.addmm_(d_a, basis(t, amplitude).T)
            of_h = along.mul_(second).addcmul_(third, square * of_l).mul_(a)
            of_square = thinning.mul_(a)
            if of_y is not None and of_units is not None:
                bend = third * of_units[:, -1]
                of_h.addcmul_(second, of_y).addcmul_(third, (tangent * of_units).sum(1))
                of_h.addcmul_(sigma.fourth(p), square * of_units[:, -1])
                of_square += bend
            if d_offset is not None:
                d_offset.add_(of_h if d_offset.shape[1] > 1 else of_h.sum(1, keepdim=True))
            if not i:
                break
            of_tangent = push[:, None] * adjoint
            if of_units is not None:
                of_tangent.addcmul_(second[:, None], of_units)
            of_tangent[:, :-1].addcmul_(tangent[:, :-1], of_square[:, None], value=2)
            if d_weight is not None:
                before = deeper[4 * i - 5] if i > 1 else p0
                d_weight.addmm_(of_h, before.T)
                d_weight.addmm_(of_tangent.flatten(1), units.flatten(1).T)
            of_y, of_units = weight.T @ of_h, _product(weight.T, of_tangent)
        if d_weight is not None:
            d_weight.addmm_(of_h, x.T)
        if d_first is not None:
            d_first.addmm_(push, adjoint.T)
            if of_units is not None:
                d_first.add_((second[:, None] * of_units).sum(2))
        if d_square is not None:
            d_square.add_(of_square.sum(1, keepdim=True))
        if d_speed is not None:
            d_speed.add_(of_h.sum(1, keepdim=True) * t)
        if d_quadratic is not None:
            d_quadratic.addmm_(adjoint, x.T)
        if d_drift is not None:
            d_drift.add_(adjoint.sum(1, keepdim=True))
        return torch.addmm(weight.T @ of_h, quadratic.T, adjoint)

    def points(self, state: Tensor) -> Tensor:
        return as_rows(state[: self.coordinates], self._event_shape)

    def _whole(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        whole: Any = self.tensors
        return tuple(whole[:5])

    def _layers(self) -> list[Layer]:
        parts: Any = iter(self.tensors[5:])
        return [Layer(*three) for three in zip(parts, parts, parts, strict=True)]


def _product(weight: Tensor, tangents: Tensor) -> Tensor:
    """The product with derivatives of units, (M, H) times (H, D + 1, B)."""
    product: Tensor = (weight @ tangents.flatten(1)).unflatten(1, tangents.shape[1:])
    return product


def _combine(push: Tensor, tangents: Tensor) -> Tensor:
    """The sum of derivatives of units, (M, D + 1, B) or (M, D + 1, 1), each times its push."""
    if tangents.shape[2] == 1:
        return tangents[:, :, 0].T @ push
    total: Tensor = (push[:, None] * tangents).sum(0)
    return total


def at(t: Time, amplitude: Tensor) -> Tensor:
    """Amplitudes at a time, from those of each mode: (M, modes) to (M, 1)."""
    return amplitude if amplitude.shape[1] == 1 else amplitude @ basis(t, amplitude)


def basis(t: Time, amplitude: Tensor) -> Tensor:
    r"""The functions :math:`\cos \pi k t` of which amplitudes are made, one in each row."""
    k = torch.arange(amplitude.shape[1], dtype=amplitude.dtype, device=amplitude.device)
    time = torch.as_tensor(t, dtype=amplitude.dtype, device=amplitude.device)
    return torch.cos(math.pi * k[:, None] * time)
