"""Ridges: parameters, symmetry, and the choice of coordinates."""

import pytest
import torch

from nflows_mongeampere import DeepPotential, RidgePotential
from nflows_mongeampere.conftest import close, ridge
from nflows_mongeampere.potentials.ridges import ReducedDynamics, RidgeDynamics


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
    assert not potential.amplitude.any()  # a new flow is its base
    assert all(p.any() for name, p in potential.named_parameters() if name != "amplitude")


def test_logcosh_without_bias_is_even():
    x = torch.randn(6, 3, dtype=torch.float64)
    potential = ridge(3, 5, activation="logcosh", bias=False)
    assert potential.even
    close(potential(-x), potential(x), 1e-14)
    close(potential.gradient(-x), -potential.gradient(x), 1e-14)
    close(potential.laplacian(-x), potential.laplacian(x), 1e-14)
    for options in ({"bias": True}, {"time_dependent": True}, {"activation": "softplus"}):
        assert not RidgePotential(3, 5, **{"activation": "logcosh", "bias": False, **options}).even


@pytest.mark.parametrize(
    ("features", "hidden", "batch", "evaluations", "expected"),
    [
        (8, 4, 10, 16, ReducedDynamics),  # H < 2D: one H×H product beats two H×D ones
        (784, 1024, 100, 400, ReducedDynamics),
        (2, 32, 10, 16, RidgeDynamics),  # H > 2D
        (64, 64, 1, 1, RidgeDynamics),  # the products with G never pay for G
    ],
)
def test_coordinates_are_chosen_by_shape(features, hidden, batch, evaluations, expected):
    potential = RidgePotential(features, hidden)
    dynamics = potential.dynamics(torch.zeros(batch, features), None, evaluations)
    assert type(dynamics) is expected


@pytest.mark.parametrize("build", [RidgePotential, lambda d, h: DeepPotential(d, [h, 4])])
def test_ridges_start_from_data(build):
    data = torch.tensor([2.0, 0.5, 10.0]) * torch.randn(500, 3) + torch.tensor([1.0, 0.0, -50.0])
    potential = build(3, 40)
    before = potential.amplitude.clone()
    potential.initialize(data, sharpness=4.0)
    assert torch.equal(potential.amplitude, before)
    # the projections on all rows vary about as much, and each ridge bends at a row of the data
    projected = data @ potential.weight.T + potential.bias
    assert ((projected.std(0) > 3) & (projected.std(0) < 5)).all()
    assert (projected.abs().min(0).values < 1e-4).all()
    axes = potential.weight[:3] * data.std(0) / 4
    close(axes, torch.eye(3), 1e-6)
    assert RidgePotential(3, 2, bias=False).initialize(data) is None  # fewer ridges than axes
    assert build(3, 2)(data).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": torch.randn(5, 4)}, "data: got shape .5, 4., expected at least 2 rows of 3"),
        ({"data": torch.randn(1, 3)}, "data: got shape"),
        ({"data": torch.ones(5, 3)}, "data: got the same number in all rows of feature 0"),
        ({"data": torch.randn(5, 3), "sharpness": 0}, "sharpness: got 0"),
    ],
)
def test_data_to_start_from_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        RidgePotential(3, 7).initialize(**arguments)


@pytest.mark.parametrize("hidden", [255, 300])
@pytest.mark.parametrize("activation", ["softplus", "logcosh"])
def test_coordinates_agree_in_float32(hidden, activation):
    potential = ridge(200, hidden, activation=activation, scale=2.0).float()
    x = torch.randn(6, 200)
    found = []
    for evaluations in (1, 10**6):  # in x, and reduced
        dynamics = potential.dynamics(x, None, evaluations)
        rate = dynamics.rate(0.0, dynamics.state)
        state = dynamics.state + rate
        found.append((type(dynamics), dynamics.points(state), dynamics.logabsdet(state)))
    (first, *ours), (second, *theirs) = found
    assert (first, second) == (RidgeDynamics, ReducedDynamics)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"features": 0}, ValueError),
        ({"features": 2.0}, TypeError),
        ({"hidden_features": -1}, ValueError),
        ({"context_features": 0}, ValueError),
        ({"activation": "relu"}, ValueError),
    ],
    ids=str,
)
def test_mistakes_name_the_argument(arguments, error):
    name = next(iter(arguments))
    with pytest.raises(error, match=rf"^{name}: got .* expected"):
        RidgePotential(**{"features": 2, "hidden_features": 3} | arguments)
