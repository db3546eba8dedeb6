"""Solvers and sensitivities against the textbook, autograd and torchdyn."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torchdyn.numerics import odeint
from torchdyn.numerics.solvers.ode import AsynchronousLeapfrog, DormandPrince45, Euler, RungeKutta4

from nflows_mongeampere import (
    AutogradPotential,
    IntegrationError,
    Integrator,
    MongeAmpereTransform,
    Potential,
    RidgePotential,
)
from nflows_mongeampere.conftest import POTENTIALS, close, make_potential, ridge

ORDERS = {"euler": 1, "ieuler": 1, "midpoint": 2, "alf": 2, "rk4": 4}
ADAPTIVE = ["dopri5", "tsit5"]


class Growth(Potential):
    """u = rate |x|^(power + 1) / (power + 1) in one dimension: dx/dt = rate x^power."""

    def __init__(self, rate=1.0, power=1):
        super().__init__()
        self.rate, self.power = rate, power

    def _value(self, x, t, context):
        return self.rate * x.pow(self.power + 1).sum(1) / (self.power + 1)

    def _gradient(self, x, t, context):
        return self.rate * x.pow(self.power)

    def _laplacian(self, x, t, context):
        return self.rate * self.power * x.pow(self.power - 1).sum(1)


class Broken(nn.Module):
    """A solver instance that advances as it is told."""

    order = 1

    def __init__(self, advance, stepping_class="fixed"):
        super().__init__()
        self.advance, self.stepping_class = advance, stepping_class
        self.safety, self.min_factor, self.max_factor = (
            torch.tensor([v]) for v in (0.9, 0.2, 10.0)
        )

    def sync_device_dtype(self, x, t_span):
        return x, t_span

    def step(self, f, x, t, dt, k1=None, args=None):
        return self.advance(f, x, t, dt)


def gradients(potential, x, context, sensitivity, solver="rk4", steps=8, **options):
    """The loss and its gradient to parameters, inputs and context, through both directions."""
    transform = MongeAmpereTransform(
        potential, solver=solver, steps=steps, sensitivity=sensitivity, **options
    )
    x = x.clone().requires_grad_()
    context = None if context is None else context.clone().requires_grad_()
    z, forward = transform(x, context)
    y, inverse = transform.inverse(x, context)
    loss = (z.square().sum() - y.sin().sum() + (forward * inverse).sum()) / len(x)
    leaves = [x, *([] if context is None else [context]), *potential.parameters()]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return loss.detach(), *grads


def pair(kind, time_dependent, batch=5, features=3):
    """A potential with everything, and arguments for it."""
    potential = make_potential(
        kind,
        features,
        time_dependent=time_dependent,
        context_features=2 if time_dependent else None,
    )
    x = torch.randn(batch, features, dtype=torch.float64)
    context = torch.randn(batch, 2, dtype=torch.float64) if time_dependent else None
    return potential, x, context


class TestSolvers:
    @pytest.mark.parametrize("solver", ORDERS)
    @pytest.mark.parametrize("time_dependent", [False, True])
    @pytest.mark.parametrize("direction", ["forward", "inverse"])
    def test_order(self, solver, time_dependent, direction):
        potential, x, context = pair("softplus", time_dependent)

        def solve(steps, solver=solver):
            transform = MongeAmpereTransform(potential, solver=solver, steps=steps)
            return torch.cat([y.flatten() for y in getattr(transform, direction)(x, context)])

        with torch.no_grad():
            truth = solve(200, "rk4")
            counts = (4, 8, 16) if solver == "rk4" else (8, 16, 32)
            errors = [(solve(steps) - truth).norm() for steps in counts]
        for coarse, fine in itertools.pairwise(errors):
            assert float(torch.log2(coarse / fine)) == pytest.approx(ORDERS[solver], abs=0.3)

    @pytest.mark.parametrize("solver", ADAPTIVE)
    @pytest.mark.parametrize("time_dependent", [False, True])
    @pytest.mark.parametrize("sensitivity", ["autograd", "recompute"])
    def test_adaptive_within_tolerance(self, solver, time_dependent, sensitivity):
        potential, x, context = pair("softplus", time_dependent)
        fine = MongeAmpereTransform(potential, steps=400, time=4.0)
        errors = []
        for tolerance in (1e-4, 1e-10):
            transform = MongeAmpereTransform(
                potential,
                time=4.0,
                solver=solver,
                sensitivity=sensitivity,
                atol=tolerance,
                rtol=tolerance,
            )
            pairs = zip(transform(x, context), fine(x, context), strict=True)
            errors.append(max((a - b).detach().abs().max() for a, b in pairs))
            assert errors[-1] < 30 * tolerance
        assert errors[1] < errors[0] / 1000

    # torchdyn's odeint does not carry the velocities of leapfrog
    @pytest.mark.parametrize("solver", ["euler", "ieuler", "midpoint", "rk4", *ADAPTIVE])
    @pytest.mark.parametrize("direction", [(0.0, 1.0), (1.0, 0.0)])
    def test_agrees_with_torchdyn(self, solver, direction):
        """torchdyn's own driver over the same equations, in rising time."""
        potential, x, _ = pair("softplus", False)
        dynamics = potential.dynamics(x, None, 10**6)
        sign = direction[1] - direction[0]
        span = torch.linspace(0, 1, 9, dtype=torch.float64)
        tolerances = {"atol": 1e-9, "rtol": 1e-9}
        with torch.no_grad():
            ours = Integrator(solver, 8, **tolerances).solve(dynamics, direction, 1.0)[-1]
            theirs = odeint(
                lambda t, y: sign * dynamics(sign * t, y),
                dynamics.state,
                span if solver in ORDERS else span[[0, -1]],
                solver,
                **(tolerances if solver in ADAPTIVE else {}),
            )[1][-1]
        close(ours, theirs, 1e-5 if solver == "ieuler" else 1e-12 if solver in ORDERS else 1e-7)

    @pytest.mark.parametrize("name", ["euler", "rk4", "dopri5", "alf"])
    def test_instances(self, name):
        classes = {
            "euler": Euler, "rk4": RungeKutta4, "dopri5": DormandPrince45,
            "alf": AsynchronousLeapfrog,
        }  # fmt: skip
        potential, x, context = pair("logcosh", True)
        instance = classes[name](dtype=torch.float64)
        by_name = MongeAmpereTransform(potential, solver=name)(x, context)
        by_instance = MongeAmpereTransform(potential, solver=instance)(x, context)
        for ours, theirs in zip(by_instance, by_name, strict=True):
            assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("steps", [1, 3, 7, 10])
    def test_number_of_steps(self, steps):
        calls = []

        class Counted(Growth):
            def _gradient(self, x, t, context):
                calls.append(t)
                return super()._gradient(x, t, context)

        MongeAmpereTransform(Counted(), solver="euler", steps=steps, time=0.7)(torch.ones(1, 1))
        assert calls == pytest.approx([0.7 * (1 - i / steps) for i in range(steps)])

    @pytest.mark.parametrize("solver", [*ORDERS, *ADAPTIVE])
    def test_values_do_not_depend_on_grad_mode(self, solver):
        potential, x, context = pair("network", True)
        transform = MongeAmpereTransform(potential, solver=solver)
        with torch.no_grad():
            expected = transform(x, context)
        for ours, theirs in zip(transform(x, context), expected, strict=True):
            close(ours.detach(), theirs, 1e-14)

    def test_implicit_euler_solves_its_equation(self):
        # y = y0 + rate y / steps, every step
        transform = MongeAmpereTransform(Growth(-20.0), solver="ieuler", steps=4)
        x = torch.tensor([[1.0], [-0.3]], dtype=torch.float64)
        y, logabsdet = transform.inverse(x)
        close(y, x / 6**4, 1e-6)
        close(logabsdet, torch.full((2,), -20.0, dtype=torch.float64), 1e-6)


class TestSensitivities:
    @pytest.mark.parametrize("kind", POTENTIALS)
    @pytest.mark.parametrize("time_dependent", [False, True])
    @pytest.mark.parametrize("solver", [*ORDERS, *ADAPTIVE])
    def test_recompute_is_autograd(self, kind, time_dependent, solver):
        problem = pair(kind, time_dependent)
        for ours, theirs in zip(
            gradients(*problem, "recompute", solver, 3),
            gradients(*problem, "autograd", solver, 3),
            strict=True,
        ):
            close(ours, theirs, 1e-12)

    @pytest.mark.parametrize("sensitivity", ["autograd", "recompute"])
    @pytest.mark.parametrize("solver", ["midpoint", "rk4", "alf", "ieuler", "dopri5"])
    def test_gradient_of_the_solution(self, sensitivity, solver):
        """Finite differences of what the solver itself returns."""
        potential, x, context = pair("softplus", True, batch=2)
        options = {"atol": 1e-11, "rtol": 1e-11} if solver == "dopri5" else {}
        transform = MongeAmpereTransform(
            potential, solver=solver, steps=3, sensitivity=sensitivity, **options
        )
        tolerance = 1e-4 if solver == "ieuler" else 1e-6
        step = 1e-3 if solver == "ieuler" else 1e-6
        assert torch.autograd.gradcheck(
            transform,
            (x.requires_grad_(), context.requires_grad_()),
            eps=step,
            atol=tolerance,
            rtol=tolerance,
            check_undefined_grad=False,
        )

    @pytest.mark.parametrize("sensitivity", ["adjoint", "interpolated_adjoint"])
    @pytest.mark.parametrize("kind", POTENTIALS)
    @pytest.mark.parametrize("time_dependent", [False, True])
    def test_adjoints_approach_autograd(self, sensitivity, kind, time_dependent):
        problem = pair(kind, time_dependent)
        errors = []
        for steps in (8, 32):
            pairs = zip(
                gradients(*problem, sensitivity, steps=steps),
                gradients(*problem, "autograd", steps=steps),
                strict=True,
            )
            errors.append(max((a - b).norm() / (1 + b.norm()) for a, b in pairs))
        assert errors[1] < 1e-6
        # fourth order, or third at the ends of the spline
        assert errors[1] < errors[0] / 30 or errors[1] < 1e-12

    @pytest.mark.parametrize("sensitivity", ["adjoint", "interpolated_adjoint"])
    @pytest.mark.parametrize("solver", ["euler", "midpoint", "ieuler", *ADAPTIVE])
    def test_adjoints_with_every_solver(self, sensitivity, solver):
        problem = pair("softplus", True)
        exact = gradients(*problem, "autograd", "rk4", 64)
        options = {"atol": 1e-8, "rtol": 1e-8} if solver in ADAPTIVE else {}
        ours = gradients(*problem, sensitivity, solver, 64, **options)
        tolerance = 1e-4 if solver in ADAPTIVE else {1: 0.1, 2: 2e-3}[ORDERS[solver]]
        for a, b in zip(ours, exact, strict=True):
            assert (a - b).norm() < tolerance * (1 + b.norm())

    @pytest.mark.parametrize("hidden", [3, 20], ids=["reduced", "direct"])
    def test_recompute_keeps_the_states_between_steps_alone(self, hidden):
        batch, features = 8, 8
        potential = ridge(features, hidden)
        x = torch.randn(batch, features, dtype=torch.float64)
        width = hidden if hidden < 2 * features else features

        def packed(steps, sensitivity):
            sizes = []

            def pack(tensor):
                sizes.append(tensor.numel())
                return tensor

            transform = MongeAmpereTransform(potential, steps=steps, sensitivity=sensitivity)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                transform(x)
            return sum(sizes)

        counts = [packed(steps, "recompute") for steps in (10, 20, 40)]
        state = batch * (width + 1)
        assert counts[1] - counts[0] == 10 * state
        assert counts[2] - counts[1] == 20 * state
        assert packed(20, "autograd") - packed(10, "autograd") > 5 * 10 * state

    def test_no_gradient_is_kept_without_grad(self):
        potential, x, context = pair("network", True)
        for sensitivity in ("autograd", "recompute", "adjoint"):
            transform = MongeAmpereTransform(potential, sensitivity=sensitivity)
            with torch.no_grad():
                assert not any(y.requires_grad for y in transform(x, context))

    @pytest.mark.parametrize("sensitivity", ["adjoint", "interpolated_adjoint"])
    def test_adjoints_of_a_frozen_potential(self, sensitivity):
        potential, x, _ = pair("softplus", False)
        for parameter in potential.parameters():
            parameter.requires_grad_(False)
        x.requires_grad_()
        results = []
        for option in (sensitivity, "autograd"):
            z, logabsdet = MongeAmpereTransform(potential, steps=32, sensitivity=option)(x)
            results.append(torch.autograd.grad(z.sin().sum() + logabsdet.sum(), x)[0])
        close(*results, 1e-6)


class TestImports:
    def test_nothing_heavy_comes_along(self):
        code = (
            "import sys, nflows_mongeampere, nflows_mongeampere.normflows\n"
            "heavy = {'lightning', 'pytorch_lightning', 'torchdyn.core', 'torchvision'}\n"
            "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr

    @pytest.mark.parametrize("sensitivity", ["adjoint", "interpolated_adjoint"])
    def test_broken_torchdyn_core(self, sensitivity, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchdyn.core", None)
        monkeypatch.setitem(sys.modules, "torchdyn.core.problems", None)
        potential, x, _ = pair("softplus", False)
        transform = MongeAmpereTransform(potential, sensitivity=sensitivity)
        with pytest.raises(ImportError, match=r"^sensitivity=.*torchdyn.core.*'recompute'"):
            transform(x)

    def test_torchvision_that_raises_runtime_error(self, monkeypatch):
        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name.startswith("torchdyn.core"):
                    raise RuntimeError("operator torchvision::nms does not exist")

        for name in [name for name in sys.modules if name.startswith("torchdyn.core")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
        potential, x, _ = pair("softplus", False)
        with pytest.raises(ImportError, match=r"torchvision::nms.*'recompute'"):
            MongeAmpereTransform(potential, sensitivity="adjoint")(x)


class TestFailures:
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)

    @pytest.mark.parametrize("sensitivity", ["autograd", "recompute", "adjoint"])
    @pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4"])
    def test_explosion_with_fixed_steps(self, solver, sensitivity):
        """x' = x³ leaves every bound before t = 1/2."""
        transform = MongeAmpereTransform(
            Growth(100.0, 3), solver=solver, sensitivity=sensitivity, steps=20
        )
        with pytest.raises(
            IntegrationError, match="NaN or infinite values between t = 0 and t = 1"
        ):
            transform.inverse(self.x)

    @pytest.mark.parametrize("solver", ADAPTIVE)
    def test_explosion_with_adaptive_steps(self, solver):
        transform = MongeAmpereTransform(Growth(1.0, 3), solver=solver)
        with pytest.raises(
            IntegrationError, match=r"stopped at t = 0\.12.* from 0 to 1.*max_steps"
        ):
            transform.inverse(self.x)

    @pytest.mark.parametrize("solver", ADAPTIVE)
    def test_max_steps(self, solver):
        stiff = Growth(-1e6)
        with pytest.raises(IntegrationError, match=r"max_steps=50.*stiff.*raise atol"):
            MongeAmpereTransform(stiff, solver=solver, max_steps=50).inverse(self.x)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("stepping_class", ["fixed", "adaptive"])
    def test_solver_that_yields_values_that_are_not_finite(self, value, stepping_class):
        solver = Broken(
            lambda f, x, t, dt: (None, torch.full_like(x, value), torch.full_like(x, value)),
            stepping_class,
        )
        with pytest.raises(IntegrationError, match="solver Broken"):
            MongeAmpereTransform(Growth(), solver=solver)(self.x)

    @pytest.mark.parametrize(
        "advance",
        [
            lambda f, x, t, dt: (None, x[:1], None),
            lambda f, x, t, dt: (None, x.flatten(), None),
            lambda f, x, t, dt: (None, None, None),
            lambda f, x, t, dt: (None, x.tolist(), None),
        ],
        ids=["rows", "flat", "None", "list"],
    )
    def test_solver_that_returns_no_state(self, advance):
        with pytest.raises(IntegrationError, match=r"Broken returned .* expected .*\(2, 2\)"):
            MongeAmpereTransform(Growth(), solver=Broken(advance))(self.x)

    @pytest.mark.parametrize(
        "advance",
        [lambda f, x, t, dt: x, lambda f, x, t, dt: None, lambda f, x, t, dt: (None, x)],
        ids=["tensor", "None", "pair"],
    )
    @pytest.mark.parametrize("stepping_class", ["fixed", "adaptive"])
    def test_solver_whose_step_returns_no_triple(self, advance, stepping_class):
        with pytest.raises(IntegrationError, match=r"Broken returned .* expected"):
            MongeAmpereTransform(Growth(), solver=Broken(advance, stepping_class))(self.x)

    @pytest.mark.parametrize("error", [None, torch.ones(3, 3)], ids=["None", "shape"])
    def test_adaptive_solver_without_an_error_estimate(self, error):
        solver = Broken(lambda f, x, t, dt: (None, x + dt * f(t, x), error), "adaptive")
        with pytest.raises(IntegrationError, match=r"returned no error estimate of the state"):
            MongeAmpereTransform(Growth(), solver=solver)(self.x)

    @pytest.mark.parametrize("error", [2.0, math.nan])
    def test_adaptive_solver_that_never_accepts_a_step(self, error):
        solver = Broken(
            lambda f, x, t, dt: (None, x + dt * f(t, x), torch.full_like(x, error)), "adaptive"
        )
        with pytest.raises(IntegrationError, match=r"Broken stopped at t = 1 .* max_steps"):
            MongeAmpereTransform(Growth(), solver=solver)(self.x)

    def test_implicit_step_too_long_for_its_gradient(self):
        x = self.x.clone().requires_grad_()
        y, _ = MongeAmpereTransform(Growth(-20.0), solver="ieuler", steps=1).inverse(x)
        with pytest.raises(IntegrationError, match=r"did not converge.*more steps"):
            y.sum().backward()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"solver": "rk5"}, ValueError),
        ({"solver": "RK4"}, ValueError),
        ({"solver": None}, TypeError),
        ({"solver": 4}, TypeError),
        ({"solver": nn.Linear(2, 2)}, TypeError),
        ({"solver": RungeKutta4}, TypeError),
        ({"solver": Broken(None, "sideways")}, TypeError),
        # torchdyn's estimate of its error does not shrink with the step
        ({"solver": AsynchronousLeapfrog(stepping_class="adaptive")}, ValueError),
        ({"sensitivity": "backprop"}, ValueError),
        ({"sensitivity": None}, ValueError),
        ({"sensitivity": "adjoint", "solver": "alf"}, ValueError),
        ({"sensitivity": "interpolated_adjoint", "solver": "alf"}, ValueError),
        ({"sensitivity": "adjoint", "solver": AsynchronousLeapfrog()}, ValueError),
        ({"steps": 0}, ValueError),
        ({"steps": -3}, ValueError),
        ({"steps": 8.0}, TypeError),
        ({"steps": True}, TypeError),
        ({"steps": "8"}, TypeError),
        ({"steps": None}, TypeError),
        ({"atol": 0.0}, ValueError),
        ({"atol": math.nan}, ValueError),
        ({"rtol": -1e-3}, ValueError),
        ({"rtol": "1e-3"}, TypeError),
        ({"max_steps": 0}, ValueError),
        ({"max_steps": 1.5}, TypeError),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_construction(options, error):
    name = next(iter(options))
    with pytest.raises(error, match=rf"^{name}: got .*(expected|use)"):
        Integrator(**options)


@pytest.mark.parametrize("sensitivity", ["adjoint", "interpolated_adjoint"])
def test_adjoints_are_bounded(sensitivity):
    potential = RidgePotential(3, 8)
    torch.nn.init.constant_(potential.amplitude, 1e4)
    settings = {"solver": "dopri5", "sensitivity": sensitivity, "max_steps": 20}
    with pytest.raises(IntegrationError, match=r"^solver Dorm.* did not arrive .*max_steps=20"):
        MongeAmpereTransform(potential, **settings)(torch.randn(4, 3))


@pytest.mark.parametrize("sensitivity", ["autograd", "recompute", "adjoint"])
def test_overflow_in_the_search_for_a_root(sensitivity):
    potential = RidgePotential(3, 8)
    torch.nn.init.constant_(potential.amplitude, 1e25)
    with pytest.raises(IntegrationError, match=r"^solver ImplicitEuler .* more steps"):
        MongeAmpereTransform(potential, solver="ieuler", sensitivity=sensitivity)(torch.ones(4, 3))


def test_search_for_a_root_is_no_part_of_a_checkpoint():
    """Else each of its derivatives would repeat the search from the start."""
    calls = []

    class Counting(nn.Module):
        def forward(self, x):
            calls.append(len(x))
            return x.sin().sum(1)

    counts = []
    for sensitivity in ("autograd", "recompute"):
        transform = MongeAmpereTransform(
            AutogradPotential(Counting()), solver="ieuler", steps=1, sensitivity=sensitivity
        )
        calls.clear()
        transform(torch.randn(4, 3, requires_grad=True))
        counts.append(len(calls))
    assert counts[1] < 3 * counts[0]


@pytest.mark.parametrize("sensitivity", ["adjoint", "interpolated_adjoint"])
def test_adjoints_say_when_times_are_too_close(sensitivity):
    transform = MongeAmpereTransform(RidgePotential(2, 4), sensitivity=sensitivity)
    with pytest.raises(IntegrationError, match=r"times: from 0 to 1e-12 .* cannot tell"):
        transform.trajectory(torch.zeros(1, 2), [0.0, 1e-12])
