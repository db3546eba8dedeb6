from __future__ import annotations

import itertools
import math

import normflows
import pytest
import torch
from scipy import integrate
from torch import Tensor

from nflows_mongeampere.targets import CRITICAL_TEMPERATURE, Ising, Phi4
from nflows_mongeampere.targets.ising import (
    _open_log_partition,
    _periodic_log_partition,
    _transfer_log_partition,
)

BOUNDARIES = ["periodic", "open"]
TEMPERATURES = [0.7, CRITICAL_TEMPERATURE, 5.0]


def bonds(length: int, boundary: str) -> list[tuple[int, int]]:
    """Every bond of the lattice, site by site."""
    found = []
    for i, j in itertools.product(range(length), repeat=2):
        for a, b in ((i + 1, j), (i, j + 1)):
            if boundary == "periodic" or max(a, b) < length:
                found.append((i * length + j, a % length * length + b % length))
    return found


def coupling_matrix(
    length: int, temperature: float, boundary: str, couplings: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """K, bond by bond: each site's bond along the first axis comes before that along the second."""
    matrix = torch.zeros(length**2, length**2, dtype=torch.float64)
    for i, j in bonds(length, boundary):
        # a bond between columns stays in its row
        coupling = couplings[1] if i // length == j // length else couplings[0]
        matrix[i, j] += coupling / temperature
        matrix[j, i] += coupling / temperature
    return matrix


def all_spins(sites: int) -> Tensor:
    codes = torch.arange(2**sites)
    return 2.0 * (codes[:, None] >> torch.arange(sites) & 1).double() - 1


def enumerated_free_energy(
    length: int,
    temperature: float,
    boundary: str,
    couplings: tuple[float, float] = (1.0, 1.0),
    field: float = 0.0,
) -> float:
    """-ln Z for each site by the sum over all spins, and the determinant of a matrix."""
    sites = length**2
    K = coupling_matrix(length, temperature, boundary, couplings)
    spins = all_spins(sites)
    log_weights = 0.5 * ((spins @ K) * spins).sum(1) + field / temperature * spins.sum(1)
    log_sum = torch.logsumexp(log_weights, 0).item()
    alpha = 0.1 - torch.linalg.eigvalsh(K).min().item()
    matrix = K + alpha * torch.eye(sites, dtype=torch.float64)
    volume = 0.5 * (sites * math.log(2 * math.pi) + torch.linalg.slogdet(matrix)[1].item())
    return -(log_sum + alpha * sites / 2 + volume - sites * math.log(2)) / sites


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("length", [2, 3, 4])
def test_free_energy_is_that_of_enumeration(length, boundary, temperature):
    target = Ising(length, temperature, boundary)
    expected = enumerated_free_energy(length, temperature, boundary)
    assert target.free_energy == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("field", [0.0, -0.4])
@pytest.mark.parametrize("couplings", [(1.0, 0.3), (-1.0, -1.0), (-0.5, 1.0), (0.0, 1.0)], ids=str)
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("length", [2, 3, 4])
def test_free_energy_of_the_variants_is_that_of_enumeration(length, boundary, couplings, field):
    target = Ising(length, 1.3, boundary, couplings=couplings, field=field)
    expected = enumerated_free_energy(length, 1.3, boundary, couplings, field)
    assert target.free_energy == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("couplings", [(1.0, 0.2), (0.3, 1.0), (-1.0, 1.0)], ids=str)
def test_kaufmans_formula_is_the_transfer_matrix(couplings):
    first, second = (J / 2.0 for J in couplings)
    found = -64 * Ising(8, 2.0, couplings=couplings).spin_free_energy
    assert found == pytest.approx(_transfer_log_partition(8, first, second, 0.0), abs=1e-9)


@pytest.mark.parametrize(
    ("length", "expected"),
    [(4, -2.3360457306), (8, -2.3227346294), (16, -2.3159208588), (32, -2.3140498937)],
)
def test_free_energy_of_critical_lattices(length, expected):
    assert Ising(length).free_energy == pytest.approx(expected, abs=1e-10)


def test_a_temperature_for_each_field():
    target = Ising(4, couplings=(1.0, -0.5), field=0.3)
    x, temperatures = torch.randn(3, 16), torch.tensor([[1.0], [2.5], [7.0]])
    expected = [
        Ising(4, float(t), couplings=(1.0, -0.5), field=0.3).log_prob(row[None])
        for row, t in zip(x, temperatures, strict=True)
    ]
    torch.testing.assert_close(target.log_prob(x, context=temperatures), torch.cat(expected))


@pytest.mark.parametrize("temperature", [1e-3, 0.05, 0.5, CRITICAL_TEMPERATURE, 10.0, 1e3])
def test_free_energy_does_not_overflow(temperature):
    values = [Ising(length, temperature).free_energy for length in (64, 128)]
    assert all(map(math.isfinite, values))
    assert values[0] == pytest.approx(values[1], abs=1e-3)


def test_free_energy_comes_to_onsagers():
    """ln Z / N of the infinite lattice at κ, as an integral."""
    kappa = 1 / 3.0

    def integrand(q: float) -> float:
        product = math.cosh(2 * kappa) / math.tanh(2 * kappa)
        return math.acosh(max(1.0, product - math.cos(q)))

    integral = integrate.quad(integrand, 0, math.pi, epsabs=1e-13)[0] / (2 * math.pi)
    onsager = 0.5 * math.log(2 * math.sinh(2 * kappa)) + integral
    target = Ising(128, 3.0)
    modes = target._eigenvalues.log().mean().item()
    log_z = -target.free_energy - target.alpha / 2 + math.log(2)
    log_z -= 0.5 * (math.log(2 * math.pi) + modes)
    assert log_z == pytest.approx(onsager, abs=1e-10)


@pytest.mark.parametrize("length", [6, 16])
def test_an_open_lattice_has_less_free_energy_to_spare(length):
    """Removing bonds costs at most their energy, and lowers the sum over the spins."""
    kappa = 1 / CRITICAL_TEMPERATURE
    open_ = _open_log_partition(length, kappa, kappa)
    periodic = _periodic_log_partition(length, kappa, kappa)
    assert open_ < periodic < open_ + 2 * length * kappa


def test_an_open_lattice_of_decoupled_spins_is_free():
    assert _open_log_partition(5, 0.0, 0.0) == pytest.approx(25 * math.log(2), abs=1e-12)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_log_prob_is_the_definition(boundary):
    target = Ising(3, 1.7, boundary, couplings=(1.0, -0.6), field=0.4)
    K = coupling_matrix(3, 1.7, boundary, (1.0, -0.6))
    alpha = 0.1 - torch.linalg.eigvalsh(K).min()
    precision = torch.linalg.inv(K + alpha * torch.eye(9, dtype=torch.float64))
    x = 3 * torch.randn(20, 9, dtype=torch.float64)
    expected = -0.5 * ((x @ precision) * x).sum(1) + (x + 0.4 / 1.7).cosh().log().sum(1)
    torch.testing.assert_close(target.log_prob(x), expected)
    torch.testing.assert_close(target.log_prob(x.view(20, 3, 3)), expected)
    torch.testing.assert_close(target.log_prob(x.float()), expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_density_integrates_to_the_free_energy(boundary):
    """By importance sampling from a broad Gaussian on the smallest lattice."""
    target = Ising(2, 3.0, boundary)
    generator = torch.Generator().manual_seed(0)
    proposal = torch.distributions.Normal(torch.zeros(4, dtype=torch.float64), 2.5)
    x = 2.5 * torch.randn(400_000, 4, generator=generator, dtype=torch.float64)
    log_weights = target.log_prob(x) - proposal.log_prob(x).sum(1)
    log_z = torch.logsumexp(log_weights, 0) - math.log(len(x))
    relative = log_weights.exp().std() / log_weights.exp().mean() / len(x) ** 0.5
    assert abs(log_z.item() + 4 * target.free_energy) < 4 * relative.item()
    assert relative < 0.03


def test_huge_fields_do_not_overflow():
    x = torch.tensor([[1e4, -1e4, 50.0, 0.0]])
    assert torch.isfinite(Ising(2).log_prob(x)).all()


def conditional_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """<s_i> and <s_i s_j> given the fields, by the sum over all spins."""
    spins = all_spins(x.shape[1])
    weights = torch.softmax(x @ spins.T, dim=1)
    return weights @ spins, torch.einsum("bc,ci,cj->bij", weights, spins, spins)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_observables_are_those_of_the_spins(boundary):
    target = Ising(3, 2.0, boundary)
    x = torch.randn(5, 9, dtype=torch.float64)
    mean, pairs = conditional_moments(x)
    torch.testing.assert_close(target.magnetisation(x), mean.mean(1))
    energy = -sum(pairs[:, i, j] for i, j in bonds(3, boundary)) / 9
    torch.testing.assert_close(target.energy(x), energy)
    places = torch.cartesian_prod(torch.arange(3), torch.arange(3)).double()
    for p, q in itertools.product(range(3), repeat=2):
        phase = 2 * math.pi * (places @ torch.tensor([p, q], dtype=torch.float64)) / 3
        waves = torch.cos(phase[:, None] - phase)
        expected = (pairs * waves).sum((1, 2)) / 9
        torch.testing.assert_close(target.structure_factor(x)[:, p, q], expected)


def test_spins_follow_the_fields():
    target = Ising(2)
    x = torch.tensor([[-30.0, 30.0, 0.0, 0.5]]).expand(20_000, 4)
    spins = target.sample_spins(x)
    assert spins.shape == (20_000, 2, 2)
    assert set(spins.unique().tolist()) == {-1.0, 1.0}
    expected = torch.tensor([-1.0, 1.0, 0.0, math.tanh(0.5)])
    torch.testing.assert_close(spins.flatten(1).mean(0), expected, rtol=0, atol=0.03)


def test_it_is_a_target_of_normflows():
    base = normflows.distributions.DiagGaussian(16)
    model = normflows.NormalizingFlow(base, [], Ising(4))
    loss = model.reverse_kld(64)
    loss.backward()
    assert loss.item() > 16 * Ising(4).free_energy
    assert base.log_scale.grad.abs().sum() > 0


def test_phi4_is_its_action():
    target = Phi4(3, mass_squared=-1.3, coupling=0.7)
    x = torch.randn(4, 9, dtype=torch.float64)
    action = -1.3 * x.square().sum(1) + 0.7 * x.pow(4).sum(1)
    for i, j in bonds(3, "periodic"):
        action = action + (x[:, i] - x[:, j]).square()
    torch.testing.assert_close(target.log_prob(x), -action)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"length": 1}, ValueError, "length: got 1, expected an integer >= 2"),
        ({"length": 2.0}, TypeError, r"length: got 2\.0"),
        ({"temperature": 0.0}, ValueError, r"temperature: got 0\.0"),
        ({"temperature": -1.0}, ValueError, r"temperature: got -1\.0"),
        ({"temperature": 5e-324}, ValueError, "temperature: got 5e-324, at which the coupling"),
        ({"temperature": "hot"}, TypeError, "temperature: got 'hot'"),
        ({"couplings": 1.0}, TypeError, r"couplings: got 1\.0, expected two numbers"),
        ({"couplings": (1.0, math.nan)}, ValueError, r"couplings\[1\]: got nan"),
        ({"field": math.inf}, ValueError, "field: got inf"),
        ({"boundary": "free"}, ValueError, "boundary: got 'free', expected one of 'periodic'"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        Ising(**{"length": 4, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"coupling": -1.0}, ValueError, "coupling: got -1"),
        ({"coupling": 0.0, "mass_squared": -1.0}, ValueError, "coupling: got 0"),
        ({"coupling": math.inf}, ValueError, "coupling: got inf"),
        ({"mass_squared": None}, TypeError, "mass_squared: got None"),
        ({"length": 0}, ValueError, "length: got 0"),
    ],
)
def test_phi4_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        Phi4(**{"length": 4, "mass_squared": 1.0, "coupling": 1.0, **arguments})


@pytest.mark.parametrize("target", [Ising(4), Phi4(4, -1.0, 1.0)])
def test_the_density_of_the_largest_fields_is_zero(target):
    x = torch.full((2, 16), torch.finfo(torch.float32).max)
    x[1] = -x[1]
    assert target.log_prob(x).tolist() == [-math.inf, -math.inf]


def test_fields_of_another_lattice_are_refused():
    with pytest.raises(ValueError, match=r"x: got shape \(2, 9\), expected \(B, 16\)"):
        Ising(4).log_prob(torch.zeros(2, 9))
    with pytest.raises(TypeError, match="x: got list"):
        Ising(4).log_prob([1.0])
    with pytest.raises(ValueError, match="length: got 21; the exact free energy of an open"):
        _ = Ising(21, boundary="open").free_energy
    with pytest.raises(ValueError, match="length: got 13; the exact free energy of a periodic"):
        _ = Ising(13, field=1.0).free_energy
