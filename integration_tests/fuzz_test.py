"""Random calls over the public surface: good ones work, usual mistakes name the argument.

The arguments of a call are drawn at random, and one may be replaced by a mistake: a wrong width,
dtype or name, a number out of range, NaN in the data, a context that is missing. Exotic objects are
left to torch's own errors. `make test-all` makes many more calls.
"""

import itertools
import math
import os

import normflows
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nflows.distributions import StandardNormal
from torch import Tensor, nn

from cases import ACTIVATIONS, POTENTIALS, ROUND_TRIP, SENSITIVITIES, Case, Network
from nflows_mongeampere import (
    AutogradPotential,
    ConvolutionalPotential,
    IntegrationError,
    Integrator,
    MongeAmpereFlow,
    MongeAmpereTransform,
    RidgePotential,
    SymmetrizedPotential,
    refined,
    transport_costs,
)
from nflows_mongeampere.groups import Group, point_group, reflections, sign_flip, translations
from nflows_mongeampere.normflows import MongeAmpere
from nflows_mongeampere.targets import Ising, Phi4
from nflows_mongeampere.training import EndlessBatches, MaximumLikelihood, ReverseKL, SolverGuard

EXAMPLES = 1000 if "ALL_CASES" in os.environ else 60
some = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)

# What an argument may be: a strategy of good values, and one of mistakes.

_no_number = st.text(max_size=3) | st.just([2.0]) | st.just(math.nan)
_no_size = st.integers(-(2**40), 0) | st.just(1.5) | _no_number
_negative = st.floats(max_value=-1e-9, allow_infinity=False) | _no_number
SIZE = (st.integers(1, 5), _no_size | st.none())
OPTIONAL_SIZE = (st.none() | st.integers(1, 5), _no_size)
POSITIVE = (st.floats(0.01, 0.5), _negative | st.just(0.0) | st.none())
NOT_NEGATIVE = (st.floats(0, 0.5), _negative | st.none())
FIELDS = torch.ones(2, 4)
SWAP, NO_GROUPS = [[0, 1], [1, 0]], [3, [], [[1, 2]], [[0, 1, 2], [1, 2, 0]], ["ab"]]
LATTICE = (
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.sampled_from([3, None, "ab", (), (0, 2), (2, -1), (2.0, 2)]),
)


def one(values, mistakes=("flow", 3, None)):
    """One of some objects, or of others by mistake."""
    return st.sampled_from(list(values)), st.sampled_from(list(mistakes))


def named(names):
    return one(names, [*map(str.upper, names), "newton", "", 1, None])


def rows(x: Tensor, wide: bool = True):
    """A batch; ``wide`` if its width is known to the model, so that another is noticed."""
    poisoned = x.clone()
    poisoned.view(-1)[-1] = math.nan
    other = torch.float32 if x.dtype == torch.float64 else torch.float64
    mistakes = [x.long(), x.half(), x.to(other), poisoned]
    return st.just(x), st.sampled_from([*mistakes, torch.cat([x, x], dim=1)][: 4 + wide])


def rows_of_context(context: Tensor | None, count: int, wide: bool = True):
    """The context of so many rows."""
    if context is None:
        return st.none() | st.just(torch.ones(count, 1)), None  # ignored
    good, mistakes = rows(context, wide)
    return good, mistakes | st.none()


def uses(cls, width=None):
    """Build a module with some arguments, and evaluate it on rows of a width."""

    def build(**arguments):
        model = cls(**arguments)
        x = torch.randn(2, width or arguments["features"])
        columns = arguments.get("context_features")
        context = None if columns is None else torch.randn(2, columns)
        return getattr(model, "log_prob", model)(x, context=context)

    return build


# Calls: strategies of a function and what its arguments may be.

RIDGE = {
    "features": SIZE,
    "hidden_features": SIZE,
    "context_features": OPTIONAL_SIZE,
    "activation": named(list(ACTIVATIONS)),
}
INTEGRATOR = {
    "steps": SIZE,
    "solver": named([solver for solver in ROUND_TRIP if solver != "alf"]),
    "sensitivity": named(SENSITIVITIES),
    "atol": POSITIVE,
    "rtol": POSITIVE,
    "max_steps": (st.integers(500, 1000), SIZE[1]),
}
SETTINGS = {"time": POSITIVE, **INTEGRATOR}
POTENTIAL = one([RidgePotential(3, 4)], [nn.Linear(3, 1), RidgePotential, None])
TRANSFORM = {"potential": POTENTIAL, **SETTINGS}
TRAINING = {
    "flow": one([MongeAmpereFlow(3, 4)]),
    "learning_rate": POSITIVE,
    "steps": OPTIONAL_SIZE,
    "minutes": (POSITIVE[0], _negative),
    "seed": (st.integers(0, 5), _negative),
    "kinetic": NOT_NEGATIVE,
    "roughness": NOT_NEGATIVE,
}
TARGET = one([normflows.distributions.DiagGaussian(3)], [3])
VARIATIONAL = {"target": TARGET, "num_samples": SIZE, **TRAINING}


@st.composite
def flows(draw):
    """A flow that moves points, what its inputs may be, and its context."""
    case = Case(draw(st.sampled_from(list(POTENTIALS))), draw(st.sampled_from(list(ACTIVATIONS))))
    cls = draw(st.sampled_from([MongeAmpereTransform, MongeAmpere]))
    keywords = {name: draw(good) for name, (good, _) in SETTINGS.items()}
    flow = cls(case.build_potential(), **keywords)
    x, context = case.batch(draw(st.integers(2, 4)))
    wide = flow.potential.features is not None
    return flow, rows(x, wide), rows_of_context(context, len(x), wide)


@st.composite
def maps(draw):
    flow, inputs, context = draw(flows())
    name = "inputs" if isinstance(flow, MongeAmpereTransform) else "z"
    method = draw(st.sampled_from([flow.forward, flow.inverse]))
    return method, {name: inputs, "context": context}


@st.composite
def potentials(draw):
    flow, x, context = draw(flows())
    methods = [flow.potential, flow.potential.gradient, flow.potential.laplacian]
    mistakes = st.none() if flow.potential.time_dependent else None
    arguments = {"x": x, "t": (st.just(0.5), mistakes), "context": context}
    return draw(st.sampled_from(methods)), arguments


@st.composite
def trajectories(draw):
    flow, inputs, context = draw(flows())
    end = flow.time
    mistakes = [[], [0.0], [0.0, 2 * end], [-end, end], [0.0, end, end / 2], [0.0, math.nan]]
    times = one([[0.0, end], [end, end / 2, 0.0]], mistakes)
    return flow.trajectory, {"inputs": inputs, "times": times, "context": context}


@st.composite
def accuracies(draw):
    flow, inputs, context = draw(flows())
    arguments = {"inputs": inputs, "context": context}
    if not flow.integrator.adaptive and flow.integrator.solver in ("rk4", "midpoint"):
        arguments["tolerance"] = (st.just(0.1), POSITIVE[1])
        return lambda **a: torch.tensor(flow.choose_steps(**a).error), arguments
    return lambda **a: flow.estimate_error(**a).logabsdet, arguments


@st.composite
def densities(draw):
    width = draw(st.none() | st.integers(1, 3))
    flow = MongeAmpereFlow(3, 4, context_features=width)
    context = None if width is None else torch.randn(4, width)
    arguments = {"context": rows_of_context(context, 4)}
    if draw(st.booleans()):
        return flow.log_prob, {"inputs": rows(torch.randn(4, 3)), **arguments}
    return flow.sample, {"num_samples": SIZE, "batch_size": OPTIONAL_SIZE, **arguments}


def cost(model, factor):
    with refined(model, factor), transport_costs(model) as costs:
        model.log_prob(torch.randn(2, 3))
    return costs.kinetic


STATIC = {
    "ridge": (uses(RidgePotential), RIDGE),
    "convolutional": (
        uses(ConvolutionalPotential, 4),
        {
            "shape": one([(1, 2, 2), (2, 2, 1)], [(1, 4), (1, 4, 0), (1, -2, 2), "abc", 4]),
            "kernels": SIZE,
            "kernel_size": one([1, 3], [0, -1, 2.0, "3"]),
            "activation": named(list(ACTIVATIONS)),
        },
    ),
    "network": (
        uses(AutogradPotential, 3),
        {"module": one([Network(3, "softplus")]), "laplacian": named(["exact", "hutchinson"])},
    ),
    "symmetrized": (
        uses(SymmetrizedPotential, 4),
        {
            "potential": one([RidgePotential(4, 2)], [nn.Linear(4, 1), 3]),
            "group": one([translations((2, 2)), sign_flip(4)], [3, [], [[0, 1, 2]]]),
        },
    ),
    "group": (lambda group: Group(group).permutations, {"group": one([SWAP], NO_GROUPS)}),
    "lattice": (lambda shape: (translations(shape) * point_group(shape)).signs, {"shape": LATTICE}),
    "reflections": (
        lambda **a: reflections(**a).permutations,
        {"shape": (st.just((2, 3)), LATTICE[1]), "dimensions": one([(-1,), (0, 1)], [(2,), "a"])},
    ),
    "integrator": (lambda **a: torch.tensor(Integrator(**a).steps), INTEGRATOR),
    "nflows": (uses(MongeAmpereTransform, 3), TRANSFORM),
    "normflows": (uses(MongeAmpere, 3), TRANSFORM),
    "flow": (uses(MongeAmpereFlow), {**RIDGE, **SETTINGS}),
    "parts of a flow": (
        lambda **a: MongeAmpereFlow(3, 4, **a).sample(2),
        {
            "distribution": one([None, StandardNormal([3])], [StandardNormal([4]), nn.ReLU(), 3]),
            "embedding_net": one([None], [nn.Linear, "net", 3]),
        },
    ),
    "costs": (cost, {"model": one([MongeAmpereFlow(3, 4)], [nn.Linear(3, 3), 3]), "factor": SIZE}),
    "likelihood": (lambda **a: MaximumLikelihood(**a).loss(torch.randn(2, 3)), TRAINING),
    "divergence": (lambda **a: ReverseKL(**a).loss(torch.randn(2, 3)), VARIATIONAL),
    "batches": (
        lambda **a: EndlessBatches(**a)[3],
        {"data": one([torch.ones(8, 3)], [[1.0], 3, torch.tensor(1.0)]), "batch_size": SIZE},
    ),
    "guard": (
        lambda **a: torch.tensor(SolverGuard(**a).most),
        {"tolerance": POSITIVE, "most": SIZE},
    ),
    "Ising": (
        lambda x, **a: Ising(**a).log_prob(x),
        {
            "length": (st.just(2), SIZE[1]),
            "temperature": POSITIVE,
            "boundary": named(["periodic", "open"]),
            "x": one([FIELDS], [FIELDS.long(), FIELDS[:, 1:], math.nan * FIELDS]),
        },
    ),
    "phi4": (
        lambda **a: Phi4(length=2, **a).log_prob(torch.ones(2, 4)),
        {"mass_squared": (st.floats(-4, 4), _no_number), "coupling": (st.just(1.0), _negative)},
    ),
}
DRAWN = (maps, potentials, trajectories, accuracies, densities)
CALLS = {name: st.just(call) for name, call in STATIC.items()} | {f.__name__: f() for f in DRAWN}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@every_call
@some
@given(st.data())
def test_good_arguments_give_finite_numbers(call, data):
    torch.manual_seed(0)
    function, arguments = data.draw(call)
    result = function(**{name: data.draw(good) for name, (good, _) in arguments.items()})
    values = [result] if isinstance(result, Tensor) else result
    assert all(bool(value.isfinite().all()) for value in values)


class Steep(nn.Module):
    """u(x) = c |x|⁴, which takes every point to infinity in no time."""

    def forward(self, x):
        return 1e15 * x.square().sum(1).square()


@pytest.mark.parametrize(
    ("solver", "cls"), list(zip(ROUND_TRIP, itertools.cycle([MongeAmpereTransform, MongeAmpere])))
)
def test_a_solver_that_does_not_arrive_says_so(solver, cls):
    flow = cls(AutogradPotential(Steep()), solver=solver, steps=2, max_steps=20)
    with pytest.raises(IntegrationError, match="steps"):
        flow.inverse(torch.randn(2, 3))


@every_call
@some
@given(st.data())
def test_a_mistake_names_its_argument(call, data):
    torch.manual_seed(0)
    function, arguments = data.draw(call)
    values = {name: data.draw(good) for name, (good, _) in arguments.items()}
    possible = {name: mistakes for name, (_, mistakes) in arguments.items() if mistakes is not None}
    name = data.draw(st.sampled_from(list(possible)))
    values[name] = data.draw(possible[name], label=name)
    with pytest.raises((TypeError, ValueError), match=rf"^{name}\b"):
        function(**values)
