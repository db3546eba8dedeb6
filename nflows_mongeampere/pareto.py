"""How heavy the tail of some numbers is: what decides whether their mean can be trusted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# in the fit's prior: how many exceedances it counts for, and at which shape
PRIOR_COUNT, PRIOR_SHAPE = 10, 0.5
# weights that make a tail
FEWEST = 5


def tail_shape(log_weights: Tensor) -> float:
    r"""The shape :math:`\hat k` of a Pareto distribution fitted to the largest weights.

    Moments of order below :math:`1/k` exist: the variance for :math:`k < 1/2`, the mean for
    :math:`k < 1`. The tail are the :math:`\min(N/5, 3\sqrt N)` largest of N weights, less the next
    one (Vehtari, Simpson, Gelman, Yao and Gabry, `arXiv:1507.02646
    <https://arxiv.org/abs/1507.02646>`_).

    Args:
        log_weights: logarithms of the weights, shape (N,).

    Returns:
        The shape; infinite where fewer than five weights make the tail, and minus infinity where
        there is none, because the largest weights are equal.
    """
    count = len(log_weights)
    tail = min(count // 5, math.ceil(3 * math.sqrt(count)))
    weights = (log_weights.double() - log_weights.max()).exp().sort().values
    if weights[-1] == weights[-tail - 1 if tail >= FEWEST else 0]:
        return -math.inf
    cutoff = weights[-tail - 1]
    exceedances = weights[weights > cutoff] - cutoff
    return generalized_pareto_shape(exceedances) if len(exceedances) >= FEWEST else math.inf


def largest_shape(count: int) -> float:
    r"""The shape up to which the mean of so many weights and its error bar can be trusted.

    At :math:`\hat k = 1 - 1/\log_{10} N` N weights no longer come close to their mean; above 0.7 no
    number of weights in practice does (Vehtari et al., section 3).
    """
    return min(1 - 1 / math.log10(max(count, 10)), 0.7)


def generalized_pareto_shape(exceedances: Tensor) -> float:
    r"""The shape k of a generalised Pareto distribution, :math:`p(x) \propto (1 + kx/s)^{-1-1/k}`.

    The posterior mean of :math:`b = -k/s` under a prior that the data scale, by quadrature (Zhang
    and Stephens, *Technometrics* 51, 316, 2009), and a weak prior of k towards 1/2 (Vehtari et al.,
    appendix C).

    Args:
        exceedances: positive numbers in rising order, float64, shape (M,).
    """
    count = len(exceedances)
    points = 30 + math.isqrt(count)
    quartile = exceedances[int(count / 4 + 0.5) - 1]
    grid = torch.arange(1, points + 1, dtype=exceedances.dtype, device=exceedances.device) - 0.5
    b = 1 / exceedances[-1] + (1 - (points / grid).sqrt()) / (3 * quartile)
    k = torch.log1p(-b[:, None] * exceedances).mean(1)
    log_likelihood = count * ((-b / k).log() - k - 1)
    mean_b = (b * log_likelihood.softmax(0)).sum()
    shape = torch.log1p(-mean_b * exceedances).mean().item()
    return (count * shape + PRIOR_COUNT * PRIOR_SHAPE) / (count + PRIOR_COUNT)
