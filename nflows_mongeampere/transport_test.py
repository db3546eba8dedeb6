"""The whole map, its density and its path, against brute force and calculus."""

import itertools
import math

import numpy as np
import pytest
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow

from nflows_mongeampere import (
    AutogradPotential,
    IntegrationError,
    MongeAmpereFlow,
    MongeAmpereTransform,
    RidgePotential,
    transport_costs,
)
from nflows_mongeampere.conftest import (
    POTENTIALS,
    SHAPES,
    TABLEAUS,
    Network,
    brute_force,
    close,
    definition,
    log_determinant,
    make_potential,
    ridge,
    uniform_grid,
)
from nflows_mongeampere.dynamics import DirectDynamics, ReducedDynamics
from nflows_mongeampere.normflows import MongeAmpere

ORDERS = {"euler": 1, "ieuler": 1, "midpoint": 2, "alf": 2, "rk4": 4}
CONDITIONS = [{}, {"time_dependent": True}, {"context_features": 2}]
CONDITIONS += [{"time_dependent": True, "context_features": 2}]


def batch(shape, size=4, options=None):
    """Random inputs, and a context where ``options`` want one."""
    x = torch.randn(size, *shape, dtype=torch.float64)
    conditional = "context_features" in (options or {})
    return x, torch.randn(size, 2, dtype=torch.float64) if conditional else None


class TestExactness:
    @pytest.mark.parametrize("solver", TABLEAUS)
    @pytest.mark.parametrize("options", CONDITIONS[::3], ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize(
        ("kind", "hidden", "coordinates"),
        [
            ("softplus", 2, ReducedDynamics),
            ("logcosh", 2, ReducedDynamics),
            ("softplus", 16, DirectDynamics),
            ("logcosh", 16, DirectDynamics),
            ("network", None, DirectDynamics),
        ],
    )
    def test_brute_force(self, solver, options, shape, kind, hidden, coordinates):
        x, context = batch(shape, options=options)
        potential = make_potential(kind, x[0].numel(), hidden=hidden, **options)
        transform = MongeAmpereTransform(potential, time=1.5, steps=3, solver=solver)
        dynamics = potential.dynamics(x, context, transform.integrator.evaluations)
        assert type(dynamics) is coordinates

        value = definition(potential, context)
        with torch.no_grad():
            results = transform(x, context), transform.inverse(x, context)
        for (y, logabsdet), (start, stop) in zip(results, ((1.5, 0.0), (0.0, 1.5)), strict=True):
            expected = brute_force(value, x, uniform_grid(start, stop, 3), solver)
            close(y, expected[0])
            close(logabsdet, expected[1])

    @pytest.mark.parametrize("kind", POTENTIALS)
    def test_two_faces_of_one_map(self, kind):
        x, context = batch((3,), options={"context_features": 2})
        potential = make_potential(kind, 3, context_features=2)
        nflows, normflows = MongeAmpereTransform(potential), MongeAmpere(potential)
        assert torch.equal(nflows(x, context)[0], normflows.inverse(x, context)[0])
        assert torch.equal(nflows(x, context)[1], normflows.inverse(x, context)[1])
        assert torch.equal(nflows.inverse(x, context)[0], normflows(x, context)[0])
        assert torch.equal(nflows.inverse(x, context)[1], normflows(x, context)[1])

    @pytest.mark.parametrize("kind", POTENTIALS)
    @pytest.mark.parametrize("options", CONDITIONS, ids=str)
    def test_float32_gives_the_same_numbers(self, kind, options):
        x, context = batch((3,), options=options)
        potential = make_potential(kind, 3, **options)
        exact = MongeAmpereTransform(potential)(x, context)
        transform = MongeAmpereTransform(potential.float())
        single = transform(x.float(), None if context is None else context.float())
        for ours, theirs in zip(single, exact, strict=True):
            assert ours.dtype == torch.float32
            close(ours.double(), theirs, 1e-5)

    def test_quadratic_potential_in_closed_form(self):
        """u = x·Ax/2 flows by the matrix exponential; the log-determinant is T tr A."""
        A = torch.randn(3, 3, dtype=torch.float64)
        A = A + A.T

        class Quadratic(torch.nn.Module):
            def forward(self, x):
                return torch.einsum("bi,ij,bj->b", x, A, x) / 2

        x, _ = batch((3,))
        transform = MongeAmpereTransform(AutogradPotential(Quadratic()), time=0.7, steps=200)
        for solve, T in ((transform.inverse, 0.7), (transform, -0.7)):
            y, logabsdet = solve(x)
            close(y.detach(), x @ torch.linalg.matrix_exp(T * A), 1e-8)
            close(logabsdet.detach(), (T * A.trace()).expand(4), 1e-12)


class TestLogabsdet:
    @pytest.mark.parametrize("options", CONDITIONS[::3], ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("kind", POTENTIALS)
    @pytest.mark.parametrize("direction", ["forward", "inverse"])
    def test_jacobian(self, options, shape, kind, direction):
        x, context = batch(shape, size=2, options=options)
        context = None if context is None else context[:1].expand(2, -1)
        potential = make_potential(kind, x[0].numel(), **options)
        solve = getattr(MongeAmpereTransform(potential, steps=20), direction)
        jacobian = log_determinant(
            lambda row: solve(row, None if context is None else context[:1])[0], x
        )
        assert jacobian.abs().min() > 1e-4
        close(solve(x, context)[1].detach(), jacobian, 1e-5)

    @pytest.mark.parametrize("solver", ORDERS)
    @pytest.mark.parametrize("time_dependent", [False, True])
    def test_error_falls_at_the_order_of_the_solver(self, solver, time_dependent):
        x, _ = batch((3,), size=3)
        potential = make_potential("softplus", 3, hidden=6, time_dependent=time_dependent)
        errors = []
        for steps in (4, 8, 16) if solver == "rk4" else (8, 16, 32):
            transform = MongeAmpereTransform(potential, steps=steps, solver=solver)
            jacobian = log_determinant(lambda row, t=transform: t(row)[0], x)
            errors.append((transform(x)[1].detach() - jacobian).norm())
        for coarse, fine in itertools.pairwise(errors):
            assert float(torch.log2(coarse / fine)) > ORDERS[solver] - 0.3

    @pytest.mark.parametrize("solver", ["dopri5", "tsit5"])
    @pytest.mark.parametrize("tolerance", [1e-4, 1e-7, 1e-10])
    def test_error_is_within_the_tolerance(self, solver, tolerance):
        x, _ = batch((3,), size=3)
        potential = make_potential("softplus", 3, hidden=6, time_dependent=True)
        transform = MongeAmpereTransform(
            potential, time=3.0, solver=solver, atol=tolerance, rtol=tolerance
        )
        jacobian = log_determinant(lambda row: transform(row)[0], x)
        close(transform(x)[1].detach(), jacobian, 30 * tolerance)

    @pytest.mark.parametrize("solver", ORDERS)
    @pytest.mark.parametrize("kind", POTENTIALS)
    def test_there_and_back(self, solver, kind):
        x, _ = batch((3,))
        potential = make_potential(kind, 3)
        distances = []
        for steps in (8, 16):
            transform = MongeAmpereTransform(potential, steps=steps, solver=solver)
            with torch.no_grad():
                z, forward = transform(x)
                back, inverse = transform.inverse(z)
            distances.append((back - x).norm() + (forward + inverse).norm())
        assert distances[1] < distances[0] / 2 ** (ORDERS[solver] - 0.4)


class TestDensity:
    @staticmethod
    def flow(kind):
        potential = make_potential(kind, 2, hidden=12)
        if kind != "network":
            torch.nn.init.normal_(potential.amplitude, std=0.5)
        else:
            with torch.no_grad():
                potential.module.output.weight.mul_(4)
        return Flow(MongeAmpereTransform(potential), StandardNormal([2])).double()

    @staticmethod
    @torch.no_grad()
    def on_grid(flow, extent, points):
        """Centres of a grid of cells, and the density there."""
        side = (torch.arange(points, dtype=torch.float64) + 0.5) * 2 * extent / points - extent
        centres = torch.cartesian_prod(side, side)
        return flow.log_prob(centres).exp().view(points, points)

    @pytest.mark.parametrize("kind", POTENTIALS)
    def test_integrates_to_one(self, kind):
        flow = self.flow(kind)
        density = self.on_grid(flow, 12.0, 80)
        assert float(density.sum() * (24 / 80) ** 2) == pytest.approx(1, abs=1e-3)
        # far from the base, or this would say little
        base = self.on_grid(
            Flow(MongeAmpereTransform(ridge(2, 2, scale=0)), flow._distribution), 3, 9
        )
        assert (self.on_grid(flow, 3, 9) - base).abs().max() > 0.05

    @pytest.mark.parametrize("kind", POTENTIALS)
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
        assert freedom > 50
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

    @pytest.mark.parametrize("hidden", [3, 16])
    @pytest.mark.parametrize("solver", ["rk4", "midpoint"])
    def test_sign_symmetry(self, hidden, solver):
        x, _ = batch((3,))
        potential = ridge(3, hidden, activation="logcosh", bias=False)
        flow = Flow(MongeAmpereTransform(potential, solver=solver), StandardNormal([3])).double()
        close(flow.log_prob(-x), flow.log_prob(x), 1e-12)
        close(flow._transform(-x)[0], -flow._transform(x)[0], 1e-12)
        skewed = ridge(3, hidden, activation="softplus", bias=False)
        flow = Flow(MongeAmpereTransform(skewed), StandardNormal([3])).double()
        assert not torch.allclose(flow.log_prob(-x), flow.log_prob(x))

    @pytest.mark.parametrize(
        ("kind", "hidden"), [("softplus", 4), ("logcosh", 7), ("softplus", 16), ("network", 8)]
    )
    @pytest.mark.parametrize("options", CONDITIONS[::3], ids=str)
    def test_rows_do_not_know_of_each_other(self, kind, hidden, options):
        """Whatever the batch, and whichever coordinates its size favours."""
        x, context = batch((4,), size=12, options=options)
        potential = make_potential(kind, 4, hidden=hidden, **options)
        transform = MongeAmpereTransform(potential)
        order = torch.randperm(12)
        with torch.no_grad():
            z, logabsdet = transform(x, context)
            for rows in (order, *order.split(5), order[:1]):
                part = transform(x[rows], None if context is None else context[rows])
                close(part[0], z[rows], 1e-12)
                close(part[1], logabsdet[rows], 1e-12)


class TestTrajectory:
    @pytest.mark.parametrize("kind", POTENTIALS)
    @pytest.mark.parametrize("options", CONDITIONS, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("rising", [True, False])
    def test_every_point_solves_to_its_time(self, kind, options, shape, rising):
        x, context = batch(shape, options=options)
        potential = make_potential(kind, x[0].numel(), **options)
        transform = MongeAmpereTransform(potential, time=2.0, steps=4)
        times = [0.0, 0.5, 1.0, 2.0] if rising else [2.0, 1.0, 0.5, 0.0]
        path = transform.trajectory(x, times, context)
        assert path.times.tolist() == times
        assert path.points.shape == (4, 4, *shape)
        assert path.logabsdet.shape == (4, 4)
        assert torch.equal(path.points[0], x)
        assert torch.equal(path.logabsdet[0], torch.zeros(4))

        end = (transform.inverse if rising else transform)(x, context)
        close(path.points[-1], end[0], 1e-13)
        close(path.logabsdet[-1], end[1], 1e-13)
        value = definition(potential, context)
        for k in range(1, 4):
            steps = round(2 * abs(times[k] - times[0]))
            grid = uniform_grid(times[0], times[k], steps)
            expected = brute_force(value, x, grid)
            close(path.points[k].detach(), expected[0])
            close(path.logabsdet[k].detach(), expected[1])

    @pytest.mark.parametrize(
        ("solver", "sensitivity"),
        [
            pair
            for pair in itertools.product(
                [*ORDERS, "dopri5", "tsit5"], ["autograd", "recompute", "adjoint"]
            )
            if pair != ("alf", "adjoint")
        ],
    )
    def test_every_solver_between_uneven_times(self, solver, sensitivity):
        x, _ = batch((3,))
        potential = make_potential("softplus", 3, time_dependent=True)
        transform = MongeAmpereTransform(
            potential, steps=64, solver=solver, sensitivity=sensitivity
        )
        times = torch.tensor([0.9, 0.61, 0.6, 0.1])
        path = transform.trajectory(x, times)
        tolerance = {1: 0.05, 2: 1e-3}.get(ORDERS.get(solver), 1e-4)
        for k in range(1, 4):
            grid = uniform_grid(float(times[0]), float(times[k]), 20)
            expected = brute_force(definition(potential), x, grid)
            close(path.points[k].detach(), expected[0], tolerance)
            close(path.logabsdet[k].detach(), expected[1], tolerance)

    def test_gradients_flow_through_the_path(self):
        x, _ = batch((3,))
        potential = make_potential("softplus", 3)
        path = MongeAmpereTransform(potential).trajectory(x.requires_grad_(), [0, 0.5, 1])
        loss = path.points[1].square().sum() + path.logabsdet[2].sum()
        assert all(bool(g.any()) for g in torch.autograd.grad(loss, [x, *potential.parameters()]))

    @pytest.mark.parametrize(
        ("times", "error"),
        [
            ([], ValueError),
            ([0.0], ValueError),
            ([0.0, 0.0], ValueError),
            ([0.0, 1.0, 0.5], ValueError),
            ([-0.1, 1.0], ValueError),
            ([0.0, 1.1], ValueError),
            ([0.0, math.nan], ValueError),
            ([0.0, math.inf], ValueError),
            (None, TypeError),
            (0.5, TypeError),
            (["a", "b"], TypeError),
            ([None, 1.0], TypeError),
            (torch.tensor(0.5), TypeError),
            (torch.zeros(2, 2), TypeError),
        ],
        ids=str,
    )
    def test_bad_times(self, times, error):
        transform = MongeAmpereTransform(RidgePotential(2, 3))
        with pytest.raises(error, match=r"(?s)^times: got .* expected"):
            transform.trajectory(torch.zeros(4, 2), times)


def faces(potential, **options):
    """Each way to solve, with the name of its argument."""
    nflows, normflows = (
        MongeAmpereTransform(potential, **options),
        MongeAmpere(potential, **options),
    )

    def trajectory(x, context=None):
        return nflows.trajectory(x, [0.0, 0.5], context)

    return [
        ("inputs", nflows.forward),
        ("inputs", nflows.inverse),
        ("inputs", trajectory),
        ("z", normflows.forward),
        ("z", normflows.inverse),
    ]


class TestBadInput:
    @pytest.mark.parametrize("kind", POTENTIALS)
    @pytest.mark.parametrize(
        ("x", "error"),
        [
            ([[0.0, 0.0, 0.0]], TypeError),
            (None, TypeError),
            (np.zeros((4, 3)), TypeError),
            (torch.zeros(4, 3, dtype=torch.int64), TypeError),
            (torch.zeros(4, 3), TypeError),
            (torch.zeros(3, dtype=torch.float64), ValueError),
            (torch.full((4, 3), math.nan, dtype=torch.float64), ValueError),
            (torch.tensor([[0.0, 0.0, math.inf]] * 4, dtype=torch.float64), ValueError),
        ],
        ids=["list", "None", "numpy", "int", "dtype", "row", "nan", "inf"],
    )
    def test_inputs(self, kind, x, error):
        for name, solve in faces(make_potential(kind, 3)):
            with pytest.raises(error, match=rf"^{name}: got .*(expected|but)"):
                solve(x)

    @pytest.mark.parametrize("kind", ["softplus", "logcosh"])
    def test_feature_count(self, kind):
        for name, solve in faces(make_potential(kind, 3)):
            with pytest.raises(ValueError, match=rf"^{name}: got 4 features .* expected 3"):
                solve(torch.zeros(5, 2, 2, dtype=torch.float64))

    @pytest.mark.parametrize("kind", POTENTIALS)
    @pytest.mark.parametrize(
        ("context", "error"),
        [
            (None, ValueError),
            ([[0.0, 0.0]] * 4, TypeError),
            (torch.zeros(4, 2, dtype=torch.int64), TypeError),
            (torch.zeros(4, 2), TypeError),
            (torch.zeros(3, 2, dtype=torch.float64), ValueError),
            (torch.zeros(0, 2, dtype=torch.float64), ValueError),
            (torch.full((4, 2), math.nan, dtype=torch.float64), ValueError),
            (torch.full((4, 2), -math.inf, dtype=torch.float64), ValueError),
        ],
        ids=["missing", "list", "int", "dtype", "rows", "empty", "nan", "inf"],
    )
    def test_context(self, kind, context, error):
        x, _ = batch((3,))
        for _, solve in faces(make_potential(kind, 3, context_features=2)):
            with pytest.raises(error, match=r"^context: got .*(expected|but)"):
                solve(x, context)

    @pytest.mark.parametrize("kind", POTENTIALS)
    def test_unexpected_context(self, kind):
        x, _ = batch((3,))
        for _, solve in faces(make_potential(kind, 3)):
            with pytest.raises(ValueError, match=r"^context: got .* expected None"):
                solve(x, torch.zeros(4, 2, dtype=torch.float64))

    @pytest.mark.parametrize("sensitivity", ["autograd", "recompute", "adjoint"])
    @pytest.mark.parametrize("solver", ["rk4", "dopri5", "ieuler"])
    @pytest.mark.parametrize("kind", POTENTIALS)
    def test_empty_batch(self, kind, solver, sensitivity):
        x = torch.zeros(0, 3, dtype=torch.float64)
        options = {"time_dependent": True, "context_features": 2}
        potential = make_potential(kind, 3, **options)
        context = torch.zeros(0, 2, dtype=torch.float64)
        for _, solve in faces(potential, solver=solver, sensitivity=sensitivity):
            *_, y, logabsdet = solve(x, context)
            assert y.shape in ((0, 3), (2, 0, 3))
            assert logabsdet.shape in ((0,), (2, 0))

    def test_empty_batch_of_images(self):
        potentials = [
            RidgePotential(12, 300, activation="logcosh"),
            RidgePotential(12, 4),
            AutogradPotential(Network(12), laplacian="hutchinson"),
        ]
        for potential in potentials:
            y, logabsdet = MongeAmpereTransform(potential)(torch.zeros(0, 3, 2, 2))
            assert y.shape == (0, 3, 2, 2)
            assert logabsdet.shape == (0,)

    def test_weights_that_are_not_finite(self):
        potential = ridge(3, 4)
        with torch.no_grad():
            potential.weight[0, 0] = math.nan
        for _, solve in faces(potential):
            with pytest.raises(IntegrationError, match="NaN or infinite"):
                solve(torch.zeros(2, 3, dtype=torch.float64))

    @pytest.mark.parametrize("hidden", [3, 16])
    def test_weights_that_explode(self, hidden):
        potential = ridge(3, hidden)
        with torch.no_grad():
            potential.weight.mul_(1e160)
        for _, solve in faces(potential):
            with pytest.raises(IntegrationError, match="NaN or infinite"):
                solve(batch((3,))[0])


@pytest.mark.parametrize("face", [MongeAmpereTransform, MongeAmpere])
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"potential": torch.nn.Linear(2, 1)}, TypeError),
        ({"potential": RidgePotential}, TypeError),
        ({"potential": None}, TypeError),
        ({"time": 0}, ValueError),
        ({"time": -1.0}, ValueError),
        ({"time": math.nan}, ValueError),
        ({"time": math.inf}, ValueError),
        ({"time": "1"}, TypeError),
        ({"time": None}, TypeError),
        ({"time": True}, TypeError),
        ({"steps": 0}, ValueError),
        ({"steps": 2.5}, TypeError),
        ({"steps": True}, TypeError),
        ({"solver": "rk5"}, ValueError),
        ({"solver": 5}, TypeError),
        ({"sensitivity": "none"}, ValueError),
        ({"atol": 0}, ValueError),
        ({"rtol": -1}, ValueError),
        ({"max_steps": 0}, ValueError),
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
    x, _ = batch((2,))
    expected = MongeAmpereTransform(transform.potential, steps=20)(x)
    transform.steps = 20
    assert transform.steps == 20
    assert torch.equal(transform(x)[0], expected[0])
    with pytest.raises(ValueError, match=r"^steps: got 0"):
        transform.steps = 0
    with pytest.raises(TypeError, match=r"^steps: got 2.5"):
        transform.steps = 2.5


@pytest.mark.parametrize(
    "state",
    [
        None,
        [8, 0],
        torch.zeros(3),
        torch.tensor([8, 0]),
        torch.tensor([math.nan, 1.0]),
        torch.tensor([8.0, -1.0]),
        torch.tensor([-8.0, 0.0]),
        torch.tensor([8.0, 1.0]).to_sparse(),
        torch.zeros(2, device="meta"),
    ],
    ids=repr,
)
def test_bad_extra_state(state):
    with pytest.raises(ValueError, match=r"^state: got "):
        MongeAmpereTransform(RidgePotential(2, 4)).set_extra_state(state)


@pytest.mark.parametrize(
    ("times", "error"),
    [
        ("01", TypeError),
        (iter([0.0, 1.0]), TypeError),
        (torch.zeros(2, 2), TypeError),
        (torch.zeros(2, device="meta"), TypeError),
        ({0.0, 1.0}, TypeError),
        ([0, 10**400], ValueError),
    ],
    ids=["text", "iterator", "matrix", "meta", "set", "huge"],
)
def test_bad_times(times, error):
    with pytest.raises(error, match=r"^times: got "):
        MongeAmpereTransform(RidgePotential(2, 4)).trajectory(torch.zeros(1, 2), times)


@pytest.mark.parametrize("method", ["estimate_error", "choose_steps"])
def test_inverse_is_a_flag(method):
    transform = MongeAmpereTransform(RidgePotential(2, 4))
    arguments = {"tolerance": 1e-2} if method == "choose_steps" else {}
    with pytest.raises(TypeError, match=r"^inverse: got 'yes'"):
        getattr(transform, method)(torch.zeros(1, 2), inverse="yes", **arguments)


def test_costs_of_what_is_no_module():
    with pytest.raises(TypeError, match=r"^model: got list"), transport_costs([]):
        pass


def test_costs_of_batches_of_two_sizes():
    flow = MongeAmpereTransform(RidgePotential(2, 4))
    with transport_costs(flow):
        flow(torch.zeros(3, 2))
        with pytest.raises(ValueError, match=r"^inputs: got 2 rows after a batch of 3"):
            flow(torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"embedding_net": "net"}, TypeError, "embedding_net"),
        ({"distribution": torch.distributions.Normal(0.0, 1.0)}, TypeError, "distribution"),
        ({"distribution": StandardNormal([3])}, ValueError, "distribution"),
    ],
)
def test_bad_flow(options, error, name):
    with pytest.raises(error, match=rf"^{name}: got "):
        MongeAmpereFlow(2, 4, **options)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda flow: flow.log_prob("x"), TypeError, "inputs"),
        (lambda flow: flow.log_prob(torch.tensor(1.0), torch.ones(1)), ValueError, "context"),
        (lambda flow: flow.log_prob(torch.ones(2, 2), torch.tensor(1.0)), ValueError, "context"),
        (lambda flow: flow.log_prob(torch.ones(3, 2, 1), torch.ones(3, 1)), ValueError, "inputs"),
        (lambda flow: flow.log_prob(torch.ones(3, 2), torch.ones(2, 1)), ValueError, "context"),
        (lambda flow: flow.sample(0), ValueError, "num_samples"),
        (lambda flow: flow.sample(3, torch.ones(2, 1), 0), ValueError, "batch_size"),
        (lambda flow: flow.sample_and_log_prob(1.5), TypeError, "num_samples"),
        (lambda flow: flow.transform_to_noise(None), TypeError, "inputs"),
    ],
)
def test_bad_calls_of_a_flow(call, error, name):
    with pytest.raises(error, match=rf"^{name}: got "):
        call(MongeAmpereFlow(2, 4, context_features=1))


@pytest.mark.parametrize("size", [None, 1, 2, 5, 9])
def test_samples_in_batches(size):
    flow = MongeAmpereFlow(2, 4, context_features=1)
    assert flow.sample(5, torch.ones(3, 1), size).shape == (3, 5, 2)
    assert MongeAmpereFlow(2, 4).sample(5, batch_size=size).shape == (5, 2)


@pytest.mark.parametrize("changed", [True, False])
def test_a_state_dict_brings_steps_that_were_changed(changed):
    """Else the densities of a flow that a training has refined would come back as others."""
    flow, other = (MongeAmpereTransform(RidgePotential(2, 4), steps=steps) for steps in (2, 3))
    flow.steps = 8 if changed else 2
    other.load_state_dict(flow.state_dict())
    assert (other.steps, other.tolerance) == (8 if changed else 3, None)
    third = MongeAmpereTransform(RidgePotential(2, 4), steps=5)
    third.load_state_dict(other.state_dict())
    assert third.steps == (8 if changed else 5)
