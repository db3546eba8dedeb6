"""The whole map, its density and its path, against brute force and calculus."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow

from nflows_mongeampere import (
    AutogradPotential,
    MongeAmpereFlow,
    MongeAmpereTransform,
    RidgePotential,
)
from nflows_mongeampere.conftest import (
    ADAPTIVE,
    FIXED,
    POTENTIALS,
    TABLEAUS,
    Network,
    brute_force,
    close,
    definition,
    log_determinant,
    make,
    ridge,
    uniform_grid,
)
from nflows_mongeampere.normflows import MongeAmpere

FACES = [MongeAmpereTransform, MongeAmpere]


class TestExactness:
    @pytest.mark.parametrize(("name", "solver"), zip(POTENTIALS, itertools.cycle(TABLEAUS)))
    def test_brute_force(self, name, solver):
        potential, x, context = make(name, rows=2)
        transform = MongeAmpereTransform(potential, time=1.5, steps=2, solver=solver)
        with torch.no_grad():
            results = transform(x, context), transform.inverse(x, context)
        value = definition(potential, context)
        for (y, logabsdet), (start, stop) in zip(results, ((1.5, 0.0), (0.0, 1.5)), strict=True):
            expected = brute_force(value, x, uniform_grid(start, stop, 2), solver)
            close(y, expected[0])
            close(logabsdet, expected[1])
            assert y.is_contiguous()
            assert logabsdet.is_contiguous()

    @pytest.mark.parametrize("name", POTENTIALS)
    def test_logabsdet_is_that_of_the_jacobian(self, name):
        """In both directions."""
        potential, x, context = make(name, rows=2)
        row_context = None if context is None else context[:1]
        transform = MongeAmpereTransform(potential, time=0.5, steps=4)
        for solve, rows in ((transform, x[:1]), (transform.inverse, x[1:])):
            jacobian = log_determinant(lambda row, s=solve: s(row, row_context)[0], rows)
            assert jacobian.abs().min() > 1e-5
            close(solve(rows, row_context)[1].detach(), jacobian, 1e-4)

    @pytest.mark.parametrize("name", POTENTIALS)
    def test_two_faces_of_one_map(self, name):
        potential, x, context = make(name)
        nflows, normflows = MongeAmpereTransform(potential), MongeAmpere(potential)
        for ours, theirs in ((nflows, normflows.inverse), (nflows.inverse, normflows)):
            for a, b in zip(ours(x, context), theirs(x, context), strict=True):
                assert torch.equal(a, b)

    @pytest.mark.parametrize("name", POTENTIALS)
    def test_float32_gives_the_same_numbers(self, name):
        potential, x, context = make(name)
        exact = MongeAmpereTransform(potential)(x, context)
        transform = MongeAmpereTransform(potential.float())
        single = transform(x.float(), None if context is None else context.float())
        for ours, theirs in zip(single, exact, strict=True):
            assert ours.dtype == torch.float32
            close(ours.double(), theirs, 1e-5)

    @pytest.mark.parametrize("name", POTENTIALS)
    def test_rows_do_not_know_of_each_other(self, name):
        """Whatever the batch, and whichever coordinates its size favours."""
        potential, x, context = make(name, rows=12)
        transform = MongeAmpereTransform(potential, steps=2)
        order = torch.randperm(12)
        with torch.no_grad():
            z, logabsdet = transform(x, context)
            for rows in (order, *order.split(5), order[:1], order[:0]):
                part = transform(x[rows], None if context is None else context[rows])
                close(part[0], z[rows], 1e-12)
                close(part[1], logabsdet[rows], 1e-12)

    def test_quadratic_potential_in_closed_form(self):
        """u = x·Ax/2 flows by the matrix exponential; the log-determinant is T tr A."""
        A = torch.randn(3, 3, dtype=torch.float64)
        A = A + A.T

        class Quadratic(torch.nn.Module):
            def forward(self, x):
                return torch.einsum("bi,ij,bj->b", x, A, x) / 2

        x = torch.randn(4, 3, dtype=torch.float64)
        transform = MongeAmpereTransform(AutogradPotential(Quadratic()), time=0.7, steps=100)
        for solve, T in ((transform.inverse, 0.7), (transform, -0.7)):
            y, logabsdet = solve(x)
            close(y.detach(), x @ torch.linalg.matrix_exp(T * A), 1e-7)
            close(logabsdet.detach(), (T * A.trace()).expand(4), 1e-12)


class TestDensity:
    @staticmethod
    def flow(kind):
        if kind == "network":
            potential = AutogradPotential(Network(2).double())
            with torch.no_grad():
                potential.module.output.weight.mul_(4)
        else:
            potential = ridge(2, 12, scale=1.7, activation=kind)
        return Flow(MongeAmpereTransform(potential), StandardNormal([2])).double()

    @staticmethod
    @torch.no_grad()
    def on_grid(flow, extent, points):
        """Centres of a grid of cells, and the density there."""
        side = (torch.arange(points, dtype=torch.float64) + 0.5) * 2 * extent / points - extent
        centres = torch.cartesian_prod(side, side)
        return flow.log_prob(centres).exp().view(points, points)

    @pytest.mark.parametrize("kind", ["softplus", "logcosh", "network"])
    def test_integrates_to_one(self, kind):
        flow = self.flow(kind)
        density = self.on_grid(flow, 12.0, 80)
        assert float(density.sum() * (24 / 80) ** 2) == pytest.approx(1, abs=1e-3)
        # far from the base, or this would say little
        base = self.on_grid(
            Flow(MongeAmpereTransform(ridge(2, 2, scale=0)), flow._distribution), 3, 9
        )
        assert (self.on_grid(flow, 3, 9) - base).abs().max() > 0.05

    @pytest.mark.parametrize("kind", ["softplus", "logcosh", "network"])
    def test_samples_follow_it(self, kind):
        flow = self.flow(kind)
        with torch.no_grad():
            samples = flow._transform.inverse(torch.randn(10_000, 2, dtype=torch.float64))[0]
        edges = np.linspace(-4, 4, 17)
        counts = torch.as_tensor(np.histogram2d(*samples.T.numpy(), bins=(edges, edges))[0])
        # each bin from 4×4 cells
        fine = self.on_grid(flow, 4.0, 64).view(16, 4, 16, 4).sum((1, 3)) * (8 / 64) ** 2
        expected = len(samples) * fine
        kept = expected > 20
        freedom = int(kept.sum())
        assert freedom > 30
        chi_square = ((counts - expected)[kept].square() / expected[kept]).sum()
        assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)

    def test_a_new_flow_is_its_base(self):
        flow = MongeAmpereFlow(2, 16, context_features=3, time_dependent=True)
        x, context = torch.randn(5, 2), torch.randn(5, 3)
        z, logabsdet = flow._transform(x, context)
        assert torch.equal(z, x)
        assert torch.equal(logabsdet, torch.zeros(5))
        normal = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1)
        close(flow.log_prob(x, context), normal, 1e-6)


class TestTrajectory:
    @pytest.mark.parametrize(("name", "rising"), zip(POTENTIALS, itertools.cycle([True, False])))
    def test_every_point_solves_to_its_time(self, name, rising):
        potential, x, context = make(name, rows=2)
        transform = MongeAmpereTransform(potential, time=2.0, steps=4, solver="midpoint")
        times = [0.0, 0.5, 2.0] if rising else [2.0, 0.5, 0.0]
        path = transform.trajectory(x, times, context)
        assert path.times.tolist() == times
        assert path.points.shape == (3, *x.shape)
        assert path.points.is_contiguous()
        assert torch.equal(path.points[0], x)
        assert torch.equal(path.logabsdet[0], torch.zeros(2))
        end = (transform.inverse if rising else transform)(x, context)
        value = definition(potential, context)
        expected = x, torch.zeros(2, dtype=torch.float64)
        for k in (1, 2):
            grid = uniform_grid(times[k - 1], times[k], round(2 * abs(times[k] - times[k - 1])))
            points, logabsdet = brute_force(value, expected[0], grid, "midpoint")
            expected = points, expected[1] + logabsdet
            close(path.points[k].detach(), expected[0])
            close(path.logabsdet[k].detach(), expected[1])
        close(path.points[-1], end[0], 1e-13)
        close(path.logabsdet[-1], end[1], 1e-13)

    @pytest.fixture(scope="class")
    def ends(self):
        """Points on their way, and where they are at some times."""
        potential, x, context = example = make("ridge-all")
        value, times = definition(potential, context), torch.tensor([0.9, 0.61, 0.6, 0.1])
        grids = [uniform_grid(float(times[0]), float(time), 10) for time in times[1:]]
        return example, times, [brute_force(value, x, grid) for grid in grids]

    @pytest.mark.parametrize(
        ("solver", "sensitivity"),
        [
            *((solver, "autograd") for solver in (*FIXED, "ieuler", *ADAPTIVE)),
            *itertools.product(["rk4", "dopri5"], ["recompute", "adjoint"]),
        ],
    )
    def test_every_solver_between_uneven_times(self, solver, sensitivity, ends):
        (potential, x, context), times, expected = ends
        transform = MongeAmpereTransform(
            potential, steps=32, solver=solver, sensitivity=sensitivity
        )
        path = transform.trajectory(x, times, context)
        tolerance = {"euler": 0.1, "ieuler": 0.1, "midpoint": 4e-3, "alf": 4e-3}.get(solver, 1e-4)
        for k, (points, logabsdet) in enumerate(expected, 1):
            close(path.points[k].detach(), points, tolerance)
            close(path.logabsdet[k].detach(), logabsdet, tolerance)

    def test_autocast_keeps_the_precision_of_the_parameters(self):
        transform = MongeAmpereTransform(RidgePotential(2, 3))
        with torch.autocast("cpu", torch.bfloat16):
            path = transform.trajectory(torch.zeros(4, 2).bfloat16(), [0, 0.3, 1])
        assert {part.dtype for part in path} == {torch.float32}

    @pytest.mark.parametrize(
        "times",
        [[], [0.0], [0.0, 0.0], [0.0, 1.0, 0.5], [-0.1, 1.0], [0.0, 1.1], [0.0, math.nan]],
        ids=str,
    )
    def test_bad_times(self, times):
        transform = MongeAmpereTransform(RidgePotential(2, 3))
        with pytest.raises(ValueError, match=r"^times: got .* expected at least two"):
            transform.trajectory(torch.zeros(4, 2), times)


def solves(potential):
    """Each way to solve, with the name of its argument."""
    nflows, normflows = MongeAmpereTransform(potential), MongeAmpere(potential)
    return [
        ("inputs", nflows.forward),
        ("inputs", nflows.inverse),
        ("inputs", lambda x, context=None: nflows.trajectory(x, [0.0, 0.5], context)),
        ("inputs", nflows.estimate_error),
        ("inputs", lambda x, context=None: nflows.choose_steps(x, 0.1, context)),
        ("z", normflows.forward),
        ("z", normflows.inverse),
    ]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x.tolist(), TypeError, "got list"),
        (lambda x: x.float(), TypeError, "got dtype torch.float32, but .* torch.float64"),
        (lambda x: x.int(), TypeError, "got dtype torch.int32"),
        (lambda x: x[0], ValueError, r"got shape \(2,\)"),
        (lambda x: x.repeat(1, 2), ValueError, r"got 4 features .* expected 2"),
        (lambda x: x / 0, ValueError, "got NaN or infinite"),
    ],
    ids=["list", "dtype", "int", "row", "width", "nan"],
)
def test_mistakes_name_the_argument(change, error, message):
    """In the words of the method that was called; a missing context, too."""
    x = torch.zeros(4, 2, dtype=torch.float64)
    for name, solve in solves(ridge(2, 3)):
        with pytest.raises(error, match=rf"^{name}: {message}"):
            solve(change(x))
    for _, solve in solves(ridge(2, 3, context_features=2)):
        with pytest.raises(ValueError, match=r"^context: got None, expected"):
            solve(x)
        with pytest.raises(ValueError, match=r"^context: got shape \(3, 2\), expected \(4, 2\)"):
            solve(x, x[:3])


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"potential": torch.nn.Linear(2, 1)}, TypeError),
        ({"time": 0}, ValueError),
        ({"time": "1"}, TypeError),
        ({"steps": 2.5}, TypeError),
        ({"solver": "rk5"}, ValueError),
    ],
    ids=str,
)
def test_bad_construction(face, options, error):
    name = next(iter(options))
    options = {"potential": RidgePotential(2, 3)} | options
    with pytest.raises(error, match=rf"^{name}: got .* expected"):
        face(options.pop("potential"), **options)


def test_steps_may_be_set():
    transform = MongeAmpereTransform(ridge(2, 3), steps=2)
    x = torch.randn(4, 2, dtype=torch.float64)
    expected = MongeAmpereTransform(transform.potential, steps=20)(x)
    transform.steps = 20
    assert transform.steps == 20
    assert torch.equal(transform(x)[0], expected[0])
    with pytest.raises(ValueError, match=r"^steps: got 0"):
        transform.steps = 0


class TestState:
    @pytest.mark.parametrize("saved", FACES)
    @pytest.mark.parametrize("fresh", FACES)
    def test_a_state_dict_restores_the_density(self, saved, fresh):
        """Steps and tolerances with it, whatever they were before; in both adapters."""
        flow = saved(ridge(2, 4), steps=5, atol=1e-3, rtol=1e-2)
        state = copy.deepcopy(flow.state_dict())
        other = fresh(ridge(2, 4), steps=3)
        for changed in (other, flow):
            changed.steps = 1
            changed.load_state_dict(state)
            settings = changed.integrator
            assert (settings.steps, settings.atol, settings.rtol) == (5, 1e-3, 1e-2)
            assert changed.tolerance is None

    @pytest.mark.parametrize(
        "state", [None, [8, 0], torch.zeros(3), torch.tensor([8.0, -1.0, 1.0, 1.0])], ids=repr
    )
    def test_bad_extra_state(self, state):
        with pytest.raises(ValueError, match=r"^state: got .*four"):
            MongeAmpereTransform(RidgePotential(2, 4)).set_extra_state(state)

    @pytest.mark.parametrize("name", POTENTIALS)
    @pytest.mark.parametrize("how", ["to_empty", "assign"])
    def test_models_built_without_numbers(self, name, how):
        """Under torch.device("meta"), to be filled by a state_dict; groups are on the CPU."""
        potential, x, context = make(name)
        reference = MongeAmpereTransform(potential, steps=3)
        with torch.device("meta"):
            fresh = MongeAmpereTransform(POTENTIALS[name].build())
        assert all(p.is_meta for p in fresh.parameters())
        if how == "to_empty":
            fresh.to_empty(device="cpu")
        fresh.load_state_dict(reference.state_dict(), assign=how == "assign")
        for ours, theirs in zip(fresh(x, context), reference(x, context), strict=True):
            assert torch.equal(ours, theirs)
        fresh(x, context)[1].sum().backward()
