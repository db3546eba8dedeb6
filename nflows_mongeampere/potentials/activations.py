"""Activations of ridge potentials, with the derivatives that the flow needs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F


class Activation(ABC):
    r"""A convex scalar function :math:`\sigma` with its derivatives.

    The higher derivatives are functions of the first, so that one transcendental function serves
    all that the flow needs. Where nothing has to differentiate them, results are written to
    ``out``, because fresh memory costs more than the arithmetic.

    Attributes:
        rise: r in :math:`\sigma''' = (r - 2p)\, \sigma''`, with :math:`p = \sigma'`.
        scale: :math:`\kappa` in :math:`\sigma(h) = \ln\cosh\kappa h + r \kappa h + const`.
    """

    rise: float
    scale: float

    @abstractmethod
    def value(self, h: Tensor) -> Tensor:
        r""":math:`\sigma(h)`."""

    @abstractmethod
    def first(self, h: Tensor, out: Tensor | None = None) -> Tensor:
        r""":math:`p = \sigma'(h)`."""

    @abstractmethod
    def second(self, p: Tensor, out: Tensor | None = None) -> Tensor:
        r""":math:`\sigma''`, as a function of :math:`p`."""

    def steepness(self, p: Tensor) -> Tensor:
        r""":math:`\sigma''' / \sigma''`, as a function of :math:`p`."""
        return torch.rsub(p, self.rise, alpha=2)

    def pull_back(
        self, p: Tensor, force: Tensor, bend: Tensor | None, second: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""The adjoint of h, from those of the first and of the second derivative.

        .. math:: g = \sigma^{(2)} \odot force + \sigma^{(3)} \odot bend

        Args:
            p: the first derivative.
            force: its adjoint, written over.
            bend: the adjoint of the second derivative, or None where it is zero.
            second: room for the second derivative.

        Returns:
            g and the second derivative.
        """
        second = self.second(p, second)
        if bend is not None:
            if self.rise:
                force.add_(bend, alpha=self.rise)
            force.addcmul_(bend, p, value=-2)
        return force.mul_(second), second

    def third(self, p: Tensor) -> Tensor:
        r""":math:`\sigma'''`, as a function of :math:`p`."""
        return self.second(p) * self.steepness(p)

    @abstractmethod
    def fourth(self, p: Tensor) -> Tensor:
        r""":math:`\sigma''''`, as a function of :math:`p`."""


class Softplus(Activation):
    r""":math:`\ln(1 + e^h)`: :math:`p = 1/(1 + e^{-h})`, :math:`\sigma'' = p - p^2`."""

    rise, scale = 1.0, 0.5

    def value(self, h: Tensor) -> Tensor:
        # F.softplus is linear beyond a threshold, 2e-9 off the function; this one is not
        return -F.logsigmoid(-h)

    def first(self, h: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.sigmoid(h, out=out)

    def second(self, p: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.addcmul(p, p, p, value=-1, out=out)

    def fourth(self, p: Tensor) -> Tensor:
        second = self.second(p)
        return second * (1 - 6 * second)


class LogCosh(Activation):
    r""":math:`\ln \cosh h`, even in h: :math:`p = \tanh h`, :math:`\sigma'' = 1 - p^2`."""

    rise, scale = 0.0, 1.0

    def value(self, h: Tensor) -> Tensor:
        return -F.logsigmoid(-2 * h) - h - math.log(2)

    def first(self, h: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.tanh(h, out=out)

    def second(self, p: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.addcmul(p.new_ones(()), p, p, value=-1, out=out)

    def fourth(self, p: Tensor) -> Tensor:
        second = self.second(p)
        return second * (4 - 6 * second)


ACTIVATIONS: dict[str, Activation] = {"softplus": Softplus(), "logcosh": LogCosh()}
