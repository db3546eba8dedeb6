"""Citizenship in PyTorch: transforms, compilers, exporters, dtypes, devices, copies, manners."""

import copy
import itertools
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
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian, jvp
from torch.func import functional_call
from torch.nn.utils import parametrize
from torchdyn.numerics.solvers.ode import str_to_solver

from cases import CASES, FEW_CASES, POTENTIALS, ROUND_TRIP, SENSITIVITIES, Case, Model
from nflows_mongeampere import (
    MongeAmpereFlow,
    MongeAmpereTransform,
    RidgePotential,
    SymmetrizedPotential,
    transport_costs,
)
from nflows_mongeampere.groups import translations

every_potential = pytest.mark.parametrize("potential", POTENTIALS)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_few_cases = pytest.mark.parametrize("case", FEW_CASES, ids=str)
few_certain_cases = pytest.mark.parametrize(
    "case", [case for case in FEW_CASES if case.potential != "hutchinson"], ids=str
)


# what compilers and function transforms see: the others add nothing to these
TRACED = [
    name
    for name in POTENTIALS
    if name not in {"reduced-time", "reduced-context", "reduced-image", "deep", "lattice"}
]


class Density(nn.Module):
    """``log_prob`` as a forward, with the same Hutchinson probe in every call."""

    def __init__(self, model):
        super().__init__()
        self.density = model.density

    def forward(self, *inputs):
        return self.density.log_prob(*inputs)


class Sampler(nn.Module):
    """Noise to data as a forward."""

    def __init__(self, model):
        super().__init__()
        self.transport = model.transport

    def forward(self, *inputs):
        return self.transport.inverse(*inputs)[0]


def inputs_of(case, size=3):
    return tuple(v for v in case.batch(size) if v is not None)


def with_probe(call, *arguments):
    """With the same Hutchinson probe in every call."""
    torch.manual_seed(2)
    return call(*arguments)


def of_one_row(potential):
    """The log-density of a point, the noise it comes from, and the point."""
    case = Case(potential)
    model, (point, *context) = Model(case), inputs_of(case, 1)

    def density(x):
        return with_probe(model.density.log_prob, x[None], *context)[0]

    def noise(x):
        return with_probe(model.to_noise, x[None], *context)[0][0]

    return density, noise, point[0]


@pytest.mark.parametrize("potential", TRACED)
def test_function_transforms(potential):
    density, noise, point = of_one_row(potential)
    same = {"randomness": "same"}  # in all directions of a Jacobian
    first, second = jacobian(noise, point), hessian(density, point)
    for found, expected in (
        (torch.func.grad(density)(point), jacobian(density, point)),
        (torch.func.jacrev(noise)(point), first),
        (torch.func.jacfwd(noise, **same)(point), first),
        (torch.func.jacfwd(torch.func.jacrev(density), **same)(point), second),
        (torch.func.jacrev(torch.func.jacrev(density))(point), second),
        (torch.func.jvp(noise, (point,), (point,))[1], jvp(noise, point, point)[1]),
    ):
        torch.testing.assert_close(found, expected)
    if potential != "hutchinson":  # whose probe needs the option
        torch.testing.assert_close(torch.func.hessian(density)(point), second)


@every_potential
def test_transforms_of_a_potential(potential):
    """Value, gradient and Laplacian by themselves, and the rows of a batch by vmap."""
    case = Case(potential)
    function, (x, *context) = case.build_potential(), inputs_of(case)
    t = 0.3 if function.time_dependent else None

    def row(method):
        return lambda x, *c: method(x[None], t, *[v[None] for v in c])[0]

    slope = torch.func.vmap(torch.func.grad(row(function)))(x, *context)
    torch.testing.assert_close(slope, function.gradient(x, t, *context))
    bends = torch.func.vmap(torch.func.hessian(row(function)))(x, *context)
    size = x[0].numel()
    traces = bends.reshape(len(x), size, size).diagonal(dim1=1, dim2=2).sum(1)
    if potential != "hutchinson":
        torch.testing.assert_close(traces, function.laplacian(x, t, *context))
        each = torch.func.vmap(row(function.laplacian))(x, *context)
        torch.testing.assert_close(each, traces)


@every_potential
def test_gradients_of_each_sample(potential):
    """By the input and by the weights, in one call, as backward() gives them row by row."""
    case = Case(potential)
    model, inputs = Model(case), inputs_of(case)
    density = Density(model)
    weights = {name: p.detach() for name, p in density.named_parameters()}

    def log_prob(weights, *row):
        return functional_call(density, weights, tuple(v[None] for v in row))[0]

    both = torch.func.grad(log_prob, argnums=(0, 1))
    rows = (None, *[0] * len(inputs))
    of_weights, of_inputs = with_probe(
        torch.func.vmap(both, in_dims=rows, randomness="same"), weights, *inputs
    )
    for i in range(3):
        row = [v[i : i + 1].requires_grad_() for v in inputs]
        # the shape of a row in vmap is that of a batch of one
        torch.manual_seed(2)
        value = density(*row).sum()
        expected = torch.autograd.grad(value, [row[0], *density.parameters()])
        torch.testing.assert_close(of_inputs[i : i + 1], expected[0])
        torch.testing.assert_close(tuple(w[i] for w in of_weights.values()), expected[1:])


@pytest.mark.parametrize("learning", [True, False])
@every_potential
def test_forward_mode(potential, learning):
    """Tangents of inputs and weights arrive, whether or not gradients are enabled."""
    case = Case(potential)
    model, inputs = Model(case), inputs_of(case)
    density = Density(model)
    names = [name for name, _ in density.named_parameters()]
    weights = [p.detach() for p in density.parameters()]

    def log_prob(*values):
        given = dict(zip(names, values[len(inputs) :], strict=False))
        return with_probe(functional_call, density, given, values[: len(inputs)])

    for primals in (inputs, (*inputs, *weights)):
        moving = primals[-1:] if len(primals) > len(inputs) else primals
        still = primals[: len(primals) - len(moving)]
        tangents = tuple(torch.randn_like(v) for v in moving)
        expected = jvp(lambda *m, still=still: log_prob(*still, *m), moving, tangents)[1]
        with torch.set_grad_enabled(learning), forward_ad.dual_level():
            duals = map(forward_ad.make_dual, moving, tangents)
            tangent = forward_ad.unpack_dual(log_prob(*still, *duals)).tangent
            torch.testing.assert_close(tangent.detach(), expected)


@every_potential
def test_forward_mode_of_transport_costs(potential):
    case = Case(potential)
    model, (x, *context) = Model(case), inputs_of(case)

    def cost(x):
        with transport_costs(model.density) as costs:
            with_probe(model.to_noise, x, *context)
        return costs.kinetic + costs.roughness

    expected = jvp(cost, x, x)[1]
    with torch.no_grad():
        torch.testing.assert_close(torch.func.jvp(cost, (x,), (x,))[1], expected)


BLIND = {
    "adaptive": {"solver": "dopri5"},
    "implicit": {"solver": "ieuler"},
    "adjoint": {"sensitivity": "adjoint"},
    "interpolated": {"sensitivity": "interpolated_adjoint"},
}


def trace(module, inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a tracer warns of every size that it sees
        return torch.jit.trace(module, inputs, check_trace=False)


VIEWS = {
    "vmap": lambda flow, x: torch.func.vmap(lambda row: flow(row[None])[1])(x),
    "compile": lambda flow, x: torch.compile(flow, backend="eager", fullgraph=True)(x),
    "export": lambda flow, x: torch.export.export(flow, (x,)),
    "trace": lambda flow, x: trace(flow, (x,)),
    "grad": lambda flow, x: torch.func.grad(lambda x: flow(x)[1].sum())(x),
    "jvp": lambda flow, x: torch.func.jvp(flow, (x,), (x,)),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("settings", BLIND)
def test_what_cannot_be_seen_through_says_what_to_use(settings, view):
    torch._dynamo.reset()
    case = Case("direct", **BLIND[settings])
    flow, (x,) = Model(case).transport, inputs_of(case)
    if settings == "adaptive" and view in ("grad", "jvp"):  # where numbers can be read
        VIEWS[view](flow, x)
        return
    with pytest.raises(Exception, match=r"use a(n explicit| fixed-step) solver|='autograd'"):
        VIEWS[view](flow, x)


@pytest.mark.parametrize("view", ["export", "trace"])
def test_networks_cannot_be_exported(view):
    case = Case("network")
    with pytest.raises(NotImplementedError, match=r"Network.*use torch\.compile"):
        VIEWS[view](Model(case).transport, *inputs_of(case))


has_compiler = shutil.which("g++") is not None
needs_compiler = pytest.mark.skipif(not has_compiler, reason="needs a C++ compiler")


def assert_compiles(potential, backend, **keywords):
    """A new flow, in one graph, with its gradients, learning or not."""
    torch._dynamo.reset()
    case = Case(potential, solver="midpoint", keywords={"steps": 1, **keywords})
    model, inputs = Model(case), inputs_of(case)
    parameters = list(model.potential.parameters())
    compiled = torch.compile(model.density.log_prob, backend=backend, fullgraph=True)
    log_prob = with_probe(compiled, *inputs)
    expected = with_probe(Model(case).density.log_prob, *inputs)
    torch.testing.assert_close(log_prob, expected, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(log_prob.sum(), parameters)
    original = with_probe(model.density.log_prob, *inputs).sum()
    torch.testing.assert_close(gradients, torch.autograd.grad(original, parameters))
    with torch.no_grad():
        torch.testing.assert_close(with_probe(compiled, *inputs), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("potential", TRACED)
def test_compile(potential):
    assert_compiles(potential, "eager")


@pytest.mark.parametrize("potential", ["convolutional", "network"])
def test_compile_ahead_of_time(potential):
    assert_compiles(potential, "aot_eager", solver="euler")


@needs_compiler
def test_compile_to_machine_code():
    assert_compiles("reduced", "inductor", solver="euler")


@pytest.mark.parametrize(
    ("potential", "part"),
    zip(
        [p for p in TRACED if "network" not in p and p != "hutchinson"],
        itertools.cycle([Density, Sampler]),
    ),
)
def test_export(potential, part):
    """A new flow, for batches of any size; a trace, too."""
    case = Case(potential, solver="midpoint", keywords={"steps": 1})
    inputs, longer = inputs_of(case), inputs_of(case, 7)
    sizes = tuple({0: torch.export.Dim("batch")} for _ in inputs)
    program = torch.export.export(part(Model(case)), inputs, dynamic_shapes=(sizes,))
    traced = trace(part(Model(case)), inputs)
    expected = part(Model(case))(*longer)
    for found in (program.module()(*longer), traced(*longer)):
        torch.testing.assert_close(found, expected)


def test_export_of_samples():
    """Noise is drawn in the program."""
    flow = MongeAmpereFlow(2, 4)
    nn.init.normal_(flow.transform.potential.amplitude)

    class Samples(nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = flow

        def forward(self):
            return self.flow.sample(5)

    program = torch.export.export(Samples(), ()).module()
    torch.testing.assert_close(with_probe(program), with_probe(flow.sample, 5))


def test_a_flow_from_the_meta_device_samples():
    reference = MongeAmpereFlow(2, 8)
    nn.init.normal_(reference.transform.potential.amplitude)
    with torch.device("meta"):
        flow = MongeAmpereFlow(2, 8)
    flow.load_state_dict(reference.state_dict(), assign=True)
    assert torch.equal(with_probe(flow.sample, 3), with_probe(reference.sample, 3))


def test_lattices_in_fourier_space():
    """Their equations of motion go through all of it as well."""
    potential = SymmetrizedPotential(RidgePotential(256, 2), translations((16, 16))).double()
    nn.init.normal_(potential.potential.amplitude, std=20)
    transform = MongeAmpereTransform(potential, steps=1, solver="midpoint")
    x = torch.randn(2, 256, dtype=torch.float64)

    def logabsdet(x):
        return transform(x)[1]

    expected = jvp(logabsdet, x, x)
    torch.testing.assert_close(torch.func.jvp(logabsdet, (x,), (x,)), expected)
    each = torch.func.vmap(lambda row: logabsdet(row[None])[0])(x)
    torch.testing.assert_close(each, expected[0])
    sizes = {0: torch.export.Dim("batch")}
    program = torch.export.export(transform, (x,), dynamic_shapes=(sizes,)).module()
    torch.testing.assert_close(program(x.repeat(2, 1))[1], expected[0].repeat(2))
    torch._dynamo.reset()
    compiled = torch.compile(logabsdet, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected[0])


def in_single_precision(model, x, context):
    model.density.float()
    return model, x.float(), None if context is None else context.float()


@every_few_cases
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


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
@every_potential
def test_copies_are_independent(potential, duplicate):
    case = Case(potential)
    model = Model(case)
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
    ("potential", "solver", "sensitivity"),
    [
        *zip(POTENTIALS, itertools.repeat("rk4"), itertools.cycle(["autograd", "recompute"])),
        *(("direct", s, "autograd") for s in ROUND_TRIP if s not in ("rk4", "ieuler")),
    ],
)
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


@pytest.mark.parametrize(
    ("potential", "sensitivity"), zip(POTENTIALS, itertools.cycle(["recompute", "autograd"]))
)
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


@every_few_cases
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


@every_few_cases
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


@every_few_cases
def test_layout_does_not_matter(case):
    model = Model(case)
    x, context = case.batch()
    expected = model.log_prob(x, context)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    reordered = x.movedim(0, -1).contiguous().movedim(-1, 0)
    for other in (strided, reordered):
        assert not other.is_contiguous()
        torch.testing.assert_close(model.log_prob(other, context), expected, rtol=1e-12, atol=1e-12)


@few_certain_cases
def test_expanded_inputs(case):
    """One row seen four times, and its gradient the sum of theirs."""
    model = Model(case)
    row, context = case.batch(1)
    row.requires_grad_()
    expected = model.log_prob(row, context)
    (gradient,) = torch.autograd.grad(expected.sum(), row)
    expanded = row.expand(4, *case.shape)
    wide = None if context is None else context.expand(4, -1)
    log_prob = model.log_prob(expanded, wide)
    # implicit steps find the root of a batch, and torchdyn's adjoints step by its norm
    ours = case.solver != "ieuler" and "adjoint" not in case.sensitivity
    bound = 1e-7 if ours else 1e-4
    torch.testing.assert_close(log_prob, expected.expand(4), rtol=bound / 10, atol=bound / 10)
    (summed,) = torch.autograd.grad(log_prob.sum(), row)
    torch.testing.assert_close(summed, 4 * gradient, rtol=bound, atol=bound)


@every_case
def test_gradient_of_inputs_and_context(case):
    """Frozen parameters, as in sampling by Langevin dynamics or in path gradients."""
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
        bound = 0.2 if "adjoint" in case.sensitivity or case.solver == "ieuler" else 1e-4
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


@every_few_cases
def test_autocast_keeps_the_precision_of_the_parameters(case):
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
    assert (lengths < 2 + 1e-9).all()
    x, context = case.batch()
    bounded = Model(case)
    with torch.no_grad():
        bounded.potential.weight.copy_(Bounded()(before))
    loss, expected = (m.log_prob(x, context).sum() for m in (model, bounded))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model.potential.parametrizations.weight.original.grad.abs().sum() > 0
