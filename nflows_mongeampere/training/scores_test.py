"""The score that a flow carries along, against autograd through its density."""

import itertools

import normflows
import pytest
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, InverseTransform, LULinear
from torch import nn

from nflows_mongeampere import (
    AutogradPotential,
    ConvolutionalPotential,
    MongeAmpereTransform,
    RidgePotential,
    SymmetrizedPotential,
    transport_costs,
)
from nflows_mongeampere.groups import translations
from nflows_mongeampere.normflows import MongeAmpere
from nflows_mongeampere.training.scores import sample_with_score

pytestmark = pytest.mark.usefixtures("float64")


def moving(potential):
    nn.init.normal_(getattr(potential, "potential", potential).amplitude, std=0.4)
    return potential


POTENTIALS = {
    "ridge": lambda: moving(RidgePotential(4, 8)),
    "time": lambda: moving(RidgePotential(4, 8, time_dependent=True, activation="logcosh")),
    "convolutional": lambda: moving(ConvolutionalPotential((1, 2, 2), 2, kernel_size=3)),
    "orbits": lambda: moving(SymmetrizedPotential(RidgePotential(4, 2), translations((4,)))),
}


def flow_of_nflows(potential, steps):
    """Two flows, one of them upside down, and a linear layer between them."""
    transforms = [
        MongeAmpereTransform(potential(), steps=steps),
        LULinear(4),
        InverseTransform(MongeAmpereTransform(potential(), steps=steps)),
    ]
    return Flow(CompositeTransform(transforms), StandardNormal([4]))


def model_of_normflows(potential, steps):
    base = normflows.distributions.DiagGaussian(4, trainable=False)
    return normflows.NormalizingFlow(
        base, [MongeAmpere(potential(), steps=steps) for _ in range(2)]
    )


@pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS)
@pytest.mark.parametrize("build", [flow_of_nflows, model_of_normflows])
def test_score_is_the_slope_of_the_density(build, potential):
    """To the order of the solver."""
    errors = []
    for steps in (4, 8):
        torch.manual_seed(0)
        flow = build(potential, steps)
        drawn = sample_with_score(flow, 5)
        x = drawn.x.detach().requires_grad_()
        log_prob = flow.log_prob(x)
        (score,) = torch.autograd.grad(log_prob.sum(), x)
        torch.testing.assert_close(drawn.log_prob, log_prob.detach(), rtol=1e-3, atol=1e-3)
        errors.append(float((drawn.score - score).abs().max()))
    for coarse, fine in itertools.pairwise(errors):
        assert fine < coarse / 8 or fine < 1e-10
    assert errors[-1] < 1e-4 * float(score.abs().max())


def test_each_context_has_its_own_score():
    torch.manual_seed(0)
    potential = moving(RidgePotential(4, 8, context_features=2))
    transform = CompositeTransform([LULinear(4), MongeAmpereTransform(potential, steps=16)])
    flow, context = Flow(transform, StandardNormal([4])), torch.randn(3, 1)
    flow._embedding_net = nn.Linear(1, 2)
    drawn = sample_with_score(flow, 5, context)
    x = drawn.x.detach().requires_grad_()
    log_prob = flow.log_prob(x, context.repeat_interleave(5, 0))
    (score,) = torch.autograd.grad(log_prob.sum(), x)
    torch.testing.assert_close(drawn.log_prob, log_prob.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn.score, score, rtol=0, atol=1e-5)


def test_samples_are_those_of_the_flow():
    torch.manual_seed(0)
    flow = flow_of_nflows(POTENTIALS["ridge"], 4)
    torch.manual_seed(1)
    drawn = sample_with_score(flow, 6)
    torch.manual_seed(1)
    x, log_prob = flow.sample_and_log_prob(6)
    torch.testing.assert_close(drawn.x, x)
    torch.testing.assert_close(drawn.log_prob, log_prob)
    assert not drawn.score.requires_grad
    weights = dict(flow.named_parameters())
    ours = torch.autograd.grad(drawn.x.square().sum(), weights.values(), allow_unused=True)
    theirs = torch.autograd.grad(x.square().sum(), weights.values(), allow_unused=True)
    for name, gradient, expected in zip(weights, ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, msg=name)


class Bowl(nn.Module):
    def forward(self, x):
        return x.square().sum(1) / 4


def test_flows_that_cannot_carry_it_say_so_before_they_draw():
    state = torch.get_rng_state()
    transform = MongeAmpereTransform(AutogradPotential(Bowl()))
    assert sample_with_score(Flow(transform, StandardNormal([4])), 2) is None
    adaptive = MongeAmpereTransform(RidgePotential(4, 2), solver="dopri5")
    assert sample_with_score(Flow(adaptive, StandardNormal([4])), 2) is None
    flow = Flow(MongeAmpereTransform(moving(RidgePotential(4, 2))), StandardNormal([4]))
    state = torch.get_rng_state()
    with transport_costs(flow):
        assert sample_with_score(flow, 2) is None
    assert torch.equal(torch.get_rng_state(), state)
