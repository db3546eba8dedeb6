"""Potentials in torchcfm's training loop, and the exact density of their flows afterwards."""

import pytest
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torchcfm import ConditionalFlowMatcher, ExactOptimalTransportConditionalFlowMatcher
from torchdiffeq import odeint

from nflows_mongeampere import MongeAmpereTransform, RidgePotential

MATCHERS = (ConditionalFlowMatcher, ExactOptimalTransportConditionalFlowMatcher)


def target() -> MixtureSameFamily:
    """Two bumps, whose density is known."""
    centres = torch.tensor([[-1.2, 0.0], [1.2, 0.5]])
    return MixtureSameFamily(
        Categorical(torch.ones(2)), Independent(Normal(centres, torch.tensor(0.5)), 1)
    )


@pytest.mark.parametrize("matcher", MATCHERS)
def test_torchcfm_s_loop_trains_a_flow_with_an_exact_density(matcher):
    torch.manual_seed(0)
    potential = RidgePotential(2, 64, time_dependent=True, activation="logcosh")
    pairs = matcher(sigma=0.0)
    optimizer = torch.optim.Adam(potential.parameters(), lr=1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        x1 = target().sample((256,))
        x0 = torch.randn_like(x1)
        t, xt, ut = pairs.sample_location_and_conditional_flow(x0, x1)
        loss = (potential.gradient(xt, t) - ut).square().mean()
        loss.backward()
        optimizer.step()
    flow = Flow(MongeAmpereTransform(potential, steps=16), StandardNormal([2]))
    with torch.no_grad():
        x = target().sample((4000,))
        missed = (target().log_prob(x) - flow.log_prob(x)).mean()
        assert 0 < missed < 0.1, "nats that the density misses on average"
        # their way to sample: torchdiffeq from t = 0 to 1
        noise = torch.randn(100, 2)
        velocity = lambda t, x: potential.gradient(x, t.expand(len(x)))  # noqa: E731
        theirs = odeint(velocity, noise, torch.tensor([0.0, 1.0]), atol=1e-6, rtol=1e-6)[-1]
        ours, _ = flow._transform.inverse(noise)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
