"""Properties that hold for every flow, on examples that hypothesis draws."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, InverseTransform
from torch import nn

from nflows_mongeampere import (
    AutogradPotential,
    MongeAmpereFlow,
    MongeAmpereTransform,
    RidgePotential,
    files,
)
from nflows_mongeampere.normflows import MongeAmpere

EXPLICIT = ("euler", "midpoint", "rk4", "alf")
SOLVERS = (*EXPLICIT, "dopri5", "tsit5", "ieuler")
SENSITIVITIES = ("autograd", "recompute")
EPSILON = {torch.float32: 1e-5, torch.float64: 1e-12}

some = settings(max_examples=25, deadline=None, derandomize=True, database=None)
few = settings(some, max_examples=15)


class Network(nn.Module):
    """A smooth u(x, t; c) for events and contexts of any shape."""

    def __init__(self, features, context_features):
        super().__init__()
        self.hidden = nn.Linear(features + 1 + (context_features or 0), 5)
        self.amplitude = nn.Parameter(torch.randn(5) / 2)

    def forward(self, x, t, context=None):
        parts = [x.flatten(1), t.expand(len(x), 1)]
        parts += [] if context is None else [context]
        return torch.sin(self.hidden(torch.cat(parts, dim=1))) @ self.amplitude


@st.composite
def flows(draw, solvers=SOLVERS, dtypes=tuple(EPSILON), faces=(MongeAmpereTransform, MongeAmpere)):
    """A flow that moves points, with a batch and its context."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    dtype, face = draw(st.sampled_from(dtypes)), draw(st.sampled_from(faces))
    shape = draw(st.sampled_from([(1,), (2,), (5,), (1, 2, 2), (3, 1, 2)]))
    features = math.prod(shape)
    width = draw(st.sampled_from([None, 1, 3]))
    if draw(st.booleans()):
        potential = RidgePotential(
            features,
            draw(st.integers(1, 9)),
            context_features=width,
            time_dependent=draw(st.booleans()),
            activation=draw(st.sampled_from(["softplus", "logcosh"])),
            bias=draw(st.booleans()),
        )
        nn.init.normal_(potential.amplitude, std=0.4)
    else:
        potential = AutogradPotential(Network(features, width))
    solver = draw(st.sampled_from(solvers))
    flow = face(
        potential.to(dtype),
        time=draw(st.sampled_from([0.1, 0.5, 1.0])),
        steps=draw(st.sampled_from([1, 2, 5])) * (4 if solver == "ieuler" else 1),
        solver=solver,
        sensitivity=draw(st.sampled_from(SENSITIVITIES)),
    )
    rows = draw(st.integers(1, 6))
    x = torch.randn(rows, *shape, dtype=dtype)
    return flow, x, None if width is None else torch.randn(rows, width, dtype=dtype)


def close(found, expected, bound):
    scale = 1 + expected.abs().max()
    assert (found - expected).abs().max() <= bound * scale


@some
@given(flows())
@torch.no_grad()
def test_inverse_undoes_forward(example):
    """To within the errors that the flow itself reports, there and back."""
    flow, x, context = example
    y, there = flow(x, context)
    z, back = flow.inverse(y, context)
    assert y.shape == z.shape == x.shape
    assert there.shape == back.shape == x.shape[:1]
    assert {v.dtype for v in (y, z, there, back)} == {x.dtype}
    forward = flow.estimate_error(x, context)
    inverse = flow.estimate_error(y, context, inverse=True)
    rounding = 10 * EPSILON[x.dtype] * (1 + x.abs().max() + there.abs().max())
    # an error of the outputs grows on the way back, and moves the log-determinant
    missed = 5 * (forward.outputs + inverse.outputs) + rounding
    distance = torch.linalg.vector_norm((z - x).flatten(1), dim=1)
    assert (distance <= missed).all()
    assert torch.allclose(forward.round_trip, distance, atol=float(rounding))
    reported = forward.logabsdet + inverse.logabsdet
    assert ((there + back).abs() <= 5 * (reported + missed)).all()


@some
@given(flows(dtypes=[torch.float64], faces=[MongeAmpereTransform]), st.data())
@torch.no_grad()
def test_density_of_a_composite_is_the_sum(example, data):
    first, x, context = example
    second = MongeAmpereTransform(first.potential, time=0.3, solver="midpoint", steps=3)
    parts = [first, InverseTransform(second)]
    if data.draw(st.booleans()):
        parts.reverse()
    base = StandardNormal(x.shape[1:])
    log_prob = Flow(CompositeTransform(parts), base).log_prob(x, context)
    point, total = x, torch.zeros(len(x), dtype=x.dtype)
    for part in parts:
        point, logabsdet = part(point, context)
        total = total + logabsdet
    close(log_prob, base.log_prob(point) + total, 1e-12)


@some
@given(flows(solvers=(*EXPLICIT, "ieuler"), dtypes=[torch.float64], faces=[MongeAmpereTransform]))
def test_gradient_of_log_prob_against_finite_differences(example):
    """In a direction of inputs, context and parameters together."""
    transform, x, context = example
    flow = Flow(transform, StandardNormal(x.shape[1:]))
    moved = [x, *([] if context is None else [context]), *flow.parameters()]
    for tensor in moved:
        tensor.requires_grad_()
    gradients = torch.autograd.grad(
        flow.log_prob(x, context).sum(), moved, allow_unused=True, materialize_grads=True
    )
    directions = [torch.randn_like(tensor) for tensor in moved]
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    size = 1e-3 if transform.integrator.solver == "ieuler" else 1e-4

    @torch.no_grad()
    def shifted(step):
        for tensor, direction in zip(moved, directions, strict=True):
            tensor.add_(step * direction)
        value = flow.log_prob(x, context).sum()
        for tensor, direction in zip(moved, directions, strict=True):
            tensor.sub_(step * direction)
        return value

    # central differences of fourth order
    near, far = (shifted(k * size) - shifted(-k * size) for k in (1, 2))
    difference = (8 * near - far) / (12 * size)
    norm = sum(g.norm() for g in gradients)
    bound = 1e-3 if transform.integrator.solver == "ieuler" else 1e-6
    assert (slope - difference).abs() <= bound * (1 + norm)


@some
@given(flows())
@torch.no_grad()
def test_state_dict_restores_the_flow(example):
    flow, x, context = example
    state = {key: value.clone() for key, value in flow.state_dict().items()}
    expected = flow(x, context)
    for parameter in flow.parameters():
        parameter.add_(1)
    flow.load_state_dict(state)
    assert all(map(torch.equal, flow(x, context), expected))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("files") / "flow"


@few
@given(flows(faces=[MongeAmpereTransform]), st.booleans())
@torch.no_grad()
def test_files_restore_the_flow(path, example, whole):
    transform, x, context = example
    if isinstance(transform.potential, AutogradPotential):
        with pytest.raises(TypeError, match=r"^flow: .*AutogradPotential"):
            files.save(transform, path)
        return
    flow = Flow(transform, StandardNormal(x.shape[1:])) if whole else transform
    files.save(flow, path)
    loaded = files.load(path)
    assert repr(loaded) == repr(flow)
    restored = loaded._transform if whole else loaded
    assert all(map(torch.equal, restored(x, context), transform(x, context)))


@few
@given(st.integers(1, 4), st.integers(1, 8), st.booleans(), st.integers(0, 99))
@torch.no_grad()
def test_files_restore_the_published_flow(path, features, hidden, timed, seed):
    torch.manual_seed(seed)
    flow = MongeAmpereFlow(features, hidden, time_dependent=timed, steps=2, solver="midpoint")
    nn.init.normal_(flow._transform.potential.amplitude)
    files.save(flow, path)
    x = torch.randn(3, features)
    assert torch.equal(files.load(path).log_prob(x), flow.log_prob(x))


@few
@given(flows(), st.integers(2, 3))
@torch.no_grad()
def test_results_do_not_depend_on_threads(example, threads):
    flow, x, context = example
    x = x.repeat(50, *[1] * (x.dim() - 1))
    context = None if context is None else context.repeat(50, 1)
    expected = flow(x, context)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = flow(x, context)
    finally:
        torch.set_num_threads(before)
    for value, same in zip(found, expected, strict=True):
        close(value, same, EPSILON[x.dtype])


@some
@given(flows(solvers=EXPLICIT), st.data())
@torch.no_grad()
def test_rows_do_not_depend_on_their_batch(example, data):
    """Fixed steps treat each row by itself, in any order and any split."""
    flow, x, context = example
    points, logabsdet = flow(x, context)
    order = torch.tensor(data.draw(st.permutations(range(len(x)))))
    cut = data.draw(st.integers(0, len(x)))
    for rows in (order, order[:cut], order[cut:]):
        found = flow(x[rows], None if context is None else context[rows])
        assert found[0].shape == points[rows].shape
        if len(rows):
            close(found[0], points[rows], EPSILON[x.dtype])
            close(found[1], logabsdet[rows], EPSILON[x.dtype])
