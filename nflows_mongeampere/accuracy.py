"""How far a flow's outputs and log-densities are from the exact solution of its equations."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nflows_mongeampere import validation
from nflows_mongeampere.integration import IntegrationError

if TYPE_CHECKING:
    from nflows_mongeampere.transport import Transport

logger = logging.getLogger("nflows_mongeampere")

# The finest solution that choose_steps will try.
MAX_STEPS = 4096


class AccuracyWarning(UserWarning):
    """A flow is evaluated at a larger error than was asked for."""


@dataclass(frozen=True)
class ErrorEstimate:
    """The estimated error of one solve, row by row.

    Attributes:
        outputs: Euclidean distance of the outputs from the exact solution, shape (B,).
        logabsdet: distance of the log-determinant from the exact one in nats, shape (B,).
        round_trip: Euclidean distance between the inputs and their image under the map and its
            inverse, shape (B,).
    """

    outputs: Tensor
    logabsdet: Tensor
    round_trip: Tensor


@dataclass(frozen=True)
class StepChoice:
    """What :meth:`choose_steps` found.

    Attributes:
        steps: the number of fixed steps.
        error: the largest error of a log-determinant in the batch at these steps, in nats.
        tolerance: the error that was asked for, in nats.
    """

    steps: int
    error: float
    tolerance: float

    def __str__(self) -> str:
        return (
            f"{self.steps} steps give every log-density of the batch to {self.error:.2g} nats "
            f"(asked: {self.tolerance:.2g})"
        )


@torch.no_grad()
def estimate_error(
    transport: Transport, inputs: Tensor, context: Tensor | None, to_data: bool
) -> ErrorEstimate:
    r"""The error of a solve, by comparison with a finer one.

    With a solver of order p the error of N steps is :math:`2^p / (2^p - 1)` times their distance
    from 2N steps (Richardson). Adaptive solvers are compared with themselves at a hundredth of
    the tolerance.
    """
    coarse = _apply(_with(transport), inputs, context, to_data)
    fine = _apply(_finer(transport), inputs, context, to_data)
    factor = _richardson(transport)
    back, _ = _apply(_with(transport), coarse[0], context, not to_data)
    return ErrorEstimate(
        outputs=factor * _distance(coarse[0], fine[0]),
        logabsdet=factor * (coarse[1] - fine[1]).abs(),
        round_trip=_distance(back, inputs),
    )


@torch.no_grad()
def choose_steps(
    transport: Transport,
    inputs: Tensor,
    tolerance: float,
    context: Tensor | None,
    to_data: bool,
) -> StepChoice:
    """The fewest steps whose log-determinants are right to ``tolerance`` on every row."""
    tolerance = validation.positive("tolerance", tolerance)
    if isinstance(inputs, Tensor) and inputs.shape[:1] == (0,):
        raise ValueError("inputs: got no rows, expected the data or noise to choose the steps by")
    if transport.integrator.adaptive:
        raise ValueError(
            f"solver: got {transport.integrator.solver!r}, which chooses its own steps; set atol "
            "and rtol, or use a fixed-step solver"
        )
    order = transport.integrator.order

    @cache
    def solution(steps: int) -> Tensor | None:
        try:
            return _apply(_with(transport, steps=steps), inputs, context, to_data)[1]
        except IntegrationError:  # too coarse even to arrive
            return None

    def error(steps: int, finer: int) -> float:
        """The error of ``steps`` by their distance from ``finer`` ones (Richardson)."""
        rough, reference = solution(steps), solution(finer)
        if rough is None or reference is None:
            return float("inf")
        return float((rough - reference).abs().max()) / (1 - (steps / finer) ** order)

    steps = 1
    while (found := error(steps, 2 * steps)) > tolerance:
        if 2 * steps >= MAX_STEPS:
            raise IntegrationError(
                f"tolerance: got {tolerance:g} nats, but {steps} steps are off by {found:.2g}: "
                "raise it, use float64, which rounds less, or a solver of higher order"
            )
        steps *= 2

    # the answer lies in (steps / 2, steps]
    enough, too_few = steps, steps // 2
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        candidate = error(middle, 2 * steps)
        if candidate <= tolerance:
            enough, found = middle, candidate
        else:
            too_few = middle
    choice = StepChoice(enough, found, tolerance)
    logger.info(str(choice))
    return choice


def _with(transport: Transport, **changes: Any) -> Transport:
    """The same flow, parameters shared, integrated in another way."""
    twin = copy.copy(transport)
    twin.integrator = replace(transport.integrator, **changes)
    twin.tolerance = None  # a twin does not watch itself
    twin._costs = None
    return twin


def _finer(transport: Transport) -> Transport:
    integrator = transport.integrator
    if integrator.adaptive:
        return _with(transport, atol=integrator.atol / 100, rtol=integrator.rtol / 100)
    return _with(transport, steps=2 * integrator.steps)


def _richardson(transport: Transport) -> float:
    integrator = transport.integrator
    return 1.0 if integrator.adaptive else 2**integrator.order / (2**integrator.order - 1)


def _apply(
    transport: Transport, inputs: Tensor, context: Tensor | None, to_data: bool
) -> tuple[Tensor, Tensor]:
    """One solve, with the same random probe each time where the potential draws one."""
    devices = [inputs.device] if isinstance(inputs, Tensor) and inputs.is_cuda else []
    with torch.random.fork_rng(devices=devices):  # every solve starts from the caller's generator
        return transport._map("inputs", inputs, context, to_data)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    distance: Tensor = torch.linalg.vector_norm((a - b).flatten(1), dim=1)
    return distance
