"""Spins from fields, against the sum over all spins."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nflows_mongeampere.targets import Ising
from nflows_mongeampere.targets.ising_test import all_spins, coupling_matrix
from nflows_mongeampere.targets.spins import (
    _energies,
    magnetisation_distribution,
    spin_observables,
)
from nflows_mongeampere.variational import Estimate, WeightedSamples

MODELS = [
    Ising(4),
    Ising(4, 3.0, couplings=(1.0, 0.4), field=0.3),
    Ising(4, 2.5, couplings=(-1.0, -1.0)),
    Ising(4, 2.0, "open", field=-0.2),
]


def probabilities(target: Ising) -> tuple[Tensor, Tensor]:
    """All spins of a 4 x 4 lattice and their probabilities."""
    spins = all_spins(16)
    K = coupling_matrix(4, target.temperature, target.boundary, target.couplings)
    weight = 0.5 * ((spins @ K) * spins).sum(1) + target.h * spins.sum(1)
    return spins, weight.softmax(0)


def exact_fields(target: Ising, count: int) -> Tensor:
    """Fields from the joint density of spins and fields: normal given the spins."""
    generator = torch.Generator().manual_seed(1)
    spins, chances = probabilities(target)
    drawn = spins[torch.multinomial(chances, count, replacement=True, generator=generator)]
    K = coupling_matrix(4, target.temperature, target.boundary, target.couplings)
    matrix = K + target.alpha * torch.eye(16, dtype=torch.float64)
    noise = torch.randn(count, 16, generator=generator, dtype=torch.float64)
    return drawn @ matrix + noise @ torch.linalg.cholesky(matrix).T


@pytest.mark.parametrize("target", MODELS, ids=str)
def test_observables_are_those_of_enumeration(target):
    spins, chances = probabilities(target)
    energy = 16 * target.spin_energy(spins.view(-1, 4, 4))
    total = spins.sum(1)

    def mean(values: Tensor) -> float:
        return float(chances @ values)

    T = target.temperature
    # fields of the exact density, drawn with weights that are not all the same
    x = exact_fields(target, 40_000)
    tilt = 0.3 * x[:, 0].tanh()
    keep = torch.rand(len(x), generator=torch.Generator().manual_seed(2)) < (tilt - 0.3).exp()
    shift = 16 * -target.free_energy + math.log(float(keep.double().mean()))
    samples = WeightedSamples(x[keep], shift + 0.3 - tilt[keep])
    found = spin_observables(target, samples)
    expected = {
        "free_energy": target.spin_free_energy,
        "energy": mean(energy) / 16,
        "specific_heat": (mean(energy**2) - mean(energy) ** 2) / (16 * T**2),
        "magnetisation": mean(total.abs()) / 16,
        "susceptibility": (mean(total**2) - mean(total.abs()) ** 2) / (16 * T),
        "binder": 1 - mean(total**4) / (3 * mean(total**2) ** 2),
    }
    for name, value in expected.items():
        estimate: Estimate = getattr(found, name)
        assert abs(estimate.value - value) < 4 * estimate.error, name
        assert estimate.error < 0.05 * (1 + abs(value)), name
    distribution, error = found.distribution
    for k in range(17):
        exact = float(chances[total == 2 * k - 16].sum())
        assert abs(distribution[k] - exact) < 4.5 * error[k] + 1e-9
    correlation, error = found.correlation
    rows = spins.view(-1, 4, 4)
    for a in range(4):
        for b in range(4):
            exact = mean((rows * rows.roll((-a, -b), (1, 2))).flatten(1).mean(1))
            assert abs(correlation[a, b] - exact) < 4.5 * error[a, b] + 1e-9


@pytest.mark.parametrize("boundary", ["periodic", "open"])
@pytest.mark.parametrize("length", [2, 3])
def test_the_square_of_the_energy_of_free_spins(length, boundary):
    target = Ising(length, 2.0, boundary, couplings=(0.7, -1.3), field=0.4)
    mean = torch.rand(3, length, length, dtype=torch.float64) * 2 - 1
    spins = all_spins(length**2)
    chances = ((1 + mean.flatten(1)[:, None] * spins) / 2).prod(2)
    energy = length**2 * target.spin_energy(spins.view(-1, length, length))
    first, second = _energies(target, mean)
    torch.testing.assert_close(first, chances @ energy)
    torch.testing.assert_close(second, chances @ energy**2)


def test_the_distribution_of_the_sum_of_free_spins():
    mean = torch.rand(3, 9, dtype=torch.float64) * 2 - 1
    spins = all_spins(9)
    chances = ((1 + mean[:, None] * spins) / 2).prod(2)
    expected = torch.stack([chances[:, spins.sum(1) == m].sum(1) for m in range(-9, 10, 2)], 1)
    torch.testing.assert_close(magnetisation_distribution(mean), expected)
