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
        first: :math:`p = \sigma'(h)`.
        second: :math:`\sigma''`, as a function of :math:`p`.
        steepness: :math:`\sigma''' / \sigma''`, as a function of :math:`p`.
    """

    value: Callable[[Tensor], Tensor]
    first: Callable[[Tensor], Tensor]
    second: Callable[[Tensor], Tensor]
    steepness: Callable[[Tensor], Tensor]

    def third(self, p: Tensor) -> Tensor:
        r""":math:`\sigma'''`, as a function of :math:`p`."""
        return self.second(p) * self.steepness(p)


def _softplus(h: Tensor) -> Tensor:
    # F.softplus is linear beyond a threshold, 2e-9 off the function; this one is not.
    return -F.logsigmoid(-h)


def _logcosh(h: Tensor) -> Tensor:
    return _softplus(2 * h) - h - math.log(2)


ACTIVATIONS: dict[str, Activation] = {
    # ln(1 + e^h), p = 1/(1 + e^-h), σ'' = p - p², σ''' = (p - p²)(1 - 2p)
    "softplus": Activation(
        _softplus,
        torch.sigmoid,
        lambda p: torch.addcmul(p, p, p, value=-1),
        lambda p: torch.rsub(p, 1, alpha=2),
    ),
    # ln cosh h, p = tanh h, σ'' = 1 - p², σ''' = -2p(1 - p²); even in h
    "logcosh": Activation(
        _logcosh,
        torch.tanh,
        lambda p: torch.rsub(p * p, 1),
        lambda p: -2 * p,
    ),
}
