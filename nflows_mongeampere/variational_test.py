import math

import normflows
import pytest
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, IdentityTransform
from torch import nn

from nflows_mongeampere import (
    AutogradPotential,
    MongeAmpereFlow,
    MongeAmpereTransform,
    RidgePotential,
    SymmetrizedPotential,
)
from nflows_mongeampere.accuracy import AccuracyWarning
from nflows_mongeampere.conftest import close
from nflows_mongeampere.groups import sign_flip
from nflows_mongeampere.normflows import MongeAmpere
from nflows_mongeampere.targets import Ising
from nflows_mongeampere.variational import Chain, WeightedSamples, weigh

SHIFT = 0.5


class Shifted:
    """A normal density at SHIFT in two dimensions, times e³: ln Z = 3."""

    def log_prob(self, x):
        return 3 - 0.5 * (x - SHIFT).square().sum(1) - math.log(2 * math.pi)


def samples(count=100_000, seed=0):
    torch.manual_seed(seed)
    return weigh(Flow(IdentityTransform(), StandardNormal([2])), Shifted(), count)


def test_free_energies_of_a_shifted_normal():
    drawn = samples()
    assert len(drawn) == 100_000
    # KL(N(0, 1) | N(m, 1)) = m² / 2 for each entry
    assert drawn.free_energy.value == pytest.approx(-3 + SHIFT**2, abs=4 * drawn.free_energy.error)
    # the variance of ln w is that of m·x: 2 m²
    expected = math.sqrt(2 * SHIFT**2 / 100_000)
    assert drawn.free_energy.error == pytest.approx(expected, rel=0.02)
    corrected = drawn.corrected_free_energy
    assert corrected.value == pytest.approx(-3, abs=4 * corrected.error)
    # <w²> / <w>² = e^(2 m²)
    relative = math.sqrt((math.exp(2 * SHIFT**2) - 1) / 100_000)
    assert corrected.error == pytest.approx(relative, rel=0.05)
    assert drawn.effective_sample_size == pytest.approx(math.exp(-2 * SHIFT**2), rel=0.02)


def test_errors_are_what_repetitions_show():
    repeated = [samples(2000, seed) for seed in range(100)]
    for estimate in (
        lambda drawn: drawn.free_energy,
        lambda drawn: drawn.corrected_free_energy,
        lambda drawn: drawn.mean(drawn.x[:, 0]),
        lambda drawn: drawn.chain(4).mean(drawn.x[:, 0]),
    ):
        values = torch.tensor([estimate(drawn) for drawn in repeated])
        assert values[:, 1].mean().item() == pytest.approx(values[:, 0].std().item(), rel=0.3)


def test_observables_are_those_of_the_target():
    drawn = samples()
    for values, exact in ((drawn.x[:, 0], SHIFT), (drawn.x[:, 1].square(), 1 + SHIFT**2)):
        weighted, visited = drawn.mean(values), drawn.chain(100).mean(values)
        assert weighted.value == pytest.approx(exact, abs=4 * weighted.error)
        assert visited.value == pytest.approx(exact, abs=4 * visited.error)
        assert visited.error < 0.03
    assert drawn.x[:, 0].mean().abs() < 0.03  # the samples themselves are not


def test_acceptance_of_a_chain():
    chain = samples().chain(100)
    assert chain.numbers.shape == (1000, 100)
    # <min(1, w(y) / w(x))> with x of the target and y of the flow: 2 Φ(-|m| / √2), |m|² = 2 SHIFT²
    expected = 2 * torch.distributions.Normal(0, 1).cdf(torch.tensor(-SHIFT)).item()
    assert chain.acceptance == pytest.approx(expected, abs=0.01)


def test_a_perfect_flow_accepts_everything():
    drawn = WeightedSamples(torch.randn(1000, 1), torch.full((1000,), 2.0, dtype=torch.float64))
    chain = drawn.chain(2)
    assert chain.acceptance == 1
    assert drawn.effective_sample_size == pytest.approx(1)
    assert drawn.corrected_free_energy == pytest.approx((-2, 0))
    assert chain.autocorrelation_time(drawn.x[:, 0]) == pytest.approx(1, abs=0.2)


def test_autocorrelation_time_of_an_autoregressive_process():
    torch.manual_seed(0)
    steps, chains, rho = 5000, 20, 0.9
    path = [torch.randn(chains, dtype=torch.float64)]
    for _ in range(steps - 1):
        noise = torch.randn(chains, dtype=torch.float64)
        path.append(rho * path[-1] + math.sqrt(1 - rho**2) * noise)
    values = torch.stack(path)
    chain = Chain(torch.arange(steps * chains).view(steps, chains))
    assert chain.autocorrelation_time(values.flatten()) == pytest.approx(
        (1 + rho) / (1 - rho), rel=0.1
    )


@pytest.mark.parametrize("chains", [1, 5])
def test_chains_that_never_move_have_no_error_bar(chains):
    weights = -1e6 * torch.arange(50, dtype=torch.float64)
    drawn = WeightedSamples(torch.randn(50, 1), weights)
    chain = drawn.chain(chains)
    assert chain.acceptance == 0
    assert chain.autocorrelation_time(drawn.x[:, 0]) == pytest.approx(50 // chains)
    assert chain.mean(drawn.x[:, 0]).error == math.inf


class FarAway:
    """Uniform where x > edge."""

    def __init__(self, edge):
        self.edge = edge

    def log_prob(self, x):
        return torch.where((x > self.edge).all(1), 0.0, -math.inf)


def test_no_sample_in_the_support():
    drawn = weigh(MongeAmpereFlow(2, 4), FarAway(50), 100)
    assert drawn.effective_sample_size == 0
    assert drawn.free_energy == drawn.corrected_free_energy == (math.inf, math.inf)
    chain = drawn.chain(2)
    assert chain.acceptance == 0
    assert chain.mean(drawn.x[:, 0]).error == math.inf
    with pytest.raises(ValueError, match="none of the 100 samples lies in the target's support"):
        drawn.mean(drawn.x[:, 0])


def test_some_samples_in_the_support():
    """Observables may be anything outside of it."""
    torch.manual_seed(0)
    drawn = weigh(MongeAmpereFlow(2, 4), FarAway(-1.0), 20_000)
    assert drawn.free_energy == (math.inf, math.inf)
    inside = torch.where((drawn.x > -1).all(1), drawn.x[:, 0], math.nan)
    with pytest.warns(AccuracyWarning):  # 1 / q grows without bounds
        mean = drawn.mean(inside)
    assert math.isfinite(mean.value)
    assert math.isfinite(mean.error)


def test_one_sample_has_no_error_bar():
    drawn = weigh(MongeAmpereFlow(2, 4), Shifted(), 1)
    assert drawn.free_energy.error == math.inf
    assert drawn.effective_sample_size == 1
    assert drawn.corrected_free_energy.error == math.inf
    assert drawn.mean(drawn.x[:, 0]).error == math.inf


def lognormal(deviation, count, seed):
    """Weights whose mean is 1, so that -ln Z = 0."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, generator=generator, dtype=torch.float64)
    return WeightedSamples(noise[:, None], deviation * noise - deviation**2 / 2)


@pytest.mark.filterwarnings("ignore::nflows_mongeampere.AccuracyWarning")
def test_error_bars_hold_where_the_tail_is_light():
    """And only there: -ln Z is 0, and three error bars should reach it."""
    reached = {}
    for deviation in (0.7, 4.0):
        samples = [lognormal(deviation, 1000, seed) for seed in range(100)]
        assert all((drawn.pareto_k < 2 / 3) == (deviation < 1) for drawn in samples)
        estimates = [drawn.corrected_free_energy for drawn in samples]
        reached[deviation] = sum(abs(e.value) < 3 * e.error for e in estimates)
    assert reached[0.7] >= 97
    assert reached[4.0] < 75


def test_an_error_bar_that_a_few_weights_make_is_warned_of():
    light, heavy = lognormal(0.7, 1000, 0), lognormal(4.0, 1000, 0)
    values = torch.zeros(1000)
    with pytest.warns(AccuracyWarning, match=r"Pareto k = 1.*at most 0.67 for 1000 samples"):
        _ = heavy.corrected_free_energy
    with pytest.warns(AccuracyWarning, match="error bar cannot be trusted"):
        heavy.mean(values)
    # warnings of the package are errors in tests
    _ = light.corrected_free_energy, light.mean(values), heavy.free_energy


@pytest.mark.filterwarnings("ignore:the training of")
def test_plain_ridges_on_a_large_lattice_are_warned_of():
    """Trained for a moment at L = 8, a few of 2,000 samples count."""
    torch.manual_seed(0)
    target = Ising(length=8)
    flow = MongeAmpereFlow(target.sites, 8, activation="logcosh", steps=2)
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-2)
    for _ in range(100):
        x, log_q = flow.sample_and_log_prob(64)
        optimizer.zero_grad()
        (log_q - target.log_prob(x)).mean().backward()
        optimizer.step()
    drawn = weigh(flow, target, 2000)
    assert drawn.effective_sample_size < 0.02
    with pytest.warns(AccuracyWarning):
        corrected = drawn.corrected_free_energy
    assert corrected.value - target.sites * target.free_energy > 8 * corrected.error


def test_models_of_normflows():
    torch.manual_seed(0)
    model = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(2), [])
    drawn = weigh(model, Shifted(), 1234, batch_size=100)
    assert drawn.x.shape == (1234, 2)
    assert not drawn.x.requires_grad
    assert drawn.free_energy.value == pytest.approx(-3 + SHIFT**2, abs=5 * drawn.free_energy.error)


def test_errors_name_the_argument():
    flow = Flow(IdentityTransform(), StandardNormal([2]))
    with pytest.raises(TypeError, match=r"target: got \d"):
        weigh(flow, 3, 10)
    with pytest.raises(ValueError, match="num_samples: got 0"):
        weigh(flow, Shifted(), 0)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        weigh(flow, Shifted(), 10, batch_size=0)
    drawn = weigh(flow, Shifted(), 10)
    with pytest.raises(ValueError, match=r"values: got a tensor of shape \(3,\).*\(10,\)"):
        drawn.mean(torch.zeros(3))
    with pytest.raises(ValueError, match="chains: got 6, expected at most 5"):
        drawn.chain(6)

    class Broken:
        def log_prob(self, x):
            return x.sum(1) * math.nan

    with pytest.raises(ValueError, match="target: the log-density"):
        weigh(flow, Broken(), 10)


def test_a_target_gives_one_log_density_for_each_sample():
    class Column:
        def log_prob(self, x: torch.Tensor) -> torch.Tensor:
            return -x.square().sum(1, keepdim=True)

    with pytest.raises(ValueError, match=r"target: Column returned .*\(400, 1\)"):
        weigh(Flow(IdentityTransform(), StandardNormal([2])), Column(), 400)
    with pytest.raises(TypeError, match=r"flow: got \d"):
        weigh(3, Column(), 10)


@pytest.mark.parametrize("shape", [(3,), (40, 1)])
@pytest.mark.parametrize("method", ["mean", "autocorrelation_time"])
def test_an_observable_of_a_chain_has_a_value_for_each_sample(method, shape):
    chain = Chain(torch.arange(40)[:, None])
    with pytest.raises(ValueError, match=r"values: got .*N >= 40"):
        getattr(chain, method)(torch.randn(shape))


class Bumps(nn.Module):
    def forward(self, x):
        return 2 * torch.tanh(x[:, 0]) * torch.tanh(x[:, 1])


def stochastic_flows():
    potential = AutogradPotential(Bumps(), laplacian="hutchinson")
    transform = MongeAmpereTransform(potential)
    base = StandardNormal([2])
    symmetrized = MongeAmpereTransform(SymmetrizedPotential(potential, sign_flip(2)))
    normal = normflows.distributions.DiagGaussian(2)
    return {
        "alone": Flow(transform, base),
        "symmetrized": Flow(symmetrized, base),
        "composite": Flow(CompositeTransform([IdentityTransform(), transform]), base),
        "normflows": normflows.NormalizingFlow(normal, [MongeAmpere(potential)]),
    }


@pytest.mark.parametrize("name", ["alone", "symmetrized", "composite", "normflows"])
def test_weights_take_the_exact_laplacian(name):
    """The exponential of an unbiased estimate is biased."""
    flow = stochastic_flows()[name]
    potentials = [m for m in flow.modules() if isinstance(m, AutogradPotential)]
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="potential.* is a random estimate.*laplacian='exact'"):
        drawn = weigh(flow, Shifted(), 10)
    assert {potential.laplacian_method for potential in potentials} == {"hutchinson"}
    for potential in potentials:
        potential.laplacian_method = "exact"
    torch.manual_seed(1)
    close(weigh(flow, Shifted(), 10).log_weights, drawn.log_weights, 1e-5)


class Moved:
    """A normal density around the context, times the exponential of its first entry."""

    def log_prob(self, x, context):
        return context[:, 0] - 0.5 * (x - context).square().sum(1) - math.log(2 * math.pi)


def conditional_flow(library):
    """x = z + 0.9 c, a little away from the target."""
    potential = RidgePotential(2, 2, context_features=2)
    with torch.no_grad():  # u(x) = x·c up to a constant, for ridges that are nearly linear
        potential.weight.copy_(torch.eye(2) * 1e-3)
        potential.context_weight.copy_(torch.eye(2))
        potential.bias.zero_()
        potential.amplitude.fill_(300.0)
    if library == "nflows":
        return Flow(MongeAmpereTransform(potential), StandardNormal([2]))
    base = normflows.distributions.DiagGaussian(2, trainable=False)
    return normflows.ConditionalNormalizingFlow(base, [MongeAmpere(potential)])


@pytest.mark.parametrize("library", ["nflows", "normflows"])
def test_weights_under_one_context(library):
    torch.manual_seed(0)
    context = torch.tensor([[0.8, -0.4]])
    drawn = weigh(conditional_flow(library), Moved(), 3000, batch_size=700, context=context)
    assert drawn.x.shape == (3000, 2)
    corrected = drawn.corrected_free_energy
    assert corrected.value == pytest.approx(-0.8, abs=4 * corrected.error)
    for entry in range(2):
        mean = drawn.mean(drawn.x[:, entry])
        assert mean.value == pytest.approx(context[0, entry].item(), abs=4 * mean.error)
        assert mean.error < 0.05


@pytest.mark.parametrize("library", ["nflows", "normflows"])
def test_weights_under_a_context_for_each_sample(library):
    torch.manual_seed(0)
    flow, context = conditional_flow(library), torch.randn(50, 2)
    drawn = weigh(flow, Moved(), 50, batch_size=15, context=context)
    log_q = flow.log_prob(drawn.x, context)
    expected = Moved().log_prob(drawn.x, context) - log_q
    torch.testing.assert_close(drawn.log_weights, expected.double(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="context: got 3 rows for 50 samples"):
        weigh(flow, Moved(), 50, context=context[:3])
