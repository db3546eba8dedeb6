"""Error estimates against true errors, the choice of steps, and the warning that watches it."""

import copy
import logging
import math
import pickle
import warnings

import pytest
import torch

from nflows_mongeampere import (
    AccuracyWarning,
    AutogradPotential,
    IntegrationError,
    MongeAmpereFlow,
    MongeAmpereTransform,
    StepChoice,
    refined,
    transport_costs,
)
from nflows_mongeampere.conftest import ADAPTIVE, POTENTIALS, Network, close, make, ridge
from nflows_mongeampere.normflows import MongeAmpere

FACES = [MongeAmpereTransform, MongeAmpere]


def solve(transform, x, context=None, inverse=False):
    with torch.no_grad():
        return (transform.inverse if inverse else transform.forward)(x, context)


def distance(a, b):
    return torch.linalg.vector_norm((a - b).flatten(1), dim=1)


def true_errors(transform, x, context=None, inverse=False):
    """Distances of outputs and logabsdet from a solve at a tolerance of 1e-12."""
    exact = type(transform)(
        transform.potential, time=transform.time, solver="dopri5", atol=1e-12, rtol=1e-12
    )
    exact = solve(exact, x, context, inverse)
    found = solve(transform, x, context, inverse)
    return distance(found[0], exact[0]), (found[1] - exact[1]).abs()


def case(seed, **options):
    """A flow of any kind with paths that bend, a batch and its context, and a direction."""
    torch.manual_seed(seed)
    potential, x, context = make(list(POTENTIALS)[seed % len(POTENTIALS)], rows=4)
    with torch.no_grad():
        for name, parameter in potential.named_parameters():
            if name.endswith(("amplitude", "output.weight")):
                parameter.mul_(2)
    return FACES[seed % 2](potential, **options), x, context, seed % 3 == 0


def count_within(factor, cases, floor=1e-11):
    """How many estimates, of outputs and of logabsdet, lie within a factor of the truth."""
    within = torch.zeros(2)
    for transform, x, context, inverse in cases:
        estimate = transform.estimate_error(x, context, inverse=inverse)
        truths = true_errors(transform, x, context, inverse)
        for i, (ours, truth) in enumerate(
            zip((estimate.outputs, estimate.logabsdet), truths, strict=True)
        ):
            assert ours.shape == truth.shape == (4,)
            ratio = (ours.mean() + floor) / (truth.mean() + floor)
            within[i] += bool(1 / factor < ratio < factor)
    return within.tolist()


class TestEstimateError:
    def test_estimates_are_near_the_truth(self):
        settings = [(solver, n) for solver in ("euler", "midpoint", "rk4") for n in (1, 2, 3, 5, 8)]
        cases = [
            case(seed, solver=solver, steps=steps)
            for seed, (solver, steps) in enumerate(settings * 2)
        ]
        assert min(count_within(3, cases)) >= 0.95 * len(cases)

    @pytest.mark.parametrize("solver", ADAPTIVE)
    @pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
    def test_adaptive_solvers(self, solver, tolerance):
        cases = [
            case(seed, solver=solver, atol=tolerance, rtol=tolerance) for seed in (0, 9, 18, 28)
        ]
        # steps of least size may be far better than what was asked for
        assert count_within(3, cases, floor=tolerance / 30) == [4, 4]

    @pytest.mark.parametrize("face", FACES)
    @pytest.mark.parametrize("inverse", [False, True])
    def test_round_trip(self, face, inverse):
        potential, x, context = make("ridge-all")
        transform = face(potential, steps=1)
        there = solve(transform, x, context, inverse)[0]
        back = solve(transform, there, context, not inverse)[0]
        expected = distance(back, x)
        assert expected.min() > 1e-9
        found = transform.estimate_error(x, context, inverse=inverse).round_trip
        close(found, expected, 1e-14)

    def test_the_probe_is_no_error(self):
        transform = MongeAmpereTransform(
            AutogradPotential(Network(6).double(), laplacian="hutchinson"), steps=32
        )
        x = torch.randn(5, 6, dtype=torch.float64)
        noise = solve(transform, x)[1] - solve(transform, x)[1]
        assert noise.abs().min() > 1e-3
        assert transform.estimate_error(x).logabsdet.max() < 1e-6

    @pytest.mark.parametrize("use", ["estimate_error", "choose_steps", "watch"])
    def test_random_numbers_go_on_as_before(self, use, monkeypatch):
        # torch.manual_seed would reset the generators of every accelerator too
        monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("CUDA reseeded"))
        transform = MongeAmpereTransform(
            AutogradPotential(Network(2).double(), laplacian="hutchinson")
        )
        x = torch.randn(5, 2, dtype=torch.float64)
        if use == "watch":
            transform.choose_steps(x, 0.1)
            twin = MongeAmpereTransform(transform.potential)
            start = torch.get_rng_state()
            solve(twin, x)
            expected = torch.get_rng_state()
            torch.set_rng_state(start)
            solve(transform, x)
            assert not torch.equal(expected, start)
        else:
            expected = torch.get_rng_state()
            getattr(transform, use)(x, *([0.1] if use == "choose_steps" else []))
        assert torch.equal(torch.get_rng_state(), expected)

    def test_no_gradients(self):
        transform = MongeAmpereTransform(ridge(2, 5))
        x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
        estimate = transform.estimate_error(x)
        for error in (estimate.outputs, estimate.logabsdet, estimate.round_trip):
            assert not error.requires_grad

    def test_autocast(self):
        transform = MongeAmpereTransform(ridge(2, 5).float())
        x = torch.randn(5, 2).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            transform.choose_steps(x, 1e-3)
            solve(transform, x)
            assert transform.estimate_error(x).logabsdet.max() <= 1e-3

    def test_nothing_is_recorded(self):
        """The paths of estimates, of choices and of the watch are no part of the costs."""
        transform = MongeAmpereTransform(ridge(2, 5))
        x = torch.randn(10, 2, dtype=torch.float64)
        with transport_costs(transform) as costs, torch.no_grad():
            transform.choose_steps(x, 1e-3)
            transform(x)
            kinetic = costs.kinetic.clone()
            transform.estimate_error(x)
        with transport_costs(transform) as again, torch.no_grad():
            transform(x)
        assert torch.equal(kinetic, again.kinetic)
        assert torch.equal(costs.kinetic, kinetic)


class TestChooseSteps:
    @pytest.mark.parametrize("seed", range(0, len(POTENTIALS), 3))
    def test_the_fewest_steps(self, seed):
        """The search is the same for all, and goes through a few potentials with each solver."""
        solver, tolerance = [("euler", 0.03), ("midpoint", 1e-3), ("rk4", 1e-6)][seed // 3 % 3]
        transform, x, context, inverse = case(seed, solver=solver, steps=7)
        choice = transform.choose_steps(x, tolerance, context, inverse=inverse)
        assert (transform.steps, transform.tolerance) == (choice.steps, tolerance)
        assert choice.tolerance == tolerance
        assert choice.error <= tolerance
        assert choice.quantity == "logabsdet"

        def error(steps):
            twin = type(transform)(transform.potential, solver=solver, steps=steps)
            return true_errors(twin, x, context, inverse)[1].max()

        assert error(choice.steps) <= 1.02 * tolerance
        if choice.steps > 1:
            assert error(choice.steps - 1) > 0.9 * tolerance

    @pytest.mark.parametrize("features", [2, 16])
    @pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-5, 1e-7])
    def test_it_bounds_log_prob_where_the_base_is_known(self, features, tolerance):
        flow = MongeAmpereFlow(features, 32).double()
        torch.nn.init.normal_(flow.transform.potential.amplitude, std=0.6)
        z = torch.randn(50, features, dtype=torch.float64)
        with torch.no_grad():
            x = flow.transform.inverse(z)[0]
            choice = flow.transform.choose_steps(x, tolerance)
            assert choice.quantity == "log_prob"
            coarse = flow.log_prob(x)
            with refined(flow, 16):
                error = (flow.log_prob(x) - coarse).abs().max()
        assert error <= 1.02 * tolerance
        assert error > tolerance / 100 or choice.steps == 1

    def test_what_it_says(self, caplog):
        transform = MongeAmpereTransform(ridge(2, 5))
        with caplog.at_level(logging.INFO, logger="nflows_mongeampere"):
            choice = transform.choose_steps(torch.randn(8, 2).double(), 1e-6)
        assert isinstance(choice, StepChoice)
        assert f"{choice.steps} steps" in str(choice)
        assert "1e-06" in str(choice)
        assert caplog.record_tuples == [("nflows_mongeampere", logging.INFO, str(choice))]

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
    def test_copies(self, clone):
        transform = MongeAmpereTransform(ridge(2, 5), steps=1)
        x = torch.randn(8, 2, dtype=torch.float64)
        choice = transform.choose_steps(x, 1e-6)
        twin = clone(transform)
        assert (twin.steps, twin.tolerance) == (choice.steps, 1e-6)
        assert torch.equal(solve(twin, x)[1], solve(transform, x)[1])
        assert clone(choice) == choice

    @pytest.mark.parametrize(
        ("arguments", "options", "error", "message"),
        [
            ((torch.zeros(0, 2), 0.1), {}, ValueError, "^inputs: got no rows"),
            ((torch.zeros(4, 2), 0), {}, ValueError, "^tolerance: got 0"),
            ((torch.zeros(4, 2), math.nan), {}, ValueError, "^tolerance: got nan"),
            ((torch.zeros(4, 2), "0.1"), {}, TypeError, "^tolerance: got '0.1'"),
            ((torch.zeros(4, 2), 0.1), {"solver": "dopri5"}, ValueError, "^solver: got 'dopri5'"),
            (
                (torch.randn(9, 2), 1e-12),
                {"solver": "midpoint"},
                IntegrationError,
                "^tolerance: got 1e-12.*float64",
            ),
        ],
    )
    def test_errors_leave_the_flow_alone(self, arguments, options, error, message):
        transform = MongeAmpereTransform(ridge(2, 5).float(), steps=3, **options)
        with pytest.raises(error, match=message):
            transform.choose_steps(*arguments)
        assert (transform.steps, transform.tolerance) == (3, None)


class TestAccuracyWarning:
    x = torch.linspace(-2, 2, 40, dtype=torch.float64).view(20, 2)

    def warnings_of(self, transform, evaluations, grad=False, inverse=False):
        """How often the evaluations warn."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(evaluations):
                with torch.set_grad_enabled(grad):
                    (transform.inverse if inverse else transform.forward)(self.x)
        assert all(issubclass(w.category, AccuracyWarning) for w in caught)
        return len(caught)

    @pytest.fixture(params=FACES)
    def transform(self, request):
        transform = request.param(ridge(2, 5, scale=2.0))
        transform.choose_steps(self.x, 1e-5)
        return transform

    def test_not_where_the_tolerance_is_met(self, transform):
        assert self.warnings_of(transform, 20) == 0

    @pytest.mark.parametrize("inverse", [False, True])
    def test_once_after_steps_were_cut(self, transform, inverse):
        transform.steps = 1
        assert self.warnings_of(transform, 1, inverse=inverse) == 1
        assert self.warnings_of(transform, 40, inverse=inverse) == 0
        transform.choose_steps(self.x, 1e-5)
        transform.steps = 1
        with pytest.warns(AccuracyWarning, match=r"off by .* steps=1, .* 1e-05 .* choose_steps"):
            solve(transform, self.x)

    def test_once_after_weights_grew(self, transform):
        assert self.warnings_of(transform, 5) == 0
        with torch.no_grad():
            transform.potential.weight.mul_(3)
        assert self.warnings_of(transform, 40) == 1

    def test_a_loaded_flow_watches_too(self, transform):
        with torch.no_grad():
            transform.potential.weight.mul_(3)
        fresh = type(transform)(ridge(2, 5))
        fresh.load_state_dict(transform.state_dict())
        assert self.warnings_of(fresh, 40) == 1

    def test_not_in_training(self, transform):
        transform.steps = 1
        assert self.warnings_of(transform, 20, grad=True) == 0
        assert self.warnings_of(transform, 1) == 1

    def test_not_where_nothing_was_chosen(self):
        assert self.warnings_of(MongeAmpereTransform(ridge(2, 5, scale=2.0), steps=1), 8) == 0

    def test_it_points_to_the_line_of_the_user(self, transform):
        transform.steps = 1
        with pytest.warns(AccuracyWarning) as caught, torch.no_grad():
            torch.nn.Sequential(transform)(self.x)
        assert caught[0].filename == __file__

    def test_it_watches_the_largest_error(self, transform):
        """Of one row in eight, where the mean is within the tolerance."""
        with torch.no_grad():  # a wall at 3
            transform.potential.weight.copy_(torch.tensor([5.0, 0.0]))
            transform.potential.bias.fill_(-15.0)
            transform.potential.amplitude.fill_(0.02)
        batch = torch.zeros(8, 2, dtype=torch.float64)
        batch[3, 0] = 3.2
        errors = true_errors(type(transform)(transform.potential, steps=1), batch)[1]
        tolerance = float(errors.max()) / 2
        assert errors.mean() < tolerance
        transform._adopt(1, tolerance)
        with pytest.warns(AccuracyWarning):
            solve(transform, batch)
