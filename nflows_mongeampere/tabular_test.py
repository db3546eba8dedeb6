from __future__ import annotations

import math

import pytest
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from nflows_mongeampere.tabular import Bounded, NormalMixture, SinhArcsinh, whitening

INF = math.inf


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def bounded():
    ends = Bounded([-INF, -1.0, -INF, 2.0], [INF, INF, 3.0, 5.0])
    return ends, torch.tensor([[-7.0, -0.5, 2.5, 2.25], [4.0, 30.0, -8.0, 4.75]])


def sinh_arcsinh():
    marginals = SinhArcsinh(4)
    for parameter in marginals.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return marginals, torch.randn(20, 4) * 3


@pytest.mark.parametrize("make", [bounded, sinh_arcsinh])
def test_log_determinants_are_those_of_autograd(make):
    transform, x = make()
    z, logabsdet = transform(x)
    jacobian = torch.autograd.functional.jacobian(lambda x: transform(x)[0].sum(0), x)
    expected = torch.stack([jacobian[:, i].slogdet()[1] for i in range(len(x))])
    torch.testing.assert_close(logabsdet, expected)
    back, logabsdet_back = transform.inverse(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(logabsdet_back, -logabsdet)


def test_ends_that_are_none():
    with pytest.raises(ValueError, match="upper: got"):
        Bounded([0.0], [0.0])


def mixture():
    base = NormalMixture(3, 4)
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter)
    precision = base.factors.triu() @ base.factors.triu().mT
    reference = MixtureSameFamily(
        Categorical(logits=base.logits), MultivariateNormal(base.means, precision_matrix=precision)
    )
    return base, reference


def test_a_mixture_is_that_of_torch():
    base, reference = mixture()
    x = torch.randn(10, 3) * 2
    torch.testing.assert_close(base.log_prob(x), reference.log_prob(x))


def test_samples_of_a_mixture_have_its_moments():
    base, reference = mixture()
    with torch.no_grad():
        base.factors.add_(2 * torch.eye(3))  # away from singular
        precision = base.factors.triu() @ base.factors.triu().mT
        reference = MixtureSameFamily(
            Categorical(logits=base.logits),
            MultivariateNormal(base.means, precision_matrix=precision),
        )
        x = base.sample(20_000)
        error = reference.variance.div(len(x)).sqrt()
        assert ((x.mean(0) - reference.mean).abs() < 5 * error).all()
        # E ln p is the negative entropy: the spread of the bumps, not only their place
        ours, theirs = base.log_prob(x), reference.log_prob(reference.sample((20_000,)))
        assert abs(ours.mean() - theirs.mean()) < 5 * (2 * ours.var() / len(x)).sqrt()


def test_whitening_whitens():
    x = torch.randn(50, 3) @ torch.randn(3, 3) + 4
    z = Flow(whitening(x.mean(0), torch.cov(x.T)), StandardNormal([3])).transform_to_noise(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(3), atol=1e-8, rtol=0)
    torch.testing.assert_close(torch.cov(z.T), torch.eye(3))
