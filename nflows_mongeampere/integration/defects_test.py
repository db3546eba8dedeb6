"""The free estimate of the solver's error, and the warning of trainings that live off it."""

import math
import warnings

import pytest
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, ReversePermutation

from nflows_mongeampere import (
    AccuracyWarning,
    MongeAmpereFlow,
    MongeAmpereTransform,
    Potential,
    RidgePotential,
)

ORDERS = {"euler": 1, "midpoint": 2, "rk4": 4}


class Linear(Potential):
    """u = e^t |x|²/2, a linear field that grows: the log-determinant is D (e - 1) at T = 1."""

    time_dependent = True

    def _value(self, x, t, context):
        return math.exp(float(t)) * x.square().sum(1) / 2

    def _gradient(self, x, t, context):
        return math.exp(float(t)) * x

    def _laplacian(self, x, t, context):
        return math.exp(float(t)) * x.new_full(x.shape[:1], x.shape[1])

    def log_determinant(self, x):
        return torch.full_like(x[:, 0], x.shape[1] * math.expm1(1))


class Riccati(Potential):
    """u = Σ x³/3: paths are x / (1 - x t), and the log-determinant is -2 Σ ln(1 - x) at T = 1."""

    def _value(self, x, t, context):
        return x.pow(3).sum(1) / 3

    def _gradient(self, x, t, context):
        return x.square()

    def _laplacian(self, x, t, context):
        return 2 * x.sum(1)

    def log_determinant(self, x):
        return -2 * torch.log1p(-x).sum(1)


def rms(errors):
    return float(errors.square().mean().sqrt())


@pytest.mark.parametrize(
    ("make", "solver", "most"),
    [
        (Riccati, "euler", 2),
        (Riccati, "midpoint", 4),
        (Riccati, "rk4", 10),
        # where nothing but time moves, solvers are better than their stages know
        (Linear, "euler", 2),
        (Linear, "midpoint", 12),
        (Linear, "rk4", 120),
    ],
)
def test_estimate_is_above_the_error_and_of_its_order(make, solver, most):
    potential = make()
    x = torch.tensor([[0.1, 0.3, -0.4], [0.5, 0.2, 0.1], [-0.9, 0.3, 0.5]], dtype=torch.float64)
    estimates = []
    for steps in (4, 8, 16, 32):
        transform = MongeAmpereTransform(potential, solver=solver, steps=steps)
        error = transform.inverse(x)[1] - potential.log_determinant(x)
        assert transform.solver_error.shape == (3,)
        estimates.append(rms(transform.solver_error))
        assert 1 < estimates[-1] / rms(error) < most
    order = math.log2(estimates[-2] / estimates[-1])
    assert order == pytest.approx(ORDERS[solver], abs=0.1)


def test_estimate_is_in_nats_of_the_whole_time_and_of_each_row():
    """A field of half the strength has, over twice the time, the same errors."""
    x = torch.tensor([[0.1, 0.2], [-0.5, 0.4], [0.0, 0.0]], dtype=torch.float64)

    class Slow(Riccati):
        def _gradient(self, x, t, context):
            return super()._gradient(x, t, context) / 2

        def _laplacian(self, x, t, context):
            return super()._laplacian(x, t, context) / 2

    for solver in ORDERS:
        fast = MongeAmpereTransform(Riccati(), solver=solver, steps=4)
        slow = MongeAmpereTransform(Slow(), solver=solver, steps=4, time=2.0)
        fast(x)
        slow(x)
        torch.testing.assert_close(slow.solver_error, fast.solver_error)
        assert fast.solver_error[2] == 0  # a row that rests
        assert fast.solver_error[:2].min() > 0


def test_estimate_is_none_where_there_is_nothing_to_compare():
    x = torch.randn(3, 2)
    assert MongeAmpereTransform(RidgePotential(2, 4)).solver_error is None
    for settings in ({"solver": "euler", "steps": 1}, {"solver": "dopri5"}):
        transform = MongeAmpereTransform(RidgePotential(2, 4), **settings)
        transform(x)
        assert transform.solver_error is None


def train(solver, steps):
    """Two spirals in a plain loop, by a layer behind another one.

    Returns the mean log-likelihood that the solver claims too much in the end.
    """
    layer = MongeAmpereTransform(RidgePotential(2, 64), solver=solver, steps=steps)
    flow = Flow(CompositeTransform([ReversePermutation(2), layer]), StandardNormal([2]))
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.1)
    for _ in range(100):
        angle, arm = 3 * math.pi * torch.rand(128).sqrt(), torch.randint(2, (128,)) * 2 - 1
        curve = torch.stack([arm * angle * angle.cos(), arm * angle * angle.sin()], dim=1) / 4
        batch = curve + 0.05 * torch.randn(128, 2)
        optimizer.zero_grad()
        (-flow.log_prob(batch).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        claimed = flow.log_prob(batch).mean()
        layer.steps = 256
        return float(claimed - flow.log_prob(batch).mean())


def test_training_that_lives_off_its_solver_is_warned_once():
    with pytest.warns(AccuracyWarning) as caught:
        assert train("euler", steps=2) > 0.2
    (warning,) = [w for w in caught if w.category is AccuracyWarning]
    message = str(warning.message)
    assert "the training of _transform._transforms.1, a MongeAmpereTransform lives off" in message
    assert "at steps=2. Take more steps, a lower learning rate" in message
    assert warning.filename == __file__


def test_honest_training_is_not_warned():
    with warnings.catch_warnings():
        warnings.simplefilter("error", AccuracyWarning)
        assert abs(train("rk4", steps=4)) < 0.01


def test_a_training_may_meet_empty_batches():
    """The solver's error is looked at in every 20th solve."""
    transform = MongeAmpereTransform(RidgePotential(2, 4))
    transform(torch.randn(3, 2))
    for _ in range(40):
        outputs, _ = transform(torch.empty(0, 2))
    assert outputs.shape == (0, 2)


def test_what_is_right_to_the_tolerance_depends_on_the_direction():
    flow = MongeAmpereFlow(2, 4)
    x = torch.randn(5, 2)
    assert flow.transform.choose_steps(x, 0.1).quantity == "log_prob"
    assert flow.transform.choose_steps(x, 0.1, inverse=True).quantity == "logabsdet"
