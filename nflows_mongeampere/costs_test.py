"""Costs of transport against quadrature along the path, in every coordinate and direction."""

import contextlib
import copy

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
    RidgePotential,
    transport_costs,
)
from nflows_mongeampere.conftest import (
    ALL,
    POTENTIALS,
    Network,
    close,
    definition,
    differentiate,
    every_pair,
    make,
    ridge,
)
from nflows_mongeampere.dynamics import FieldDynamics
from nflows_mongeampere.normflows import MongeAmpere
from nflows_mongeampere.potentials.ridges import ReducedCostDynamics


def record(transform, x, context=None, inverse=False):
    with transport_costs(transform) as costs:
        result = (transform.inverse if inverse else transform.forward)(x, context)
    return result, (costs.kinetic, costs.roughness)


def quadrature(transform, x, context, stop):
    """Both integrals by calculus of polynomials through points of the path."""
    times = transform.time * (1 + chebyshev.chebpts2(13)) / 2
    transform.steps = 24
    with torch.no_grad():
        path = transform.trajectory(x, times if stop else times[::-1].copy(), context)
    value = definition(transform.potential, context)
    derivatives = [
        differentiate(value, point, float(t))
        for t, point in zip(path.times, path.points, strict=True)
    ]
    speeds = torch.stack([gradient.flatten(1).square().sum(1) for gradient, _ in derivatives])
    laplacians = torch.stack([laplacian for _, laplacian in derivatives])
    nodes, weights = legendre.leggauss(30)

    def fit(values):
        return chebyshev.chebfit(2 * path.times.numpy() / transform.time - 1, values.numpy(), 12)

    rates = chebyshev.chebder(fit(laplacians)) * 2 / transform.time
    integrands = chebyshev.chebval(nodes, fit(speeds)), chebyshev.chebval(nodes, rates) ** 2
    return [torch.from_numpy(np.dot(f, weights) * transform.time / 2) for f in integrands]


@pytest.mark.parametrize("name", POTENTIALS)
def test_quadrature(name):
    """In both directions."""
    potential, x, context = make(name)
    face = [MongeAmpereTransform, MongeAmpere][len(name) % 2]
    transform = face(potential, time=0.4, steps=20)
    with torch.no_grad():
        (y, _), there = record(transform, x, context)
        back = record(transform, y, context, inverse=True)[1]
    expected = quadrature(transform, x, context, stop=face is MongeAmpere)
    for ours, reverse, theirs in zip(there, back, expected, strict=True):
        assert ours.shape == (3,)
        assert theirs.max() > 1e-5
        close(ours, theirs, 1e-6)
        close(reverse, theirs, 1e-6)
        assert min(ours.min(), reverse.min()) > 0


@pytest.mark.parametrize("options", [{}, ALL], ids=str)
@pytest.mark.parametrize("activation", ["softplus", "logcosh"])
@pytest.mark.parametrize("inverse", [False, True])
def test_coordinates_agree(options, activation, inverse):
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    context = torch.randn(4, 2, dtype=torch.float64, requires_grad=True) if options else None
    potential = ridge(6, 4, activation=activation, **options)
    transform = MongeAmpereTransform(potential, steps=3)
    leaves = [x, *([] if context is None else [context]), *transform.parameters()]

    def results(coordinates):
        assert type(potential.dynamics(x, context, 12, True)) is coordinates
        outputs, costs = record(transform, x, context, inverse)
        loss = costs[0].sum() + costs[1].sin().sum()
        return *outputs, *costs, *torch.autograd.grad(loss, leaves)

    reduced = results(ReducedCostDynamics)

    twin = copy.deepcopy(potential)  # the field is made of dynamics itself
    potential.dynamics = lambda inputs, context, evaluations, costs=False: FieldDynamics(
        twin._gradient_and_laplacian, inputs, context, twin, costs
    )
    leaves[-len(list(twin.parameters())) :] = twin.parameters()
    direct = results(FieldDynamics)
    for ours, theirs in zip(direct, reduced, strict=True):
        assert ours.abs().max() > 1e-6
        close(ours, theirs)


@pytest.mark.parametrize("name", POTENTIALS)
def test_recording_changes_nothing(name):
    potential, x, context = make(name)
    transform = MongeAmpereTransform(potential, steps=1)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected = transform(x, context)
            result, _ = record(transform, x, context)
        for ours, theirs in zip(result, expected, strict=True):
            close(ours, theirs, 1e-12)


@pytest.mark.parametrize(
    ("name", "sensitivity", "solver"),
    every_pair(
        ["ridge-all", "reduced-all", "lattice", "network-all"],
        ["recompute", "adjoint", "interpolated_adjoint"],
        ["rk4", "dopri5"],
    ),
)
def test_sensitivities(name, sensitivity, solver):
    potential, x, context = make(name)
    leaves = [x.requires_grad_(), context.requires_grad_(), *potential.parameters()]

    def results(sensitivity):
        transform = MongeAmpereTransform(
            potential, steps=4, solver=solver, sensitivity=sensitivity, atol=1e-6, rtol=1e-6
        )
        costs = record(transform, x, context)[1]
        grads = torch.autograd.grad(
            costs[0].sum() + costs[1].sum(), leaves, allow_unused=True, materialize_grads=True
        )
        return *costs, *grads

    for ours, theirs in zip(results(sensitivity), results("autograd"), strict=True):
        close(ours, theirs, 1e-10 if sensitivity == "recompute" else 5e-3)


@pytest.mark.parametrize("name", POTENTIALS)
def test_gradcheck(name):
    potential, x, context = make(name, rows=1)
    transform = MongeAmpereTransform(potential, steps=1, solver="midpoint")
    # gradcheck shakes the parameters where they are
    assert torch.autograd.gradcheck(
        lambda x, *_: record(transform, x, context)[1],
        (x.requires_grad_(), *transform.parameters()),
        fast_mode=True,
    )


def test_costs_add_up():
    x = torch.randn(4, 6, dtype=torch.float64)
    potentials = ridge(6, 4), AutogradPotential(Network(6).double())
    flows = [MongeAmpereTransform(potential) for potential in potentials]
    (y, _), first = record(flows[0], x)
    _, second = record(flows[1], y)
    _, both = record(CompositeTransform(flows), x)
    for a, b, total in zip(first, second, both, strict=True):
        close(total, a + b, 1e-14)


def test_blocks_may_be_nested():
    """Each records for itself, also of a part of the model."""
    x = torch.randn(4, 6, dtype=torch.float64)
    flows = [MongeAmpereTransform(ridge(6, 4)) for _ in range(2)]
    model = CompositeTransform(flows)
    expected = record(model, x)[1][0]
    with transport_costs(model) as outer:
        y, _ = flows[0](x)
        with transport_costs(model) as inner, transport_costs(flows[1]) as part:
            flows[1](y)
    close(outer.kinetic, expected, 1e-14)
    close(inner.kinetic, record(flows[1], y)[1][0], 1e-14)
    assert torch.equal(inner.kinetic, part.kinetic)


def test_a_copy_is_another_flow():
    x = torch.randn(4, 6, dtype=torch.float64)
    flow = MongeAmpereTransform(ridge(6, 4))
    with transport_costs(flow) as costs:
        copy.deepcopy(flow)(x)
        with pytest.raises(AttributeError, match="no batch"):
            _ = costs.kinetic
        flow(x)
        kinetic = costs.kinetic
        copy.deepcopy(flow)(x)
    assert costs.kinetic is kinetic


def test_nothing_is_recorded_after_a_block_that_fails():
    x = torch.randn(4, 6, dtype=torch.float64)
    flow = MongeAmpereTransform(ridge(6, 4))
    with contextlib.suppress(KeyError), transport_costs(flow) as costs:
        flow(x)
        raise KeyError
    kinetic = costs.kinetic
    flow(x)
    assert costs.kinetic is kinetic


def test_batches_of_two_sizes():
    flow = MongeAmpereTransform(RidgePotential(2, 4))
    with transport_costs(flow):
        flow(torch.zeros(3, 2))
        with pytest.raises(ValueError, match=r"^inputs: got 2 rows after a batch of 3"):
            flow(torch.zeros(2, 2))


@pytest.mark.parametrize("name", ["kinetic", "roughness"])
def test_nothing_to_read_yet(name):
    with (
        transport_costs(MongeAmpereFlow(2, 3)) as costs,
        pytest.raises(AttributeError, match=rf"^{name}: no batch .* evaluate it inside the with"),
    ):
        getattr(costs, name)


def test_no_flow_to_record():
    with pytest.raises(ValueError, match=r"^model: got Linear.*no Monge-Ampère"):
        transport_costs(nn.Linear(2, 2)).__enter__()
    with pytest.raises(TypeError, match=r"^model: got list"):
        transport_costs([]).__enter__()


def test_empty_batches_and_probes():
    with transport_costs(flow := MongeAmpereFlow(2, 3)) as costs:
        flow.log_prob(torch.zeros(0, 2))
    assert costs.kinetic.shape == costs.roughness.shape == (0,)

    network = Network(3).double()
    estimated = MongeAmpereTransform(AutogradPotential(network, laplacian="hutchinson"))
    x = torch.randn(4, 3, dtype=torch.float64)
    kinetic, roughness = record(estimated, x)[1]
    close(kinetic, record(MongeAmpereTransform(AutogradPotential(network)), x)[1][0], 1e-12)
    assert roughness.min() > 0
