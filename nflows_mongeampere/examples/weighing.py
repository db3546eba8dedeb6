"""How finely the examples solve what they weigh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nflows_mongeampere.convergence import Converged, converged
from nflows_mongeampere.models import refined
from nflows_mongeampere.variational import Estimate, WeightedSamples, weigh

FEW = 1000  # samples by which it is judged
TOLERANCE = 1e-5  # of a free energy per site when the solver's steps are doubled, at most


def settled(
    flow: nn.Module,
    target: Any,
    count: int,
    free_energy: Callable[[WeightedSamples], Estimate],
    context: Tensor | None = None,
) -> Converged[float]:
    """The solver's steps at which a free energy stands still to a tenth of its standard error.

    Args:
        flow: a flow of a lattice field.
        target: with ``log_prob`` and the number of its ``sites``.
        count: samples whose standard error it is.
        free_energy: of weighted samples, in nats.
        context: of the samples, a single row, if the flow has one.

    Returns:
        The free energy per site of the first 1,000 of them, and the factor of the steps.
    """
    few = min(count, FEW)

    def judged() -> Estimate:
        return free_energy(weigh(flow, target, few, context=context))

    with torch.random.fork_rng(devices=[]):  # the same samples once more
        error = judged().error * (few / count) ** 0.5 / target.sites
    tolerance = min(TOLERANCE, error / 10)
    return converged(flow, lambda: judged().value / target.sites, tolerance)


def drawn(
    flow: nn.Module,
    target: Any,
    count: int,
    seed: int,
    factor: int,
    context: Tensor | None = None,
) -> WeightedSamples:
    """Weighted samples at ``factor`` times the solver's steps, from the noise of a seed."""
    torch.manual_seed(seed)
    with refined(flow, factor):
        return weigh(flow, target, count, context=context)
