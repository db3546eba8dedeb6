"""Settings, steps and tolerances of an integration, and how it fails."""

import math

import pytest
import torch
from torch import nn
from torchdyn.numerics.solvers.ode import AsynchronousLeapfrog, RungeKutta4

from nflows_mongeampere import IntegrationError, Integrator, MongeAmpereTransform, RidgePotential
from nflows_mongeampere.conftest import ADAPTIVE, Growth, make

X = torch.tensor([[1.0], [2.0]], dtype=torch.float64)


class Counted(Growth):
    """Remembers when it was evaluated."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.times = []

    def _gradient(self, x, t, context):
        self.times.append(t)
        return super()._gradient(x, t, context)


@pytest.mark.parametrize("steps", [1, 3, 7, 10])
def test_number_of_steps(steps):
    potential = Counted()
    MongeAmpereTransform(potential, solver="euler", steps=steps, time=0.7)(X)
    assert potential.times == pytest.approx([0.7 * (1 - i / steps) for i in range(steps)])


@pytest.mark.parametrize(
    ("times", "steps"), [([0, 0.5, 1], 4), ([0, 0.25, 1], 4), ([0, 0.3, 1], 5), ([0.9, 0.89], 1)]
)
def test_intervals_get_their_share_of_the_steps(times, steps):
    potential = Counted()
    MongeAmpereTransform(potential, solver="euler", steps=4).trajectory(X, times)
    assert len(potential.times) == steps


@pytest.mark.parametrize("sensitivity", ["autograd", "recompute"])
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_adaptive_steps_are_those_of_the_worst_row(solver, sensitivity):
    """A wall at x = 3, where one row is, among many that are far from it."""
    potential = RidgePotential(2, 1).double()
    with torch.no_grad():
        potential.weight.copy_(torch.tensor([[30.0, 0.0]]))
        potential.bias.fill_(-90.0)
        potential.amplitude.fill_(0.01)
    row = torch.tensor([[3.05, 0.0]], dtype=torch.float64)
    others = 0.3 * torch.randn(2000, 2, dtype=torch.float64)
    adaptive = MongeAmpereTransform(
        potential, solver=solver, sensitivity=sensitivity, atol=1e-6, rtol=1e-5
    )
    exact = MongeAmpereTransform(potential, steps=2000)(row)[1]
    alone, among = adaptive(row)[1], adaptive(torch.cat([row, others]))[1][:1]
    allowed = 1e-6 + 1e-5 * exact.abs()
    assert (alone - exact).abs() < 5 * allowed
    assert (among - exact).abs() < 5 * allowed


class TestFailures:
    @pytest.mark.parametrize("sensitivity", ["autograd", "recompute", "adjoint"])
    @pytest.mark.parametrize("solver", ["euler", "rk4"])
    def test_explosion_with_fixed_steps(self, solver, sensitivity):
        """x' = 100 x³ leaves every bound at once."""
        transform = MongeAmpereTransform(
            Growth(100.0, 3), solver=solver, sensitivity=sensitivity, steps=20
        )
        message = "NaN or infinite values between t = 0 and t = 1.*more steps"
        with pytest.raises(IntegrationError, match=message):
            transform.inverse(X)

    @pytest.mark.parametrize("solver", ADAPTIVE)
    def test_explosion_with_adaptive_steps(self, solver):
        with pytest.raises(IntegrationError, match=r"stopped at t = 0\.12.* from 0 to 1"):
            MongeAmpereTransform(Growth(1.0, 3), solver=solver).inverse(X)

    @pytest.mark.parametrize("solver", ADAPTIVE)
    def test_max_steps(self, solver):
        with pytest.raises(IntegrationError, match=r"max_steps=50.*stiff.*raise atol"):
            MongeAmpereTransform(Growth(-1e6), solver=solver, max_steps=50).inverse(X)

    @pytest.mark.parametrize("name", ["ridge-all", "reduced-all", "images", "lattice", "network"])
    @pytest.mark.parametrize("weight", [math.nan, 1e200])
    def test_weights_that_are_not_finite_or_explode(self, name, weight):
        potential, x, context = make(name)
        with torch.no_grad():
            for parameter in potential.parameters():
                parameter.fill_(weight)
        transform = MongeAmpereTransform(potential)
        for solve in (transform, transform.inverse):
            with pytest.raises(IntegrationError, match="NaN or infinite"):
                solve(x, context)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"solver": "rk5"}, ValueError),
        ({"solver": None}, TypeError),
        ({"solver": nn.Linear(2, 2)}, TypeError),
        # torchdyn's estimate of its error does not shrink with the step
        ({"solver": AsynchronousLeapfrog(stepping_class="adaptive")}, ValueError),
        ({"sensitivity": "backprop"}, ValueError),
        ({"sensitivity": "adjoint", "solver": "alf"}, ValueError),
        ({"sensitivity": "interpolated_adjoint", "solver": AsynchronousLeapfrog()}, ValueError),
        ({"steps": 0}, ValueError),
        ({"steps": 8.0}, TypeError),
        ({"atol": 0.0}, ValueError),
        ({"rtol": math.nan}, ValueError),
        ({"max_steps": 0}, ValueError),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_name_the_setting(options, error):
    name = next(iter(options))
    with pytest.raises(error, match=rf"^{name}: got .*(expected|use)"):
        Integrator(**options)


def test_a_solver_instance_is_not_shared():
    """torchdyn's solvers change when they are used."""
    solver = RungeKutta4(dtype=torch.float32)
    before = [t.clone() for t in (solver.tableau[0], *solver.tableau[1], solver.tableau[2])]
    MongeAmpereTransform(Growth(), solver=solver)(X)
    MongeAmpereTransform(Growth(), solver=solver, sensitivity="adjoint")(X)
    after = [solver.tableau[0], *solver.tableau[1], solver.tableau[2]]
    assert all(map(torch.equal, before, after))
