import math

import pytest
import scipy.stats
import torch

from nflows_mongeampere.pareto import generalized_pareto_shape, largest_shape, tail_shape


@pytest.mark.parametrize("shape", [-0.3, 0.0, 0.3, 0.7, 1.2])
def test_the_shape_of_pareto_samples(shape):
    drawn = scipy.stats.genpareto.rvs(shape, scale=3.0, size=5000, random_state=1)
    found = generalized_pareto_shape(torch.from_numpy(drawn).sort().values)
    # the error of the maximum-likelihood estimate is (1 + k) / √N; the prior adds 10 in 5010
    assert found == pytest.approx(shape, abs=3 * (1 + shape) / math.sqrt(5000))


def test_the_prior_draws_few_samples_towards_one_half():
    """It counts for 10 samples; those of a uniform distribution have k = -1."""
    few = generalized_pareto_shape((torch.arange(10, dtype=torch.float64) + 0.5) / 10)
    assert few == pytest.approx((10 * -1 + 10 * 0.5) / 20, abs=0.2)


@pytest.mark.parametrize("shape", [0.2, 0.7, 1.5])
def test_the_tail_of_pareto_weights_is_theirs(shape):
    drawn = scipy.stats.genpareto.rvs(shape, size=100_000, random_state=2)
    weights = torch.from_numpy(drawn).log() + 700  # as far as exp would overflow
    assert tail_shape(weights) == pytest.approx(shape, abs=0.15)


@pytest.mark.parametrize("deviation", [0.5, 1.0, 3.0])
def test_the_tail_of_lognormal_weights(deviation):
    """Every moment exists, but how far N weights are from them grows with the deviation.

    Where the tail starts, at z standard deviations, von Mises' condition gives it the shape
    1 + d ln U'(t) / d ln t of the quantile U(t) = exp(deviation · z(t)), deviation / z - 1 / z².
    """
    torch.manual_seed(0)
    found = tail_shape(deviation * torch.randn(100_000, dtype=torch.float64))
    start = scipy.stats.norm.isf(3 / math.sqrt(100_000))
    assert found == pytest.approx(deviation / start - 1 / start**2, abs=0.25)


def test_weights_without_a_tail():
    assert tail_shape(torch.zeros(10)) == -math.inf
    assert tail_shape(torch.tensor([0.0, -1.0, -2.0])) == math.inf  # too few to tell
    some = torch.full((1000,), -math.inf)
    assert tail_shape(some) == math.inf
    some[:3] = 0
    assert tail_shape(some) == math.inf
    some[:300] = 0
    assert tail_shape(some) == -math.inf


def test_how_heavy_a_tail_may_be():
    assert largest_shape(100) == pytest.approx(0.5)
    assert largest_shape(1000) == pytest.approx(2 / 3)
    assert largest_shape(10**6) == 0.7
    assert largest_shape(1) == 0
