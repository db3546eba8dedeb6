r"""The published arithmetic of the Monge-Ampère flow, to compare with.

``published_transform`` does as the code that came with Zhang, E and Wang, `arXiv:1809.10188
<https://arxiv.org/abs/1809.10188>`_: the potential is evaluated in :math:`x`, gradient and
Laplacian each compute their own hidden layer, and the output weights are a diagonal matrix.
``plain_loop`` is the same without waste: one hidden layer for both, and no diagonal matrices.
Autograd goes through all of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from nflows_mongeampere import RidgePotential

State = tuple[Tensor, ...]


def classical_rk4(field: Callable[[State], State], state: State, *, dt: float, steps: int) -> State:
    """The classical Runge-Kutta method, written by hand."""
    for _ in range(steps):
        k1 = field(state)
        k2 = field(_advance(state, k1, dt / 2))
        k3 = field(_advance(state, k2, dt / 2))
        k4 = field(_advance(state, k3, dt))
        state = tuple(
            y + dt / 6 * (a + 2 * b + 2 * c + d)
            for y, a, b, c, d in zip(state, k1, k2, k3, k4, strict=True)
        )
    return state


def _advance(state: State, slope: State, dt: float) -> State:
    return tuple(y + dt * k for y, k in zip(state, slope, strict=True))


def published_transform(
    potential: RidgePotential, data: Tensor, *, time: float, steps: int
) -> tuple[Tensor, Tensor]:
    r"""Data to noise, and :math:`\ln|dz/dx|`, for a softplus potential with bias."""
    weight, bias, amplitude = potential.weight, potential.bias, potential.amplitude

    def gradient(x: Tensor) -> Tensor:
        p = torch.sigmoid(F.linear(x, weight, bias))
        return (p @ torch.diag(amplitude)) @ weight

    def laplacian(x: Tensor) -> Tensor:
        p = torch.sigmoid(F.linear(x, weight, bias))
        return (((p * (1 - p)) @ torch.diag(amplitude)) @ (weight * weight)).sum(1)

    def field(state: State) -> State:
        return gradient(state[0]), laplacian(state[0])

    start = data, data.new_zeros(len(data))
    noise, logabsdet = classical_rk4(field, start, dt=-time / steps, steps=steps)
    return noise, logabsdet


def plain_loop(
    potential: RidgePotential, data: Tensor, *, time: float, steps: int
) -> tuple[Tensor, Tensor]:
    r"""The same map, as somebody would write it who follows the equations."""
    weight, bias, amplitude = potential.weight, potential.bias, potential.amplitude

    def field(state: State) -> State:
        p = torch.sigmoid(F.linear(state[0], weight, bias))
        gradient = (p * amplitude) @ weight
        laplacian = (p * (1 - p)) @ (amplitude * weight.square().sum(1))
        return gradient, laplacian

    start = data, data.new_zeros(len(data))
    noise, logabsdet = classical_rk4(field, start, dt=-time / steps, steps=steps)
    return noise, logabsdet
