import pytest
import torch

from nflows_mongeampere import RidgePotential
from nflows_mongeampere.conftest import SHAPES, close, definition, differentiate, ridge
from nflows_mongeampere.dynamics import DirectDynamics, ReducedDynamics

OPTIONS = [
    pytest.param(
        time_dependent, context_features, bias, id=f"{time_dependent}-{context_features}-{bias}"
    )
    for time_dependent in (False, True)
    for context_features in (None, 2)
    for bias in (True, False)
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["softplus", "logcosh"])
@pytest.mark.parametrize(("time_dependent", "context_features", "bias"), OPTIONS)
@pytest.mark.parametrize("per_row_time", [False, True])
def test_value_gradient_laplacian(
    shape, activation, time_dependent, context_features, bias, per_row_time
):
    x = 3 * torch.randn(4, *shape, dtype=torch.float64)
    potential = ridge(
        x[0].numel(),
        5,
        activation=activation,
        time_dependent=time_dependent,
        context_features=context_features,
        bias=bias,
    )
    context = None if context_features is None else torch.randn(4, 2, dtype=torch.float64)
    t = torch.rand(4, dtype=torch.float64) if per_row_time else 0.7
    value = definition(potential, context)
    gradient, laplacian = differentiate(value, x, t)

    close(potential(x, t, context), value(x, t))
    close(potential.gradient(x, t, context).detach(), gradient)
    close(potential.laplacian(x, t, context).detach(), laplacian)
    for ours, theirs in zip(
        potential._gradient_and_laplacian(x, t, context), (gradient, laplacian), strict=True
    ):
        close(ours.detach(), theirs)


def test_amplitude_starts_at_zero():
    potential = RidgePotential(3, 7, context_features=2, time_dependent=True)
    assert torch.equal(potential.amplitude, torch.zeros(7))
    x, context = torch.randn(5, 3), torch.randn(5, 2)
    assert torch.equal(potential(x, 0.3, context), torch.zeros(5))
    assert torch.equal(potential.gradient(x, 0.3, context), torch.zeros(5, 3))
    assert torch.equal(potential.laplacian(x, 0.3, context), torch.zeros(5))


def test_parameters_are_those_of_the_contract():
    potential = RidgePotential(3, 7, context_features=2, time_dependent=True)
    shapes = {name: tuple(p.shape) for name, p in potential.named_parameters()}
    assert shapes == {
        "weight": (7, 3),
        "bias": (7,),
        "amplitude": (7,),
        "time_weight": (7,),
        "context_weight": (7, 2),
    }
    bare = dict(RidgePotential(3, 7, bias=False).named_parameters())
    assert set(bare) == {"weight", "amplitude"}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logcosh_without_bias_is_even(shape):
    x = torch.randn(6, *shape, dtype=torch.float64)
    potential = ridge(x[0].numel(), 5, activation="logcosh", bias=False)
    close(potential(-x), potential(x), 1e-14)
    close(potential.gradient(-x), -potential.gradient(x), 1e-14)
    close(potential.laplacian(-x), potential.laplacian(x), 1e-14)

    biased = ridge(x[0].numel(), 5, activation="logcosh")
    assert not torch.allclose(biased(-x), biased(x))


@pytest.mark.parametrize(
    ("features", "hidden", "batch", "evaluations", "expected"),
    [
        (8, 4, 10, 16, ReducedDynamics),  # H < 2D: one H×H product beats two H×D ones
        (784, 1024, 100, 400, ReducedDynamics),
        (2, 32, 10, 16, DirectDynamics),  # H > 2D
        (64, 64, 1, 1, DirectDynamics),  # the products with G never pay for G
    ],
)
def test_coordinates_are_chosen_by_shape(features, hidden, batch, evaluations, expected):
    potential = RidgePotential(features, hidden)
    dynamics = potential.dynamics(torch.zeros(batch, features), None, evaluations)
    assert type(dynamics) is expected


@pytest.mark.parametrize("name", ["weight", "bias", "amplitude", "time_weight", "context_weight"])
def test_gradients_reach_every_parameter(name):
    potential = ridge(3, 5, context_features=2, time_dependent=True)
    x, context = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    loss = potential.laplacian(x, 0.5, context).sum()
    (grad,) = torch.autograd.grad(loss, getattr(potential, name))
    assert grad.abs().min() > 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"features": 0}, ValueError),
        ({"features": 2.0}, TypeError),
        ({"features": True}, TypeError),
        ({"hidden_features": -1}, ValueError),
        ({"hidden_features": "8"}, TypeError),
        ({"context_features": 0}, ValueError),
        ({"context_features": 1.5}, TypeError),
        ({"activation": "relu"}, ValueError),
        ({"activation": None}, ValueError),
    ],
    ids=str,
)
def test_bad_construction(arguments, error):
    name = next(iter(arguments))
    with pytest.raises(error, match=f"{name}: got"):
        RidgePotential(**{"features": 2, "hidden_features": 3} | arguments)


def test_more_than_memory():
    with pytest.raises(ValueError, match=r"^hidden_features: .* does not fit into memory"):
        RidgePotential(2**31 - 1, 2**31 - 1)
