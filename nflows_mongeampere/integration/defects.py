r"""The error of a solution, from slopes that it has evaluated anyway.

The stages of a step disagree by something like its error. For the classical method, with
:math:`k_1 \ldots k_4` the rates of the log-determinant at the stages of a step,

.. math:: Q = \tfrac{dt}{3} |k_3 - k_2| + \tfrac{dt}{6} |k_1 + k_4 - k_2 - k_3|

is an error of third order, and the error of the step is two orders smaller,
:math:`Q \min(1, 4 r^2)`, where :math:`r` is the larger of the ratios
:math:`\|k_3 - k_2\| / \|k_2 - k_1\|` and :math:`\|k_2 - k_1\| / \|k\|` over the batch: half of the
step times the rate at which slopes change. Where r is large the solution means nothing, and Q is
about the error itself. On flows in training (``examples/benchmarks/defects.py``) the estimate
orders errors from 1e-9 to 8 nats. Where errors are below 1e-3 it is four times too large in the
median, and up to thirty times; above, it is mostly right within a factor of five. Where a flow
lives off its solver, at errors of several nats, it may be four times too small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Slopes(NamedTuple):
    """The rates of the log-determinant at the stages of some equal steps.

    Attributes:
        rates: of each step, shape (stages, B).
        lengths: of the steps; the error of equal steps alone is estimated.
        order: of the solver.
    """

    rates: Sequence[Tensor]
    lengths: Sequence[float]
    order: int

    @torch.no_grad()
    def error(self) -> Tensor | None:
        """About how far the log-determinant of each row is off in nats, shape (B,).

        None where there is nothing to compare: a single step of one stage, or steps of a solver
        that chooses them.
        """
        if not self.rates or len({round(length, 9) for length in self.lengths}) > 1:
            return None
        rates = torch.stack([*self.rates])
        steps, stages, _ = rates.shape
        if stages == 4:
            first, second, third, last = rates.unbind(1)
            change = second - first
            quadrature = (third - second).abs() / 3 + (first + last - second - third).abs() / 6
            ratio = torch.maximum(_ratio(third - second, change), _ratio(change, rates))
            reduction = (2 * ratio).square()
        elif stages == 2:
            first, second = rates.unbind(1)
            quadrature = 2 * (second - first).abs()
            reduction = _ratio(second - first, rates)
        elif steps > 1:  # steps are compared with each other
            change = rates[1:, 0] - rates[:-1, 0]
            quadrature = change.abs() * (steps / (steps - 1))
            reduction = _ratio(change, rates) ** (self.order - 1)
        else:
            return None
        error: Tensor = self.lengths[0] * quadrature.sum(0) * reduction.clamp(max=1)
        return error


def _ratio(change: Tensor, scale: Tensor) -> Tensor:
    """The ratio of two root mean squares, zero where nothing changes."""
    size = scale.square().mean().sqrt()
    return change.square().mean().sqrt() / size.clamp(min=torch.finfo(size.dtype).tiny)
