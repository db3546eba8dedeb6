from __future__ import annotations

import math

import normflows
import numpy as np
import pytest
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, PointwiseAffineTransform
from scipy.stats import kstest
from torch import nn
from torch.utils.data import DataLoader

from nflows_mongeampere import MongeAmpereFlow, MongeAmpereTransform, Potential, RidgePotential
from nflows_mongeampere.normflows import MongeAmpere
from nflows_mongeampere.training import EndlessBatches, FlowMatching, endless, fit
from nflows_mongeampere.training.matching import paired

MEAN = torch.tensor([1.0, -0.5])
COVARIANCE = torch.tensor([[1.2, 0.5], [0.5, 0.4]])


def gaussian(count):
    return MEAN + torch.randn(count, 2) @ torch.linalg.cholesky(COVARIANCE).T


def optimal_velocity(x, tau):
    """E(x₁ - x₀ | x) where x₁ is normal and independent of x₀: by conditioning normals."""
    tau = torch.as_tensor(tau).view(-1, 1, 1)
    path = (1 - tau) ** 2 * torch.eye(2) + tau**2 * COVARIANCE
    gain = (tau * COVARIANCE - (1 - tau) * torch.eye(2)) @ torch.linalg.inv(path)
    return MEAN + ((x[:, None] - tau * MEAN) @ gain.mT)[:, 0]


class Optimal(Potential):
    """The potential whose gradient is the optimal velocity over T."""

    time_dependent = True

    def __init__(self, duration):
        super().__init__()
        self.duration = duration
        self.scale = nn.Parameter(torch.ones(()))

    def _value(self, x, t, context):
        raise NotImplementedError

    def _gradient(self, x, t, context):
        return self.scale * optimal_velocity(x, t / self.duration) / self.duration

    def _laplacian(self, x, t, context):
        raise NotImplementedError


@pytest.mark.parametrize("duration", [1.0, 2.5])
def test_the_loss_is_least_at_the_optimal_velocity(duration):
    """Its expectation there is the variance that x leaves, and it is stationary."""
    torch.manual_seed(0)
    potential = Optimal(duration)
    flow = Flow(MongeAmpereTransform(potential, time=duration), StandardNormal([2]))
    losses = FlowMatching(flow, steps=1).losses(gaussian(4000))
    taus = (torch.arange(200) + 0.5) / 200
    left = []
    for tau in taus:
        path = (1 - tau) ** 2 * torch.eye(2) + tau**2 * COVARIANCE
        cross = tau * COVARIANCE - (1 - tau) * torch.eye(2)
        left.append((COVARIANCE + torch.eye(2) - cross @ torch.linalg.inv(path) @ cross).trace())
    error = losses.std() / math.sqrt(len(losses))
    assert abs(losses.mean() - torch.stack(left).mean()) < 4 * error
    (slope,) = torch.autograd.grad(losses.mean(), potential.scale)
    assert abs(slope) < 0.1 * losses.mean()


@pytest.mark.parametrize("pairs", ["independent", "optimal_transport"])
def test_a_trained_potential_moves_noise_into_the_data(pairs, tmp_path):
    torch.manual_seed(0)
    flow = MongeAmpereFlow(2, 64, time_dependent=True, steps=6)
    objective = FlowMatching(flow, pairs=pairs, learning_rate=2e-2, steps=400, seed=0)
    data = gaussian(4000)
    batches = endless(EndlessBatches(data, 250), interval=200)
    fit(objective, batches, DataLoader(data[:200], batch_size=200), tmp_path)
    normal = torch.distributions.MultivariateNormal(MEAN, COVARIANCE)
    test = gaussian(2000)
    with torch.no_grad():
        divergence = (normal.log_prob(test) - flow.log_prob(test)).mean()
        assert divergence < 0.1  # a new flow has 1.1
        if pairs == "independent":
            for tau in (0.2, 0.5, 0.8):
                x = (1 - tau) * torch.randn(500, 2) + tau * gaussian(500)
                wanted = optimal_velocity(x, tau)
                miss = flow.transform.potential.gradient(x, tau) - wanted
                assert miss.square().sum(1).mean() < 0.15 * wanted.square().sum(1).mean()


def test_the_density_after_matching_is_that_of_the_samples(tmp_path):
    torch.manual_seed(0)
    data = torch.where(torch.rand(3000, 1) < 0.3, -1.5, 0.8) + 0.4 * torch.randn(3000, 1)
    flow = MongeAmpereFlow(1, 64, time_dependent=True, steps=12)
    objective = FlowMatching(flow, learning_rate=2e-2, steps=200)
    fit(objective, endless(EndlessBatches(data, 250), interval=100), None, tmp_path)
    grid = torch.linspace(-6, 6, 4001)[:, None]
    with torch.no_grad():
        density = flow.log_prob(grid).exp()
        samples = flow.sample(2000)[:, 0]
    cumulated = torch.cumulative_trapezoid(density, grid[:, 0]).numpy()
    assert cumulated[-1] == pytest.approx(1, abs=2e-3)
    cdf = lambda x: np.interp(x, grid[1:, 0].numpy(), cumulated)  # noqa: E731
    assert kstest(samples.numpy(), cdf).pvalue > 1e-3
    assert kstest(torch.randn(2000).numpy(), cdf).pvalue < 1e-3  # a new flow's


def test_optimal_transport_is_that_of_all_permutations():
    torch.manual_seed(0)
    noise, data = torch.randn(5, 2), torch.randn(5, 2)
    found = (paired(noise, data) - data).square().sum()
    every = torch.cartesian_prod(*[torch.arange(5)] * 5)
    orders = [p for p in every if len(p.unique()) == 5]
    least = min((noise[order] - data).square().sum() for order in orders)
    torch.testing.assert_close(found, least)


@pytest.mark.parametrize("library", ["nflows", "normflows"])
def test_layers_before_the_data_map_it(library):
    """Data of another unit under a layer that takes it away: the loss is that of data without."""
    shift, scale = torch.tensor([5.0, -3.0]), torch.tensor([10.0, 0.1])
    potential = RidgePotential(2, 8, time_dependent=True)
    nn.init.normal_(potential.amplitude)
    bare = Flow(MongeAmpereTransform(potential), StandardNormal([2]))
    if library == "nflows":
        unit = PointwiseAffineTransform(-shift / scale, 1 / scale)
        flow = Flow(CompositeTransform([unit, bare._transform]), StandardNormal([2]))
    else:
        unit = normflows.flows.AffineConstFlow(2)
        with torch.no_grad():
            unit.t.copy_(shift)
            unit.s.copy_(scale.log())
        base = normflows.distributions.DiagGaussian(2, trainable=False)
        flow = normflows.NormalizingFlow(base, [MongeAmpere(potential), unit])
    z = torch.randn(50, 2)
    found = []
    for model, data in ((bare, z), (flow, shift + scale * z)):
        torch.manual_seed(0)
        found.append(FlowMatching(model, steps=1).losses(data))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_a_context_reaches_the_potential():
    flow = MongeAmpereFlow(
        2, 8, time_dependent=True, context_features=4, embedding_net=nn.Linear(3, 4)
    )
    nn.init.normal_(flow.transform.potential.amplitude)
    x, context = torch.randn(6, 2), torch.randn(6, 3)
    objective = FlowMatching(flow, steps=1)
    losses = []
    for given in (context, context + 1):
        torch.manual_seed(0)
        losses.append(objective.losses((x, given)))
    assert (losses[0] != losses[1]).all()
    losses[0].sum().backward()
    assert flow._embedding_net.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="pairs: got 'optimal_transport' and a context"):
        FlowMatching(flow, pairs="optimal_transport", steps=1).losses((x, context))


def test_validation_is_the_likelihood():
    flow = MongeAmpereFlow(2, 8, time_dependent=True, steps=4)
    nn.init.normal_(flow.transform.potential.amplitude)
    x = torch.randn(30, 2)
    losses, errors = FlowMatching(flow, steps=1).judge(x, seed=0)
    flow.transform.steps = 8
    with torch.no_grad():
        torch.testing.assert_close(losses, -flow.log_prob(x))
    assert len(errors) == 20


@pytest.mark.parametrize(
    ("flow", "keywords", "message"),
    [
        (MongeAmpereFlow(2, 4), {}, "flow: got a potential that does not depend on time"),
        (
            Flow(PointwiseAffineTransform(), StandardNormal([2])),
            {},
            "flow: got a PointwiseAffineTransform next to the base",
        ),
        (MongeAmpereFlow(2, 4, time_dependent=True), {"pairs": "ot"}, "pairs: got 'ot'"),
        (MongeAmpereFlow(2, 4, time_dependent=True), {"sigma": -1}, "sigma: got -1"),
        (MongeAmpereFlow(2, 4, time_dependent=True), {"kinetic": 1.0}, "kinetic, roughness: got 1"),
    ],
)
def test_wrong_arguments(flow, keywords, message):
    with pytest.raises(ValueError, match=message):
        FlowMatching(flow, steps=1, **keywords)
