"""A second layer at each pixel: the grouped potential that it is, borders included."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nflows_mongeampere import (
    DeepConvolutionalPotential,
    GroupedPotential,
    MongeAmpereTransform,
)
from nflows_mongeampere.conftest import (
    close,
    deep_convolutional,
    deep_convolutional_value,
    differentiate,
)
from nflows_mongeampere.dynamics import FieldDynamics

# narrow, square, with channels, and smaller than the kernel
SHAPES = [(1, 4, 5), (2, 3, 3), (3, 1, 2), (1, 1, 1)]


@pytest.mark.parametrize("group_size", [1, 2, 4])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_derivatives_are_those_of_torch(shape, kernel_size, group_size):
    potential = deep_convolutional(shape, group_size, group_units=2, kernel_size=kernel_size)
    x = torch.randn(4, *shape, dtype=torch.float64)
    gradient, laplacian = differentiate(lambda x, t: deep_convolutional_value(potential, x), x)
    close(potential.gradient(x), gradient, 1e-12)
    close(potential.laplacian(x), laplacian, 1e-12)


@pytest.mark.parametrize("sensitivity", ["autograd", "recompute"])
@pytest.mark.parametrize("group_size", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_a_flow_by_hand_are_those_of_autograd(shape, group_size, sensitivity):
    """Line by line by hand, and by autograd through the rate of whole images."""
    potential = deep_convolutional(shape, group_size, group_units=3)
    x = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    leaves = [x, *potential.parameters()]
    transform = MongeAmpereTransform(potential, solver="midpoint", steps=2, sensitivity=sensitivity)
    motion = potential.dynamics(x, None, 4)
    y = motion.state
    for _ in range(2):
        y = y + motion.rate(0.0, y + motion.rate(0.0, y) / 4) / 2
    found = []
    for points, logabsdet in (transform.inverse(x), (motion.points(y), motion.logabsdet(y))):
        loss = points.sin().sum() + (logabsdet * points.flatten(1).sum(1)).sum()
        found.append((points, logabsdet, *torch.autograd.grad(loss, leaves)))
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs, 1e-12)


def test_it_is_the_grouped_potential_of_all_translated_kernels():
    shape, pixels = (2, 3, 4), 12
    potential = deep_convolutional(shape, group_units=3)
    images = torch.eye(24, dtype=torch.float64).reshape(24, *shape)
    rows = F.conv2d(images, potential.weight, padding=1).flatten(2).permute(2, 1, 0)
    grouped = GroupedPotential(24, 4 * pixels, 2, group_units=3, rank=0).double()

    def pixel_by_pixel(numbers):
        return numbers.flatten(1).T.flatten()

    with torch.no_grad():
        grouped.weight.copy_(rows.flatten(0, 1))
        grouped.bias.copy_(pixel_by_pixel(potential.bias))
        grouped.hidden_weight.copy_(potential.hidden_weight.repeat(pixels, 1, 1))
        grouped.hidden_bias.copy_(pixel_by_pixel(potential.hidden_bias))
        amplitudes = potential.amplitude, potential.hidden_amplitude
        grouped.amplitude.copy_(torch.cat([pixel_by_pixel(a) for a in amplitudes])[:, None])
    x = torch.randn(5, *shape, dtype=torch.float64)
    for ours, theirs in zip(
        MongeAmpereTransform(potential)(x), MongeAmpereTransform(grouped)(x), strict=True
    ):
        close(ours, theirs, 1e-12)
    flat = MongeAmpereTransform(potential)(x.flatten(1))[0]
    close(flat, MongeAmpereTransform(grouped)(x)[0].flatten(1), 1e-12)


def test_a_new_flow_is_the_identity_and_can_learn():
    transform = MongeAmpereTransform(DeepConvolutionalPotential((1, 3, 3), 4).double(), steps=2)
    x = torch.randn(5, 9, dtype=torch.float64)
    z, logabsdet = transform(x)
    close(z, x, 0)
    close(logabsdet, torch.zeros(5, dtype=torch.float64), 0)
    (z.square().sum() - logabsdet.sum()).backward()
    assert transform.potential.amplitude.grad.all()
    assert transform.potential.hidden_amplitude.grad.all()


def test_costs_are_recorded_in_x():
    potential = deep_convolutional((1, 2, 2))
    x = torch.randn(2, 4, dtype=torch.float64)
    assert type(potential.dynamics(x, None, 4, costs=True)) is FieldDynamics


def test_groups_divide_the_kernels():
    with pytest.raises(ValueError, match=r"^group_size: got 4, expected a divisor of kernels=6"):
        DeepConvolutionalPotential((1, 4, 4), 6, 4)
