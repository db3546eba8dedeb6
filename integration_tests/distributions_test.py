"""The flow inside Pyro and zuko, through torch.distributions."""

import copy
import math

import pyro
import pytest
import torch
import zuko
from pyro.distributions import (
    ConditionalTransformedDistribution,
    Independent,
    Normal,
    TransformedDistribution,
)
from pyro.distributions.conditional import ConditionalComposeTransformModule, ConditionalTransform
from pyro.distributions.torch_transform import ComposeTransformModule
from pyro.distributions.transforms import AffineTransform, ComposeTransform
from pyro.infer import HMC, MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow

from cases import POTENTIALS, Case
from nflows_mongeampere import AutogradPotential, MongeAmpereTransform, RidgePotential
from nflows_mongeampere.distributions import FlowTransform


@pytest.fixture
def transform() -> MongeAmpereTransform:
    torch.manual_seed(0)
    return MongeAmpereTransform(RidgePotential(2, 16), steps=4)


@pytest.fixture
def conditional() -> MongeAmpereTransform:
    torch.manual_seed(0)
    transform = MongeAmpereTransform(RidgePotential(2, 8, context_features=3), steps=4)
    torch.nn.init.normal_(transform.potential.amplitude)
    return transform


def base() -> Independent:
    return Independent(Normal(torch.zeros(2), torch.ones(2)), 1)


@pytest.mark.parametrize("name", POTENTIALS)
def test_every_potential_makes_a_transform(name):
    """The promises of a transform: inverse, determinant and shapes, with any batch shape."""
    case = Case(name, "logcosh" if "network" in name else "softplus")
    points, context = case.batch(3)
    view = FlowTransform(MongeAmpereTransform(case.build_potential(), **case.settings), case.shape)
    view = view if context is None else view.condition(context)
    dims = len(case.shape)
    assert view.event_dim == view.inv.event_dim == view.domain.event_dim == dims
    z = torch.stack([points, -points / 2])  # (2, 3, *event_shape)
    for t in (view, view.inv):
        image = t(z)
        assert image.shape == t.forward_shape(z.shape) == t.inverse_shape(z.shape) == z.shape
        torch.testing.assert_close(t.inv(image), z, rtol=1e-4, atol=1e-4)
        assert t.log_abs_det_jacobian(z, image).shape == z.shape[:-dims] == (2, 3)
    normal = Normal(torch.zeros(case.shape).double(), 1.0)
    density = TransformedDistribution(normal, [view])
    assert density.event_shape == case.shape
    assert density.batch_shape == (() if context is None else (3,))
    assert density.rsample((4,)).shape == (4, *density.batch_shape, *case.shape)
    assert density.log_prob(z).shape == (2, 3)


@pytest.mark.parametrize("name", [name for name in POTENTIALS if name != "hutchinson"])
def test_the_determinant_of_every_potential_is_that_of_its_jacobian(name):
    case = Case(name)
    points, context = case.batch(1)
    view = FlowTransform(
        MongeAmpereTransform(case.build_potential(), **case.settings),
        case.shape,
        None if context is None else context[0],
    )
    for t in (view, view.inv):
        z = points[0]
        jacobian = torch.autograd.functional.jacobian(t, z).reshape(z.numel(), z.numel())
        expected = torch.linalg.slogdet(jacobian)[1]
        got = t.log_abs_det_jacobian(z, t(z))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_guide_of_pyro_finds_the_posterior_and_the_evidence(transform):
    """Two correlated means, one observation: the posterior is a Gaussian, the evidence too."""
    datum, view = torch.tensor(1.5), FlowTransform(transform, (2,), cache_size=1)

    def model() -> None:
        means = pyro.sample("means", base())
        pyro.sample("sum", Normal(means.sum(-1), 0.5), obs=datum)

    def guide() -> None:
        pyro.module("flow", view)
        pyro.sample("means", TransformedDistribution(base(), [view]))

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


@pytest.mark.parametrize("inverse", [False, True])
def test_an_automatic_guide_of_pyro_trains_the_flow(transform, inverse):
    def model() -> None:
        means = pyro.sample("means", base())
        pyro.sample("sum", Normal(means.sum(-1), 0.5), obs=torch.tensor(1.5))

    def build(width: int) -> FlowTransform:
        view = FlowTransform(transform, (width,), cache_size=1)
        return view.inv if inverse else view

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoNormalizingFlow(model, build)
    elbo = Trace_ELBO(num_particles=16, max_plate_nesting=0, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 2e-2}), elbo)
    losses = [svi.step() for _ in range(60)]
    evidence = -0.5 * math.log(2 * math.pi * 2.25) - 0.5 * 1.5**2 / 2.25
    assert sum(losses[:10]) / 10 > 2 - evidence
    assert sum(losses[-10:]) / 10 < 0.3 - evidence
    assert set(guide.parameters()) == set(transform.parameters())
    assert transform.potential.amplitude.abs().max() > 0.1
    assert set(copy.deepcopy(guide).state_dict()) == set(guide.state_dict())


def test_composites_of_pyro_and_torch(conditional):
    shift = AffineTransform(torch.tensor([0.5, -1.0]), torch.tensor([2.0, 1.0]), event_dim=1)
    view = FlowTransform(conditional, (2,), torch.ones(3))
    modules = ComposeTransformModule([shift, view.inv, view])
    assert set(modules.parameters()) == set(conditional.parameters())
    x, context = torch.randn(5, 2), torch.ones(5, 3)
    noise, logabsdet = conditional(x, context)
    y = (noise - shift.loc) / shift.scale
    expected = base().log_prob(y) - math.log(2) + logabsdet
    for cache_size in (0, 1):
        composite = ComposeTransform([shift, view], cache_size=cache_size)
        density = TransformedDistribution(base(), [composite])
        torch.testing.assert_close(density.log_prob(x), expected, rtol=1e-4, atol=1e-4)
        density = TransformedDistribution(base(), [shift, view.with_cache(cache_size)])
        torch.testing.assert_close(density.log_prob(x), expected)
        density.clear_cache()
        torch.testing.assert_close(density.log_prob(x), expected)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("compose", [False, True])
@pytest.mark.parametrize("before", [None, torch.zeros(3)])
def test_pyros_conditional_distributions_condition_it(conditional, inverse, compose, before):
    view = FlowTransform(conditional, (2,), before)
    view = view.inv if inverse else view
    part = ConditionalComposeTransformModule([view]) if compose else view
    contexts, x = torch.randn(5, 3), torch.randn(5, 2)
    density = ConditionalTransformedDistribution(base(), [part]).condition(contexts)
    noise, logabsdet = conditional.inverse(x, contexts) if inverse else conditional(x, contexts)
    torch.testing.assert_close(density.log_prob(x), base().log_prob(noise) + logabsdet)
    assert density.batch_shape == (5,)


@pytest.mark.parametrize("arrive", [copy.copy, lambda view: view.with_cache(1)])
def test_pyro_may_be_imported_after_the_class(conditional, arrive):
    view = FlowTransform(conditional, (2,))
    ConditionalTransform._abc_registry_clear()
    ConditionalTransform._abc_caches_clear()
    assert not isinstance(view, ConditionalTransform)
    assert isinstance(arrive(view), ConditionalTransform)


class Steep(torch.nn.Module):
    """A potential in which distant points diverge."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.001 * (x**4).sum(-1)


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@pytest.mark.parametrize("kernel", [HMC, NUTS])
def test_chains_of_pyro_reject_where_the_flow_diverges(kernel, solver):
    potential = AutogradPotential(Steep())
    transform = MongeAmpereTransform(potential, steps=1, solver=solver, max_steps=30)
    view, diverged = FlowTransform(transform, (2,)), []
    view.inv.register_forward_hook(lambda module, x, z: diverged.append(z.isnan().any()))
    prior = TransformedDistribution(base(), [view])

    def model() -> None:
        z = pyro.sample("z", prior)
        pyro.sample("x", Normal(z, 0.01).to_event(1), obs=torch.ones(2))

    pyro.set_rng_seed(3)
    settings = {"num_steps": 3} if kernel is HMC else {"max_tree_depth": 2}
    chain = MCMC(
        kernel(model, step_size=1.0, adapt_step_size=False, **settings),
        num_samples=3,
        warmup_steps=2,
        disable_progbar=True,
    )
    chain.run()
    assert any(diverged)
    assert chain.get_samples()["z"].isfinite().all()


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
