"""What weighted samples of the Ising model's field tell about its spins, with error bars."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nflows_mongeampere.targets.ising import Ising
from nflows_mongeampere.variational import Estimate, WeightedSamples

# Spins whose magnetisation is found at once.
AT_ONCE = 4_000_000


@dataclass(frozen=True)
class SpinObservables:
    r"""Means over the spins, per site where that makes sense, with M the sum of the spins.

    Attributes:
        free_energy: :math:`-\ln Z_s / N`, the free energy over T.
        energy: :math:`\langle E \rangle / N`.
        specific_heat: :math:`(\langle E^2 \rangle - \langle E \rangle^2) / (N T^2)`.
        magnetisation: :math:`\langle |M| \rangle / N`.
        susceptibility: :math:`(\langle M^2 \rangle - \langle |M| \rangle^2) / (N T)`.
        binder: :math:`1 - \langle M^4 \rangle / (3 \langle M^2 \rangle^2)`.
        distribution: the probability of :math:`M = -N, -N + 2, \ldots, N`, shape (N + 1,), and its
            error.
        correlation: :math:`\langle s_0 s_r \rangle`, averaged over all pairs of a periodic lattice
            whose distance is r, shape (L, L), and its error.
    """

    free_energy: Estimate
    energy: Estimate
    specific_heat: Estimate
    magnetisation: Estimate
    susceptibility: Estimate
    binder: Estimate
    distribution: tuple[Tensor, Tensor]
    correlation: tuple[Tensor, Tensor]


@torch.no_grad()
def spin_observables(target: Ising, samples: WeightedSamples) -> SpinObservables:
    r"""Energies, magnetisation and correlations of the spins, from samples of the field.

    Given the field the spins are free, with means :math:`m_i = \tanh(x_i + h)`: what is averaged
    over the weighted samples are means over the spins, which have no noise of their own. Errors of
    what is no mean, such as the specific heat, are those of its linear part.

    Args:
        target: the model.
        samples: of its field, as :func:`~nflows_mongeampere.variational.weigh` gives them.

    Example:
        >>> from nflows_mongeampere.lattices import LatticeFlow
        >>> from nflows_mongeampere.variational import weigh
        >>> target = Ising(2, temperature=10.0)
        >>> samples = weigh(LatticeFlow.towards(target), target, 1000)
        >>> abs(spin_observables(target, samples).free_energy.value - target.spin_free_energy) < 0.1
        True
    """
    sites, temperature = target.sites, target.temperature
    mean = target.mean_spins(samples.x.double())
    energy, square = _energies(target, mean)
    chances = magnetisation_distribution(mean)
    steps = torch.arange(-sites, sites + 1, 2, dtype=chances.dtype, device=chances.device)
    absolute, second, fourth = (chances @ power for power in (steps.abs(), steps**2, steps**4))
    corrected = samples.corrected_free_energy

    def of(function: Callable[..., Tensor], *values: Tensor) -> Estimate:
        return function_of_means(samples, function, *values)

    spectrum = target.structure_factor(samples.x.double())
    correlation: Tensor = torch.fft.ifft2(spectrum).real
    return SpinObservables(
        free_energy=Estimate(corrected.value / sites - target.shift, corrected.error / sites),
        energy=samples.mean(energy / sites),
        specific_heat=of(lambda e, s: (s - e**2) / (sites * temperature**2), energy, square),
        magnetisation=samples.mean(absolute / sites),
        susceptibility=of(lambda a, s: (s - a**2) / (sites * temperature), absolute, second),
        binder=of(lambda s, f: 1 - f / (3 * s**2), second, fourth),
        distribution=means(samples, chances),
        correlation=means(samples, correlation),
    )


def magnetisation_distribution(mean: Tensor) -> Tensor:
    r"""The distribution of the sum of free spins, shape (B, N + 1), exactly.

    Its generating function is a product over the sites,

    .. math:: \sum_{k=0}^{N} p(M = 2k - N)\, z^k
              = \prod_i \Big[ \frac{1 - m_i}{2} + \frac{1 + m_i}{2} z \Big],

    which is multiplied out two by two, by Fourier transforms: O(N ln² N) for each row.

    Args:
        mean: of each spin, shape (B, ...).
    """
    up = (1 + mean.flatten(1)) / 2
    rows = max(1, AT_ONCE // up.shape[1])
    return torch.cat([_product(torch.stack([1 - few, few], 2)) for few in up.split(rows)])


def _product(factors: Tensor) -> Tensor:
    """The products of N polynomials of degree one each, from (B, N, 2) to (B, N + 1)."""
    count = factors.shape[1]
    while factors.shape[1] > 1:
        if factors.shape[1] % 2:
            one = torch.zeros_like(factors[:, :1])
            one[..., 0] = 1
            factors = torch.cat([factors, one], 1)
        length = 2 * factors.shape[2] - 1
        modes = torch.fft.rfft(factors, n=length)
        factors = torch.fft.irfft(modes[:, ::2] * modes[:, 1::2], n=length)
    return factors[:, 0, : count + 1].clamp(min=0)


def function_of_means(
    samples: WeightedSamples, function: Callable[..., Tensor], *values: Tensor
) -> Estimate:
    r"""A function of means of observables, with the error of its linear part.

    .. math:: f(\bar a, \bar b, \ldots), \qquad \text{whose error is that of the mean of }
              \partial_a f\, a + \partial_b f\, b + \ldots

    Args:
        samples: the weighted samples.
        function: f, of tensors of shape ().
        *values: a, b, ... on each sample, shape (N,) each.
    """
    means = [torch.tensor(samples.mean(v).value, dtype=torch.float64) for v in values]
    with torch.enable_grad():
        points = [mean.requires_grad_() for mean in means]
        result = function(*points)
        slopes = torch.autograd.grad(result, points)
    linear = sum(
        (slope * value.double().cpu() for slope, value in zip(slopes, values, strict=True)),
        torch.zeros(len(samples), dtype=torch.float64),
    )
    return Estimate(result.item(), samples.mean(linear).error)


def _energies(target: Ising, mean: Tensor) -> tuple[Tensor, Tensor]:
    r"""The means of E and of E² over free spins with these means, shape (B,) each.

    .. math:: \mathrm{var} E = \sum_i (1 - m_i^2) \Big[\Big(\sum_j J_{ij} m_j + H\Big)^2
              - \sum_j J_{ij}^2 m_j^2 \Big]
              + \sum_{\langle ij \rangle} J_{ij}^2 (1 - m_i^2 m_j^2)
    """
    energy = target.spin_energy(mean) * target.sites
    push, squares = torch.zeros_like(mean), torch.zeros_like(mean)
    bonds = torch.zeros_like(energy)
    for axis, matrix in enumerate(target.bonds(), 1):
        matrix = matrix.to(mean)
        push = push + torch.tensordot(mean, matrix, ([axis], [0])).movedim(-1, axis)
        squares = squares + torch.tensordot(mean**2, matrix**2, ([axis], [0])).movedim(-1, axis)
        bonds = bonds + matrix.square().sum() / 2 * target.length
    free = 1 - mean**2
    variance = (free * ((push + target.magnetic_field) ** 2 - squares)).flatten(1).sum(1)
    # half the sum over sites of m_i² J_ij² m_j² counts each pair once
    variance = variance + bonds - (mean**2 * squares).flatten(1).sum(1) / 2
    return energy, energy**2 + variance


def means(samples: WeightedSamples, values: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted mean of each of many observables and its error, of shape (...) for (N, ...)."""
    share = samples.log_weights.softmax(0).to(values)
    mean = torch.tensordot(share, values, 1)
    error = torch.tensordot(share.square(), (values - mean).square(), 1).sqrt()
    return mean, error
