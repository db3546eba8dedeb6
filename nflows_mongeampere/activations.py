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
    r"""A convex scalar function :math:`\sigma` with its derivatives.

    The higher derivatives are functions of the first, so that one transcendental function serves
    all that the flow needs.

    Attributes:
        value: :math:`\sigma(h)`.
        first: :math:`p`, the first derivative at :math:`h`.
        second: the second derivative, as a function of :math:`p`.
        third: the third derivative, as a function of :math:`p`.
    """

    value: Callable[[Tensor], Tensor]
    first: Callable[[Tensor], Tensor]
    second: Callable[[Tensor], Tensor]
    third: Callable[[Tensor], Tensor]


def _softplus(h: Tensor) -> Tensor:
    # F.softplus is linear beyond a threshold, 2e-9 off the function; this one is not.
    return -F.logsigmoid(-h)


def _sigmoid_first(p: Tensor) -> Tensor:
    return torch.addcmul(p, p, p, value=-1)


def _sigmoid_second(p: Tensor) -> Tensor:
    return _sigmoid_first(p) * (1 - 2 * p)


def _logcosh(h: Tensor) -> Tensor:
    return _softplus(2 * h) - h - math.log(2)


def _tanh_first(p: Tensor) -> Tensor:
    return 1 - p * p


def _tanh_second(p: Tensor) -> Tensor:
    return -2 * p * _tanh_first(p)


ACTIVATIONS: dict[str, Activation] = {
    # ln(1 + e^h), p = 1/(1 + e^-h), σ'' = p - p², σ''' = (p - p²)(1 - 2p)
    "softplus": Activation(_softplus, torch.sigmoid, _sigmoid_first, _sigmoid_second),
    # ln cosh h, p = tanh h, σ'' = 1 - p², σ''' = -2p(1 - p²); even in h
    "logcosh": Activation(_logcosh, torch.tanh, _tanh_first, _tanh_second),
}
