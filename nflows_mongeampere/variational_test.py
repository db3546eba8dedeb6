import math

import normflows
import pytest
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import IdentityTransform

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


def test_a_chain_that_never_moves_has_no_error_bar():
    weights = torch.zeros(50, dtype=torch.float64)
    weights[0] = 1e6
    drawn = WeightedSamples(torch.randn(50, 1), weights)
    chain = drawn.chain()
    assert chain.acceptance == 0
    assert chain.autocorrelation_time(drawn.x[:, 0]) == 50
    assert chain.mean(drawn.x[:, 0]).error == math.inf


def test_models_of_normflows():
    torch.manual_seed(0)
    model = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(2), [])
    drawn = weigh(model, Shifted(), 1234, batch_size=100)
    assert drawn.x.shape == (1234, 2)
    assert not drawn.x.requires_grad
    assert drawn.free_energy.value == pytest.approx(-3 + SHIFT**2, abs=5 * drawn.free_energy.error)


def test_errors_name_the_argument():
    flow = Flow(IdentityTransform(), StandardNormal([2]))
    with pytest.raises(TypeError, match="target: got int"):
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
    with pytest.raises(TypeError, match="flow: got int"):
        weigh(3, Column(), 10)


@pytest.mark.parametrize("shape", [(3,), (40, 1)])
@pytest.mark.parametrize("method", ["mean", "autocorrelation_time"])
def test_an_observable_of_a_chain_has_a_value_for_each_sample(method, shape):
    chain = Chain(torch.arange(40)[:, None])
    with pytest.raises(ValueError, match=r"values: got .*N >= 40"):
        getattr(chain, method)(torch.randn(shape))
