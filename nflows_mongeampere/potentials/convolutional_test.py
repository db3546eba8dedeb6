"""Kernels at every pixel against PyTorch's convolution, for images of every shape."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nflows_mongeampere import ConvolutionalPotential, MongeAmpereTransform, RidgePotential
from nflows_mongeampere.conftest import close, convolutional, convolutional_value, differentiate
from nflows_mongeampere.dynamics import FieldDynamics

# narrow, square, with channels, and smaller than the kernel
SHAPES = [(1, 4, 5), (2, 3, 3), (3, 1, 2), (1, 1, 1)]


@pytest.mark.parametrize("activation", ["softplus", "logcosh"])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_derivatives_are_those_of_torch(shape, kernel_size, activation):
    potential = convolutional(shape, kernel_size=kernel_size, activation=activation)
    x = torch.randn(4, *shape, dtype=torch.float64)
    gradient, laplacian = differentiate(lambda x, t: convolutional_value(potential, x), x)
    close(potential(x), convolutional_value(potential, x))
    close(potential.gradient(x), gradient)
    close(potential.laplacian(x), laplacian)


@pytest.mark.parametrize("sensitivity", ["autograd", "recompute"])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_a_flow_are_those_of_torch(shape, kernel_size, sensitivity):
    """By hand line by line, and by autograd through F.conv2d and its derivatives."""
    potential = convolutional(shape, kernel_size=kernel_size)
    x = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    leaves = [x, *potential.parameters()]
    transform = MongeAmpereTransform(potential, solver="midpoint", steps=2, sensitivity=sensitivity)
    y, logabsdet = transform.inverse(x)
    loss = y.sin().sum() + (logabsdet * y.flatten(1).sum(1)).sum()
    found = torch.autograd.grad(loss, leaves)

    def field(points):
        value = convolutional_value(potential, points).sum()
        (gradient,) = torch.autograd.grad(value, points, create_graph=True)
        diagonal = [
            torch.autograd.grad(column.sum(), points, create_graph=True)[0].flatten(1)[:, i]
            for i, column in enumerate(gradient.flatten(1).T)
        ]
        return gradient, torch.stack(diagonal).sum(0)

    points, total = x, 0
    for _ in range(2):
        gradient, laplacian = field(points + field(points)[0] / 4)
        points, total = points + gradient / 2, total + laplacian / 2
    loss = points.sin().sum() + (total * points.flatten(1).sum(1)).sum()
    close(y, points)
    close(logabsdet, total)
    for ours, theirs in zip(found, torch.autograd.grad(loss, leaves), strict=True):
        close(ours, theirs)


def test_it_is_the_ridge_potential_of_all_translated_kernels():
    potential = convolutional((2, 3, 4))
    images = torch.eye(24, dtype=torch.float64).reshape(24, 2, 3, 4)
    rows = F.conv2d(images, potential.weight, padding=1).flatten(1).T
    ridge = RidgePotential(24, len(rows)).double()
    with torch.no_grad():
        ridge.weight.copy_(rows)
        ridge.bias.copy_(potential.bias.flatten())
        ridge.amplitude.copy_(potential.amplitude.flatten())
    x = torch.randn(5, 2, 3, 4, dtype=torch.float64)
    for ours, theirs in zip(
        MongeAmpereTransform(potential)(x), MongeAmpereTransform(ridge)(x), strict=True
    ):
        close(ours, theirs)
    close(
        MongeAmpereTransform(potential)(x.flatten(1))[0],
        MongeAmpereTransform(ridge)(x)[0].flatten(1),
    )


def test_costs_are_recorded_in_x():
    potential = convolutional((1, 2, 2))
    x = torch.randn(2, 4, dtype=torch.float64)
    assert type(potential.dynamics(x, None, 4, costs=True)) is FieldDynamics


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shape": (8, 8)}, TypeError, r"shape: got \(8, 8\), expected a sequence of 3 integers"),
        ({"shape": (1, 0, 8)}, ValueError, r"shape\[1\]: got 0"),
        ({"kernels": 0}, ValueError, "kernels: got 0"),
        ({"kernel_size": 4}, ValueError, "kernel_size: got 4, expected an odd .* use 3 or 5"),
        ({"kernel_size": 3.0}, TypeError, "kernel_size"),
        ({"activation": "relu"}, ValueError, "activation: got 'relu'"),
    ],
)
def test_mistakes_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        ConvolutionalPotential(**{"shape": (1, 8, 8), "kernels": 2, **arguments})
