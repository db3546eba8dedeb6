"""Costs of transport against quadrature along the path, in every coordinate and direction."""

from functools import partial

import numpy as np
import pytest
import torch
from nflows.transforms import CompositeTransform
from numpy.polynomial import chebyshev, legendre
from torch import nn

from nflows_mongeampere import (
    AutogradPotential,
    MongeAmpereFlow,
    MongeAmpereTransform,
    Potential,
    RidgePotential,
    dynamics,
    transport_costs,
)
from nflows_mongeampere.conftest import (
    POTENTIALS,
    Network,
    close,
    definition,
    differentiate,
    make_potential,
    ridge,
)
from nflows_mongeampere.dynamics import DirectDynamics, ReducedCostDynamics
from nflows_mongeampere.normflows import MongeAmpere

BOTH = {"time_dependent": True, "context_features": 2}


def batch(shape=(6,), options=None, grad=False):
    x = torch.randn(4, *shape, dtype=torch.float64, requires_grad=grad)
    if "context_features" not in (options or {}):
        return x, None
    return x, torch.randn(4, 2, dtype=torch.float64, requires_grad=grad)


def record(transform, x, context=None, inverse=False):
    with transport_costs(transform) as costs:
        result = (transform.inverse if inverse else transform.forward)(x, context)
    return result, (costs.kinetic, costs.roughness)


def in_x(potential):
    """The same potential, always integrated in x itself."""
    potential.dynamics = partial(Potential.dynamics, potential)
    return potential


def quadrature(transform, x, context, stop):
    """Both integrals by calculus of polynomials through points of the path."""
    times = transform.time * (1 + chebyshev.chebpts2(25)) / 2
    transform.steps = 100
    with torch.no_grad():
        path = transform.trajectory(x, times if stop else times[::-1].copy(), context)
    value = definition(transform.potential, context)
    derivatives = [
        differentiate(value, point, float(t))
        for t, point in zip(path.times, path.points, strict=True)
    ]
    speeds = torch.stack([gradient.flatten(1).square().sum(1) for gradient, _ in derivatives])
    laplacians = torch.stack([laplacian for _, laplacian in derivatives])
    nodes, weights = legendre.leggauss(40)

    def fit(values):
        return chebyshev.chebfit(2 * path.times.numpy() / transform.time - 1, values.numpy(), 24)

    rates = chebyshev.chebder(fit(laplacians)) * 2 / transform.time
    integrands = chebyshev.chebval(nodes, fit(speeds)), chebyshev.chebval(nodes, rates) ** 2
    return [torch.from_numpy(np.dot(f, weights) * transform.time / 2) for f in integrands]


@pytest.mark.parametrize("kind", POTENTIALS)
@pytest.mark.parametrize(("shape", "hidden"), [((3,), 16), ((2, 1, 3), 4)])
@pytest.mark.parametrize("options", [{}, BOTH], ids=str)
@pytest.mark.parametrize("face", [MongeAmpereTransform, MongeAmpere])
def test_quadrature(kind, shape, hidden, options, face):
    x, context = batch(shape, options)
    potential = make_potential(kind, x[0].numel(), hidden=hidden, **options)
    transform = face(potential, time=0.8, steps=40)
    with torch.no_grad():
        (y, _), there = record(transform, x, context)
        back = record(transform, y, context, inverse=True)[1]
    expected = quadrature(transform, x, context, stop=face is MongeAmpere)
    for ours, reverse, theirs in zip(there, back, expected, strict=True):
        assert ours.shape == (4,)
        assert theirs.max() > 1e-4
        close(ours, theirs, 1e-8)
        close(reverse, theirs, 1e-8)
        assert min(ours.min(), reverse.min()) > 0


@pytest.mark.parametrize("options", [{}, {"time_dependent": True}, BOTH], ids=str)
@pytest.mark.parametrize("activation", ["softplus", "logcosh"])
@pytest.mark.parametrize("inverse", [False, True])
def test_coordinates_agree(options, activation, inverse):
    x, context = batch(options=options, grad=True)
    transform = MongeAmpereTransform(ridge(6, 4, activation=activation, **options), steps=3)
    leaves = [x, *([] if context is None else [context]), *transform.parameters()]

    def results(coordinates):
        assert type(transform.potential.dynamics(x, context, 12, True)) is coordinates
        outputs, costs = record(transform, x, context, inverse)
        loss = costs[0].sum() + costs[1].sin().sum()
        return *outputs, *costs, *torch.autograd.grad(loss, leaves)

    reduced = results(ReducedCostDynamics)
    in_x(transform.potential)
    for ours, theirs in zip(results(DirectDynamics), reduced, strict=True):
        assert ours.abs().max() > 1e-6
        close(ours, theirs)


@pytest.mark.parametrize("kind", POTENTIALS)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_recording_changes_nothing(kind, inverse, grad):
    x, context = batch(options=BOTH)
    transform = MongeAmpereTransform(make_potential(kind, 6, **BOTH))
    with torch.set_grad_enabled(grad):
        expected = (transform.inverse if inverse else transform.forward)(x, context)
        result, _ = record(transform, x, context, inverse)
    for ours, theirs in zip(result, expected, strict=True):
        close(ours, theirs, 1e-12)


def test_no_further_products(monkeypatch):
    products = []

    def counted(gram, s, product=dynamics._gram_product):
        products.append(s)
        return product(gram, s)

    monkeypatch.setattr(dynamics, "_gram_product", counted)
    transform = MongeAmpereTransform(ridge(6, 4), steps=3)
    x, _ = batch()
    transform(x)
    assert len(products) == 4 * 3
    record(transform, x)
    assert len(products) == 2 * 4 * 3


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@pytest.mark.parametrize("sensitivity", ["recompute", "adjoint", "interpolated_adjoint"])
@pytest.mark.parametrize("kind", ["softplus", "network"])
def test_sensitivities(solver, sensitivity, kind):
    x, context = batch((3,), BOTH, grad=True)
    potential = make_potential(kind, 3, **BOTH)
    leaves = [x, context, *potential.parameters()]

    def results(sensitivity):
        transform = MongeAmpereTransform(
            potential, steps=8, solver=solver, sensitivity=sensitivity, atol=1e-6, rtol=1e-6
        )
        costs = record(transform, x, context)[1]
        grads = torch.autograd.grad(
            costs[0].sum() + costs[1].sum(), leaves, allow_unused=True, materialize_grads=True
        )
        return *costs, *grads

    for ours, theirs in zip(results(sensitivity), results("autograd"), strict=True):
        close(ours, theirs, 1e-10 if sensitivity == "recompute" else 5e-3)


@pytest.mark.parametrize("kind", POTENTIALS)
@pytest.mark.parametrize("inverse", [False, True])
def test_gradcheck(kind, inverse):
    x, context = batch((2,), BOTH, grad=True)
    transform = MongeAmpereTransform(make_potential(kind, 2, hidden=3, **BOTH), steps=2)
    # gradcheck shakes the parameters where they are
    assert torch.autograd.gradcheck(
        lambda x, context, *_: record(transform, x, context, inverse)[1],
        (x[:2], context[:2], *transform.parameters()),
        fast_mode=True,
    )


def test_costs_add_up():
    x, _ = batch()
    flows = [MongeAmpereTransform(make_potential(kind, 6)) for kind in ("softplus", "network")]
    (y, _), first = record(flows[0], x)
    _, second = record(flows[1], y)
    _, both = record(CompositeTransform(flows), x)
    for a, b, total in zip(first, second, both, strict=True):
        close(total, a + b, 1e-14)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_recorded_after_the_block(fails):
    x, _ = batch()
    model = CompositeTransform([MongeAmpereTransform(ridge(6, 4)) for _ in range(2)])
    try:
        with transport_costs(model) as costs:
            model(x)
            if fails:
                raise KeyError
    except KeyError:
        pass
    kinetic, roughness = costs.kinetic, costs.roughness
    model(x)
    assert costs.kinetic is kinetic
    assert costs.roughness is roughness
    types = [type(t.potential.dynamics(x, None, 32)) for t in model._transforms]
    assert ReducedCostDynamics not in types
    assert all(t._costs is None for t in model._transforms)


@pytest.mark.parametrize("name", ["kinetic", "roughness"])
def test_nothing_to_read_yet(name):
    with (
        transport_costs(MongeAmpereFlow(2, 3)) as costs,
        pytest.raises(AttributeError, match=rf"^{name}: no batch .* evaluate it inside the with"),
    ):
        getattr(costs, name)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), RidgePotential(2, 3)], ids=type)
def test_no_flow_to_record(model):
    with (
        pytest.raises(ValueError, match=rf"^model: got {type(model).__name__}.*no Monge-Ampère"),
        transport_costs(model),
    ):
        pass


def test_empty_batches_and_probes():
    with transport_costs(flow := MongeAmpereFlow(2, 3)) as costs:
        flow.log_prob(torch.zeros(0, 2))
    assert costs.kinetic.shape == costs.roughness.shape == (0,)

    network = Network(3).double()
    estimated = MongeAmpereTransform(AutogradPotential(network, laplacian="hutchinson"))
    x, _ = batch((3,))
    kinetic, roughness = record(estimated, x)[1]
    close(kinetic, record(MongeAmpereTransform(AutogradPotential(network)), x)[1][0], 1e-12)
    assert roughness.min() > 0
