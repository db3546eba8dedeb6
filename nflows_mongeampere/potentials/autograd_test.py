import math
import warnings

import pytest
import torch
from torch import nn

from nflows_mongeampere import AutogradPotential, MongeAmpereTransform
from nflows_mongeampere.conftest import (
    ContextNetwork,
    Network,
    TimeContextNetwork,
    close,
    definition,
    differentiate,
)


class Returns(nn.Module):
    """A module that returns what it was told to."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class OptionalContext(nn.Module):
    def forward(self, x, context=None):
        y = x.square().sum(1) / 2
        return y if context is None else y * context[:, 0]


class CountingProbes(AutogradPotential):
    """Keeps the probes that it draws."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.probes = []

    def _draw_probe(self, x):
        self.probes.append(super()._draw_probe(x))
        return self.probes[-1]


def test_laplacian_over_more_than_one_chunk():
    # a quadratic form whose every diagonal entry counts
    A = torch.randn(150, 150, dtype=torch.float64)
    potential = AutogradPotential(Returns(lambda x: torch.einsum("bi,ij,bj->b", x, A, x) / 2))
    x = torch.randn(3, 150, dtype=torch.float64)
    close(potential.laplacian(x), A.trace().expand(3))
    close(potential.gradient(x), x @ (A + A.T) / 2)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.new_ones(len(x)),
        lambda x: x.detach().sum(1),
        lambda x: 3 * x.sum(1),
        lambda x: 3 * x.sum(1) + 0 * x.detach().square().sum(1),
    ],
    ids=["constant", "detached", "linear", "linear-detached"],
)
@pytest.mark.parametrize("laplacian", ["exact", "hutchinson"])
def test_laplacian_is_zero_where_nothing_bends(function, laplacian):
    potential = AutogradPotential(Returns(function), laplacian=laplacian)
    x = torch.randn(2, 3)
    assert torch.equal(potential.laplacian(x), torch.zeros(2))
    assert potential.gradient(x).shape == x.shape


def test_a_context_computed_from_x_does_not_count_as_x():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    potential = AutogradPotential(ContextNetwork(3).double())
    context = x.square()
    gradient, laplacian = differentiate(definition(potential, context.detach()), x)
    close(potential.gradient(x, context=context).detach(), gradient)
    close(potential.laplacian(x, context=context).detach(), laplacian)


@pytest.mark.parametrize("method", ["gradient", "laplacian"])
def test_derivatives_are_differentiable(method):
    potential = AutogradPotential(TimeContextNetwork(3).double())
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    context = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda x, c: getattr(potential, method)(x, 0.4, c), (x, context), fast_mode=True
    )
    loss = getattr(potential, method)(x, 0.4, context).square().sum()
    # only the bias of the last layer, which shifts u by a constant, must get nothing
    grads = torch.autograd.grad(
        loss, list(potential.parameters()), allow_unused=True, materialize_grads=True
    )
    assert [bool(g.any()) for g in grads] == [True, True, True, False]


class TestHutchinson:
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(1, 2, 2, 3)

    @pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
    def test_unbiased(self, probe):
        module = Network(12).double()
        exact = AutogradPotential(module).laplacian(self.x).detach()
        probes = self.x.expand(20_000, 2, 2, 3)  # every row of a batch has its own
        estimates = AutogradPotential(module, laplacian="hutchinson", probe=probe).laplacian(probes)
        standard_error = estimates.std() / math.sqrt(len(estimates))
        assert standard_error > 0
        assert (estimates.mean() - exact).abs() < 5 * standard_error

    def test_estimate_is_the_quadratic_form_of_the_hessian(self):
        potential = CountingProbes(Network(12).double(), laplacian="hutchinson", probe="gaussian")
        value = definition(potential)
        hessian = torch.autograd.functional.hessian(
            lambda x: value(x.view(1, 2, 2, 3), 0.0).sum(), self.x.flatten()
        )
        estimate = potential.laplacian(self.x)
        (probe,) = potential.probes
        close(estimate.detach(), (probe.flatten() @ hessian @ probe.flatten())[None])

    def test_rademacher_is_exact_for_a_diagonal_hessian(self):
        potential = AutogradPotential(
            Returns(lambda x: torch.sin(x).flatten(1).sum(1)), laplacian="hutchinson"
        )
        close(potential.laplacian(self.x), -torch.sin(self.x).flatten(1).sum(1), 1e-14)

    def test_probes_by_name(self):
        assert AutogradPotential(Network(2), laplacian="hutchinson").probe == "rademacher"
        x = torch.zeros(10_000, 2)
        signs = AutogradPotential(Network(2), laplacian="hutchinson")._draw_probe(x)
        assert set(signs.unique().tolist()) == {-1.0, 1.0}
        assert signs.mean().abs() < 5 / math.sqrt(signs.numel())
        normal = AutogradPotential(Network(2), laplacian="hutchinson", probe="gaussian")
        draws = normal._draw_probe(x)
        assert len(draws.unique()) > 10_000
        assert (draws.var() - 1).abs() < 5 * math.sqrt(2 / draws.numel())

    @pytest.mark.parametrize("sensitivity", ["autograd", "recompute"])
    @pytest.mark.parametrize("solver", ["rk4", "dopri5"])
    def test_one_probe_is_held_through_a_solve(self, sensitivity, solver):
        potential = CountingProbes(Network(12).double(), laplacian="hutchinson")
        transform = MongeAmpereTransform(
            potential, steps=3, solver=solver, sensitivity=sensitivity, atol=1e-11, rtol=1e-11
        )
        x = torch.randn(5, 2, 2, 3, dtype=torch.float64, requires_grad=True)
        logabsdet = transform(x)[1]
        logabsdet.sum().backward()
        assert len(potential.probes) == 1

        # the same probe in other arithmetic: -∫ εᵀ(∇∇u)ε dt by fine steps
        (probe,) = potential.probes
        fixed = CountingProbes(potential.module, laplacian="hutchinson")
        fixed._draw_probe = lambda x: probe
        fine = MongeAmpereTransform(fixed, steps=3 if solver == "rk4" else 60)
        close(logabsdet, fine(x)[1], 1e-9)

        transform(x)
        assert len(potential.probes) == 2
        assert not torch.equal(*potential.probes)

    def test_exact_draws_none(self):
        potential = CountingProbes(Network(12).double())
        state = torch.get_rng_state()
        MongeAmpereTransform(potential)(self.x)
        assert potential.probes == [None]
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "function",
    [lambda x: x, lambda x: x.sum(), lambda x: x.sum(1, keepdim=True), lambda x: None],
    ids=["(B,D)", "()", "(B,1)", "None"],
)
def test_module_must_return_one_value_for_each_row(function):
    potential = AutogradPotential(Returns(function))
    for call in (potential, potential.gradient, MongeAmpereTransform(potential)):
        with pytest.raises(ValueError, match=r"module: Returns returned .* expected .*\(4,\)"):
            call(torch.randn(4, 3))


def test_context_is_optional_where_the_module_says_so():
    potential = AutogradPotential(OptionalContext())
    x = torch.ones(2, 3)
    assert potential(x).tolist() == [1.5, 1.5]
    assert potential(x, context=torch.tensor([[1.0], [2.0]])).tolist() == [1.5, 3.0]


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"module": lambda x: x.sum(1)}, TypeError, "module"),
        ({"module": Network}, TypeError, "module"),
        ({"laplacian": "stein"}, ValueError, "laplacian"),
        ({"probe": "uniform"}, ValueError, "probe"),
    ],
)
def test_bad_construction(arguments, error, name):
    arguments = {"module": Network(2)} | arguments
    with pytest.raises(error, match=f"{name}: got"):
        AutogradPotential(arguments.pop("module"), **arguments)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.ReLU(), r"has a layer ReLU \(1\), whose slope jumps.* take Softplus"),
        (nn.LeakyReLU(), "LeakyReLU"),
        (nn.Hardtanh(), "Hardtanh"),
        (nn.BatchNorm1d(4), "which couples the rows of a batch; take LayerNorm"),
        (nn.Dropout(), "which draws anew in every evaluation"),
    ],
)
def test_layers_that_spoil_a_density_are_warned_of(layer, message):
    with pytest.warns(UserWarning, match=f"^module: Sequential .*{message}.*Ignore") as caught:
        AutogradPotential(nn.Sequential(nn.Linear(2, 4), layer, nn.Linear(4, 1), nn.Flatten(0)))
    assert caught[0].filename == __file__


def test_layers_that_do_no_harm_pass_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layers = nn.Linear(2, 4), nn.Dropout(0.0), nn.LayerNorm(4), nn.Softplus(), nn.Flatten(0)
        AutogradPotential(nn.Sequential(*layers))


def test_time_and_context_go_by_their_names():
    class Foreign(torch.nn.Module):
        def forward(self, x, t, c, scale=1.0):
            return scale * (x.sum(1) + t * c.sum(1))

    message = r"module: got a forward\(x, t, c, scale\), which needs c; expected forward\(x\)"
    with pytest.raises(TypeError, match=message):
        AutogradPotential(Foreign())
