"""Figures of a flow that do not change any more when its solver takes more steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from nflows_mongeampere import validation
from nflows_mongeampere.accuracy import AccuracyWarning
from nflows_mongeampere.models import refined, transports

Figure = TypeVar("Figure", float, Tensor)


@dataclass(frozen=True)
class Converged(Generic[Figure]):
    """What :func:`converged` found.

    Attributes:
        figure: at ``factor`` times the steps of the model.
        finer: the same at twice these steps.
        factor: of the steps, a power of two.
    """

    figure: Figure
    finer: Figure
    factor: int

    @property
    def change(self) -> float:
        """The most that an entry changes at twice the steps: an estimate of the solver's error."""
        return float(torch.as_tensor(self.finer - self.figure).abs().max())


def converged(
    model: nn.Module, evaluate: Callable[[], Figure], tolerance: float, *, doublings: int = 6
) -> Converged[Figure]:
    r"""Evaluate a figure at more and more steps, until it stands still.

    With :math:`F(n)` the figure at n times the steps of the model, the result is the first of
    :math:`F(1), F(2), F(4), \ldots` for which

    .. math:: |F(2 n) - F(n)| \le \epsilon.

    A training finds the weaknesses of its solver: only a figure that stands still is one of the
    flow. Every evaluation starts from the same state of torch's generators, so that figures of
    drawn samples differ by the solver alone; no gradients are recorded. To evaluate more at the
    same steps, use ``with refined(model, found.factor)``.

    Args:
        model: a flow, or anything that contains some; left as it is.
        evaluate: evaluates a number or a tensor of the model, such as a mean loss on a test set.
        tolerance: :math:`\epsilon`, in the unit of the figure (nats, for a loss).
        doublings: how often the steps are doubled at most.

    Returns:
        The figure, the same at twice the steps, and the factor of the steps.

    Warns:
        AccuracyWarning: if the figure does not stand still within the doublings; ``change`` is
            then above the tolerance.

    Raises:
        TypeError: if ``model`` is no module, or an argument is no number.
        ValueError: if there is no Monge-Ampère flow in ``model``, or a number is not positive.
        IntegrationError: where the solver fails.

    Example:
        >>> import torch
        >>> from nflows_mongeampere import MongeAmpereFlow
        >>> from nflows_mongeampere.convergence import converged
        >>> flow, x = MongeAmpereFlow(2, 16, steps=1), torch.randn(100, 2)
        >>> found = converged(flow, lambda: -flow.log_prob(x).mean(), tolerance=1e-3)
        >>> found.factor, found.change  # a new flow is the identity, exact in one step
        (1, 0.0)
    """
    tolerance = validation.positive("tolerance", tolerance)
    doublings = validation.integer("doublings", doublings)
    flows = transports(model)
    if not flows:
        raise ValueError(
            f"model: got {type(model).__name__}, in which no Monge-Ampère flow is found"
        )
    devices = {p.device for p in model.parameters() if p.is_cuda}

    @torch.no_grad()
    def at(factor: int) -> Figure:
        with refined(model, factor), torch.random.fork_rng(devices=devices):
            return evaluate()

    coarse, factor = at(1), 1
    while True:
        finer = at(2 * factor)
        found = Converged(coarse, finer, factor)
        if found.change <= tolerance:
            return found
        if factor >= 2 ** (doublings - 1):
            break
        coarse, factor = finer, 2 * factor
    warnings.warn(
        f"the figure still changes by {found.change:.2g} from {factor} to {2 * factor} times the "
        f"steps, more than the tolerance of {tolerance:.2g}: allow more doublings, take a solver "
        "of higher order, or train with a SolverGuard",
        AccuracyWarning,
        stacklevel=2,
    )
    return found
