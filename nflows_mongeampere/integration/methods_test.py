"""Steps of torchdyn's solvers against the textbook and torchdyn's own loops."""

import itertools

import pytest
import torch
from torchdyn.numerics import odeint
from torchdyn.numerics.solvers.ode import (
    AsynchronousLeapfrog,
    DormandPrince45,
    Euler,
    RungeKutta4,
    SolverTemplate,
)

from nflows_mongeampere import Integrator, MongeAmpereTransform
from nflows_mongeampere.conftest import ADAPTIVE, FIXED, close, make

ORDERS = {"euler": 1, "ieuler": 1, "midpoint": 2, "alf": 2, "rk4": 4}


@pytest.mark.parametrize("solver", ORDERS)
@pytest.mark.parametrize("name", ["ridge-all", "reduced-all"])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_order(solver, name, direction):
    """Stages in motion have to be evaluated at the right times, or the order falls."""
    potential, x, context = make(name)

    def solve(steps, solver=solver):
        transform = MongeAmpereTransform(potential, solver=solver, steps=steps)
        return torch.cat([y.flatten() for y in getattr(transform, direction)(x, context)])

    assert Integrator(solver).order == ORDERS[solver]
    with torch.no_grad():
        truth = solve(200, "rk4")
        counts = (4, 8, 16) if solver == "rk4" else (8, 16, 32)
        errors = [(solve(steps) - truth).norm() for steps in counts]
    for coarse, fine in itertools.pairwise(errors):
        assert float(torch.log2(coarse / fine)) == pytest.approx(ORDERS[solver], abs=0.3)


@pytest.mark.parametrize("solver", ADAPTIVE)
@pytest.mark.parametrize("name", ["ridge-all", "reduced-all", "network"])
def test_adaptive_solutions_are_within_the_tolerance(solver, name):
    potential, x, context = make(name)
    fine = MongeAmpereTransform(potential, steps=100, time=2.0)
    errors = []
    with torch.no_grad():
        for tolerance in (1e-4, 1e-10):
            transform = MongeAmpereTransform(
                potential, time=2.0, solver=solver, atol=tolerance, rtol=tolerance
            )
            pairs = zip(transform(x, context), fine(x, context), strict=True)
            errors.append(max((a - b).abs().max() for a, b in pairs))
            assert errors[-1] < 30 * tolerance
    assert errors[1] < errors[0] / 1000


# torchdyn's odeint does not carry the velocities of leapfrog
@pytest.mark.parametrize("solver", ["euler", "ieuler", "midpoint", "rk4", *ADAPTIVE])
@pytest.mark.parametrize("direction", [(0.0, 1.0), (1.0, 0.0)])
def test_agrees_with_torchdyn(solver, direction):
    """torchdyn's own loop over the same equations, in rising time."""
    potential, x, _ = make("ridge")
    dynamics = potential.dynamics(x, None, 10**6)
    sign = direction[1] - direction[0]
    span = torch.linspace(0, 1, 9, dtype=torch.float64)
    tolerances = {"atol": 1e-9, "rtol": 1e-9}
    with torch.no_grad():
        ours = Integrator(solver, 8, **tolerances).solve(dynamics, direction, 1.0)[-1]
        theirs = odeint(
            lambda t, y: sign * dynamics.rate(sign * t, y),
            dynamics.state,
            span if solver in ORDERS else span[[0, -1]],
            solver,
            **(tolerances if solver in ADAPTIVE else {}),
        )[1][-1]
    close(ours, theirs, 1e-5 if solver == "ieuler" else 1e-12 if solver in ORDERS else 1e-7)


@pytest.mark.parametrize("const", [1.0, 0.8])  # torchdyn's attribute, the γ of its formula
def test_leapfrog_is_that_of_torchdyn(const):
    potential, x, _ = make("ridge")
    dynamics = potential.dynamics(x, None, 10**6)
    solver = AsynchronousLeapfrog(dtype=torch.float64)
    solver.const = const
    with torch.no_grad():
        ours = Integrator(solver, 4).solve(dynamics, (0.0, 1.0), 1.0)[-1]
        # torchdyn has the batch first, and position and velocity side by side
        state = torch.cat([dynamics.state, dynamics.rate(0.0, dynamics.state)]).T
        for t in torch.arange(4) / 4:
            state = solver.step(lambda t, y: dynamics.rate(t, y.T).T, state, t, 0.25)[1]
    close(ours, state.T.chunk(2)[0], 1e-12)
    direction = torch.randn_like(x)

    def loss(shift):
        z, logabsdet = MongeAmpereTransform(potential, solver=solver)(x + shift * direction)
        return z.sin().sum() + logabsdet.square().sum()

    shift = x.new_zeros(()).requires_grad_()
    slope = torch.autograd.grad(loss(shift), shift)[0]
    with torch.no_grad():
        close(slope, (loss(1e-5) - loss(-1e-5)) / 2e-5, 1e-7)


@pytest.mark.parametrize("name", ["euler", "rk4", "dopri5", "alf"])
def test_instances_are_their_names(name):
    classes = {
        "euler": Euler, "rk4": RungeKutta4, "dopri5": DormandPrince45, "alf": AsynchronousLeapfrog,
    }  # fmt: skip
    potential, x, context = make("ridge-all")
    instance = classes[name](dtype=torch.float32)
    by_name = MongeAmpereTransform(potential, solver=name)(x, context)
    by_instance = MongeAmpereTransform(potential, solver=instance)(x, context)
    for ours, theirs in zip(by_instance, by_name, strict=True):
        assert torch.equal(ours, theirs)


def test_a_tableau_that_was_changed_is_taken_as_it_is():
    """With Euler's weights the classical method is Euler's."""
    potential, x, context = make("ridge-all")
    solver = RungeKutta4(dtype=torch.float64)
    c, a, b, error = solver.tableau
    solver.tableau = (c, a, torch.eye(4, dtype=b.dtype)[0], error)
    changed = MongeAmpereTransform(potential, solver=solver, steps=3)(x, context)
    euler = MongeAmpereTransform(potential, solver="euler", steps=3)(x, context)
    for ours, theirs in zip(changed, euler, strict=True):
        close(ours, theirs, 1e-12)


class Heun(SolverTemplate):
    """A solver that torchdyn does not have, with an estimate of its error."""

    def __init__(self, stepping_class):
        super().__init__(order=2)
        self.stepping_class = stepping_class
        self.safety, self.min_factor, self.max_factor = map(torch.tensor, (0.9, 0.2, 10.0))

    def sync_device_dtype(self, x, t_span):
        return x, t_span

    def step(self, f, x, t, dt, k1=None, args=None):
        k1 = f(t, x)
        k2 = f(t + dt, x + dt * k1)
        return None, x + dt * (k1 + k2) / 2, dt * (k1 - k2) / 2


@pytest.mark.parametrize("stepping_class", ["fixed", "adaptive"])
@pytest.mark.parametrize("sensitivity", ["autograd", "recompute"])
def test_solvers_of_the_user(stepping_class, sensitivity):
    potential, x, context = make("ridge-all")
    leaves = [x.requires_grad_(), *potential.parameters()]
    results = []
    for settings in (
        {"solver": Heun(stepping_class), "steps": 50, "sensitivity": sensitivity, "rtol": 1e-6},
        {"solver": "rk4", "steps": 50},
    ):
        z, logabsdet = MongeAmpereTransform(potential, **settings)(x, context)
        grads = torch.autograd.grad(z.sin().sum() + logabsdet.square().sum(), leaves)
        results.append((z, logabsdet, *grads))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs, 1e-3)


@pytest.mark.parametrize("solver", [*FIXED, "ieuler", *ADAPTIVE])
@pytest.mark.parametrize("name", ["ridge-all", "reduced-all", "images", "lattice", "network-all"])
def test_values_do_not_depend_on_the_mode_of_autograd(solver, name):
    potential, x, context = make(name)
    transform = MongeAmpereTransform(potential, solver=solver, steps=2)
    with torch.no_grad():
        expected = transform(x, context)
    for ours, theirs in zip(transform(x, context), expected, strict=True):
        assert ours.requires_grad
        assert not theirs.requires_grad
        close(ours.detach(), theirs, 1e-14)
