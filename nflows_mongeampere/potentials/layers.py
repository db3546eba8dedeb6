"""The equations of motion of deep potentials: Laplacians that are carried through the layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nflows_mongeampere import validation
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

    Forward through the layers go the units and their gradients J with respect to x (a *forward
    Laplacian*, Li et al., `arXiv:2307.08214 <https://arxiv.org/abs/2307.08214>`_),

    .. math:: y_l = \sigma'(h_l), \qquad h_{l+1} = K_l y_l + d_l, \qquad
              J_{l+1} = K_l\, (\sigma''(h_l) \odot J_l), \qquad J_1 = W,

    back go the derivatives :math:`e_l = \partial u / \partial h_l`,

    .. math:: e_l = a_l \odot \sigma'(h_l) + \sigma''(h_l) \odot g_l, \qquad
              g_l = K_l^T e_{l+1}, \qquad g_L = 0,

    and the rates are sums over the units of all layers,

    .. math:: \nabla u = W^T e_1, \qquad
              \Delta u = \sum_l \big(a_l \odot \sigma''(h_l) + g_l \odot \sigma'''(h_l)\big)
                         \cdot \|J_l\|^2,

    with the quadratic part beside them. One evaluation costs D + 2 times the products of a value.
    The pullback takes adjoints through both passes, the last one first.
    """

    by_hand = True

    def __init__(self, potential: Layers, inputs: Tensor) -> None:
        self._activation: Activation = ACTIVATIONS[potential.activation]
        self._event_shape = inputs.shape[1:]
        self.coordinates = self._event_shape.numel()
        self.state = start(inputs, 1)
        trace = potential.quadratic.diagonal().sum()
        self.tensors = (
            torch.cat([potential.quadratic, torch.zeros_like(potential.quadratic[:1])]),
            torch.cat([potential.drift, trace[None]])[:, None],
            potential.layers[0].weight.square().sum(1, keepdim=True),
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
        quadratic, drift, first, speed = self._whole()
        sigma, layers, x = self._activation, self._layers(), state[: self.coordinates]
        ys: list[Tensor] = []
        seconds: list[Tensor] = []
        thirds: list[Tensor] = []
        units: list[Tensor] = []
        slopes, squares = [layers[0].weight[:, :, None]], [first]
        for i, (weight, offset, _) in enumerate(layers):
            if i:
                units.append(seconds[-1][:, None] * slopes[-1])
                slopes.append(_product(weight, units[-1]))
                squares.append(slopes[-1].square().sum(1))
            elif speed is not None:
                offset = offset + speed * t
            h = torch.addmm(offset, weight, ys[-1] if i else x)
            ys.append(sigma.first(h, out=h if in_place else None))
            seconds.append(sigma.second(ys[-1]))
            thirds.append(seconds[-1] * sigma.steepness(ys[-1]))
        pushes: list[Tensor] = []
        pulls: list[Tensor] = []
        laplacian = torch.zeros_like(state[:1])
        for i in reversed(range(len(layers))):
            y, second, a = ys[i], seconds[i], at(t, layers[i].amplitude)
            push, bend = a * y, a * second
            if pushes:
                pull = layers[i + 1].weight.T @ pushes[0]
                push = torch.addcmul(push, second, pull)
                bend = torch.addcmul(bend, thirds[i], pull)
                pulls.insert(0, pull)
            laplacian = laplacian + (bend * squares[i]).sum(0, keepdim=True)
            pushes.insert(0, push)
        velocity = layers[0].weight.T @ pushes[0]
        rate = torch.addmm(drift, quadratic, x) + torch.cat([velocity, laplacian])
        whole = (*ys, *seconds, *thirds, *pushes)
        return rate, (x, *whole, *pulls, *units, *slopes[1:], *squares[1:])

    def pullback(
        self,
        t: Time,
        kept: tuple[Tensor, ...],
        adjoint: Tensor,
        gradients: list[Tensor | None],
    ) -> Tensor:
        quadratic, _, first, _ = self._whole()
        sigma, layers = self._activation, self._layers()
        last = len(layers) - 1
        if len(adjoint) == self.coordinates:
            adjoint = torch.cat([adjoint, torch.zeros_like(adjoint[:1])])
        of_x, of_l = adjoint[:-1], adjoint[-1:]
        x, *parts = kept
        count = last + 1
        ys, seconds, thirds, pushes = (parts[count * i : count * (i + 1)] for i in range(4))
        parts = parts[4 * count :]
        pulls, units, slopes, squares = (parts[last * i : last * (i + 1)] for i in range(4))
        slopes, squares = [layers[0].weight[:, :, None], *slopes], [first, *squares]
        d_quadratic, d_drift, d_first, d_speed, *d_layers = gradients
        d_weights, d_offsets, d_amplitudes = (d_layers[i::3] for i in range(3))

        # through the pass that went back, from the first layer to the last
        of_push = layers[0].weight @ of_x
        if d_weights[0] is not None:
            d_weights[0].addmm_(pushes[0], of_x.T)
        of_ys, of_seconds, of_squares, of_thirds = [], [], [], []
        for i, (y, second, third) in enumerate(zip(ys, seconds, thirds, strict=True)):
            amplitude, d_amplitude = layers[i].amplitude, d_amplitudes[i]
            a, thinning = at(t, amplitude), squares[i] * of_l
            if d_amplitude is not None:
                d_a = (y * of_push).addcmul_(second, thinning).sum(1, keepdim=True)
                d_amplitude.add_(d_a if amplitude.shape[1] == 1 else d_a @ basis(t, amplitude).T)
            of_ys.append(a * of_push)
            of_second, bend = a * thinning, a * second
            if i < last:
                bend.addcmul_(third, pulls[i])
                of_second.addcmul_(pulls[i], of_push)
                of_thirds.append(pulls[i] * thinning)
                of_pull = (second * of_push).addcmul_(third, thinning)
                d_weight = d_weights[i + 1]
                if d_weight is not None:
                    d_weight.addmm_(pushes[i + 1], of_pull.T)
                of_push = layers[i + 1].weight @ of_pull
            of_seconds.append(of_second)
            of_squares.append(bend.mul_(of_l))

        # through the pass that went forward, from the last layer to the first
        of_slope = of_units = x.new_empty(0)  # of the layer above, where there is one
        for i in reversed(range(last + 1)):
            of_h = seconds[i] * of_ys[i]
            if i < last:
                of_units = _product(layers[i + 1].weight.T, of_slope)
                of_seconds[i] += (slopes[i] * of_units).sum(1)
                of_h.addcmul_(sigma.fourth(ys[i]), of_thirds[i])
            of_h.addcmul_(thirds[i], of_seconds[i])
            d_weight, d_offset = d_weights[i], d_offsets[i]
            if d_offset is not None:
                d_offset.add_(of_h if d_offset.shape[1] > 1 else of_h.sum(1, keepdim=True))
            if d_weight is not None:
                d_weight.addmm_(of_h, (ys[i - 1] if i else x).T)
            if i:
                of_slope = of_squares[i].mul_(2)[:, None] * slopes[i]
                if i < last:
                    of_slope.addcmul_(seconds[i][:, None], of_units)
                if d_weight is not None:
                    d_weight.addmm_(of_slope.flatten(1), units[i - 1].flatten(1).T)
                of_ys[i - 1] += layers[i].weight.T @ of_h
            elif d_weight is not None and last:
                d_weight.add_((seconds[0][:, None] * of_units).sum(2))
        if d_first is not None:
            d_first.add_(of_squares[0].sum(1, keepdim=True))
        if d_speed is not None:
            d_speed.add_(of_h.sum(1, keepdim=True) * t)
        if d_quadratic is not None:
            d_quadratic.addmm_(adjoint, x.T)
        if d_drift is not None:
            d_drift.add_(adjoint.sum(1, keepdim=True))
        return torch.addmm(layers[0].weight.T @ of_h, quadratic.T, adjoint)

    def points(self, state: Tensor) -> Tensor:
        return as_rows(state[: self.coordinates], self._event_shape)

    def _whole(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        whole: Any = self.tensors
        return tuple(whole[:4])

    def _layers(self) -> list[Layer]:
        parts: Any = iter(self.tensors[4:])
        return [Layer(*three) for three in zip(parts, parts, parts, strict=True)]


def _product(weight: Tensor, gradients: Tensor) -> Tensor:
    """The product with gradients of units, (M, H) times (H, D, B)."""
    product: Tensor = (weight @ gradients.flatten(1)).unflatten(1, gradients.shape[1:])
    return product


def at(t: Time, amplitude: Tensor) -> Tensor:
    """Amplitudes at a time, from those of each mode: (M, modes) to (M, 1)."""
    return amplitude if amplitude.shape[1] == 1 else amplitude @ basis(t, amplitude)


def basis(t: Time, amplitude: Tensor) -> Tensor:
    r"""The functions :math:`\cos \pi k t` of which amplitudes are made, one in each row."""
    k = torch.arange(amplitude.shape[1], dtype=amplitude.dtype, device=amplitude.device)
    time = torch.as_tensor(t, dtype=amplitude.dtype, device=amplitude.device)
    return torch.cos(math.pi * k[:, None] * time)


def number_of_modes(modes: object, time_dependent: bool) -> int:
    """Return ``modes`` if so many functions of time make sense."""
    number = validation.integer("modes", modes)
    if number > 1 and not time_dependent:
        raise ValueError(
            f"modes: got {number}, expected 1, because amplitudes of a potential that does not "
            "depend on time are constant; build it with time_dependent=True"
        )
    return number
