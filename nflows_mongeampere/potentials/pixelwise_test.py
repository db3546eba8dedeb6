"""One potential at every pixel, against its definition and closed forms."""

from __future__ import annotations

import pytest
import torch

from nflows_mongeampere import MongeAmpereTransform, PixelwisePotential
from nflows_mongeampere.conftest import close, differentiate, pixelwise, pixelwise_value

# narrow, with channels, and a single pixel
SHAPES = [(1, 2, 3), (3, 2, 1), (2, 1, 1)]


@pytest.mark.parametrize("activation", ["softplus", "logcosh"])
@pytest.mark.parametrize("maps", [None, 1, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_derivatives_are_those_of_torch(shape, maps, activation):
    potential = pixelwise(shape, context_channels=maps, activation=activation)
    x = torch.randn(4, *shape, dtype=torch.float64)
    rows = None if maps is None else torch.randn(4, potential.context_features).double()
    gradient, laplacian = differentiate(lambda x, t: pixelwise_value(potential, x, rows), x)
    close(potential(x, context=rows), pixelwise_value(potential, x, rows))
    close(potential.gradient(x, context=rows), gradient)
    close(potential.laplacian(x, context=rows), laplacian)


def test_without_ridges_the_flow_is_affine_pixel_by_pixel():
    potential = PixelwisePotential((2, 2, 2), 3, context_channels=4).double()
    x, rows = torch.randn(5, 2, 2, 2).double(), torch.randn(5, 4, 2, 2).double() / 2
    with torch.no_grad():  # the scale and the two drifts are the last three maps
        potential.context_weight.zero_()
        potential.context_weight[-3:, 1:] = torch.eye(3)
    drift, raw = rows[:, 1:3], rows[:, 3:]
    scale = raw / (1 + raw.abs() / potential.stiffness)
    y, logabsdet = MongeAmpereTransform(potential, steps=20).inverse(x, rows.flatten(1))
    close(y, x * scale.exp() + drift * torch.expm1(scale) / scale, tolerance=1e-7)
    close(logabsdet, 2 * scale.flatten(1).sum(1))


def test_no_curvature_exceeds_the_stiffness():
    potential = PixelwisePotential((2, 1, 2), 5, context_channels=3, stiffness=2.0).double()
    for parameter in potential.parameters():
        torch.nn.init.normal_(parameter, std=10.0)
    x, rows = torch.randn(50, 4).double() / 50, torch.randn(50, 6).double()
    potential.bias.data.zero_()

    def value(point, row):
        return potential(point[None], context=row[None])[0]

    hessians = [
        torch.autograd.functional.hessian(lambda p, r=row: value(p, r), point)
        for point, row in zip(x, rows, strict=True)
    ]
    curvatures = torch.linalg.eigvalsh(torch.stack(hessians))
    assert 0.2 < curvatures.abs().max() < 2.0


def test_ridges_start_along_the_channels_and_bend_within_their_range():
    potential = PixelwisePotential((2, 2, 2), 7)
    images = torch.rand(100, 2, 2, 2) * torch.tensor([1.0, 10.0]).view(2, 1, 1) + 5
    potential.initialize(images, sharpness=2.0)
    spread = images.movedim(1, 0).flatten(1).std(1)
    assert [(row != 0).tolist() for row in potential.weight] == [
        [True, False],
        [False, True],
    ] * 3 + [[True, False]]
    close(potential.weight.sum(1), 2 / spread[torch.arange(7) % 2])
    bends = -potential.bias / potential.weight.sum(1)
    close(bends[::2], 5 + torch.tensor([1, 3, 5, 7]) / 8, tolerance=0.02)
    close(bends[1::2], 5 + 10 * torch.tensor([1, 3, 5]) / 8, tolerance=0.2)
    assert not potential.amplitude.any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shape": (8, 8)}, TypeError, r"shape: got \(8, 8\), expected a sequence of 3 integers"),
        ({"hidden_features": 0}, ValueError, "hidden_features: got 0"),
        ({"context_channels": 1.5}, TypeError, "context_channels: got 1.5"),
        ({"activation": "relu"}, ValueError, "activation: got 'relu'"),
        ({"stiffness": 0.0}, ValueError, "stiffness: got 0.0"),
    ],
)
def test_mistakes_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        PixelwisePotential(**{"shape": (1, 8, 8), "hidden_features": 2, **arguments})


def test_data_to_start_from_must_fit():
    potential = PixelwisePotential((1, 2, 2), 3)
    with pytest.raises(ValueError, match=r"^data: got shape \(5, 3\), expected rows of 4 features"):
        potential.initialize(torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"^data: got the same number at all pixels of channel 0"):
        potential.initialize(torch.ones(5, 4))
