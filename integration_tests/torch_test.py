"""Citizenship in PyTorch: dtypes, devices, copies, derivatives, compilers, modes, manners."""

import copy
import pickle
import random
import shutil
import warnings
from contextlib import nullcontext

import pytest
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, LULinear
from torch import nn
from torch.autograd.functional import hessian
from torch.nn.utils import parametrize
from torchdyn.numerics.solvers.ode import str_to_solver

from cases import CASES, FACES, POTENTIALS, ROUND_TRIP, SENSITIVITIES, Case, Model
from nflows_mongeampere import MongeAmpereTransform, RidgePotential

EXPLICIT = [s for s in ROUND_TRIP if s != "ieuler"]
every_potential = pytest.mark.parametrize("potential", POTENTIALS)
every_solver = pytest.mark.parametrize("solver", ROUND_TRIP)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def in_single_precision(model, x, context):
    model.density.float()
    return model, x.float(), None if context is None else context.float()


@every_case
def test_single_precision(case):
    x, context = case.batch()
    # implicit Euler's root is found to the square root of the precision
    bound = 1e-3 if case.solver == "ieuler" else 1e-5
    gradients, values = [], []
    for change in (lambda *arguments: arguments, in_single_precision):
        model, points, row = change(Model(case), x, context)
        if case.potential == "hutchinson":  # the same probe in both dtypes
            model.potential._draw_probe = torch.ones_like
        log_prob = model.log_prob(points, row)
        assert log_prob.dtype == points.dtype
        grads = torch.autograd.grad(log_prob.sum(), list(model.potential.parameters()))
        assert {g.dtype for g in grads} == {points.dtype}
        values.append(log_prob.detach().double())
        gradients.append(torch.cat([g.flatten() for g in grads]).double())
    torch.testing.assert_close(values[1], values[0], rtol=bound, atol=bound)
    assert (gradients[1] - gradients[0]).norm() <= 10 * bound * gradients[0].norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_case
def test_gpu(case):
    model = Model(case)
    if case.potential == "hutchinson":
        model.potential._draw_probe = torch.ones_like
    x, context = case.batch()
    parameters = list(model.potential.parameters())
    expected = model.log_prob(x, context)
    expected_gradients = torch.autograd.grad(expected.sum(), parameters)
    model.density.cuda()
    log_prob = model.log_prob(x.cuda(), None if context is None else context.cuda())
    gradients = torch.autograd.grad(log_prob.sum(), list(model.potential.parameters()))
    assert {v.device.type for v in (log_prob, *gradients)} == {"cuda"}
    bound = 1e-4 if case.solver == "ieuler" else 1e-6
    torch.testing.assert_close(log_prob.cpu(), expected, rtol=bound, atol=bound)
    for computed, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(computed.cpu(), wanted, rtol=bound, atol=bound)


def test_devices_must_agree():
    transform = MongeAmpereTransform(RidgePotential(2, 4)).to("meta")
    with pytest.raises(ValueError, match=r"cpu.*meta"):
        transform(torch.zeros(1, 2))


@every_potential
def test_state_passes_between_faces(potential):
    case = Case(potential)
    ours, theirs = Model(case, "nflows"), Model(case, "normflows", seed=5)
    theirs.transport.load_state_dict(ours.transport.state_dict())
    x, context = case.batch()
    torch.testing.assert_close(
        theirs.log_prob(x, context), ours.log_prob(x, context), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("face", FACES)
@every_potential
def test_copies_are_independent(potential, face, duplicate):
    case = Case(potential)
    model = Model(case, face)
    x, context = case.batch()
    expected = model.log_prob(x, context)
    expected.sum().backward()
    twin = duplicate(model.density)
    torch.manual_seed(2)
    assert torch.equal(twin.log_prob(x, context), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model.log_prob(x, context), expected)


def test_solver_instance_survives_copies():
    model = Model(Case("direct", keywords={"solver": str_to_solver("rk4", torch.float64)}))
    x, _ = Case("direct").batch()
    expected = Model(Case("direct")).log_prob(x, None)
    for duplicate in (copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        assert torch.equal(duplicate(model.density).log_prob(x), expected)


@pytest.mark.parametrize(
    ("solver", "sensitivity"), [("rk4", "recompute"), *((s, "autograd") for s in EXPLICIT)]
)
@every_potential
def test_second_derivatives(potential, solver, sensitivity):
    case = Case(potential, solver=solver, sensitivity=sensitivity, keywords={"rtol": 1e-9})
    model = Model(case)
    points, context = case.batch(1)
    point = points[0]

    def density(x):
        return model.log_prob(x[None], context)[0]

    def force(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(density(x), x)[0].flatten()

    steps = 1e-5 * torch.eye(point.numel(), dtype=point.dtype).view(-1, *point.shape)
    differences = torch.stack([(force(point + s) - force(point - s)) / 2e-5 for s in steps])
    size = point.numel()
    # the steps of an adaptive solver move with the point
    bound = 1e-3 if solver in ("dopri5", "tsit5") else 1e-7
    torch.testing.assert_close(
        hessian(density, point).view(size, size), differences, rtol=bound, atol=bound
    )


@pytest.mark.parametrize(
    ("solver", "sensitivity"),
    [
        ("ieuler", "autograd"),
        ("ieuler", "recompute"),
        ("rk4", "adjoint"),
        ("rk4", "interpolated_adjoint"),
    ],
)
def test_no_second_derivatives_rather_than_wrong_ones(solver, sensitivity):
    case = Case("direct", solver=solver, sensitivity=sensitivity)
    x, _ = case.batch()
    x.requires_grad_()
    log_prob = Model(case).log_prob(x, None).sum()
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.autograd.grad(log_prob, x, create_graph=True)


@pytest.mark.parametrize("sensitivity", ["autograd", "recompute"])
@every_potential
def test_gradient_penalty_reaches_the_parameters(potential, sensitivity):
    """Training on |∇ ln p|², against finite differences."""
    case = Case(potential, sensitivity=sensitivity)
    model = Model(case)
    x, context = case.batch()
    x.requires_grad_()
    parameters = list(model.potential.parameters())

    def penalty():
        (score,) = torch.autograd.grad(model.log_prob(x, context).sum(), x, create_graph=True)
        return score.square().sum()

    gradients = torch.autograd.grad(penalty(), parameters)
    directions = [torch.randn_like(p) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))

    def shifted(size):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(size * direction)
        return penalty().detach()

    difference = (shifted(1e-5) - shifted(-2e-5)) / 2e-5
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("solver", EXPLICIT)
@pytest.mark.parametrize("potential", ["reduced", "direct", "direct-everything"])
def test_function_transforms(potential, solver):
    case = Case(potential, solver=solver)
    model = Model(case)
    points, context = case.batch(1)
    point = points[0]

    def density(x):
        return model.log_prob(x[None], context)[0]

    torch.testing.assert_close(
        torch.func.grad(density)(point),
        torch.autograd.functional.jacobian(density, point),
    )
    expected = hessian(density, point)
    for derivative in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
        torch.testing.assert_close(derivative(density)(point), expected)


@pytest.mark.parametrize(
    ("potential", "solver", "backend"),
    [
        ("reduced", "rk4", "aot_eager"),
        ("network-everything", "euler", "aot_eager"),
        pytest.param(
            "reduced",
            "euler",
            "inductor",
            marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
        ),
    ],
)
def test_compile(potential, solver, backend):
    torch._dynamo.reset()
    case = Case(potential, solver=solver, keywords={"steps": 1})
    model = Model(case)
    x, context = case.batch()
    parameters = list(model.potential.parameters())
    expected = model.log_prob(x, context)
    expected_gradients = torch.autograd.grad(expected.sum(), parameters)
    compiled = torch.compile(model.density.log_prob, backend=backend)
    torch.manual_seed(2)
    log_prob = compiled(x, context)
    torch.testing.assert_close(log_prob, expected, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(log_prob.sum(), parameters)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-10)
    torch._dynamo.reset()


@every_case
def test_inference_mode(case):
    model = Model(case)
    x, context = case.batch()
    expected = model.log_prob(x, context).detach()
    with torch.inference_mode():
        log_prob = model.log_prob(x, context)
        inner = model.log_prob(x * 1, None if context is None else context * 1)
    assert torch.equal(log_prob, expected)
    assert torch.equal(inner, expected)
    assert not log_prob.requires_grad


def global_state():
    return {
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "random": torch.get_rng_state().tolist(),
        "python random": random.getstate(),
        "filters": list(warnings.filters),
    }


@every_case
def test_manners(case, capfd):
    """No state but its own is touched, nothing is printed, nobody is warned."""
    model = Model(case)
    x, context = case.batch()
    draws = case.potential == "hutchinson"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = global_state()
        model.density.log_prob(x, context).sum().backward()
        model.to_data(x, context)
        after = global_state()
    assert (before.pop("random") != after.pop("random")) is draws
    assert before == after
    assert [str(w.message) for w in caught] == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@every_potential
def test_layout_does_not_matter(potential, sensitivity):
    case = Case(potential, sensitivity=sensitivity)
    model = Model(case)
    x, context = case.batch()
    expected = model.log_prob(x, context)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    reordered = x.movedim(0, -1).contiguous().movedim(-1, 0)
    for other in (strided, reordered):
        assert not other.is_contiguous()
        torch.testing.assert_close(model.log_prob(other, context), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("potential", [p for p in POTENTIALS if p != "hutchinson"])
def test_expanded_inputs(potential, sensitivity):
    """One row seen four times, and its gradient the sum of theirs."""
    case = Case(potential, sensitivity=sensitivity)
    model = Model(case)
    row, context = case.batch(1)
    row.requires_grad_()
    expected = model.log_prob(row, context)
    (gradient,) = torch.autograd.grad(expected.sum(), row)
    expanded = row.expand(4, *case.shape)
    wide = None if context is None else context.expand(4, -1)
    log_prob = model.log_prob(expanded, wide)
    torch.testing.assert_close(log_prob, expected.expand(4))
    (summed,) = torch.autograd.grad(log_prob.sum(), row)
    torch.testing.assert_close(summed, 4 * gradient)


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@every_solver
@every_potential
def test_gradient_of_inputs_and_context(potential, solver, sensitivity):
    """Frozen parameters, as in sampling by Langevin dynamics or in path gradients."""
    if solver == "alf" and "adjoint" in sensitivity:
        pytest.skip("refused at construction")
    case = Case(potential, solver=solver, sensitivity=sensitivity)
    model = Model(case)
    model.density.requires_grad_(False)
    inputs = [v for v in case.batch() if v is not None]
    leaves = [v.clone().requires_grad_() for v in inputs]

    def log_prob(values):
        return model.log_prob(values[0], values[1] if len(values) > 1 else None).sum()

    gradients = torch.autograd.grad(log_prob(leaves), leaves)
    for i, gradient in enumerate(gradients):
        direction = torch.randn_like(gradient)
        shifted = [
            [v + s * direction if j == i else v for j, v in enumerate(inputs)]
            for s in (1e-4, -1e-4)
        ]
        difference = (log_prob(shifted[0]) - log_prob(shifted[1])) / 2e-4
        bound = 0.2 if "adjoint" in sensitivity or solver == "ieuler" else 1e-4
        assert ((gradient * direction).sum() - difference).abs() <= bound * gradient.norm()


@every_potential
def test_outputs_may_be_changed_in_place(potential):
    """As nflows and normflows do when they add up log-determinants."""
    case = Case(potential, sensitivity="recompute")
    x, context = case.batch()
    gradients = []
    for in_place in (False, True):
        model = Model(case)
        inputs = x.clone()
        torch.manual_seed(2)
        points, logabsdet = model.to_data(inputs, context)
        if in_place:
            points *= 2
            logabsdet += 1
        else:
            points, logabsdet = points * 2, logabsdet + 1
        assert torch.equal(inputs, x)
        loss = points.square().sum() + logabsdet.square().sum()
        gradients.append(torch.autograd.grad(loss, list(model.potential.parameters())))
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@every_potential
def test_autocast_keeps_the_precision_of_the_parameters(potential, sensitivity):
    case = Case(potential, sensitivity=sensitivity)
    model, x, context = in_single_precision(Model(case), *case.batch())
    parameters = list(model.potential.parameters())
    outputs = []
    for autocast in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with autocast:
            torch.manual_seed(2)
            log_prob = model.density.log_prob(x, context)
        gradients = torch.autograd.grad(log_prob.sum(), parameters)
        outputs.append((log_prob, *gradients))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)


def test_autocast_in_a_pipeline():
    """What a layer in front hands on in half precision comes out in that of the parameters."""
    potential = RidgePotential(4, 8, context_features=2)
    nn.init.normal_(potential.amplitude)
    transform = MongeAmpereTransform(potential)
    flow = Flow(
        CompositeTransform([LULinear(4, identity_init=False), transform]),
        StandardNormal([4]),
        embedding_net=nn.Linear(3, 2),
    )
    x, context = torch.randn(5, 4), torch.randn(5, 3)
    expected = flow.log_prob(x, context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_prob = flow.log_prob(x, context)
        path = transform.trajectory(x.bfloat16(), [1.0, 0.0], torch.zeros(5, 2))
    assert log_prob.dtype == path.points.dtype == path.logabsdet.dtype == torch.float32
    torch.testing.assert_close(log_prob, expected, rtol=0.05, atol=0.05)
    log_prob.sum().backward()
    assert all(p.grad.isfinite().all() for p in flow.parameters())


class Bounded(nn.Module):
    """Rows no longer than two."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return rows * (2 * torch.tanh(lengths / 2) / lengths)


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("potential", ["reduced", "direct"])
def test_parametrised_weights_are_bounded_and_trained(potential, sensitivity):
    case = Case(potential, sensitivity=sensitivity)
    model = Model(case)
    with torch.no_grad():
        model.potential.weight.mul_(50)
    before = model.potential.weight.detach().clone()
    parametrize.register_parametrization(model.potential, "weight", Bounded())
    lengths = torch.linalg.vector_norm(model.potential.weight, dim=1)
    assert (lengths <= 2).all()
    x, context = case.batch()
    bounded = Model(case)
    with torch.no_grad():
        bounded.potential.weight.copy_(Bounded()(before))
    loss, expected = (m.log_prob(x, context).sum() for m in (model, bounded))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model.potential.parametrizations.weight.original.grad.abs().sum() > 0
