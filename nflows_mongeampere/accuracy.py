"""How far a solution is from the exact one, and the fewest steps that are near enough."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from nflows_mongeampere import validation
from nflows_mongeampere.integration import IntegrationError, Integrator

logger = logging.getLogger("nflows_mongeampere")

# The finest solution that choose_steps will try.
MAX_STEPS = 4096

# outputs and log-densities (or log-determinants) of a batch, as an integrator gives them
Map = Callable[[Integrator], "tuple[Tensor, Tensor]"]


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
        error: the largest error in the batch at these steps, in nats.
        tolerance: the error that was asked for, in nats.
        quantity: what is right to that error: ``"log_prob"``, where the base distribution is known,
            or ``"logabsdet"``.
    """

    steps: int
    error: float
    tolerance: float
    quantity: str = "logabsdet"

    def __str__(self) -> str:
        return (
            f"{self.steps} steps give every {self.quantity} of the batch to {self.error:.2g} nats "
            f"(asked: {self.tolerance:.2g})"
        )


@torch.no_grad()
def compare(solve: Map, integrator: Integrator) -> tuple[Tensor, Tensor, Tensor]:
    r"""Outputs, and how far they and the log-determinants are from the exact ones, row by row.

    With a solver of order p the error of N steps is :math:`2^p / (2^p - 1)` times their distance
    from 2N steps (Richardson). Adaptive solvers are compared with themselves at a hundredth of
    the tolerance.
    """
    outputs, logabsdet = solve(integrator)
    if integrator.adaptive:
        finer = replace(integrator, atol=integrator.atol / 100, rtol=integrator.rtol / 100)
        factor = 1.0
    else:
        finer = replace(integrator, steps=2 * integrator.steps)
        factor = 2**integrator.order / (2**integrator.order - 1)
    better, better_logabsdet = solve(finer)
    return (
        outputs,
        factor * distance(outputs, better),
        factor * (logabsdet - better_logabsdet).abs(),
    )


@torch.no_grad()
def choose_steps(solve: Map, integrator: Integrator, tolerance: float, quantity: str) -> StepChoice:
    """The fewest steps that are right to ``tolerance`` on every row."""
    tolerance = validation.positive("tolerance", tolerance)
    if integrator.adaptive:
        raise ValueError(
            f"solver: got {integrator.solver!r}, which chooses its own steps; set atol and rtol, "
            "or use a fixed-step solver"
        )

    @cache
    def solution(steps: int) -> Tensor | None:
        try:
            return solve(replace(integrator, steps=steps))[1]
        except IntegrationError:  # too coarse even to arrive
            return None

    def error(steps: int, finer: int) -> float:
        """The error of ``steps`` by their distance from ``finer`` ones (Richardson)."""
        rough, reference = solution(steps), solution(finer)
        if rough is None or reference is None:
            return float("inf")
        return float((rough - reference).abs().max()) / (1 - (steps / finer) ** integrator.order)

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
    choice = StepChoice(enough, found, tolerance, quantity)
    logger.info(str(choice))
    return choice


def distance(a: Tensor, b: Tensor) -> Tensor:
    """The Euclidean distance of each row, shape (B,)."""
    distance: Tensor = torch.linalg.vector_norm((a - b).flatten(1), dim=1)
    return distance
