"""The contract of nflows, to the letter: transforms, composites, base distributions, flows."""

import itertools
import math

import pytest
import torch
from nflows import transforms
from nflows.distributions import (
    ConditionalDiagonalNormal,
    DiagonalNormal,
    MADEMoG,
    StandardNormal,
)
from nflows.flows import Flow
from torch import nn
from torch.autograd.functional import jacobian

from cases import POTENTIALS, Case, Model
from nflows_mongeampere import MongeAmpereFlow, MongeAmpereTransform, Potential, RidgePotential

pytestmark = pytest.mark.usefixtures("float64")

FEATURES = 4


every_potential = pytest.mark.parametrize("potential", POTENTIALS)


def contexts(case, size):
    """The contexts that a batch may come with: an unconditional potential takes any, or none."""
    context = case.batch(size)[1]
    return [None, torch.randn(size, 3)] if context is None else [context]


@pytest.mark.parametrize("size", [0, 3])
@every_potential
def test_transform(potential, size):
    """Shapes, and the inverse after the forward, as nflows composes them."""
    case = Case(potential)
    transform, x = Model(case).transport, case.batch(size)[0]
    there_and_back = transforms.CompositeTransform(
        [transform, transforms.InverseTransform(transform)]
    )
    found = []
    for context in contexts(case, size):
        for direction in (transform.forward, transform.inverse):
            torch.manual_seed(2)
            points, logabsdet = direction(x, context=context)
            assert points.shape == x.shape
            assert logabsdet.shape == (size,)
            found.append((points, logabsdet))
        if potential == "hutchinson":  # draws two probes
            continue
        points, logabsdet = there_and_back(x, context)
        torch.testing.assert_close(points, x, rtol=0, atol=1e-5)
        torch.testing.assert_close(logabsdet, torch.zeros(size), rtol=0, atol=1e-5)
    torch.testing.assert_close(found[2:], found[:-2])  # a context that is not taken is ignored


@pytest.mark.parametrize("rows", [None, 3])
@every_potential
def test_flow(potential, rows):
    """Samples in the shape of an event, for each row of context, with their densities."""
    case = Case(potential)
    flow = Model(case).density
    context = None if rows is None else contexts(case, rows)[-1]
    if context is None and POTENTIALS[potential].context_features is not None:
        with pytest.raises(ValueError, match=r"^context: got None"):
            flow.sample(5)
        return
    first = (5,) if context is None else (rows, 5)
    assert flow.sample(5, context).shape == (*first, *case.shape)
    samples, log_prob = flow.sample_and_log_prob(5, context)
    assert samples.shape == (*first, *case.shape)
    assert log_prob.shape == first
    events = samples.reshape(-1, *case.shape)
    repeated = None if context is None else context.repeat_interleave(5, 0)
    again = flow.log_prob(events, repeated)
    assert again.shape == (len(events),)
    if potential != "hutchinson":
        torch.testing.assert_close(again, log_prob.flatten(), rtol=0, atol=1e-5)
    assert flow.transform_to_noise(events, repeated).shape == events.shape


@every_potential
def test_density_estimator_of_sbi(potential):
    """Batches of samples for each of some conditions, whose events have a shape of their own."""
    module = "sbi.neural_nets.estimators.nflows_flow"
    estimators = pytest.importorskip(module, reason="needs sbi")
    case = Case(potential)
    width, features = POTENTIALS[potential].context_features or 1, math.prod(case.shape)
    embedding = nn.Sequential(nn.Flatten(), nn.Linear(6, width))
    flow = Flow(Model(case).transport, StandardNormal([features]), embedding)
    estimator = estimators.NFlowsFlow(flow, torch.Size([features]), torch.Size([2, 3]))
    for rows, draws in itertools.product((1, 4), ((), (1,), (3, 2))):
        condition = torch.randn(rows, 2, 3)
        samples = estimator.sample(draws, condition)
        assert samples.shape == (*draws, rows, features)
        drawn, of_drawn = estimator.sample_and_log_prob(torch.Size(draws), condition)
        assert drawn.shape == samples.shape
        assert of_drawn.shape == (*draws, rows)
        inputs = samples.reshape(-1, rows, features).detach()
        torch.manual_seed(2)
        log_prob = estimator.log_prob(inputs, condition)
        torch.manual_seed(2)
        repeated = condition.repeat(len(inputs), 1, 1)
        expected = flow.log_prob(inputs.flatten(0, 1), repeated).view(-1, rows)
        torch.testing.assert_close(log_prob, expected)
        assert estimator.loss(inputs[0], condition).shape == (rows,)
    if POTENTIALS[potential].context_features is not None:
        log_prob.sum().backward()
        assert embedding[1].weight.grad.abs().max() > 0


class Harmonic(Potential):
    """u(x) = Σ kᵢ xᵢ² / 2: the flow is x(t) = exp(k t) x(0)."""

    def __init__(self, stiffness):
        super().__init__()
        self.stiffness = nn.Parameter(torch.tensor(stiffness))

    def _value(self, x, t, context):
        return x.square() @ self.stiffness / 2

    def _gradient(self, x, t, context):
        return x * self.stiffness

    def _laplacian(self, x, t, context):
        return self.stiffness.sum().expand(len(x))


def transport(features=FEATURES, hidden=6, context_features=None, **keywords):
    potential = RidgePotential(features, hidden, context_features=context_features)
    nn.init.normal_(potential.amplitude, std=0.5)
    return MongeAmpereTransform(potential, **{"steps": 16, **keywords})


def coupling():
    return transforms.PiecewiseRationalQuadraticCouplingTransform(
        mask=torch.arange(FEATURES) % 2,
        transform_net_create_fn=lambda inputs, outputs: _Conditioner(inputs, outputs),
        tails="linear",
        tail_bound=4.0,
    )


class _Conditioner(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, inputs, context=None):
        return self.layer(inputs)


def multiscale(shapes, split_dim=1):
    stack = transforms.MultiscaleCompositeTransform(len(shapes), split_dim)
    for shape in shapes:
        stack.add_transform(transport(math.prod(shape)), shape)
    return stack


STACKS = {
    "alone": (lambda: transport(), (FEATURES,)),
    "inverse": (lambda: transforms.InverseTransform(transport()), (FEATURES,)),
    "image": (lambda: transport(8), (2, 2, 2)),
    "linear": (
        lambda: transforms.CompositeTransform(
            [
                transforms.LULinear(FEATURES, identity_init=False),
                transport(),
                transforms.LULinear(FEATURES, identity_init=False),
            ]
        ),
        (FEATURES,),
    ),
    "everything": (
        lambda: transforms.CompositeTransform(
            [
                transforms.ActNorm(FEATURES),
                transport(solver="midpoint", steps=60),
                transforms.RandomPermutation(FEATURES),
                coupling(),
                transforms.InverseTransform(transport()),
                transforms.ReversePermutation(FEATURES),
                transport(sensitivity="recompute"),
            ]
        ),
        (FEATURES,),
    ),
    "multiscale": (lambda: multiscale([(8,), (4,), (2,)]), (8,)),
    "multiscale image": (lambda: multiscale([(4, 2, 1), (2, 2, 1)]), (4, 2, 1)),
    "multiscale image, rows": (lambda: multiscale([(2, 4, 1), (2, 2, 1)], split_dim=2), (2, 4, 1)),
}


@pytest.mark.parametrize("name", STACKS)
def test_stack(name):
    """ln|det| is that of the Jacobian by autograd; the inverse undoes both outputs."""
    build, shape = STACKS[name]
    stack = build()
    x = torch.randn(3, *shape)
    stack(torch.randn(50, *shape))  # ActNorm initialises itself on its first batch
    z, logabsdet = stack(x)
    assert (z - x.reshape(z.shape)).abs().max() > 0.1
    for row, value in zip(x, logabsdet, strict=True):
        matrix = jacobian(lambda v: stack(v[None])[0].flatten(), row).reshape(row.numel(), -1)
        torch.testing.assert_close(value, torch.linalg.slogdet(matrix)[1], rtol=0, atol=1e-4)
    back, logabsdet_back = stack.inverse(z)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-4)
    torch.testing.assert_close(logabsdet_back, -logabsdet, rtol=0, atol=1e-4)


def test_density_of_a_composite_is_the_sum_of_its_parts():
    # nflows inverts NaiveLinear by a function that PyTorch has removed: data to noise only
    linear = transforms.NaiveLinear(FEATURES, orthogonal_initialization=False)
    parts = [linear, transport(), coupling()]
    flow = Flow(transforms.CompositeTransform(parts), StandardNormal([FEATURES]))
    x = torch.randn(5, FEATURES)
    noise, expected = x, torch.zeros(5)
    for part in parts:
        noise, logabsdet = part(noise)
        expected = expected + logabsdet
    expected = expected + torch.distributions.Normal(0, 1).log_prob(noise).sum(1)
    torch.testing.assert_close(flow.log_prob(x), expected)
    assert torch.equal(flow.transform_to_noise(x), noise)


@pytest.mark.parametrize(
    ("solver", "steps", "error"),
    [
        ("euler", 1000, 1e-2),
        ("midpoint", 100, 1e-3),
        ("rk4", 20, 1e-5),
        ("dopri5", 1, 1e-5),
        ("tsit5", 1, 1e-5),
        ("ieuler", 100, 1e-1),
        ("alf", 100, 1e-3),
    ],
)
def test_known_density(solver, steps, error):
    """Axis i of a standard normal is stretched by exp(k T)."""
    potential = Harmonic([0.6, -0.3, 0.0])
    flow = Flow(
        MongeAmpereTransform(potential, time=1.5, steps=steps, solver=solver, atol=1e-8, rtol=1e-8),
        StandardNormal([3]),
    )
    x = torch.randn(6, 3)
    log_prob = flow.log_prob(x)
    known = torch.distributions.Normal(0, torch.exp(1.5 * potential.stiffness)).log_prob(x).sum(1)
    torch.testing.assert_close(log_prob, known, rtol=0, atol=error)
    (gradient,) = torch.autograd.grad(log_prob.sum(), potential.stiffness)
    (known_gradient,) = torch.autograd.grad(known.sum(), potential.stiffness)
    torch.testing.assert_close(gradient, known_gradient, rtol=0, atol=50 * error)


def test_samples_follow_the_known_density():
    flow = Flow(MongeAmpereTransform(Harmonic([0.6, -0.3])), StandardNormal([2]))
    with torch.no_grad():
        deviation = flow.sample(20_000).std(0)
    torch.testing.assert_close(deviation, torch.tensor([0.6, -0.3]).exp(), rtol=0.03, atol=0)


BASES = {
    "standard": lambda: StandardNormal([FEATURES]),
    "diagonal": lambda: _randomised(DiagonalNormal([FEATURES])),
    "conditional": lambda: ConditionalDiagonalNormal([FEATURES], nn.Linear(2, 2 * FEATURES)),
    "mixture": lambda: MADEMoG(FEATURES, 8, context_features=2, num_mixture_components=3),
}


def _randomised(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize("base", BASES)
def test_base_distribution(base):
    distribution = BASES[base]()
    flow = Flow(transport(context_features=2), distribution)
    x, context = torch.randn(5, FEATURES), torch.randn(5, 2)
    log_prob = flow.log_prob(x, context)
    noise, logabsdet = flow._transform(x, context)
    torch.testing.assert_close(log_prob, distribution.log_prob(noise, context) + logabsdet)
    log_prob.sum().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("base", [b for b in BASES if b != "diagonal"])  # nflows cannot sample it
@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint"])
def test_conditional_samples(base, sensitivity):
    flow = Flow(transport(context_features=2, sensitivity=sensitivity), BASES[base]())
    context = torch.randn(3, 2)
    assert flow.sample(4, context).shape == (3, 4, FEATURES)
    # nflows joins the batches of samples along its first dimension, that of the context
    assert flow.sample(4, context, batch_size=2).shape == (6, 2, FEATURES)
    samples, log_prob = flow.sample_and_log_prob(4, context)
    assert samples.shape == (3, 4, FEATURES)
    assert log_prob.shape == (3, 4)
    again = flow.log_prob(samples.flatten(0, 1), context.repeat_interleave(4, dim=0))
    torch.testing.assert_close(log_prob.flatten(), again, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(FEATURES,), (1, 2, 2)])
def test_unconditional_samples(shape):
    flow = Flow(transport(), StandardNormal(shape))
    assert flow.sample(5).shape == (5, *shape)
    assert flow.sample(5, batch_size=2).shape == (5, *shape)
    samples, log_prob = flow.sample_and_log_prob(5)
    assert samples.shape == (5, *shape)
    torch.testing.assert_close(log_prob, flow.log_prob(samples), rtol=0, atol=1e-4)
    noise = flow.transform_to_noise(samples)
    expected = torch.distributions.Normal(0, 1).log_prob(noise).flatten(1).sum(1)
    logabsdet = flow._transform(samples)[1]
    torch.testing.assert_close(flow.log_prob(samples), expected + logabsdet)


def test_every_row_of_context_has_its_own_density():
    flow = Flow(transport(context_features=2), StandardNormal([FEATURES]))
    x, context = torch.randn(1, FEATURES).expand(3, -1), torch.randn(3, 2)
    together = flow.log_prob(x, context)
    alone = torch.cat([flow.log_prob(x[i : i + 1], context[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone)
    assert together.std() > 1e-3


def test_embedding_net():
    """The flow sees the embedded context, and the embedding learns."""
    embedding = nn.Linear(5, 2)
    flow = MongeAmpereFlow(FEATURES, 6, context_features=2, embedding_net=embedding)
    nn.init.normal_(flow._transform.potential.amplitude)
    plain = Flow(flow._transform, flow._distribution)
    x, context = torch.randn(4, FEATURES), torch.randn(4, 5)
    log_prob = flow.log_prob(x, context)
    assert torch.equal(log_prob, plain.log_prob(x, embedding(context)))
    log_prob.sum().backward()
    assert embedding.weight.grad.abs().min() > 0
    assert flow.sample(3, context).shape == (4, 3, FEATURES)
    assert flow.sample_and_log_prob(3, context)[1].shape == (4, 3)
    assert torch.equal(
        flow.transform_to_noise(x, context), flow._transform(x, embedding(context))[0]
    )


def test_ready_made_flow_passes_every_keyword_on():
    base = ConditionalDiagonalNormal([FEATURES], nn.Linear(2, 2 * FEATURES))
    transport_keywords = {
        "time": 0.7,
        "steps": 3,
        "solver": "midpoint",
        "sensitivity": "recompute",
        "atol": 1e-4,
        "rtol": 1e-3,
        "max_steps": 77,
    }
    ready = MongeAmpereFlow(
        FEATURES,
        6,
        context_features=2,
        embedding_net=nn.Linear(5, 2),
        distribution=base,
        time_dependent=True,
        activation="logcosh",
        **transport_keywords,
    )
    potential = RidgePotential(
        FEATURES, 6, context_features=2, time_dependent=True, activation="logcosh"
    )
    built = Flow(MongeAmpereTransform(potential, **transport_keywords), base, nn.Linear(5, 2))
    _randomised(ready)
    built.load_state_dict(ready.state_dict())
    x, context = torch.randn(4, FEATURES), torch.randn(4, 5)
    assert torch.equal(ready.log_prob(x, context), built.log_prob(x, context))
    assert repr(ready._transform) == repr(built._transform)


def test_training_finds_a_density_that_is_not_gaussian():
    """Two clusters: better than the best Gaussian, and not better than the truth."""
    centre = torch.tensor([2.0, 0.0])
    truth = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(2)),
        torch.distributions.MultivariateNormal(torch.stack([centre, -centre]), torch.eye(2) / 4),
    )
    train, test = truth.sample((500,)), truth.sample((2000,))
    gaussian = torch.distributions.MultivariateNormal(train.mean(0), train.T.cov())
    flow = MongeAmpereFlow(2, 32, steps=4)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.03)
    for _ in range(100):
        optimizer.zero_grad()
        (-flow.log_prob(train).mean()).backward()
        optimizer.step()
    flow._transform.steps = 16
    with torch.no_grad():
        nll = -flow.log_prob(test).mean()
    assert nll < -gaussian.log_prob(test).mean() - 0.1
    assert nll > -truth.log_prob(test).mean() - 0.01
