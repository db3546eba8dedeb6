"""Activations of ridge potentials, with the derivatives that the flow needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Activation:
    r"""A convex scalar function :math:`\sigma` with its first two derivatives.

    The second derivative is a function of the first, so that one transcendental function
    serves both :math:`\nabla u` and :math:`\Delta u`.

    Attributes:
        value: :math:`\sigma(h)`.
        first: :math:`p = \sigma'(h)`.
        second: :math:`\sigma''(h)` as a function of :math:`p`.
    """

    value: Callable[[Tensor], Tensor]
    first: Callable[[Tensor], Tensor]
    second: Callable[[Tensor], Tensor]


def _softplus(h: Tensor) -> Tensor:
    # F.softplus is linear beyond a threshold, 2e-9 off the function; this one is not.
    return -F.logsigmoid(-h)


def _logcosh(h: Tensor) -> Tensor:
    return _softplus(2 * h) - h - math.log(2)


def _sigmoid_derivative(p: Tensor) -> Tensor:
    return torch.addcmul(p, p, p, value=-1)


def _tanh_derivative(p: Tensor) -> Tensor:
    return 1 - p * p


ACTIVATIONS: dict[str, Activation] = {
    # ln(1 + e^h), σ' = 1/(1 + e^-h), σ'' = p - p²
    "softplus": Activation(_softplus, torch.sigmoid, _sigmoid_derivative),
    # ln cosh h, σ' = tanh h, σ'' = 1 - p²; even in h
    "logcosh": Activation(_logcosh, torch.tanh, _tanh_derivative),
}
