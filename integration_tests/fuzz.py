"""Malformed and hostile calls over the whole public surface, each to end well.

    python integration_tests/fuzz.py --calls 2000 --seed 0

A call starts from good arguments, of which one or two are replaced by something hostile. It ends
well with a right answer: finite numbers of the right shape and dtype, the same as for arguments
that were cleaned (contiguous, without gradients); or with a clear error: of a documented type,
raised by the package itself, in a message that starts with the name of an argument. Anything else
fails: an error from the depths of torch, NaN, a warning from the package, or more than 20 seconds.
Errors are left to their owners: Python's of a wrong signature, torch's of ``load_state_dict``,
those of a user's embedding net, and in pipelines those that nflows and normflows raise themselves.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import random
import re
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import normflows
import numpy as np
import torch
import typer
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, InverseTransform
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

import nflows_mongeampere as package
from nflows_mongeampere import (
    AutogradPotential,
    ConvolutionalPotential,
    Group,
    IntegrationError,
    Integrator,
    MongeAmpereFlow,
    MongeAmpereTransform,
    Potential,
    RidgePotential,
    SymmetrizedPotential,
    files,
    groups,
    refined,
    transport_costs,
)
from nflows_mongeampere.normflows import MongeAmpere
from nflows_mongeampere.targets import Ising, Phi4
from nflows_mongeampere.training import EndlessBatches, MaximumLikelihood, ReverseKL, SolverGuard

SECONDS = 20
ROWS, FEATURES, CONTEXT = 4, 3, 2
ERRORS = (
    TypeError,
    ValueError,
    IntegrationError,
    NotImplementedError,
    FileNotFoundError,
    ImportError,
)
PACKAGE = str(Path(package.__file__).parent)
PUBLIC = (
    AutogradPotential,
    ConvolutionalPotential,
    EndlessBatches,
    MaximumLikelihood,
    ReverseKL,
    SolverGuard,
    Integrator,
    MongeAmpereFlow,
    MongeAmpereTransform,
    RidgePotential,
    Potential.forward,
    MongeAmpere.forward,
    MongeAmpereTransform.forward,
    MongeAmpereTransform.trajectory,
    MongeAmpereTransform.choose_steps,
    MongeAmpereTransform.set_extra_state,
    MongeAmpereFlow.log_prob,
    MongeAmpereFlow.sample,
    refined,
    transport_costs,
    files.save,
    Group,
    groups.point_group,
    groups.reflections,
    groups.sign_flip,
    SymmetrizedPotential,
    Ising,
    Ising.log_prob,
    Phi4,
)
NAMES = {name for public in PUBLIC for name in inspect.signature(public).parameters} - {"self"}
NAMED = re.compile(rf"({'|'.join(sorted(NAMES))})(\[\d+\])?[:= ]")


# Hostile values, by the kind of argument that they replace


def _sparse_csr(x: Tensor) -> Tensor:
    return x.reshape(len(x) if x.dim() > 1 else 1, -1).to_sparse_csr()


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def _poisoned(x: Tensor, value: float) -> Tensor:
    poisoned = x.clone()
    poisoned.view(-1)[-1] = value
    return poisoned


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "non-contiguous": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[:1].expand_as(x),
    "expanded entries": lambda x: x[..., :1].expand_as(x),
    "offset": lambda x: torch.cat([x, x])[len(x) :],
    "reversed": lambda x: x.flip(0),
    "negative view": lambda x: torch._neg_view(x),
    "requires grad": lambda x: x.clone().requires_grad_(),
    "not a leaf": lambda x: x.clone().requires_grad_() * 1,
    "parameter": nn.Parameter,
    "inference tensor": _inference,
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "other float": lambda x: x.to(torch.float64 if x.dtype == torch.float32 else torch.float32),
    "integer": lambda x: x.long(),
    "bool": lambda x: x > 0,
    "complex": lambda x: x.to(torch.complex64),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "sparse": lambda x: x.to_sparse(),
    "sparse csr": _sparse_csr,
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "meta": lambda x: x.to("meta"),
    "NaN": lambda x: _poisoned(x, math.nan),
    "inf": lambda x: _poisoned(x, math.inf),
    "-inf": lambda x: _poisoned(x, -math.inf),
    "large": lambda x: x * 1e8,
    "huge": lambda x: x * 1e20,
    "largest": lambda x: torch.full_like(x, torch.finfo(x.dtype).max),
    "lowest": lambda x: _poisoned(x, torch.finfo(x.dtype).min),
    "denormal": lambda x: torch.full_like(x, 1e-45 if x.dtype == torch.float32 else 5e-324),
    "zero": torch.zeros_like,
    "no rows": lambda x: x[:0],
    "no entries": lambda x: x[..., :0],
    "empty": lambda x: x.new_zeros(0),
    "one row less": lambda x: x[1:],
    "one row": lambda x: x[:1],
    "a row": lambda x: x[0],
    "a scalar": lambda x: x.flatten()[0],
    "one entry less": lambda x: x[..., 1:],
    "more dimensions": lambda x: x[..., None],
    "dimension in front": lambda x: x[None],
    "list": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "None": lambda x: None,
    "string": lambda x: "x",
    "number": lambda x: 1.0,
    "class": lambda x: Tensor,
    "module": lambda x: nn.Linear(2, 2),
    "dictionary": lambda x: {"x": x},
}

# These are odd, but right.
GENTLE = {
    *("non-contiguous", "transposed", "expanded", "expanded entries", "offset", "reversed"),
    *("negative view", "requires grad", "not a leaf", "parameter", "inference tensor"),
    *("large", "huge", "denormal", "zero", "no rows"),
}

INTEGERS: dict[str, Any] = {
    repr(value): value
    for value in (
        *(0, -1, 1, 2, 10**30, -(10**30), 2**31, True, False, 1.0, 1.5, math.nan, math.inf),
        *("3", b"3", None, 1j, [], [2], {}, Fraction(2), np.int64(2), np.bool_(True)),
        *(np.array([2, 3]), torch.tensor(2), torch.tensor([2, 3]), torch.tensor(2.5), int),
        torch.zeros((), dtype=torch.int64, device="meta"),
    )
}
REALS: dict[str, Any] = {
    repr(value)[:40]: value
    for value in (
        *(0, -1, 0.5, 1, True, math.nan, math.inf, -math.inf, 10**400, 1e308, 5e-324, 1e-30, 1e30),
        *("1", b"1", None, 1j, [], [1.0], {}, Fraction(1, 2), Fraction(10**400), Decimal("0.5")),
        *(np.float32(0.5), np.array([0.5, 1.0]), torch.tensor(0.5), torch.tensor([0.5]), float),
        torch.zeros((), device="meta"),
    )
}
CHOICES: dict[str, Any] = {
    repr(value): value
    for value in ("", "nothing", "RK4", "rk4\0", "x" * 10_000, None, 1, [], {}, b"rk4", str)
} | {"a tensor": torch.ones(2)}
FLAGS: dict[str, Any] = {
    repr(value): value
    for value in (True, False, np.bool_(True), None, 0, 1, "yes", [], torch.tensor([True, False]))
}


def _times(t: Tensor | float) -> dict[str, Any]:
    return {
        "inf": torch.tensor(math.inf),
        "NaN": torch.tensor(math.nan),
        "rows": torch.linspace(0, 1, ROWS),
        "wrong rows": torch.linspace(0, 1, ROWS + 1),
        "integers": torch.tensor(1),
        "bool tensor": torch.tensor(True),
        "double": torch.tensor(0.5, dtype=torch.float64),
        "too large for float32": torch.tensor(1e300, dtype=torch.float64),
        "half": torch.tensor(0.5, dtype=torch.float16),
        "complex": torch.tensor(1j),
        "sparse": torch.ones(ROWS).to_sparse(),
        "meta": torch.zeros((), device="meta"),
        "requires grad": torch.tensor(0.5, requires_grad=True),
        **REALS,
    }


SEQUENCES: dict[str, Any] = {
    repr(value)[:60]: value
    for value in (
        *([], [0.0], [0.0, 0.0], [0.0, 1.0, 0.5], [0.0, 2.0], [-1.0, 1.0], [0.0, math.nan]),
        *([0.0, math.inf], [0, 10**400], [0.0, 5e-324], ["0", "x"], "01", b"01", None, 1.0, 1j),
        *([0.0, None], [0, 1j], [[0.0], [1.0]], {0.0, 1.0}, {0: 0.0, 1: 1.0}, range(2), (1, 0)),
        *(np.array([0.0, 1.0]), np.array([1.0, 0.0])[::-1], np.zeros((2, 2)), object),
        *(torch.tensor([0.0, 0.5, 1.0]), torch.tensor(0.5), torch.zeros(2, 2), torch.zeros(0)),
        *(torch.tensor([0, 1]), torch.tensor([0.0, 1.0]).half(), torch.tensor([0, 1j])),
        *(torch.zeros(2, device="meta"), torch.eye(2)[0].to_sparse(), iter([0.0, 1.0])),
    )
}
PATHS: dict[str, Any] = {
    repr(value)[:40]: value
    for value in ("", ".", "/", "a\0b", "x" * 5000, "/nowhere/at/all", None, 1, 1.5, b"x", [], Path)
}


# Modules and potentials of users, which return rubbish


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(FEATURES, 4)

    def forward(self, x: Tensor) -> Any:
        return self.hidden(x.flatten(1)).cosh().log().sum(1)


class Conditional(Network):
    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Any:
        return super().forward(x) * (t + context.sum(1).cos())


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, CONTEXT)

    def forward(self, context: Tensor) -> Tensor:
        return self.linear(context)


class Rubbish(nn.Module):
    """Returns whatever it is told to make of its input."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(FEATURES))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function((x * self.weight).sin())


class RubbishPotential(Potential):
    """Returns whatever it is told to make of the right gradient and Laplacian."""

    def __init__(self, gradient: Callable[[Tensor], Any], laplacian: Callable[[Tensor], Any]):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(FEATURES))
        self.make_gradient, self.make_laplacian = gradient, laplacian

    def _gradient(self, x: Tensor, t: Any, context: Any) -> Any:
        return self.make_gradient((x * self.weight).cos())

    def _laplacian(self, x: Tensor, t: Any, context: Any) -> Any:
        return self.make_laplacian(-(x * self.weight).sin().sum(1))


class Unwritten(Potential):
    pass


class Solver(nn.Module):
    """Looks like a solver of torchdyn."""

    def __init__(self, function: Callable[[Tensor], Any], stepping_class: str = "fixed") -> None:
        super().__init__()
        self.function, self.stepping_class, self.order = function, stepping_class, 1
        self.safety, self.min_factor, self.max_factor = torch.tensor([0.9, 0.2, 10.0])

    def sync_device_dtype(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, t

    def step(self, f: Any, x: Tensor, t: Any, dt: Any, k1: Any = None, args: Any = None) -> Any:
        return self.function(x)


MODULES: dict[str, Any] = {
    "no module": "module",
    "None": None,
    "class": nn.Linear,
    "function": torch.sin,
    "no forward": nn.Module(),
    "list of modules": nn.ModuleList([nn.Linear(FEATURES, 1)]),
    "identity": nn.Identity(),
    "column": nn.Linear(FEATURES, 1),
    "wrong width": nn.Sequential(nn.Linear(FEATURES + 1, 1), nn.Flatten(0)),
    "double": Network().double(),
    "half": Network().half(),
    "on meta": Network().to("meta"),
    "potential inside": RidgePotential(FEATURES, 4),
    "nested": nn.Sequential(nn.Sequential(Network())),
    "flow inside": MongeAmpereFlow(FEATURES, 4),
    **{
        f"returns {name}": Rubbish(function)
        for name, function in {
            "None": lambda y: None,
            "tuple": lambda y: (y.sum(1), y.sum(1)),
            "float": lambda y: float(y.sum()),
            "numpy": lambda y: y.detach().sum(1).numpy(),
            "scalar": lambda y: y.sum(),
            "detached": lambda y: y.sum(1).detach(),
            "constant": lambda y: torch.ones(len(y)),
            "integers": lambda y: y.sum(1).long(),
            "bools": lambda y: y.sum(1) > 0,
            "complex": lambda y: y.sum(1) + 1j,
            "sparse": lambda y: y.sum(1).to_sparse(),
            "double": lambda y: y.sum(1).double(),
            "half": lambda y: y.sum(1).half(),
            "meta": lambda y: y.sum(1).to("meta"),
            "NaN": lambda y: y.sum(1) * math.nan,
            "inf": lambda y: y.sum(1) + math.inf,
            "rough": lambda y: y.abs().sqrt().sum(1),
            "clipped": lambda y: y.relu().sum(1),
            "rows less": lambda y: y.sum(1)[1:],
            "NaN slopes": lambda y: (y * 0).sqrt().sum(1),
            "steep": lambda y: 1e30 * y.sum(1),
        }.items()
    },
}

RETURNS: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda y: y,
    "None": lambda y: None,
    "tuple": lambda y: (y, y),
    "float": lambda y: 0.0,
    "scalar": lambda y: y.sum(),
    "column": lambda y: y[..., None],
    "rows less": lambda y: y[1:],
    "detached": lambda y: y.detach(),
    "double": lambda y: y.double(),
    "half": lambda y: y.half(),
    "integers": lambda y: y.long(),
    "complex": lambda y: y + 1j,
    "sparse": lambda y: y.to_sparse(),
    "meta": lambda y: y.to("meta"),
    "NaN": lambda y: y * math.nan,
    "inf": lambda y: y + math.inf,
    "huge": lambda y: y * 1e38,
    "expanded": lambda y: y[:1].expand_as(y),
}

STEPS: dict[str, Callable[[Tensor], Any]] = {
    **{f"three times {name}": (lambda y, f=f: (f(y), f(y), f(y))) for name, f in RETURNS.items()},
    "None": lambda y: None,
    "pair": lambda y: (y, y),
    "error of another shape": lambda y: (y, y, y[1:]),
    "list": lambda y: [y, y, y],
}


# Calls


@dataclass
class Call:
    """A call with good arguments, and the hostile values that may take their places.

    Attributes:
        name: what is called.
        function: takes ``arguments`` by name and returns tensors.
        arguments: good ones.
        hostile: for each argument that may be replaced, the replacements by name.
        shapes: from the arguments to the shapes of the tensors that are returned.
        compare: whether the same numbers come from cleaned arguments.
    """

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    hostile: dict[str, dict[str, Any]]
    shapes: Callable[..., list[tuple[int, ...]]] | None = None
    compare: bool = True
    replaced: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(self.replaced)})"


def _of_tensor(x: Tensor) -> dict[str, Any]:
    """Hostile tensors in the place of a good one, made when they are chosen."""
    return {name: (lambda make=make: make(x)) for name, make in TENSORS.items()}


def _potential(rng: random.Random) -> tuple[Potential, Tensor | None]:
    """A potential that moves points, and its context."""
    context = None
    kinds = ["ridge", "few", "everything", "network", "hutchinson", "conditional"]
    kind = rng.choice([*kinds, "convolutional"])
    potential: Potential
    if kind in ("ridge", "few"):
        activation = rng.choice(["softplus", "logcosh"])
        potential = RidgePotential(FEATURES, 8 if kind == "ridge" else 1, activation=activation)
    elif kind == "everything":
        potential = RidgePotential(FEATURES, 6, context_features=CONTEXT, time_dependent=True)
    elif kind == "conditional":
        potential = AutogradPotential(Conditional())
    elif kind == "convolutional":
        potential = ConvolutionalPotential((1, FEATURES, 1), 2, kernel_size=3)
    else:
        laplacian = "exact" if kind == "network" else "hutchinson"
        potential = AutogradPotential(Network(), laplacian=laplacian)
    if kind in ("everything", "conditional"):
        context = torch.randn(ROWS, CONTEXT)
    if isinstance(potential, (RidgePotential, ConvolutionalPotential)):
        nn.init.normal_(potential.amplitude, std=0.3)
    if rng.random() < 0.3:
        potential = potential.double()
        context = None if context is None else context.double()
    return potential, context


def _points(rng: random.Random, model: nn.Module) -> Tensor:
    shape = rng.choice([(FEATURES,), (1, FEATURES, 1)])
    return torch.randn(ROWS, *shape, dtype=next(model.parameters()).dtype)


def _settings(rng: random.Random) -> dict[str, Any]:
    solver = rng.choice(["euler", "midpoint", "rk4", "rk4", "dopri5", "tsit5", "ieuler", "alf"])
    sensitivities = ["autograd", "recompute"]
    if solver != "alf":
        sensitivities += ["adjoint", "interpolated_adjoint"]
    # the search of implicit Euler for a root may take 2,000 evaluations a step
    steps = 1 if solver == "ieuler" else rng.choice([1, 3])
    sensitivity = rng.choice(sensitivities)
    return {"solver": solver, "sensitivity": sensitivity, "steps": steps, "max_steps": 100}


def _transform(rng: random.Random, **settings: Any) -> tuple[Any, Tensor, Tensor | None]:
    potential, context = _potential(rng)
    face = rng.choice([MongeAmpereTransform, MongeAmpere])
    transform = face(potential, **{**_settings(rng), **settings})
    return transform, _points(rng, potential), context


def _rows(*counts: Any) -> Callable[..., list[tuple[int, ...]]]:
    """Shapes of results that follow the batch: "x" for its shape, 1 for its rows."""

    def shapes(**arguments: Any) -> list[tuple[int, ...]]:
        x = next(v for k, v in arguments.items() if k in ("x", "z", "inputs"))
        x = torch.as_tensor(x)
        return [tuple(x.shape) if count == "x" else tuple(x.shape[:1]) for count in counts]

    return shapes


def potential_methods(rng: random.Random) -> Call:
    potential, context = _potential(rng)
    method = rng.choice(["forward", "gradient", "laplacian"])
    x = _points(rng, potential)
    t = rng.choice([0.5, torch.tensor(0.5), torch.linspace(0, 1, ROWS)])
    if isinstance(potential, AutogradPotential):
        t = 0.5  # what a module makes of times by row is its own affair
    hostile: dict[str, dict[str, Any]] = {"x": _of_tensor(x)}
    if potential.time_dependent:
        hostile["t"] = _times(t)
    hostile["context"] = _of_tensor(torch.randn(ROWS, CONTEXT) if context is None else context)
    return Call(
        f"{type(potential).__name__}.{method}",
        getattr(potential, method),
        {"x": x, "t": t, "context": context},
        hostile,
        _rows("x" if method == "gradient" else 1),
    )


def transform_maps(rng: random.Random) -> Call:
    transform, inputs, context = _transform(rng)
    method = rng.choice(["forward", "inverse"])
    name = "inputs" if isinstance(transform, MongeAmpereTransform) else "z"
    spare = inputs.new_ones(ROWS, CONTEXT) if context is None else context
    return Call(
        f"{type(transform).__name__}.{method}",
        getattr(transform, method),
        {name: inputs, "context": context},
        {name: _of_tensor(inputs), "context": _of_tensor(spare)},
        _rows("x", 1),
    )


def gradients(rng: random.Random) -> Call:
    """The gradients of the outputs to the inputs and parameters, through every sensitivity."""
    transform, inputs, context = _transform(rng)
    spare = inputs.new_ones(ROWS, CONTEXT) if context is None else context

    def gradient(inputs: Any, context: Any) -> list[Tensor]:
        if isinstance(inputs, Tensor) and inputs.is_leaf and inputs.is_floating_point():
            inputs = inputs.clone().requires_grad_()
        y, logabsdet = transform(inputs, context)
        wanted = [inputs, *transform.parameters()]
        return list(torch.autograd.grad(y.sum() + logabsdet.sum(), wanted, allow_unused=True))

    return Call(
        f"gradient of {type(transform).__name__}.forward",
        gradient,
        {"inputs": inputs, "context": context},
        {"inputs": _of_tensor(inputs), "context": _of_tensor(spare)},
    )


def trajectories(rng: random.Random) -> Call:
    transform, inputs, context = _transform(rng)
    spare = inputs.new_ones(ROWS, CONTEXT) if context is None else context
    return Call(
        f"{type(transform).__name__}.trajectory",
        transform.trajectory,
        {"inputs": inputs, "times": [0.0, 0.5, 1.0], "context": context},
        {
            "inputs": _of_tensor(inputs),
            "times": SEQUENCES,
            "context": _of_tensor(spare),
        },
        lambda inputs, times, context: [
            (len(times),),
            (len(times), *inputs.shape),
            (len(times), len(inputs)),
        ],
    )


def error_estimates(rng: random.Random) -> Call:
    transform, inputs, context = _transform(rng)
    spare = inputs.new_ones(ROWS, CONTEXT) if context is None else context
    return Call(
        f"{type(transform).__name__}.estimate_error",
        lambda **arguments: list(vars(transform.estimate_error(**arguments)).values()),
        {"inputs": inputs, "context": context, "inverse": False},
        {"inputs": _of_tensor(inputs), "context": _of_tensor(spare), "inverse": FLAGS},
        _rows(1, 1, 1),
    )


def step_choices(rng: random.Random) -> Call:
    solver = rng.choice(["midpoint", "rk4", "rk4", "alf", "dopri5"])
    transform, inputs, context = _transform(rng, solver=solver, sensitivity="autograd")
    if isinstance(transform.potential, AutogradPotential):
        transform.potential = RidgePotential(FEATURES, 8).to(inputs)
        context = None
    spare = inputs.new_ones(ROWS, CONTEXT) if context is None else context

    def choose(**arguments: Any) -> list[Tensor]:
        choice = transform.choose_steps(**arguments)
        assert choice.error <= choice.tolerance
        assert choice.steps == transform.steps
        found = [choice.steps, choice.error, choice.tolerance]
        return [torch.tensor(found, dtype=torch.float64)]

    return Call(
        f"{type(transform).__name__}.choose_steps",
        choose,
        {"inputs": inputs, "tolerance": 1e-3, "context": context, "inverse": False},
        {
            "inputs": _of_tensor(inputs),
            "tolerance": REALS,
            "context": _of_tensor(spare),
            "inverse": FLAGS,
        },
    )


def steps_setter(rng: random.Random) -> Call:
    transform, inputs, context = _transform(rng)

    def evaluate(steps: Any) -> Any:
        transform.steps = steps
        return transform(inputs, context)

    return Call("Transport.steps = ", evaluate, {"steps": 2}, {"steps": INTEGERS})


def flow_log_prob(rng: random.Random) -> Call:
    embedding = Embedding() if rng.random() < 0.3 else None
    width = CONTEXT if embedding or rng.random() < 0.5 else None
    flow = MongeAmpereFlow(
        FEATURES, 4, context_features=width, embedding_net=embedding, **_settings(rng)
    )
    nn.init.normal_(flow._transform.potential.amplitude, std=0.3)
    x = torch.randn(ROWS, FEATURES)
    spare = torch.randn(ROWS, 5 if embedding else CONTEXT)
    method = rng.choice(["log_prob", "transform_to_noise"])
    return Call(
        f"MongeAmpereFlow.{method}",
        getattr(flow, method),
        {"inputs": x, "context": None if width is None else spare},
        {"inputs": _of_tensor(x), "context": _of_tensor(spare)},
        _rows(1 if method == "log_prob" else "x"),
    )


def flow_samples(rng: random.Random) -> Call:
    embedding = Embedding() if rng.random() < 0.3 else None
    width = CONTEXT if embedding or rng.random() < 0.5 else None
    flow = MongeAmpereFlow(
        FEATURES, 4, context_features=width, embedding_net=embedding, **_settings(rng)
    )
    nn.init.normal_(flow._transform.potential.amplitude, std=0.3)
    spare = torch.randn(ROWS, 5 if embedding else CONTEXT)
    arguments = {"num_samples": 3, "context": None if width is None else spare}
    hostile = {"num_samples": INTEGERS, "context": _of_tensor(spare)}
    if rng.random() < 0.5:
        method = flow.sample_and_log_prob
    else:
        method = flow.sample
        arguments["batch_size"] = None
        hostile["batch_size"] = INTEGERS

    def shapes(num_samples: Any, context: Any, batch_size: Any = None) -> list[tuple[int, ...]]:
        rows = (int(num_samples),)
        if context is not None:
            rows = (len(context), *rows)
        return [(*rows, FEATURES), rows][: 1 if method == flow.sample else 2]

    return Call(f"MongeAmpereFlow.{method.__name__}", method, arguments, hostile, shapes)


def costs(rng: random.Random) -> Call:
    transform, inputs, context = _transform(rng)
    spare = inputs.new_ones(ROWS, CONTEXT) if context is None else context

    def record(model: Any, inputs: Any, context: Any) -> list[Tensor]:
        with transport_costs(model) as recorded:
            transform(inputs, context)
        return [recorded.kinetic, recorded.roughness]

    models = {
        "no module": transform.forward,
        "None": None,
        "class": type(transform),
        "no flow": nn.Linear(2, 2),
        "list": [transform],
        "nested": nn.Sequential(nn.ModuleList([transform])),
        "twice": nn.ModuleList([transform, transform]),
    }
    hostile = {"inputs": _of_tensor(inputs), "context": _of_tensor(spare), "model": models}
    arguments = {"model": transform, "inputs": inputs, "context": context}
    return Call("transport_costs", record, arguments, hostile, _rows(1, 1))


def costs_of_batches(rng: random.Random) -> Call:
    """A second batch in one block."""
    transform, inputs, context = _transform(rng)

    def record(inputs: Any) -> list[Tensor]:
        with transport_costs(transform) as recorded:
            for batch in (good, inputs):
                transform(batch, context)
        return [recorded.kinetic, recorded.roughness]

    good = inputs
    return Call("transport_costs", record, {"inputs": inputs}, {"inputs": _of_tensor(inputs)})


def _use(model: nn.Module) -> list[Tensor]:
    """Evaluate what was built."""
    context = None
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    potential = next(m for m in model.modules() if isinstance(m, Potential))
    if potential.context_features is not None:
        context = torch.randn(ROWS, potential.context_features, dtype=dtype)
    x = torch.randn(ROWS, potential.features or FEATURES, dtype=dtype)
    if isinstance(model, Potential):
        return [f(x, 0.5, context) for f in (model, model.gradient, model.laplacian)]
    if isinstance(model, Flow):
        return [model.log_prob(x, context)]
    if isinstance(model, (MongeAmpereTransform, MongeAmpere)) and model.steps > 1000:
        return []
    return list(model.inverse(x, context))


def ridge_constructor(rng: random.Random) -> Call:
    return Call(
        "RidgePotential",
        lambda **arguments: _use(RidgePotential(**arguments)),
        {
            "features": FEATURES,
            "hidden_features": 4,
            "context_features": None,
            "time_dependent": False,
            "activation": "softplus",
            "bias": True,
        },
        {
            "features": INTEGERS,
            "hidden_features": INTEGERS,
            "context_features": INTEGERS,
            "time_dependent": FLAGS,
            "activation": CHOICES,
            "bias": FLAGS,
        },
    )


def convolutional_constructor(rng: random.Random) -> Call:
    shapes = {
        repr(value)[:40]: value
        for value in (
            *((1, FEATURES), (1, FEATURES, 0), (1, FEATURES, -1), (1, 1, 1, FEATURES), "abc", 3),
            *(None, [], [1, FEATURES, 1], (1.0, 2, 2), (1, 2**31, 2), torch.Size([1, 2, 2])),
            *(torch.tensor([1, 2, 2]), {1, 2, 3}, {1: 1, 2: 2, 3: 3}, (1, True, 2), b"abc"),
        )
    }
    return Call(
        "ConvolutionalPotential",
        lambda **arguments: _use(ConvolutionalPotential(**arguments)),
        {"shape": (1, 2, 2), "kernels": 2, "kernel_size": 3, "activation": "softplus"},
        {
            "shape": shapes,
            "kernels": INTEGERS,
            "kernel_size": INTEGERS,
            "activation": CHOICES,
        },
    )


def symmetrized_constructor(rng: random.Random) -> Call:
    good = [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    bad = {
        repr(value)[:40]: value
        for value in (
            *(None, 3, "abc", b"abc", [], [[]], [[0, 1, 2], [1, 0, 2], [1, 2, 0]], [[0, 0, 1]]),
            *([[1, 2, 3]], [[0, 1]], [[0, 1, 2, 3]], [0, 1, 2], [[0, 1, 2], [0, 1]], {1, 2, 3}),
            *([([0, 1, 2], [1, 1, 0])], [([0, 1, 2], [1, 1])], [([0, 1, 2], [1.0, 1.0, -1.0])]),
            *(
                [[0.0, 1.0, 2.0]],
                [[True, False, True]],
                [[0, 1, None]],
                [["a", "b", "c"]],
                [[2**40]],
            ),
            *(torch.tensor(good), torch.tensor(good).double(), torch.eye(3), torch.zeros(0, 3)),
            *(
                torch.tensor(good, device="meta"),
                torch.tensor(3),
                groups.sign_flip(2),
                nn.Identity(),
            ),
            *([([0, 1, 2], [1, 1, 1]), ([0, 1, 2], [-1, -1, -1])], [[2**40]], nn.Identity()),
        )
    }
    potentials = {
        "no potential": nn.Linear(3, 1),
        "None": None,
        "class": RidgePotential,
        **{
            "other width": RidgePotential(4, 2),
            "network": AutogradPotential(Network()),
            "nested": SymmetrizedPotential(RidgePotential(3, 2), good),
        },
    }
    return Call(
        "SymmetrizedPotential",
        lambda **arguments: _use(SymmetrizedPotential(**arguments)),
        {"potential": RidgePotential(FEATURES, 2), "group": good},
        {"potential": potentials, "group": bad},
    )


def lattices(rng: random.Random) -> Call:
    """Groups and targets on a lattice."""
    shapes = {
        repr(value)[:40]: value
        for value in (
            *(3, None, "abc", (), (0, 2), (2, -1), (1, 1), (2.0, 2), [2, 2], torch.Size([2, 3])),
            *((2**31, 2), (2**20, 2**20), (True, 2), torch.tensor([2, 2]), {2, 3}, ((2,), 2)),
        )
    }
    dimensions = {
        repr(value)[:40]: value
        for value in (3, None, "a", (), (2,), (-3,), (0.5,), [0, 1], (0, 0), (None,), 2**40)
    }
    kind = rng.choice(["translations", "point_group", "reflections", "Ising", "Phi4"])
    if kind == "Ising":
        x = torch.randn(ROWS, 4)
        return Call(
            "Ising.log_prob",
            lambda x, **arguments: [Ising(**arguments).log_prob(x)],
            {"length": 2, "temperature": 2.0, "boundary": "open", "x": x},
            {
                "length": INTEGERS,
                "temperature": REALS,
                "boundary": CHOICES,
                "x": _of_tensor(x),
            },
        )
    if kind == "Phi4":
        return Call(
            "Phi4.log_prob",
            lambda **arguments: [Phi4(**arguments).log_prob(torch.ones(ROWS, 4))],
            {"length": 2, "mass_squared": -1.0, "coupling": 1.0},
            {"mass_squared": REALS, "coupling": REALS},
        )
    function = getattr(groups, kind)
    arguments: dict[str, Any] = {"shape": (2, 2)}
    hostile = {"shape": shapes}
    if kind == "reflections":
        arguments["dimensions"], hostile["dimensions"] = (0, 1), dimensions
    return Call(kind, lambda **given: [function(**given).permutations], arguments, hostile)


def refinements(rng: random.Random) -> Call:
    transform, inputs, context = _transform(rng)

    def evaluate(model: Any, factor: Any) -> Any:
        with refined(model, factor):
            return transform(inputs, context) if transform.steps <= 100 else []

    models = {"no module": transform.forward, "None": None, "class": type(transform), "3": 3}
    arguments = {"model": transform, "factor": 2}
    return Call("refined", evaluate, arguments, {"model": models, "factor": INTEGERS})


def objectives(rng: random.Random) -> Call:
    """Training, up to its loss."""
    flow = MongeAmpereFlow(FEATURES, 4)
    target = normflows.distributions.DiagGaussian(FEATURES)
    x = torch.randn(ROWS, FEATURES)
    variational = rng.random() < 0.5

    def evaluate(
        flow: Any, target: Any, num_samples: Any, path_gradient: Any, **arguments: Any
    ) -> list[Tensor]:
        if not variational:
            return [MaximumLikelihood(flow, **arguments).loss(x)]
        objective = ReverseKL(
            flow, target, num_samples=num_samples, path_gradient=path_gradient, **arguments
        )
        if objective.num_samples > 1000:
            return []
        return [objective.loss(x)]

    flows = {"None": None, "class": MongeAmpereFlow, "transform": flow._transform, "3": 3}
    variational_only = {
        "target": {"None": None, "3": 3},
        "num_samples": INTEGERS,
        "path_gradient": FLAGS,
    }
    return Call(
        "training." + ("ReverseKL" if variational else "MaximumLikelihood"),
        evaluate,
        {
            **{"flow": flow, "target": target, "num_samples": 4, "learning_rate": 1e-3, "steps": 5},
            **{"minutes": 1.0, "warmup_steps": 3, "anneal": True, "seed": 0},
            **{"kinetic": 0.1, "roughness": 0.0, "path_gradient": True},
        },
        {
            **{"flow": flows, "learning_rate": REALS, "steps": INTEGERS, "minutes": REALS},
            **{"warmup_steps": INTEGERS, "anneal": FLAGS, "seed": INTEGERS},
            **{"kinetic": REALS, "roughness": REALS},
            **(variational_only if variational else {}),
        },
    )


def batches(rng: random.Random) -> Call:
    """Batches of a training, and its guard."""
    data = torch.randn(8, FEATURES)

    def evaluate(data: Any, batch_size: Any, tolerance: Any, most: Any) -> list[Tensor]:
        SolverGuard(tolerance, most)
        return [EndlessBatches(data, batch_size)[3]]

    return Call(
        "training.EndlessBatches",
        evaluate,
        {"data": data, "batch_size": 2, "tolerance": 0.1, "most": 8},
        {
            "data": {"None": None, "list": [1.0, 2.0], "3": 3, "scalar": torch.tensor(1.0)},
            **{"batch_size": INTEGERS, "tolerance": REALS, "most": INTEGERS},
        },
    )


def beyond_memory(rng: random.Random) -> Call:
    size = 2**31 - 1
    return Call(
        "RidgePotential",
        lambda features: _use(RidgePotential(features, size)),
        {"features": size},
        {"features": {"as much as there are numbers": size}},
    )


def autograd_constructor(rng: random.Random) -> Call:
    return Call(
        "AutogradPotential",
        lambda **arguments: _use(AutogradPotential(**arguments)),
        {"module": Network(), "laplacian": "exact", "probe": "gaussian"},
        {"module": MODULES, "laplacian": CHOICES, "probe": CHOICES},
    )


def rubbish_modules(rng: random.Random) -> Call:
    settings = _settings(rng)
    x = torch.randn(ROWS, FEATURES)

    def evaluate(module: Any) -> Any:
        transform = MongeAmpereTransform(AutogradPotential(module), **settings)
        return transform(x.to(next(module.parameters(), x).dtype))

    return Call("flow of a module", evaluate, {"module": Network()}, {"module": MODULES})


def rubbish_potentials(rng: random.Random) -> Call:
    settings = _settings(rng)
    x = torch.randn(ROWS, FEATURES)
    what = rng.choice(["flow", "gradient", "laplacian", "costs"])

    def evaluate(gradient: Any, laplacian: Any) -> Any:
        potential = RubbishPotential(gradient, laplacian)
        transform = MongeAmpereTransform(potential, **settings)
        if what == "flow":
            return transform(x)
        if what == "costs":
            with transport_costs(transform) as recorded:
                transform(x)
            return [recorded.kinetic, recorded.roughness]
        return [getattr(potential, what)(x)]

    good = RETURNS["itself"]
    return Call(
        f"{what} of a user's potential",
        evaluate,
        {"gradient": good, "laplacian": good},
        {"gradient": RETURNS, "laplacian": RETURNS},
        compare=False,
    )


def rubbish_solvers(rng: random.Random) -> Call:
    x = torch.randn(ROWS, FEATURES)
    stepping_class = rng.choice(["fixed", "fixed", "adaptive"])

    def evaluate(solver: Any) -> Any:
        solver = solver if not callable(solver) else Solver(solver, stepping_class)
        return MongeAmpereTransform(RidgePotential(FEATURES, 8), solver=solver)(x)

    others = {"object": [object()], "module": {"solver": nn.Linear}}
    return Call(
        f"flow with a user's {stepping_class} solver",
        evaluate,
        {"solver": "rk4"},
        {"solver": {**STEPS, **others}},
    )


SETTINGS = {
    "time": REALS,
    "steps": INTEGERS,
    "solver": {**CHOICES, "module": nn.Linear(2, 2), "class": MongeAmpere, "object": object()},
    "sensitivity": CHOICES,
    "atol": REALS,
    "rtol": REALS,
    "max_steps": INTEGERS,
}


def transform_constructor(rng: random.Random) -> Call:
    face = rng.choice([MongeAmpereTransform, MongeAmpere])
    potentials = {
        "None": None,
        "module": Network(),
        "class": RidgePotential,
        "unwritten": Unwritten(),
        "on meta": RidgePotential(FEATURES, 4).to("meta"),
        "half": RidgePotential(FEATURES, 4).half(),
        "double": RidgePotential(FEATURES, 4).double(),
        "complex": RidgePotential(FEATURES, 4).to(torch.complex64),
        "string": "ridge",
    }
    solver = rng.choice(["rk4", "dopri5", "midpoint"])
    settings = {"time": 1.0, "steps": 2, "solver": solver, "sensitivity": "autograd"}
    settings |= {"atol": 1e-5, "rtol": 1e-5, "max_steps": 100}

    def build(potential: Any, **settings: Any) -> list[Tensor]:
        transform = face(potential, **settings)
        if isinstance(potential, Unwritten):
            return list(transform(torch.zeros(ROWS, FEATURES)))
        return _use(transform)

    arguments = {"potential": RidgePotential(FEATURES, 4), **settings}
    return Call(face.__name__, build, arguments, {"potential": potentials, **SETTINGS})


def integrator_constructor(rng: random.Random) -> Call:
    def build(**arguments: Any) -> list[Tensor]:
        integrator = Integrator(**arguments)
        return [torch.tensor([integrator.order, integrator.steps, integrator.adaptive])]

    arguments = {"solver": "rk4", "steps": 2, "sensitivity": "recompute", "max_steps": 5}
    hostile = {name: values for name, values in SETTINGS.items() if name != "time"}
    return Call("Integrator", build, arguments, hostile)


def flow_constructor(rng: random.Random) -> Call:
    arguments = {"features": FEATURES, "hidden_features": 4, "context_features": None}
    arguments |= {"embedding_net": None, "distribution": None, "time_dependent": False}
    modules = {"string": "net", "class": nn.Linear, "function": torch.sin, "list": [Embedding()]}
    bases = {"wrong width": StandardNormal([FEATURES + 1]), "normal": StandardNormal([FEATURES])}
    torch_base = torch.distributions.Normal(0.0, 1.0)
    hostile = {
        "features": INTEGERS,
        "hidden_features": INTEGERS,
        "context_features": INTEGERS,
        "embedding_net": modules,
        "distribution": modules | {"torch": torch_base} | bases,
        "time_dependent": FLAGS,
        "activation": CHOICES,
        "unknown": {"keyword": 1},
        **SETTINGS,
    }
    return Call("MongeAmpereFlow", lambda **a: _use(MongeAmpereFlow(**a)), arguments, hostile)


def hostile_parameters(rng: random.Random) -> Call:
    """A good call on a model whose parameters are not."""
    changes: dict[str, Callable[[nn.Module], Any]] = {
        "half": lambda m: m.half(),
        "bfloat16": lambda m: m.bfloat16(),
        "double": lambda m: m.double(),
        "complex": lambda m: m.to(torch.complex64),
        "meta": lambda m: m.to("meta"),
        "frozen": lambda m: m.requires_grad_(False),
        "one double": lambda m: setattr(m, "weight", nn.Parameter(m.weight.double())),
        **{
            f"{value:g}": (lambda m, value=value: nn.init.constant_(m.weight, value))
            for value in (math.nan, math.inf, 1e38, 1e20, 1e10, 1e-45, 0.0)
        },
        **{
            f"amplitude {value:g}": (lambda m, value=value: nn.init.constant_(m.amplitude, value))
            for value in (math.nan, math.inf, 1e38, 1e20, 1e5, 1e-45)
        },
        "expanded": lambda m: setattr(m, "weight", nn.Parameter(m.weight[:1].expand_as(m.weight))),
        "transposed": lambda m: setattr(m, "weight", nn.Parameter(m.weight.T.contiguous().T)),
    }
    settings = _settings(rng)
    hidden = rng.choice([1, 8])

    def evaluate(change: Callable[[nn.Module], Any]) -> Any:
        flow = MongeAmpereFlow(FEATURES, hidden, **settings)
        nn.init.normal_(flow._transform.potential.amplitude)
        potential = flow._transform.potential
        change(potential)
        x = torch.randn(ROWS, FEATURES).to(potential.amplitude.dtype)
        values = [flow.log_prob(x)]
        with transport_costs(flow) as recorded:
            flow.transform_to_noise(x)
        values += [recorded.kinetic, recorded.roughness]
        return [*values, potential(x), potential.gradient(x), potential.laplacian(x)]

    good = lambda m: m  # noqa: E731
    return Call("flow of parameters", evaluate, {"change": good}, {"change": changes})


def nested_modules(rng: random.Random) -> Call:
    """Flows inside pipelines of both libraries."""
    x = torch.randn(ROWS, FEATURES)
    build = rng.choice([MongeAmpereTransform, MongeAmpere])
    first, second = (build(RidgePotential(FEATURES, 4), **_settings(rng)) for _ in range(2))
    for layer in (first, second):
        nn.init.normal_(layer.potential.amplitude, std=0.3)
    if build is MongeAmpereTransform:
        nested = CompositeTransform([first, InverseTransform(CompositeTransform([second]))])
        model: Any = Flow(InverseTransform(nested), StandardNormal([FEATURES]))
        name, argument = "nflows.Flow.log_prob", "inputs"
    else:
        base = normflows.distributions.DiagGaussian(FEATURES, trainable=False)
        model = normflows.NormalizingFlow(base, [first, normflows.flows.Composite([second])])
        name, argument = "normflows.NormalizingFlow.log_prob", "x"

    def evaluate(**arguments: Any) -> list[Tensor]:
        with transport_costs(model) as recorded:
            log_prob = model.log_prob(*arguments.values())
        return [log_prob, recorded.kinetic, recorded.roughness]

    return Call(name, evaluate, {argument: x}, {argument: _of_tensor(x)}, _rows(1, 1, 1))


def saves(rng: random.Random) -> Call:
    folder = tempfile.TemporaryDirectory()
    flow = MongeAmpereFlow(FEATURES, 4)
    models = {
        "None": None,
        "string": "flow",
        "class": MongeAmpereFlow,
        "dictionary": flow.state_dict(),
        "number": 1.0,
        "list": [flow],
        "modules": nn.ModuleList([flow]),
        "network": Network(),
        "autograd": MongeAmpereTransform(AutogradPotential(Network())),
        "half": MongeAmpereFlow(FEATURES, 4).half(),
        "bfloat16": MongeAmpereFlow(FEATURES, 4).bfloat16(),
        "complex": RidgePotential(FEATURES, 4).to(torch.complex64),
        "meta": MongeAmpereFlow(FEATURES, 4).to("meta"),
        "double": MongeAmpereFlow(FEATURES, 4).double(),
        "mixed": Flow(
            MongeAmpereTransform(RidgePotential(FEATURES, 4).double()), StandardNormal([FEATURES])
        ),
        "embedding": MongeAmpereFlow(FEATURES, 4, embedding_net=Embedding()),
        "foreign distribution": MongeAmpereFlow(FEATURES, 4, distribution=flow),
        "normflows": MongeAmpere(RidgePotential(FEATURES, 4)),
    }

    def save_and_load(flow: Any, path: Any) -> list[Tensor]:
        assert folder is not None  # which lives as long as the call
        files.save(flow, path)
        return list(files.load(path).state_dict().values())

    path = Path(folder.name) / "flow"
    paths = PATHS | {"directory": folder.name, "string": str(path), "bytes": bytes(path)}
    paths["inside a file"] = Path(__file__) / "flow"
    return Call(
        "files.save",
        save_and_load,
        {"flow": flow, "path": path},
        {"flow": models, "path": paths},
        compare=False,
    )


def _descriptions(rng: random.Random) -> dict[str, Any]:
    def ridge(**arguments: Any) -> dict[str, Any]:
        good = {"features": FEATURES, "hidden_features": 4}
        return {"class": "RidgePotential", "arguments": {**good, **arguments}}

    deep: Any = ridge()
    for _ in range(2000):
        deep = {"class": "InverseTransform", "arguments": {"transform": deep}}
    descriptions = {
        "nothing": None,
        "number": 1,
        "string": "RidgePotential",
        "list": [ridge()],
        "empty": {},
        "no arguments": {"class": "RidgePotential"},
        "arguments are a list": {"class": "RidgePotential", "arguments": [3, 4]},
        "unknown class": {"class": "os.system", "arguments": {"command": "true"}},
        "class is a list": {"class": ["RidgePotential"], "arguments": {}},
        "unknown argument": ridge(nothing=1),
        "self": ridge(self=1),
        "other size": ridge(hidden_features=5),
        "huge": ridge(hidden_features=10**30),
        "more than memory": ridge(hidden_features=2**31 - 1, features=2**31 - 1),
        "text": ridge(features="3"),
        "dunder": {"class": "__class__", "arguments": {}},
        "deep": deep,
        "potential is a number": {"class": "MongeAmpereTransform", "arguments": {"potential": 1}},
        "shape": {"class": "StandardNormal", "arguments": {"shape": "abc"}},
        "negative": {"class": "StandardNormal", "arguments": {"shape": [-1]}},
        "permutation": {"class": "Permutation", "arguments": {"features": -1, "dim": "x"}},
        "assertion": {
            "class": "Flow",
            "arguments": {"transform": ridge(), "distribution": 1, "embedding_net": 1},
        },
    }
    try:
        return {name: json.dumps(value) for name, value in descriptions.items()} | {
            "no JSON": "{",
            "NaN": "NaN",
            "empty text": "",
        }
    except RecursionError:
        del descriptions["deep"]
        texts = {name: json.dumps(value) for name, value in descriptions.items()}
        return texts | {"deep": "[" * 100_000, "no JSON": "{", "NaN": "NaN", "empty text": ""}


def loads(rng: random.Random) -> Call:
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "flow"
    potential = RidgePotential(FEATURES, 4)
    files.save(potential, path)
    data = path.read_bytes()
    tensors = potential.state_dict()

    def archive(**changes: Any) -> Callable[[Path], None]:
        metadata = {
            "format": "nflows-mongeampere",
            "format_version": "1",
            "package_version": "0",
            "dtype": "float32",
            "flow": json.dumps(files._describe(potential, "")),
        }
        changed = {**metadata, **changes}
        kept = {key: value for key, value in changed.items() if value is not None}
        return lambda target: save_file(tensors, target, kept)

    def tensors_of(values: dict[str, Tensor]) -> Callable[[Path], None]:
        def write(target: Path) -> None:
            nonlocal tensors
            tensors = values
            archive()(target)

        return write

    def written(content: bytes) -> Callable[[Path], None]:
        return lambda target: (target.write_bytes(content), None)[1]

    position = rng.randrange(len(data))
    flipped = bytearray(data)
    flipped[position] ^= 1 << rng.randrange(8)
    weight = tensors["weight"]
    contents: dict[str, Callable[[Path], None]] = {
        "good": archive(),
        "empty": written(b""),
        "cut": written(data[:position]),
        "longer": written(data + b"\0"),
        "noise": written(random.Random(position).randbytes(200)),
        "huge header": written(b"\xff" * 16),
        "pickle": lambda target: torch.save(tensors, target),
        "no metadata": lambda target: save_file(tensors, target),
        **{f"no {key}": archive(**{key: None}) for key in ("format", "format_version", "flow")},
        **{f"no {key}": archive(**{key: None}) for key in ("dtype", "package_version")},
        "another format": archive(format="x"),
        "a newer format": archive(format_version="2"),
        "another dtype": archive(dtype="float64"),
        "half": archive(dtype="float16"),
        "no dtype of torch": archive(dtype="system"),
        "no tensors": tensors_of({}),
        "one less": tensors_of({k: v for k, v in tensors.items() if k != "weight"}),
        "one more": tensors_of({**tensors, "more": weight.clone()}),
        "other shape": tensors_of({**tensors, "weight": weight[:2].contiguous()}),
        **{f"described by {name}": archive(flow=text) for name, text in _descriptions(rng).items()},
    }

    def load(content: Any, path: Any) -> list[Tensor]:
        assert folder is not None
        if content is not None:
            content(Path(folder.name) / "flow")
        loaded = files.load(path)
        assert isinstance(loaded, nn.Module)
        return list(loaded.state_dict().values())

    paths = PATHS | {"directory": folder.name, "missing": path.with_name("missing")}
    return Call(
        "files.load",
        load,
        {"content": None, "path": path},
        {"content": contents, "path": paths} if rng.random() < 0.3 else {"content": contents},
        compare=False,
    )


def flipped_files(rng: random.Random) -> Call:
    """A file with one bit turned: it is refused, or what was not touched is right."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "flow"
    files.save(MongeAmpereTransform(RidgePotential(FEATURES, 2), steps=2), path)
    data = path.read_bytes()

    def load(position: int) -> list[Tensor]:
        assert folder is not None
        turned = bytearray(data)
        turned[position] ^= 1 << (position % 8)
        path.write_bytes(turned)
        return [torch.zeros(len(files.load(path).state_dict()))]

    positions = {"somewhere": rng.randrange(len(data))}
    return Call("files.load", load, {"position": 0}, {"position": positions}, compare=False)


def state_dicts(rng: random.Random) -> Call:
    flow = MongeAmpereFlow(FEATURES, 4)
    state = flow.state_dict()
    key = rng.choice(sorted(state))

    def load(state_dict: Any, value: Any) -> list[Tensor]:
        if isinstance(state_dict, dict):
            state_dict = {**state_dict, key: value}
        flow.load_state_dict(state_dict)
        if flow._transform.steps > 1000:
            return []
        return _use(flow)

    value = state[key].clone()
    states = {
        "None": None,
        "list": list(state.items()),
        "empty": {},
        "one more": {**state, "more": torch.ones(2)},
        "potential alone": flow._transform.potential.state_dict(),
    }
    values = _of_tensor(value if value.dim() else value[None])
    if key.endswith("_extra_state"):
        for name, numbers in {
            "steps 0": [0, 1],
            "negative": [-1, 1],
            "half a step": [0.5, 1],
            "NaN": [math.nan, 1],
            "tolerance NaN": [2, math.nan],
            "tolerance negative": [2, -1],
            "tolerance infinite": [2, math.inf],
            "huge": [1e30, 1],
            "chosen": [3, 1e-3],
        }.items():
            values[name] = torch.tensor(numbers, dtype=torch.float64)
    for name in ("meta", "nested"):  # torch itself assigns nothing and warns, and fails
        del values[name]
    hostile = {"value": values, "state_dict": states}
    arguments = {"state_dict": dict(state), "value": value}
    return Call("load_state_dict", load, arguments, hostile, compare=False)


TARGETS: tuple[Callable[[random.Random], Call], ...] = (
    *(potential_methods, potential_methods, transform_maps, transform_maps, gradients),
    *(trajectories, error_estimates, step_choices, steps_setter, flow_log_prob, flow_samples),
    *(costs, costs_of_batches, ridge_constructor, autograd_constructor, transform_constructor),
    *(integrator_constructor, flow_constructor, rubbish_modules, rubbish_potentials),
    *(rubbish_solvers, hostile_parameters, nested_modules, saves, loads, flipped_files),
    *(state_dicts, beyond_memory, convolutional_constructor, refinements, objectives, batches),
    *(symmetrized_constructor, lattices),
)


# Running and judging


@dataclass(frozen=True)
class Outcome:
    """How a call ended; ``failure`` says what is wrong with that."""

    target: str
    call: str
    kind: str
    failure: str | None = None


class Hang(BaseException):
    pass


def generate(index: int, seed: int) -> Call:
    """Call number ``index``, with hostile values in its place."""
    rng = random.Random(f"{seed}-{index}")
    torch.manual_seed(rng.getrandbits(32))
    call = TARGETS[index % len(TARGETS)](rng)
    places = sorted(call.hostile)
    for place in rng.sample(places, min(len(places), rng.choice([1, 1, 1, 2]))):
        names = sorted(call.hostile[place])
        gentle = [name for name in names if name in GENTLE]
        name = rng.choice(gentle if gentle and rng.random() < 0.4 else names)
        value = call.hostile[place][name]
        if inspect.isfunction(value) and value.__code__.co_name == "<lambda>" and _lazy(value):
            value = value()
        call.arguments[place] = value
        call.replaced.append(f"{place}: {name[:60]}")
    return call


def _lazy(function: Any) -> bool:
    return all(p.default is not p.empty for p in inspect.signature(function).parameters.values())


def attempt(index: int, seed: int) -> Outcome:
    """Make one call and judge how it ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says to the making of odd tensors
        call = generate(index, seed)

    def alarm(*_: Any) -> None:
        raise Hang

    previous = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.manual_seed(index)
            kind, failure = _end(call, index)
    except Hang:
        kind, failure = "hang", f"no answer in {SECONDS} s"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    ours = [str(w.message) for w in caught if w.filename.startswith(PACKAGE)]
    if ours and failure is None:
        failure = f"warning: {ours[0]}"
    return Outcome(call.name, str(call), kind, failure)


def _end(call: Call, index: int) -> tuple[str, str | None]:
    try:
        result = call.function(**call.arguments)
    except Exception as error:
        return _judge_error(call, error)
    signal.alarm(SECONDS)
    try:
        return "right answer", _judge(call, result, index)
    except Exception as error:
        return "right answer", f"cannot be judged: {error!r}"


def _judge(call: Call, result: Any, index: int) -> str | None:
    values = [result] if isinstance(result, Tensor) else list(result)
    values = [value for value in values if value is not None]
    largest = any(word in str(call) for word in ("large", "huge", "lowest", "1e+", "sample"))
    for value in values:
        if not isinstance(value, Tensor):
            return f"returned {type(value).__name__}"
        if call.name.startswith(("files", "load_state_dict")):
            continue
        if bool(value.isnan().any()) or bool((value == math.inf).any()):
            return f"returned NaN or infinity: {value}"
        # the normal density of the largest numbers is zero
        if bool((value == -math.inf).any()) and not (largest and "log_prob" in call.name):
            return f"returned -infinity: {value}"
    if call.shapes is not None:
        expected = call.shapes(**call.arguments)
        found = [tuple(value.shape) for value in values]
        if found != expected:
            return f"returned shapes {found}, expected {expected}"
    if not call.compare:
        return None
    torch.manual_seed(index)
    again = call.function(**{name: _clean(value) for name, value in call.arguments.items()})
    again = [again] if isinstance(again, Tensor) else list(again)
    again = [value for value in again if value is not None]
    for value, same in zip(values, again, strict=True):
        if value.dtype != same.dtype:
            return f"returned {value.dtype}, but {same.dtype} for clean arguments"
        if not torch.allclose(value, same, rtol=1e-4, atol=1e-5):
            return f"returned {value}, but {same} for clean arguments"
    return None


def _clean(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.is_inference():
            return torch.tensor(value.tolist(), dtype=value.dtype)
        return value.detach().to_dense().resolve_neg().contiguous().clone()
    return value


def _judge_error(call: Call, error: Exception) -> tuple[str, str | None]:
    kind = type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    message = str(error)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
    if any(f.filename == __file__ and "self.linear(context)" in (f.line or "") for f in frames):
        return "error of the user's embedding net", None
    if call.name == "load_state_dict" and (
        (isinstance(error, RuntimeError) and message.startswith("Error(s) in loading"))
        or (isinstance(error, TypeError) and message.startswith("Expected state_dict"))
    ):
        return "torch's error of load_state_dict", None
    if call.name.startswith(("nflows.", "normflows.")) and not any(
        f.filename.startswith(PACKAGE) for f in frames
    ):
        return "an error of nflows or normflows themselves", None
    if isinstance(error, TypeError) and "unexpected keyword argument" in message:
        return "Python's error of a signature", None
    if not isinstance(error, ERRORS):
        return kind, f"{kind} at {where}: {message[:300]}"
    if not frames[-1].filename.startswith(PACKAGE):
        return kind, f"{kind} from outside at {where}: {message[:300]}"
    if not NAMED.match(message):
        return kind, f"{kind} at {where} names no argument: {message[:300]}"
    return kind, None


def run(calls: int, seed: int, progress: bool = False) -> list[Outcome]:
    """The outcomes of ``calls`` calls."""
    logging.getLogger("nflows_mongeampere").setLevel(logging.WARNING)
    numbers = range(calls)
    shown = track(numbers, "Hostile calls", disable=not progress)
    return [attempt(index, seed) for index in shown]


def main(
    calls: Annotated[int, typer.Option(min=1, help="how many calls")] = 2000,
    seed: Annotated[int, typer.Option(help="of the hostile values")] = 0,
    only: Annotated[int, typer.Option(help="make this call alone, by its number")] = -1,
) -> None:
    """Make hostile calls and count how they end."""
    torch.set_num_threads(1)
    if only >= 0:
        print(attempt(only, seed))  # noqa: T201
        return
    outcomes = run(calls, seed, progress=True)
    failures = [(i, o) for i, o in enumerate(outcomes) if o.failure is not None]
    table = Table("target", "right", "clear error", "failed", title=f"{calls} calls, seed {seed}")
    for target in sorted({o.target for o in outcomes}):
        mine = [o for o in outcomes if o.target == target]
        right = sum(o.failure is None and o.kind == "right answer" for o in mine)
        failed = sum(o.failure is not None for o in mine)
        table.add_row(target, str(right), str(len(mine) - right - failed), str(failed))
    kinds = Table("outcome", "calls")
    for kind, count in Counter(
        o.kind if o.failure is None else "FAILURE" for o in outcomes
    ).most_common():
        kinds.add_row(kind, str(count))
    console = Console()
    console.print(table)
    console.print(kinds)
    for index, outcome in failures:
        console.print(f"{index}: {outcome.call}: {outcome.failure}", markup=False, highlight=False)
    raise typer.Exit(1 if failures else 0)


if __name__ == "__main__":
    typer.run(main)
