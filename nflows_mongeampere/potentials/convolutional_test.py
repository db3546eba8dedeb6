from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_mongeampere import ConvolutionalPotential, RidgePotential
from nflows_mongeampere.conftest import close, differentiate

SHAPES = [(1, 4, 5), (2, 3, 3), (3, 1, 2)]


def convolutional(shape: tuple[int, ...], **keywords: object) -> ConvolutionalPotential:
    """A potential in float64 that differs from place to place."""
    potential = ConvolutionalPotential(shape, 3, **{"kernel_size": 3, **keywords}).double()  # type: ignore[arg-type]
    for parameter in potential.parameters():
        nn.init.normal_(parameter, std=0.7)
    return potential


def definition(potential: ConvolutionalPotential, x: Tensor) -> Tensor:
    """The value, by PyTorch's convolution."""
    images = x.reshape(len(x), *potential.shape)
    h = F.conv2d(images, potential.weight, padding=potential.kernel_size // 2) + potential.bias
    sigma = (
        F.softplus(h, threshold=100)
        if potential.activation == "softplus"
        else torch.log(torch.cosh(h))
    )
    return (potential.amplitude * sigma).flatten(1).sum(1)


@pytest.mark.parametrize("activation", ["softplus", "logcosh"])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_gradient_and_laplacian_are_those_of_torch(shape, kernel_size, activation):
    potential = convolutional(shape, kernel_size=kernel_size, activation=activation)
    x = torch.randn(4, *shape, dtype=torch.float64)
    gradient, laplacian = differentiate(lambda points, t: definition(potential, points), x)
    close(potential(x), definition(potential, x))
    close(potential.gradient(x), gradient)
    close(potential.laplacian(x), laplacian)


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
    close(potential.gradient(x), ridge.gradient(x))
    close(potential.laplacian(x), ridge.laplacian(x))


def test_flattened_images_are_images():
    potential = convolutional((2, 3, 3))
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    close(potential(x.flatten(1)), potential(x))
    close(potential.gradient(x.flatten(1)), potential.gradient(x).flatten(1))


@pytest.mark.parametrize("order", [1, 2])
def test_parameter_gradients_are_those_of_torch(order):
    """Of first and second order: penalties differentiate twice."""
    potential = convolutional((2, 3, 3))
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    (by_autograd,) = torch.autograd.grad(definition(potential, x).sum(), x, create_graph=True)
    leaves = (x, *potential.parameters())
    loss, expected = potential.gradient(x).sin().sum(), by_autograd.sin().sum()
    for _ in range(order - 1):
        (loss,) = torch.autograd.grad(loss, x, create_graph=True)
        (expected,) = torch.autograd.grad(expected, x, create_graph=True)
        loss, expected = loss.square().sum(), expected.square().sum()
    for a, b in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        close(a, b)


def test_laplacian_can_be_differentiated():
    potential = convolutional((1, 3, 2))
    x = torch.randn(2, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    inputs = tuple(p.detach().clone().requires_grad_() for p in potential.parameters())
    names = [name for name, _ in potential.named_parameters()]

    def laplacian(x: Tensor, *values: Tensor) -> Tensor:
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(_Laplacian(potential), _prefixed(parameters), (x,))

    torch.autograd.gradcheck(laplacian, (x, *inputs))
    torch.autograd.gradgradcheck(laplacian, (x, *inputs))


class _Laplacian(nn.Module):
    def __init__(self, potential: ConvolutionalPotential) -> None:
        super().__init__()
        self.potential = potential

    def forward(self, x: Tensor) -> Tensor:
        return self.potential.laplacian(x)


def _prefixed(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"potential.{name}": value for name, value in parameters.items()}


def test_a_new_potential_is_zero():
    potential = ConvolutionalPotential((1, 4, 4), 2)
    x = torch.randn(3, 16)
    assert (potential(x) == 0).all()
    assert (potential.gradient(x) == 0).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shape": (8, 8)}, TypeError, r"shape: got \(8, 8\), expected 3 integers"),
        ({"shape": "abc"}, TypeError, "shape: got 'abc'"),
        ({"shape": (1, 0, 8)}, ValueError, r"shape\[1\]: got 0"),
        ({"shape": (1, 2**16, 2**16)}, ValueError, "shape: got .* at most"),
        ({"kernels": 0}, ValueError, "kernels: got 0"),
        ({"kernels": 2**31 - 1, "shape": (1, 2**12, 2**12)}, ValueError, "kernels: .*memory"),
        ({"kernel_size": 4}, ValueError, "kernel_size: got 4, expected an odd .* use 3 or 5"),
        ({"kernel_size": 3.0}, TypeError, "kernel_size"),
        ({"activation": "relu"}, ValueError, "activation: got 'relu'"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        ConvolutionalPotential(**{"shape": (1, 8, 8), "kernels": 2, **arguments})
