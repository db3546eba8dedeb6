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
    AutogradPotential,
    MongeAmpereFlow,
    MongeAmpereTransform,
    RidgePotential,
    refined,
    transport_costs,
)
from nflows_mongeampere.models import transports
from nflows_mongeampere.normflows import MongeAmpere
from nflows_mongeampere.training import MaximumLikelihood, Objective, ReverseKL
from nflows_mongeampere.training.layers import observed
from nflows_mongeampere.variational import sample_and_log_prob


class Normal(nn.Module):
    """An unnormalised normal density whose integral is e^3."""

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        normal = torch.distributions.Normal(1.0, 2.0)
        return normal.log_prob(x).flatten(1).sum(1) + 3


def model(library: str, target: nn.Module | None = None) -> nn.Module:
    if library == "nflows":
        return MongeAmpereFlow(2, 4)
    base = normflows.distributions.DiagGaussian(2, trainable=False)
    return normflows.NormalizingFlow(base, [MongeAmpere(RidgePotential(2, 4))], target)


@pytest.mark.parametrize("library", ["nflows", "normflows"])
def test_likelihood_of_an_identity_flow_is_that_of_its_base(library):
    x = torch.randn(50, 2)
    loss = MaximumLikelihood(model(library), steps=1).loss(x)
    expected = -torch.distributions.Normal(0, 1).log_prob(x).sum(1).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("batch", [list, tuple])
def test_likelihood_takes_a_context(batch):
    flow = MongeAmpereFlow(2, 4, context_features=3)
    nn.init.normal_(flow._transform.potential.amplitude)
    x, context = torch.randn(5, 2), torch.randn(5, 3)
    loss = MaximumLikelihood(flow, steps=1).loss(batch((x, context)))
    torch.testing.assert_close(loss, -flow.log_prob(x, context).mean())


@pytest.mark.parametrize("library", ["nflows", "normflows"])
def test_free_energy_of_an_exact_flow_is_that_of_its_target(library):
    """F = -ln Z for every sample, where the flow is the target."""
    if library == "nflows":
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


def moving_model(library: str, target: nn.Module | None = None) -> nn.Module:
    """A model that moves its samples, with a negligible error of the solver."""
    flow = model(library, target)
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
@pytest.mark.parametrize("library", ["nflows", "normflows"])
def test_the_path_gradient_leaves_out_the_score(library):
    """The whole gradient is that along the path and the mean score of the same samples."""
    flow = moving_model(library, Normal())
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
@pytest.mark.parametrize("library", ["nflows", "normflows"])
def test_the_path_gradient_of_an_exact_flow_is_zero_for_every_sample(library):
    flow = moving_model(library)
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


@pytest.mark.parametrize("library", ["nflows", "normflows"])
def test_penalties_weigh_the_mean_costs(library):
    flow, x = model(library), torch.randn(6, 2)
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
        ({"flow": 3}, TypeError, "flow: got 3, expected a flow of nflows"),
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
    with pytest.raises(TypeError, match="target: got None, expected an object with log_prob"):
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


class Around(nn.Module):
    """A normal density around the context."""

    def log_prob(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        return -(x - context).square().sum(1)


def conditional_model(library: str) -> nn.Module:
    """It moves its samples, as the context says."""
    if library == "nflows":
        flow: nn.Module = MongeAmpereFlow(2, 4, context_features=2, steps=20)
    else:
        potential = RidgePotential(2, 4, context_features=2)
        base = normflows.distributions.DiagGaussian(2)
        transport = MongeAmpere(potential, steps=20)
        flow = normflows.ConditionalNormalizingFlow(base, [transport], Around())
    nn.init.normal_(transports(flow)[0].potential.amplitude)
    return flow


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("path_gradient", [False, True])
@pytest.mark.parametrize("batch", [lambda c: c, lambda c: [c], lambda c: (torch.zeros(8, 5), c)])
def test_the_free_energy_under_contexts_is_that_of_normflows(path_gradient, batch):
    flow, context = conditional_model("normflows"), torch.randn(8, 2)
    names, parameters = zip(*flow.named_parameters(), strict=True)
    torch.manual_seed(0)
    expected = flow.reverse_kld(8, context, score_fn=not path_gradient)
    objective = ReverseKL(flow, num_samples=8, steps=1, path_gradient=path_gradient)
    torch.manual_seed(0)
    loss = objective.loss(batch(context))
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss, parameters)
    for name, part, whole in zip(
        names, found, torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(part, whole, msg=name)


@pytest.mark.usefixtures("float64")
def test_normflows_repeats_contexts_that_are_fewer_than_the_samples():
    flow, context = conditional_model("normflows"), torch.randn(3, 2)
    torch.manual_seed(0)
    expected = flow.reverse_kld(9, context.repeat_interleave(3, 0))
    torch.manual_seed(0)
    torch.testing.assert_close(ReverseKL(flow, num_samples=8, steps=1).loss(context), expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("path_gradient", [False, True])
def test_nflows_draws_samples_for_each_context(path_gradient):
    flow, context = conditional_model("nflows"), torch.randn(3, 2)
    torch.manual_seed(0)
    x, log_q = flow.sample_and_log_prob(8, context)
    expected = (log_q + (x - context[:, None]).square().sum(2)).mean()
    objective = ReverseKL(flow, Around(), num_samples=8, steps=1, path_gradient=path_gradient)
    torch.manual_seed(0)
    loss = objective.loss(context)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    rows = context.repeat_interleave(8, 0)
    score = flow.log_prob(x.detach().flatten(0, 1), rows).mean() * path_gradient
    parameters = list(flow.parameters())
    gradients = (torch.autograd.grad(part, parameters) for part in (loss, expected, score))
    for found, whole, part in zip(*gradients, strict=True):
        torch.testing.assert_close(found, whole - part, rtol=1e-4, atol=1e-6)
    validated, errors = objective.judge(context, seed=1)
    assert validated.shape == (24,)
    assert errors.abs().max() < 1e-4


def test_batches_are_no_contexts_where_a_flow_takes_none():
    """Here the target could take one, as all densities of nflows can."""
    flow = MongeAmpereFlow(2, 4)
    objective = ReverseKL(flow, copy.deepcopy(flow), num_samples=5, steps=1)
    torch.testing.assert_close(objective.loss(torch.zeros(7, 1)), torch.tensor(0.0))


class Wave(nn.Module):
    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return torch.sin(x.sum(1) + context.sum(1))


def test_a_network_says_that_it_takes_a_context():
    flow = Flow(MongeAmpereTransform(AutogradPotential(Wave())), StandardNormal([2]))
    assert ReverseKL(flow, Around(), num_samples=4, steps=1).loss(torch.zeros(3, 2)).isfinite()


def stiff_model(library: str, target: nn.Module | None = None) -> nn.Module:
    """Its solver is too coarse."""
    flow = model(library, target)
    (transport,) = transports(flow)
    transport.steps = 1
    nn.init.normal_(transport.potential.amplitude)
    return flow


def solves(objective: Objective, batch: object) -> list[tuple[int, int]]:
    """The rows and the solver's steps of each solve in a validation."""
    found = []
    (transport,) = transports(objective.flow)

    def note(place: str, layer: nn.Module, inputs: tuple, outputs: object) -> None:
        if layer is transport:
            found.append((len(inputs[0]), transport.steps))

    with observed(objective.flow, note):
        objective.judge(batch, seed=1)
    return found


@pytest.mark.parametrize("library", ["nflows", "normflows"])
def test_a_validation_takes_two_solves(library):
    flow = stiff_model(library)
    assert solves(MaximumLikelihood(flow, steps=1), torch.randn(50, 2)) == [(50, 2), (20, 1)]
    objective = ReverseKL(flow, Normal(), num_samples=40, steps=1)
    assert solves(objective, torch.zeros(3, 1)) == [(40, 2), (40, 1)]
    objective = ReverseKL(flow, Normal(), num_samples=40, steps=1, path_gradient=True)
    assert solves(objective, torch.zeros(3, 1)) == [(40, 2), (40, 1)]


@pytest.mark.parametrize("library", ["nflows", "normflows"])
def test_a_validation_measures_the_loss_that_is_trained(library):
    flow, x = stiff_model(library), torch.randn(50, 2)
    losses, errors = MaximumLikelihood(flow, steps=1).judge(x, seed=1)
    with refined(flow):
        torch.testing.assert_close(losses, -flow.log_prob(x))
    torch.testing.assert_close(errors, -flow.log_prob(x[:20]) - losses[:20])
    assert errors.abs().mean() > 1e-3

    losses, errors = ReverseKL(flow, Normal(), num_samples=40, steps=1).judge(None, seed=1)
    torch.manual_seed(1)
    y, log_q = sample_and_log_prob(flow, 40)
    with refined(flow):
        torch.manual_seed(1)
        x, fine_log_q = sample_and_log_prob(flow, 40)
    fine = fine_log_q - Normal().log_prob(x)
    torch.testing.assert_close(losses, fine)
    torch.testing.assert_close(errors, log_q - Normal().log_prob(y) - fine)


def test_a_validation_of_an_objective_that_gives_a_mean_alone():
    class Squared(Objective):
        def loss(self, batch: torch.Tensor) -> torch.Tensor:
            return self.flow.log_prob(batch).mean().square()

    flow, x = stiff_model("nflows"), torch.randn(50, 2)
    objective = Squared(flow, steps=1)
    losses, errors = objective.judge(x, seed=1)
    with refined(flow):
        torch.testing.assert_close(losses.mean(), objective.loss(x))
    torch.testing.assert_close(errors.mean(), objective.loss(x) - losses.mean())
    with pytest.raises(NotImplementedError, match="implements neither losses nor loss"):
        Objective(flow, steps=1).loss(x)


class Bowl(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x).sum(1)


def test_a_random_laplacian_is_the_same_in_both_solves():
    """Else its noise would be taken for an error of the solver."""
    potential = AutogradPotential(Bowl(), laplacian="hutchinson", probe="gaussian")
    flow = Flow(MongeAmpereTransform(potential, steps=20), StandardNormal([2]))
    _, errors = MaximumLikelihood(flow, steps=1).judge(torch.randn(50, 2), seed=1)
    assert errors.abs().max() < 1e-4
    with pytest.raises(ValueError, match=r"flow: the Laplacian of _transform.potential .*'exact'"):
        ReverseKL(flow, Normal(), path_gradient=True, steps=1)
    assert ReverseKL(flow, Normal(), steps=1).loss(None).isfinite()  # unbiased


def test_a_layer_in_several_places_is_left_as_it_was():
    shared = torch.nn.Linear(2, 2)
    model = torch.nn.Sequential(torch.nn.Sequential(shared), torch.nn.Sequential(shared))
    seen = []
    with observed(model, lambda place, *_: seen.append(place)):
        model(torch.zeros(1, 2))
    assert {"0.0", "1.0"} <= set(seen)
    assert "forward" not in vars(shared)
