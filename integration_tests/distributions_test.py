"""The flow inside Pyro and zuko, through torch.distributions."""

import math

import pyro
import pytest
import torch
import zuko
from pyro.distributions import Independent, Normal, TransformedDistribution
from pyro.infer import SVI, Trace_ELBO

from nflows_mongeampere import MongeAmpereTransform, RidgePotential
from nflows_mongeampere.distributions import FlowTransform


@pytest.fixture
def transform() -> MongeAmpereTransform:
    torch.manual_seed(0)
    return MongeAmpereTransform(RidgePotential(2, 16), steps=4)


def base() -> Independent:
    return Independent(Normal(torch.zeros(2), torch.ones(2)), 1)


def test_a_guide_of_pyro_finds_the_posterior_and_the_evidence(transform):
    """Two correlated means, one observation: the posterior is a Gaussian, the evidence too."""
    datum = torch.tensor(1.5)

    def model() -> None:
        means = pyro.sample("means", base())
        pyro.sample("sum", Normal(means.sum(-1), 0.5), obs=datum)

    def guide() -> None:
        pyro.module("flow", transform)
        pyro.sample("means", TransformedDistribution(base(), [FlowTransform(transform, (2,))]))

    pyro.clear_param_store()
    elbo = Trace_ELBO(num_particles=64, max_plate_nesting=0, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 2e-2}), elbo)
    for _ in range(150):
        svi.step()
    with torch.no_grad():
        bound = -sum(elbo.loss(model, guide) for _ in range(10)) / 10
        means = transform.inverse(torch.randn(2000, 2))[0]
    variance = 2 + 0.5**2
    evidence = -0.5 * math.log(2 * math.pi * variance) - 0.5 * datum.item() ** 2 / variance
    assert evidence - 0.15 < bound < evidence + 0.05
    expected = torch.full((2,), datum.item() / variance)
    torch.testing.assert_close(means.mean(0), expected, rtol=0, atol=0.1)
    assert torch.corrcoef(means.T)[0, 1] < -0.6  # -4/5 exactly


def test_a_flow_of_zuko_with_our_transform_among_its_own(transform):
    own = FlowTransform(transform, (2,)).inv  # zuko's flows lead from data to noise
    with torch.no_grad():
        transform.potential.amplitude.normal_()
        shift = zuko.transforms.MonotonicAffineTransform(torch.tensor([0.5, -1.0]), torch.ones(2))
        composed = zuko.transforms.ComposedTransform(shift, own)
        flow = zuko.distributions.NormalizingFlow(
            composed, zuko.distributions.DiagNormal(torch.zeros(2), torch.ones(2))
        )
        x, log_prob = flow.rsample_and_log_prob((5,))
        torch.testing.assert_close(flow.log_prob(x), log_prob, rtol=1e-3, atol=1e-3)
        y, affine = shift.call_and_ladj(x)
        noise, logabsdet = transform(y)
        expected = base().log_prob(noise) + logabsdet + affine.sum(-1)
        torch.testing.assert_close(flow.log_prob(x), expected)
