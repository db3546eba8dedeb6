"""The gradient of a discrete solution by hand, against autograd through every stage."""

import itertools
import weakref

import pytest
import torch

from nflows_mongeampere import MongeAmpereTransform, transport_costs
from nflows_mongeampere.conftest import (
    ADAPTIVE,
    FIXED,
    POTENTIALS,
    close,
    every_pair,
    make,
    ridge,
)
from nflows_mongeampere.normflows import MongeAmpere
from nflows_mongeampere.potentials import Potential
from nflows_mongeampere.potentials.ridges import ReducedDynamics

OPTIONAL = {"allow_unused": True, "materialize_grads": True}


def problem(name, **options):
    """A flow, a function for the loss of paths in both directions, and what it depends on."""
    potential, x, context = make(name)
    transform = MongeAmpereTransform(potential, **{"steps": 3, **options})
    leaves = [x.requires_grad_(), *potential.parameters()]
    if context is not None:
        leaves.append(context.requires_grad_())

    def loss():
        z, logabsdet = transform(x, context)
        path = transform.trajectory(x, [0.1, 0.4, 1.0], context)
        ends = path.points[1].sin().sum() + path.points[2].square().sum()
        return ends + z.sin().sum() + (logabsdet * path.logabsdet[2]).sum()

    return transform, loss, leaves


@pytest.mark.parametrize(
    ("name", "solver", "sensitivity"),
    [
        *every_pair(POTENTIALS, [*FIXED, *ADAPTIVE], ["autograd", "recompute"]),
        ("ridge-all", "alf", "recompute"),  # whose start is evaluated once more, at its time
    ],
)
def test_by_hand_is_by_autograd(name, solver, sensitivity):
    """With create_graph=True autograd goes through every stage."""
    options = {"solver": solver, "sensitivity": sensitivity, "steps": 2}
    _, loss, leaves = problem(name, **options, atol=1e-3, rtol=1e-3)
    value = loss()
    by_hand = torch.autograd.grad(value, leaves, retain_graph=True, **OPTIONAL)
    by_autograd = torch.autograd.grad(value, leaves, create_graph=True, **OPTIONAL)
    assert sum(bool(g.any()) for g in by_hand) >= len(leaves) - 1
    for ours, theirs in zip(by_hand, by_autograd, strict=True):
        close(ours, theirs, 1e-12)
    # the graph is there until nobody wants it
    for ours, theirs in zip(torch.autograd.grad(value, leaves, **OPTIONAL), by_hand, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("sensitivity", ["autograd", "recompute"])
@pytest.mark.parametrize("name", ["ridge-all", "reduced-all", "images", "lattice", "network-all"])
def test_second_derivatives(name, sensitivity):
    potential, x, context = make(name, rows=1)
    transform = MongeAmpereTransform(potential, steps=1, solver="midpoint", sensitivity=sensitivity)
    inputs = [x.requires_grad_(), *potential.parameters()]
    # gradgradcheck shakes the parameters where they are
    assert torch.autograd.gradgradcheck(
        lambda x, *_: transform(x, context), inputs, fast_mode=True, check_undefined_grad=False
    )


@pytest.mark.parametrize("sensitivity", ["autograd", "recompute"])
@pytest.mark.parametrize("name", ["ridge-all", "reduced-all", "images", "lattice", "network-all"])
class TestFrozen:
    def test_frozen_parameters_get_no_gradient(self, name, sensitivity):
        transform, loss, (x, *rest) = problem(name, sensitivity=sensitivity)
        expected = torch.autograd.grad(loss(), [x, *rest], **OPTIONAL)
        first, *others = transform.parameters()
        for frozen in ([first], [first, *others]):
            for parameter in frozen:
                parameter.requires_grad_(False)
            loss().backward()
            close(x.grad, expected[0], 1e-13)
            for parameter, gradient in zip(rest, expected[1:], strict=True):
                if parameter.requires_grad and parameter.grad is not None:
                    close(parameter.grad, gradient, 1e-13)
                else:
                    assert parameter.grad is None
            for leaf in (x, *rest):
                leaf.grad = None

    def test_parameters_frozen_between_forward_and_backward(self, name, sensitivity):
        """As in normflows' reverse_kld(score_fn=False)."""
        transform, loss, leaves = problem(name, sensitivity=sensitivity)
        expected = torch.autograd.grad(loss(), leaves, **OPTIONAL)
        value = loss()
        transform.requires_grad_(False)
        found = torch.autograd.grad(value, [leaves[0]])
        assert not any(p.requires_grad for p in transform.parameters())
        transform.requires_grad_(True)
        assert torch.equal(found[0], expected[0])


def test_context_alone_and_inputs_alone():
    for name in ("ridge-all", "reduced-all", "lattice"):
        transform, loss, leaves = problem(name)
        expected = torch.autograd.grad(loss(), leaves, **OPTIONAL)
        transform.requires_grad_(False)
        for i in (0, -1):
            found = torch.autograd.grad(loss(), leaves[i])[0]
            close(found, expected[i], 1e-13)


class Steady(Potential):
    """The same field everywhere, of nothing that autograd knows."""

    features = 2

    def _value(self, x, t, context):
        return x.sum(1)

    def _gradient(self, x, t, context):
        return torch.ones_like(x)

    def _laplacian(self, x, t, context):
        return x.new_zeros(len(x))


@pytest.mark.parametrize("sensitivity", ["autograd", "recompute"])
def test_a_field_that_depends_on_nothing_passes_gradients_on(sensitivity):
    x = torch.randn(3, 2).requires_grad_()
    z, _ = MongeAmpereTransform(Steady(), sensitivity=sensitivity)(x)
    (gradient,) = torch.autograd.grad(z.sin().sum(), x)
    close(gradient, z.detach().cos(), 1e-6)


@pytest.mark.parametrize("sensitivity", ["autograd", "recompute"])
def test_gradients_of_costs(sensitivity):
    """Costs in reduced coordinates have no gradient by hand, with the same numbers."""
    for name in ("reduced-all", "lattice", "images"):
        transform, _, leaves = problem(name, sensitivity=sensitivity, steps=2)
        context = leaves[-1] if "context_features=2" in repr(transform) else None
        results = []
        for again in (False, True):
            with transport_costs(transform) as costs:
                transform(leaves[0], context)
            loss = costs.kinetic.sum() + costs.roughness.sum()
            results.append(torch.autograd.grad(loss, leaves, create_graph=again, **OPTIONAL))
        for ours, theirs in zip(*results, strict=True):
            assert ours.isfinite().all()
            close(ours, theirs, 1e-12)


def test_layers_that_share_a_potential():
    """The points of the second depend on the parameters, and count once."""
    potential, x, context = make("network-all")
    parameters, results = list(potential.parameters()), []
    for sensitivity in ("autograd", "recompute"):
        z, _ = MongeAmpereTransform(potential, sensitivity=sensitivity)(x, context)
        y, logabsdet = MongeAmpere(potential, sensitivity=sensitivity)(2 * z, context)
        loss = y.sin().sum() + logabsdet.sum()
        results += [
            torch.autograd.grad(loss, parameters, create_graph=again, retain_graph=True, **OPTIONAL)
            for again in (False, True)
        ]
    for found in results[1:]:
        for ours, theirs in zip(found, results[0], strict=True):
            close(ours, theirs, 1e-12)


class Kept:
    """A tensor that autograd keeps for the backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor


def kept_by_a_forward_pass(transform, x):
    """How many numbers are kept, each storage once."""
    alive = weakref.WeakSet()

    def pack(tensor):
        alive.add(kept := Kept(tensor))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        results = transform(x)
    storages = {k.tensor.untyped_storage().data_ptr(): k.tensor.untyped_storage() for k in alive}
    del results
    return sum(storage.nbytes() for storage in storages.values()) / x.element_size()


@pytest.mark.parametrize(
    ("name", "rows_of_state"),
    [
        ("ridge", 2 + 2),
        ("reduced", 2 + 1),
        ("images", 12 + 1),
        ("cube", 12 + 1),
        ("network", 3 + 1),
    ],
)
@pytest.mark.parametrize("solver", ["midpoint", "rk4"])
def test_recompute_keeps_the_states_between_steps_alone(name, rows_of_state, solver):
    potential, x, _ = make(name)
    few, many = (
        kept_by_a_forward_pass(
            MongeAmpereTransform(potential, solver=solver, steps=steps, sensitivity="recompute"), x
        )
        for steps in (10, 20)
    )
    assert many - few == 10 * rows_of_state * len(x)


def peak_memory(step):
    """The most bytes that tensors which are made in a step take at once."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(itertools.accumulate(nbytes for _, nbytes in sorted(changes)))


@pytest.mark.parametrize("sensitivity", ["autograd", "recompute"])
def test_peak_memory_of_a_training_step(sensitivity):
    """Of each stage of each step the state, and as many slopes of ridges; or states alone."""
    D, H, B, steps, stages = 196, 256, 100, 20, 4
    potential, x = ridge(D, H).float(), torch.randn(B, D)
    transform = MongeAmpereTransform(potential, steps=steps, sensitivity=sensitivity)
    assert type(potential.dynamics(x, None, stages * steps)) is ReducedDynamics

    def step():
        z, logabsdet = transform(x)
        (z.square().sum() - logabsdet.sum()).backward()

    step()  # makes the gradients, which stay
    evaluation, state = (2 * H + 1) * B, (H + 1) * B
    path = stages * steps * evaluation
    if sensitivity == "recompute":
        path = steps * state + stages * evaluation
    # G, W and the offsets with their gradients, the stages of one step and room, inputs and outputs
    once = 2 * H * H + 2 * H * D + (stages + 6) * state + 2 * B * D
    assert 0.7 * (path + once) < peak_memory(step) / x.element_size() < path + once
