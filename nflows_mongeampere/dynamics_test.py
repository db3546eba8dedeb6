"""Equations of motion against the definition of each potential, and their pullbacks."""

import pytest
import torch

from nflows_mongeampere import MongeAmpereTransform
from nflows_mongeampere.conftest import (
    BY_HAND,
    POTENTIALS,
    close,
    definition,
    differentiate,
    make,
    ridge,
)
from nflows_mongeampere.dynamics import Dynamics, FieldDynamics
from nflows_mongeampere.integration import Integrator
from nflows_mongeampere.potentials.ridges import ReducedDynamics, RidgeDynamics, Ridges

KEEP = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}


def motion(name, rows=3):
    """The equations of motion of a potential of the list, whose inputs want gradients."""
    potential, x, context = make(name, rows)
    leaves = [x.requires_grad_(), *potential.parameters()]
    if context is not None:
        leaves.append(context.requires_grad_())
    dynamics = potential.dynamics(x, context, 8)
    assert type(dynamics) is POTENTIALS[name].dynamics
    return potential, context, dynamics, leaves


@pytest.mark.parametrize("name", POTENTIALS)
def test_equations_of_motion(name):
    """d(points)/dt is the gradient and d(logabsdet)/dt the Laplacian, wherever the state is."""
    potential, context, dynamics, (x, *_) = motion(name)
    assert torch.equal(dynamics.points(dynamics.state), x)
    assert dynamics.logabsdet(dynamics.state).tolist() == [0.0] * 3

    shift = torch.randn_like(dynamics.state)
    if name.startswith("ridge") or name == "orbits":
        shift[-2] = 0  # the row of ones
    state = (dynamics.state + shift).detach()
    points = dynamics.points(state).detach()
    gradient, laplacian = differentiate(
        definition(potential, None if context is None else context.detach()), points, 0.7
    )
    with torch.no_grad():
        stage, _ = dynamics.stage(0.7, state)
    for rate in (dynamics.rate(0.7, state), stage):
        velocity = torch.func.jvp(dynamics.points, (state,), (rate.detach(),))[1]
        close(velocity.detach(), gradient)
        close(dynamics.logabsdet(rate).detach(), laplacian)


@pytest.mark.parametrize("name", POTENTIALS)
def test_points_are_contiguous_and_in_the_shape_of_the_inputs(name):
    _, _, dynamics, (x, *_) = motion(name)
    points = dynamics.points(dynamics.state)
    assert points.shape == x.shape
    assert points.is_contiguous()


def partial(dynamics):
    """The same equations of motion, whose tensors depend on nothing."""
    return dynamics.rebound(
        [
            None if t is None else t.detach().requires_grad_(t.requires_grad)
            for t in dynamics.tensors
        ]
    )


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("whole", [True, False])
def test_pullback_is_that_of_autograd(name, whole):
    """Of a whole adjoint, or of its coordinates alone, where the others are zero."""
    dynamics = partial(motion(name)[2])
    state = (dynamics.state + torch.randn_like(dynamics.state)).detach()
    adjoint = torch.randn_like(state)[: None if whole else dynamics.coordinates]

    def pulled_back(cls):
        gradients = [
            torch.ones_like(t) if t is not None and t.requires_grad else None
            for t in dynamics.tensors
        ]
        with torch.no_grad():
            kept = cls.stage(dynamics, 0.7, state)[1]
            return [cls.pullback(dynamics, 0.7, kept, adjoint, gradients), *gradients]

    found, expected = pulled_back(type(dynamics)), pulled_back(Dynamics)
    learned = [e for e in expected[1:] if e is not None]
    # up to three tensors serve the Laplacian alone
    assert sum(bool((e != 1).any()) for e in learned) >= len(learned) - (0 if whole else 3)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:  # the gradients are added to what was there
            close(ours, theirs, 1e-13)


@pytest.mark.parametrize("name", POTENTIALS)
def test_tensors_carry_every_gradient(name):
    """What the rate depends on besides state and time it takes from its tensors, and no more."""
    _, _, dynamics, leaves = motion(name)
    state, twin = torch.randn_like(dynamics.state), partial(dynamics)
    expected = torch.autograd.grad(dynamics.rate(0.7, state).sin().sum(), leaves, **KEEP)
    learning = [i for i, t in enumerate(twin.tensors) if t is not None and t.requires_grad]
    through = torch.autograd.grad(
        twin.rate(0.7, state).sin().sum(), [twin.tensors[i] for i in learning], **KEEP
    )
    found = torch.autograd.grad([dynamics.tensors[i] for i in learning], leaves, through, **KEEP)
    assert sum(bool(g.any()) for g in expected) >= 2
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs, 1e-13)


@pytest.mark.parametrize("name", BY_HAND)
def test_scores_are_slopes_of_the_density(name):
    """Carried along the path; gradients go through the points, of either order."""
    potential, x, context = make(name)
    x.requires_grad_()
    score = -x
    transform = MongeAmpereTransform(potential, time=0.3, steps=6)
    points, logabsdet, found = transform.carry_score(x, score, context, to_data=True)
    expected_points, expected_logabsdet = transform.inverse(x, context)
    close(points, expected_points, 1e-12)
    close(logabsdet, expected_logabsdet, 1e-12)

    y = points.detach().requires_grad_()
    back, inverse_logabsdet = transform(y, context)
    log_prob = inverse_logabsdet - back.flatten(1).square().sum(1) / 2
    close(found, torch.autograd.grad(log_prob.sum(), y)[0], 1e-6)

    leaves = [x, *potential.parameters()]
    for again in (False, True):
        grads = torch.autograd.grad(points.sin().sum(), leaves, create_graph=again, **KEEP)
        truth = torch.autograd.grad(expected_points.sin().sum(), leaves, **KEEP)
        for ours, theirs in zip(grads, truth, strict=True):
            close(ours, theirs, 1e-12)


@pytest.mark.parametrize("options", [{}, {"time_dependent": True, "context_features": 2}], ids=str)
@pytest.mark.parametrize("solver", ["midpoint", "rk4"])
@pytest.mark.parametrize("shape", [(3,), (2, 1, 3)], ids=str)
def test_coordinates_of_ridges_agree(shape, solver, options):
    """Runge-Kutta methods commute with affine maps."""
    x = torch.randn(4, *shape, dtype=torch.float64)
    context = torch.randn(4, 2, dtype=torch.float64) if options else None
    potential = ridge(x[0].numel(), 4, **options)
    found = []
    for cls in (RidgeDynamics, ReducedDynamics):
        offset, speed = potential.offset(context), potential.time_weight
        dynamics = cls(
            Ridges(potential.weight, potential.amplitude, offset, speed, potential.activation), x
        )
        end = Integrator(solver, 3).solve(dynamics, (1.0, 0.0), 1.0)[-1]
        points, logabsdet = dynamics.points(end), dynamics.logabsdet(end)
        loss = points.square().sum() + logabsdet.sin().sum()
        found.append([points, logabsdet, *torch.autograd.grad(loss, list(potential.parameters()))])
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs, 1e-13)


@pytest.mark.parametrize("name", ["ridge", "ridge-all", "network-all", "lattice"])
def test_rate_of_the_laplacian(name):
    """With its sign, which the roughness, a square, does not show."""
    potential, x, context = make(name)
    velocity, eps = torch.randn_like(x), 1e-4
    value = definition(potential, context)
    before, after = (differentiate(value, x + e * velocity, 0.7 + e)[1] for e in (-eps, eps))
    dynamics = FieldDynamics(potential._field(x), x, context)
    with torch.device("meta"):  # a default that must not matter
        rate = dynamics._laplacian_rate(x, 0.7, context, velocity)
        in_func, _ = torch.func.jvp(
            lambda x: dynamics._laplacian_rate(x, 0.7, context, velocity), (x,), (velocity,)
        )
    close(rate.detach(), (after - before) / (2 * eps), 1e-6)
    close(in_func.detach(), rate.detach(), 1e-10)
