"""Coupling layers: what moves, what passes, and the determinant of both."""

import math

import pytest
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.nn.nets import ResidualNet
from nflows.transforms import (
    CompositeTransform,
    PiecewiseRationalQuadraticCDF,
    ReversePermutation,
)
from torch import nn

from nflows_mongeampere import (
    AutogradPotential,
    Bumps,
    DeepPotential,
    MongeAmpereCouplingTransform,
    RidgePotential,
    refined,
)
from nflows_mongeampere.conftest import close, log_determinant

MASK = [0, 1, 1, 0, 1]


def network(passing: int, width: int) -> nn.Module:
    return ResidualNet(passing, width, hidden_features=8, num_blocks=1)


def layer(potential: object = None, mask: object = MASK, **keywords: object):
    potential = potential or RidgePotential(3, 6, context_features=4, time_dependent=True)
    built = MongeAmpereCouplingTransform(mask, network, potential, **keywords).double()
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.5)
    return built


def test_a_new_layer_is_the_identity():
    built = MongeAmpereCouplingTransform(
        MASK, network, RidgePotential(3, 6, context_features=4), steps=2
    )
    x = torch.randn(4, 5)
    y, logabsdet = built(x)
    close(y, x, 0)
    close(logabsdet, torch.zeros(4), 0)


@pytest.mark.parametrize(
    "potential", [None, DeepPotential(3, [4, 3], context_features=2)], ids=["ridge", "deep"]
)
@pytest.mark.parametrize(
    "unconditional",
    [
        None,
        lambda features: PiecewiseRationalQuadraticCDF([features], tails="linear", tail_bound=3.0),
    ],
    ids=["passing", "splines"],
)
def test_determinant_and_inverse(potential, unconditional):
    built = layer(potential, steps=16, unconditional_transform=unconditional)
    x = torch.randn(3, 5, dtype=torch.float64)
    y, logabsdet = built(x)
    close(logabsdet, log_determinant(lambda points: built(points)[0], x), 1e-5)
    back, back_logabsdet = built.inverse(y)
    close(back, x, 1e-5)
    close(back_logabsdet, -logabsdet, 1e-5)
    if unconditional is None:
        close(y[:, [0, 3]], x[:, [0, 3]], 0)
    # what moves depends on what passes
    other = x.clone()
    other[:, 0] += 1
    assert (built(other)[0][:, [1, 2, 4]] - y[:, [1, 2, 4]]).abs().min() > 1e-6


def test_channels_of_images_and_a_context_for_the_network():
    def convolutions(passing: int, width: int) -> nn.Module:
        class Convolutions(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Conv2d(passing, width // 4, 1)

            def forward(self, x, context):
                return self.inner(x) + context[:, :, None, None]

        return Convolutions()

    potential = RidgePotential(8, 5, context_features=8)
    built = MongeAmpereCouplingTransform([1, 0, 1], convolutions, potential, steps=8).double()
    nn.init.normal_(potential.amplitude)
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    context = torch.randn(2, 2, dtype=torch.float64)
    y, logabsdet = built(x, context)
    assert y.shape == x.shape
    close(y[:, 1], x[:, 1], 0)
    for i in range(2):
        found = log_determinant(lambda p, i=i: built(p, context[i : i + 1])[0], x[i : i + 1])
        close(logabsdet[i : i + 1], found, 1e-5)
    assert (built(x, context + 1)[0] - y).abs().max() > 1e-3


def test_layers_stack_into_a_density_whose_steps_are_those_of_a_flow():
    """The density integrates to one, and finer steps are seen through the layers."""
    torch.manual_seed(0)
    layers = []
    for mask in ([0, 1], [1, 0]):
        potential = RidgePotential(1, 6, context_features=3)
        layers += [layer(potential, mask, steps=6), ReversePermutation(2)]
    flow = Flow(CompositeTransform(layers), StandardNormal([2])).double()
    with torch.no_grad():
        edge = torch.linspace(-9, 9, 181, dtype=torch.float64)
        grid = torch.cartesian_prod(edge, edge)
        assert flow.log_prob(grid).exp().sum() * 0.01 == pytest.approx(1, abs=1e-3)
        coarse = flow.log_prob(grid[::97])
        with refined(flow, 2):
            assert not torch.equal(flow.log_prob(grid[::97]), coarse)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"potential": 3}, TypeError, "potential: got 3"),
        ({"potential": RidgePotential(3, 4)}, ValueError, "potential: got one that takes no"),
        (
            {"potential": RidgePotential(2, 4, context_features=1)},
            ValueError,
            "potential: got one of 2 features, expected the 3",
        ),
        ({"mask": [1, 1, 1]}, ValueError, "mask: got 3 positive entries of 3"),
        ({"mask": [0, 0, 0]}, ValueError, "mask: got 0 positive entries of 3"),
        ({"steps": 0}, ValueError, "steps: got 0"),
    ],
    ids=str,
)
def test_mistakes_name_the_argument(arguments, error, message):
    given = {"mask": MASK, "potential": RidgePotential(3, 4, context_features=2)} | arguments
    with pytest.raises(error, match=message):
        MongeAmpereCouplingTransform(given.pop("mask"), network, **given)


@pytest.mark.parametrize("wrong", [torch.full((2, 5), torch.nan), torch.zeros(2, 5).double()])
def test_wrong_inputs_are_the_caller_s(wrong):
    built = MongeAmpereCouplingTransform(MASK, network, RidgePotential(3, 4, context_features=2))
    for call in (built, built.inverse):
        with pytest.raises((ValueError, TypeError), match=r"^inputs: "):
            call(wrong)


def test_networks_as_potentials_take_the_context_too():
    class Waves(nn.Module):
        def forward(self, x, context):
            return 0.2 * torch.sin(x * context).sum(1)

    potential = AutogradPotential(Waves())
    potential.context_features = 3
    built = layer(potential, steps=12)
    x = torch.randn(3, 5, dtype=torch.float64)
    close(built(x)[1], log_determinant(lambda points: built(points)[0], x), 1e-4)


def test_bumps_lie_side_by_side_along_each_feature():
    layer = Bumps(2, 9, sharpness=3.0, reach=2.0).double()
    assert (layer.weight != 0).tolist() == [[True, False], [False, True]] * 4 + [[True, False]]
    slopes = layer.weight.sum(1)
    assert slopes.min() >= 1.5
    assert slopes.max() <= 6
    # a bump is one at its place, and 1/e at a distance of 1 / slope
    places = torch.tensor([-1.6, -0.8, 0.0, 0.8, 1.6]).double().repeat_interleave(2)[:9]
    points = torch.zeros(9, 2).double()
    points[torch.arange(9), torch.arange(9) % 2] = places
    close(layer(points).diagonal(), torch.ones(9).double(), 1e-5)
    beside = points + (layer.weight != 0) / slopes[:, None]
    close(layer(beside).diagonal(), torch.full((9,), math.exp(-1)).double(), 1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 0}, "in_features: got 0"),
        ({"out_features": 2}, "out_features: got 2, expected an integer >= 3"),
        ({"sharpness": 0.0}, "sharpness: got 0.0"),
        ({"reach": -1.0}, "reach: got -1.0"),
    ],
)
def test_bumps_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Bumps(**{"in_features": 3, "out_features": 8, **arguments})
