from __future__ import annotations

import copy
import math

import normflows
import pytest
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, PointwiseAffineTransform
from torch import nn

from nflows_mongeampere import (
    MongeAmpereFlow,
    MongeAmpereTransform,
    RidgePotential,
    transport_costs,
)
from nflows_mongeampere.normflows import MongeAmpere
from nflows_mongeampere.training import MaximumLikelihood, Objective, ReverseKL
from nflows_mongeampere.transport import transports
from nflows_mongeampere.variational import sample_and_log_prob


class Normal(nn.Module):
    """An unnormalised normal density whose integral is e^3."""

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        normal = torch.distributions.Normal(1.0, 2.0)
        return normal.log_prob(x).flatten(1).sum(1) + 3


def model(face: str, target: nn.Module | None = None) -> nn.Module:
    if face == "nflows":
        return MongeAmpereFlow(2, 4)
    base = normflows.distributions.DiagGaussian(2, trainable=False)
    return normflows.NormalizingFlow(base, [MongeAmpere(RidgePotential(2, 4))], target)


@pytest.mark.parametrize("face", ["nflows", "normflows"])
def test_likelihood_of_an_identity_flow_is_that_of_its_base(face):
    x = torch.randn(50, 2)
    loss = MaximumLikelihood(model(face), steps=1).loss(x)
    expected = -torch.distributions.Normal(0, 1).log_prob(x).sum(1).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("batch", [list, tuple])
def test_likelihood_takes_a_context(batch):
    flow = MongeAmpereFlow(2, 4, context_features=3)
    nn.init.normal_(flow._transform.potential.amplitude)
    x, context = torch.randn(5, 2), torch.randn(5, 3)
    loss = MaximumLikelihood(flow, steps=1).loss(batch((x, context)))
    torch.testing.assert_close(loss, -flow.log_prob(x, context).mean())


@pytest.mark.parametrize("face", ["nflows", "normflows"])
def test_free_energy_of_an_exact_flow_is_that_of_its_target(face):
    """F = -ln Z for every sample, where the flow is the target."""
    if face == "nflows":
        flow = Flow(PointwiseAffineTransform(-0.5, 0.5), StandardNormal([2]))
        objective = ReverseKL(flow, Normal(), num_samples=10, steps=1)
    else:
        base = normflows.distributions.DiagGaussian(2)
        nn.init.constant_(base.loc, 1.0)
        nn.init.constant_(base.log_scale, math.log(2))
        flow = normflows.NormalizingFlow(base, [], Normal())
        objective = ReverseKL(flow, num_samples=10, steps=1)
    torch.testing.assert_close(objective.loss(None), torch.tensor(-3.0))
    assert objective.entries == 2


def test_free_energy_is_an_upper_bound_whose_gradient_reaches_the_flow():
    flow = model("nflows")
    loss = ReverseKL(flow, Normal(), num_samples=1000, steps=1).loss(None)
    # KL(N(0, 1) || N(1, 2)) = ln 2 - 3/8 + 1/8, twice
    expected = -3 + 2 * (math.log(2) - 1 / 4)
    assert abs(loss.item() - expected) < 0.1
    loss.backward()
    assert all(p.grad is not None for p in flow.parameters())


def moving_model(face: str, target: nn.Module | None = None) -> nn.Module:
    """A model that moves its samples, with a negligible error of the solver."""
    flow = model(face, target)
    (transport,) = transports(flow)
    transport.steps = 40
    nn.init.normal_(transport.potential.amplitude)
    return flow


def gradients(objective: Objective) -> dict[str, torch.Tensor]:
    """Of the loss, the samples being the same each time."""
    torch.manual_seed(0)
    names, parameters = zip(*objective.flow.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(objective.loss(None), parameters), strict=True))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("face", ["nflows", "normflows"])
def test_the_path_gradient_leaves_out_the_score(face):
    """The whole gradient is that along the path and the mean score of the same samples."""
    flow = moving_model(face, Normal())
    keywords = {"target": Normal(), "num_samples": 16, "steps": 1}
    whole = gradients(ReverseKL(flow, **keywords))
    path = gradients(ReverseKL(flow, **keywords, path_gradient=True))
    torch.manual_seed(0)
    x, _ = sample_and_log_prob(flow, 16)
    score = torch.autograd.grad(flow.log_prob(x.detach()).mean(), flow.parameters())
    for name, part in zip(whole, score, strict=True):
        torch.testing.assert_close(whole[name], path[name] + part, rtol=1e-4, atol=1e-7)
        assert part.abs().max() > 1e-3


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("path_gradient", [False, True])
def test_the_free_energy_is_that_of_normflows(path_gradient):
    flow = moving_model("normflows", Normal())
    names, parameters = zip(*flow.named_parameters(), strict=True)
    torch.manual_seed(0)
    expected = flow.reverse_kld(16, score_fn=not path_gradient)
    objective = ReverseKL(flow, num_samples=16, steps=1, path_gradient=path_gradient)
    torch.manual_seed(0)
    torch.testing.assert_close(objective.loss(None), expected)
    whole = dict(zip(names, torch.autograd.grad(expected, parameters), strict=True))
    torch.testing.assert_close(gradients(objective), whole)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("face", ["nflows", "normflows"])
def test_the_path_gradient_of_an_exact_flow_is_zero_for_every_sample(face):
    flow = moving_model(face)
    target = copy.deepcopy(flow)
    for path_gradient in (True, False):
        objective = ReverseKL(flow, target, num_samples=1, steps=1, path_gradient=path_gradient)
        for gradient in gradients(objective).values():
            assert (gradient.abs().max() < 1e-5) == path_gradient


@pytest.mark.usefixtures("float64")
def test_the_path_gradient_keeps_the_loss_the_penalties_and_the_flow():
    flow = moving_model("nflows")
    flow._transform.potential.bias.requires_grad_(False)
    losses = []
    for path_gradient in (False, True):
        objective = ReverseKL(
            flow,
            Normal(),
            num_samples=16,
            steps=1,
            kinetic=0.5,
            roughness=0.5,
            path_gradient=path_gradient,
        )
        torch.manual_seed(0)
        losses.append(objective._penalised_loss(None))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    learnt = {name for name, parameter in flow.named_parameters() if parameter.requires_grad}
    assert learnt == {"_transform.potential.weight", "_transform.potential.amplitude"}


@pytest.mark.parametrize("face", ["nflows", "normflows"])
def test_penalties_weigh_the_mean_costs(face):
    flow, x = model(face), torch.randn(6, 2)
    potential = next(m for m in flow.modules() if isinstance(m, RidgePotential))
    nn.init.normal_(potential.amplitude)
    objective = MaximumLikelihood(flow, steps=1, kinetic=0.3, roughness=0.02)
    with transport_costs(flow) as costs:
        nll = -flow.log_prob(x).mean()
    expected = nll + 0.3 * costs.kinetic.mean() + 0.02 * costs.roughness.mean()
    torch.testing.assert_close(objective._penalised_loss(x), expected)
    torch.testing.assert_close(objective.loss(x), nll)
    assert costs.kinetic.mean() > 0.01
    assert costs.roughness.mean() > 0.01


def test_the_rate_rises_and_falls_with_the_budget():
    objective = MaximumLikelihood(model("nflows"), steps=100, warmup_steps=9)
    rates = []
    for step in (0, 4, 9, 50, 100):
        objective.progress = step / 100
        rates.append(objective._rate(step))
    half = [0.5 * (1 + math.cos(math.pi * p)) for p in (0, 0.04, 0.09, 0.5, 1)]
    torch.testing.assert_close(rates, [0.1 * half[0], 0.5 * half[1], *half[2:]])
    short = MaximumLikelihood(model("nflows"), steps=20, warmup_steps=1000)
    short.progress = 0.05
    torch.testing.assert_close(short._rate(0), 0.5 * 0.5 * (1 + math.cos(math.pi * 0.05)))
    constant = MaximumLikelihood(model("nflows"), steps=100, warmup_steps=0, anneal=False)
    constant.progress = 0.7
    assert constant._rate(70) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"flow": 3}, TypeError, "flow: got int, expected a flow of nflows"),
        ({"flow": nn.Linear(2, 2)}, TypeError, "flow: got Linear"),
        ({"flow": MongeAmpereTransform(RidgePotential(2, 2))}, TypeError, "flow: got"),
        ({"steps": None}, ValueError, "steps: got neither steps nor minutes"),
        ({"steps": 0}, ValueError, "steps: got 0"),
        ({"minutes": -1.0}, ValueError, "minutes: got -1"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate: got 0"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps: got -1"),
        ({"anneal": 1}, TypeError, "anneal: got 1"),
        ({"seed": 1.5}, TypeError, "seed: got 1.5"),
        ({"kinetic": -0.1}, ValueError, "kinetic: got -0.1, expected a finite number >= 0"),
        ({"roughness": math.nan}, ValueError, "roughness: got nan"),
        ({"roughness": "none"}, TypeError, "roughness: got 'none'"),
        (
            {"flow": Flow(PointwiseAffineTransform(0.0, 2.0), StandardNormal([2])), "kinetic": 1},
            ValueError,
            "kinetic: got 1 for a Flow without a Monge-Ampère flow",
        ),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        MaximumLikelihood(**{"flow": model("nflows"), "steps": 5, **arguments})


def test_a_free_energy_names_what_does_not_fit():
    with pytest.raises(TypeError, match="target: got NoneType, expected an object with log_prob"):
        ReverseKL(model("nflows"), steps=1)
    with pytest.raises(ValueError, match="num_samples: got 0"):
        ReverseKL(model("nflows"), Normal(), num_samples=0, steps=1)
    with pytest.raises(TypeError, match="path_gradient: got 'yes'"):
        ReverseKL(model("nflows"), Normal(), path_gradient="yes", steps=1)
    flow = model("normflows", normflows.distributions.DiagGaussian(2))
    with pytest.raises(ValueError, match=r"target: DiagGaussian, .* would be trained"):
        ReverseKL(flow, steps=1)
    ReverseKL(model("normflows", flow.p.requires_grad_(False)), steps=1)
    steps = normflows.flows.MetropolisHastings(
        Normal(), normflows.distributions.DiagGaussianProposal((2,), 0.1), 2
    )
    flow = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(2), [steps], Normal())
    with pytest.raises(ValueError, match="path_gradient: got True for a flow with a Metropolis"):
        ReverseKL(flow, path_gradient=True, steps=1)


def test_a_target_has_one_log_density_for_each_sample():
    """Others would be broadcast, without a word where D is the number of samples."""
    flow, target = MongeAmpereFlow(4, 4), torch.distributions.Normal(0.0, 1.0)
    with pytest.raises(ValueError, match=r"target: Normal returned .*\(4, 4\).*Independent"):
        ReverseKL(flow, target, num_samples=4, steps=1).loss(None)


def test_samples_without_bounds_are_a_loss_that_is_no_number():
    """The guard of the training says the rest."""
    wide = PointwiseAffineTransform(0.0, 1e-30)
    flow = Flow(CompositeTransform([wide, wide]), StandardNormal([2]))
    loss = ReverseKL(flow, Normal(), path_gradient=True, steps=1).loss(None)
    assert not math.isfinite(loss)
