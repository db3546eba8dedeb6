"""How fast the Monge-Ampère flow is, as ratios measured in one run.

    python examples/benchmarks/speed.py [--out DIR] [--repeats N] [--dtype float64] [--quick]

compares this package with the published arithmetic, as it is and as a plain loop, and its gradients
by hand with autograd through every stage, and shows how time and memory grow. Beside a ratio stands
the one that is wanted. Timings are interleaved and ratios are taken within a round, so that they
survive a machine whose speed drifts; run it with nothing beside it.

A section is a function from a ``Plan`` to a ``Section``; to add one, append it to ``SECTIONS``.
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform
from rich.console import Console
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmark_report import Section, environment, write_report
from nflows_mongeampere import (
    AutogradPotential,
    ConvolutionalPotential,
    MongeAmpereTransform,
    Potential,
    RidgePotential,
    SymmetrizedPotential,
)
from nflows_mongeampere.groups import translations
from nflows_mongeampere.targets import Ising
from nflows_mongeampere.training import ReverseKL
from paired_timing import Spread, Timings, Track, interleave, progress_bars
from peak_memory import measure_peak
from speed_problem import (
    Problem,
    Size,
    gradients,
    log_density,
    saved_bytes,
    through_every_stage,
)

MB = 1e6
LARGE = ("published", "autograd", "recompute")


class Precision(str, Enum):
    """The precisions of the flow."""

    float32 = "float32"
    float64 = "float64"


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        size: the large problem.
        rounds: of the timings of the large problem.
        batches, steps: the sweeps of the large problem.
        quick: whether the other problems are small, to see that they run.
        track: shows a progress bar.
    """

    size: Size
    rounds: int
    batches: tuple[int, ...]
    steps: tuple[int, ...]
    quick: bool
    track: Track

    def short(self, rounds: int) -> int:
        """The rounds of a short timing."""
        return 2 if self.quick else rounds

    def small(self, **size: int) -> Size:
        """The size of a small flow, in the precision of the plan."""
        return Size(**size, time=1.0, dtype=self.size.dtype)

    def batch(self, *shape: int) -> Tensor:
        """Normal numbers, the same in every run."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(*shape, generator=generator).to(getattr(torch, self.size.dtype))

    def transform(self, potential: Potential, **settings: Any) -> MongeAmpereTransform:
        """A flow that bends paths."""
        for name, parameter in potential.named_parameters():
            if name.endswith("amplitude"):
                parameter.data = 0.05 * self.batch(*parameter.shape).to(parameter)
        transform: MongeAmpereTransform = MongeAmpereTransform(potential, **settings)
        return transform.to(getattr(torch, self.size.dtype))


@dataclass(frozen=True)
class Comparison:
    """Two computations, and the largest ratio of their times that is wanted.

    Attributes:
        what: what both compute.
        ours, reference: make one computation each.
        wanted: the largest ours / reference, or None where nothing is.
    """

    what: str
    ours: Callable[[], object]
    reference: Callable[[], object]
    wanted: float | None = None

    def measure(self, rounds: int, track: Track) -> tuple[list[str], dict[str, Any]]:
        """A row for :data:`COMPARED`, and the figures behind it."""
        candidates = {"ours": self.ours, "reference": self.reference}
        timings = interleave(candidates, rounds=rounds, track=track)
        ratio = timings.ratio("ours", "reference")
        times = [f"{1e3 * timings.median(name):.3g}" for name in candidates]
        row = [self.what, *times, str(ratio), most(self.wanted)]
        return row, {"seconds": timings.seconds, "ratio": vars(ratio), "wanted": self.wanted}


COMPARED = ["", "ms", "reference: ms", "ratio", "wanted"]


def most(wanted: float | None) -> str:
    """How a ratio is wanted that should be small."""
    return "" if wanted is None else f"≤ {wanted:g}"


def least(wanted: float | None) -> str:
    """How a ratio is wanted that should be large."""
    return "" if wanted is None else f"≥ {wanted:g}"


def compared(
    plan: Plan, name: str, title: str, comparisons: list[Comparison], rounds: int, note: str
) -> Section:
    """A section of comparisons."""
    rows, figures = [], {}
    for comparison in comparisons:
        row, figures[comparison.what] = comparison.measure(rounds, plan.track)
        rows.append(row)
    spread = (
        f"Medians, and of ratios (smallest-largest), of {rounds} interleaved rounds, "
        f"{torch.get_num_threads()} thread(s), {plan.size.dtype}."
    )
    return Section(name, title, COMPARED, rows, [note, spread], figures)


@contextmanager
def one_thread() -> Iterator[None]:
    """What is small is done on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def machine(plan: Plan) -> Section:
    """The machine and the versions."""
    rows = [[name, value] for name, value in environment().items()]
    return Section("machine", "Machine", ["", "value"], rows, [], {"environment": environment()})


def _small_sizes(plan: Plan) -> dict[str, Size]:
    return {
        "D = 2": plan.small(features=2, hidden=128, batch=256, steps=4),
        "D = 64": plan.small(features=64, hidden=512, batch=100, steps=4),
    }


def agreement(plan: Plan) -> Section:
    """Whether everything that is timed computes the same numbers."""
    rows, figures = [], {}
    for size in (*_small_sizes(plan).values(), plan.size):
        problem = Problem(size)
        reference = [problem.evaluate("published"), *problem.train("published")]
        others = ("autograd", "recompute") if size is plan.size else ("plain loop", "autograd")
        names = [name for name, _ in problem.potential.named_parameters()]
        for variant in others:
            pairs = zip(
                [problem.evaluate(variant), *problem.train(variant)], reference, strict=True
            )
            differences = [float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs]
            what = f"D = {size.features}, {variant}"
            figures[what] = dict(zip(["log density", *names], differences, strict=True))
            rows.append([what, *(f"{difference:.1e}" for difference in differences)])
    return Section(
        "agreement",
        f"Relative difference from the published arithmetic, {plan.size.dtype}",
        ["", "log density", *(f"gradient: {name}" for name in names)],
        rows,
        [],
        figures,
    )


@one_thread()
def small_flows(plan: Plan) -> Section:
    """Small flows against the published arithmetic in a plain loop."""
    wanted = {"D = 2": (0.5, 0.65), "D = 64": (0.7, 0.95)}
    comparisons = []
    for name, size in _small_sizes(plan).items():
        problem = Problem(size)
        for job, call, bound in zip(
            ("training step", "evaluation"),
            (problem.train, problem.evaluate),
            wanted[name],
            strict=True,
        ):
            calls = partial(call, "autograd"), partial(call, "plain loop")
            comparisons.append(Comparison(f"{name}, {job}", *calls, bound))
    sizes = "; ".join(map(str, _small_sizes(plan).values()))
    note = f"Reference: the published arithmetic in a plain loop (published_flow.py). {sizes}."
    title = "Small flows"
    return compared(plan, "small_flows", title, comparisons, plan.short(60), note)


@one_thread()
@torch.no_grad()
def one_step(plan: Plan) -> Section:
    """What a flow of a single step costs beside its field."""
    potential = RidgePotential(2, 128)
    transform = plan.transform(potential, steps=1, solver="euler")
    x, calls = plan.batch(1, 2), plan.short(50)

    def flow() -> None:
        for _ in range(calls):
            transform(x)

    def field() -> None:
        for _ in range(calls):
            potential._gradient_and_laplacian(x, None, None)

    def checked() -> None:
        for _ in range(calls):
            potential.gradient(x)
            potential.laplacian(x)

    return compared(
        plan,
        "one_step",
        f"{calls} flows of one Euler step, D = 2, H = 128, batch 1, no gradients",
        [
            Comparison("one evaluation of the field", flow, field, 2.0),
            Comparison("potential.gradient and potential.laplacian", flow, checked),
        ],
        plan.short(40),
        "A ratio of 2: as much time goes into checks, solver and adapter as into the field. The "
        "first reference is what the flow itself evaluates, gradient and Laplacian together from "
        "the parameters on (_gradient_and_laplacian); the second are the public calls, which "
        "check their arguments and evaluate the field once each.",
    )


@one_thread()
def convolutions(plan: Plan) -> Section:
    """A training step of kernels on images, by hand against autograd, and its products."""
    side, kernels, batch = (8, 4, 10) if plan.quick else (28, 16, 100)
    potential = ConvolutionalPotential((1, side, side), kernels)
    transform, x = plan.transform(potential, steps=4), plan.batch(batch, side**2)
    by_hand = partial(gradients, transform, potential, x)
    staged = partial(gradients, through_every_stage(transform), potential, x)
    section = compared(
        plan,
        "convolutions",
        f"{kernels} kernels on {side}×{side} pixels: training step, batch {batch}, 4 RK4 steps",
        [Comparison("by hand / autograd through every stage", by_hand, staged)],
        plan.short(8),
        "The share is the time in matrix products of all that the step does, by torch.profiler.",
    )
    shares = Spread.of([share_of_products(by_hand) for _ in range(plan.short(4))])
    section.rows.append(["share of matrix products, by hand", "", "", str(shares), ""])
    section.figures["share of matrix products"] = vars(shares)
    return section


def share_of_products(call: Callable[[], object]) -> float:
    """The part of the time of a call that is spent in matrix products."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        call()
    times = {event.key: event.self_cpu_time_total for event in record.key_averages()}
    products = [f"aten::{name}" for name in ("mm", "addmm", "addmm_", "mv", "addmv", "addmv_")]
    return float(sum(times.get(name, 0.0) for name in products) / sum(times.values()))


@one_thread()
def symmetry(plan: Plan) -> Section:
    """What the average over the translations of a lattice costs, and its gradient by hand."""
    comparisons = []
    for length in (4, 6) if plan.quick else (16, 32):
        sites, lattice = length**2, f"{length}×{length}"
        x = plan.batch(64, sites)
        make = partial(RidgePotential, sites, 8, activation="logcosh", bias=False)
        plain = plan.transform(make(), steps=4)
        averaged = SymmetrizedPotential(make(), translations((length, length)))
        transform = plan.transform(averaged, steps=4)
        by_hand = partial(gradients, transform, averaged, x)
        staged = partial(gradients, through_every_stage(transform), averaged, x)
        simple = partial(gradients, plain, plain.potential, x)
        comparisons += [
            Comparison(f"{lattice}, averaged / plain potential", by_hand, simple),
            Comparison(f"{lattice}, by hand / autograd through every stage", by_hand, staged),
        ]
    note = "8 ridges, 64 fields, 4 RK4 steps. Each ridge has become one for each site."
    title = "Training step of a potential that is averaged over all translations of a lattice"
    return compared(plan, "symmetry", title, comparisons, plan.short(8), note)


@one_thread()
def path_gradient(plan: Plan) -> Section:
    """A step of the variational free energy with the path gradient and with the whole one."""
    length = 4 if plan.quick else 16
    sites, layers = length**2, []
    for _ in range(4):
        ridges = RidgePotential(sites, 8, activation="logcosh", bias=False)
        averaged = SymmetrizedPotential(ridges, translations((length, length)))
        layers.append(plan.transform(averaged, steps=4, time=0.25))
    flow = Flow(CompositeTransform(layers), StandardNormal([sites]))

    def step(objective: ReverseKL) -> None:
        flow.zero_grad()
        objective.losses(None).mean().backward()

    target = Ising(length)
    path, whole = (
        ReverseKL(flow, target, num_samples=64, steps=1, path_gradient=path)
        for path in (True, False)
    )
    return compared(
        plan,
        "path_gradient",
        f"Variational free energy, {length}×{length} Ising model: a step with its path gradient",
        [Comparison("path / whole gradient", partial(step, path), partial(step, whole), 1.3)],
        plan.short(12),
        "64 samples of 4 layers of 8 ridges, averaged over all translations, 4 RK4 steps each.",
    )


@one_thread()
def networks(plan: Plan) -> Section:
    """Networks as potentials: time and memory of "recompute"."""
    features, width, batch = (3, 8, 10) if plan.quick else (8, 64, 100)
    network = nn.Sequential(
        *(nn.Linear(features, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()),
        *(nn.Linear(width, 1, bias=False), nn.Flatten(0)),
    )
    potential, x = AutogradPotential(network), plan.batch(batch, features)
    keep, again = (
        plan.transform(potential, steps=8, sensitivity=sensitivity)
        for sensitivity in ("autograd", "recompute")
    )
    section = compared(
        plan,
        "networks",
        "Networks as potentials: training step with 'recompute'",
        [
            Comparison(
                "recompute / autograd",
                partial(gradients, again, potential, x),
                partial(gradients, keep, potential, x),
            )
        ],
        plan.short(8),
        f"D = {features}, two layers of {width} tanh units, exact Laplacian, batch {batch}, 8 RK4 "
        "steps.",
    )
    kept, less = (saved_bytes(partial(log_density, flow, x)) for flow in (keep, again))
    cells = [f"{less / MB:.3g} MB", f"{kept / MB:.3g} MB", f"1/{kept / less:.0f}"]
    section.rows.append(["saved for the backward pass", *cells, ""])
    section.figures["saved_bytes"] = {"autograd": kept, "recompute": less}
    return section


def training(plan: Plan) -> Section:
    """A training step against the published arithmetic."""
    call = Problem(plan.size).train
    return _large(plan, "training", "Training step", call, {"autograd": 5.5})


def evaluation(plan: Plan) -> Section:
    """An evaluation of the density against the published arithmetic."""
    call = Problem(plan.size).evaluate
    return _large(plan, "evaluation", "Evaluation, no graph", call, {"autograd": 5.5})


def _large(
    plan: Plan, name: str, title: str, call: Callable[[str], object], wanted: dict[str, float]
) -> Section:
    variants = LARGE if name == "training" else LARGE[:2]
    candidates = {variant: partial(call, variant) for variant in variants}
    timings = interleave(candidates, rounds=plan.rounds, track=plan.track)
    rows, ratios = [], {}
    for variant in variants:
        faster = timings.ratio("published", variant)
        ratios[variant] = vars(faster)
        numbers = [f"{timings.median(variant):.3f}", str(faster), least(wanted.get(variant))]
        rows.append([variant, *numbers, str(timings.ratio(variant, "autograd"))])
    return Section(
        name,
        f"{title}, D = {plan.size.features}",
        ["arithmetic", "seconds", "times faster than published", "wanted", "time / autograd"],
        rows,
        [
            f"{plan.size}, {torch.get_num_threads()} thread(s). Median and (smallest-largest) "
            f"over {plan.rounds} interleaved rounds."
        ],
        {"seconds": timings.seconds, "times_faster": ratios, "wanted": wanted},
    )


def memory(plan: Plan) -> Section:
    """The peak memory of a training step, each in a process of its own."""
    problem = Problem(plan.size)
    peaks: dict[str, int] = {}
    kept: dict[str, int] = {}
    for variant in plan.track(LARGE):
        peaks[variant] = measure_peak(variant, plan.size)
        kept[variant] = saved_bytes(partial(problem.log_density, variant))
    rows = [
        [
            variant,
            f"{peak / MB:.0f}",
            f"{peaks['published'] / peak:.1f}",
            least(15 if variant == "recompute" else None),
            f"{kept[variant] / MB:.0f}",
            f"{kept['published'] / kept[variant]:.1f}",
        ]
        for variant, peak in peaks.items()
    ]
    return Section(
        "memory",
        f"Peak memory of a training step, D = {plan.size.features}",
        ["arithmetic", "peak: MB", "times less", "wanted", "saved tensors: MB", "times less"],
        rows,
        [
            f"{plan.size}. Peak: resident memory of a process that makes one step, less its peak "
            "after imports and the creation of model and data; what libraries load at first use "
            "counts. Saved tensors: what the forward pass keeps for the backward pass."
        ],
        {"peak_bytes": peaks, "saved_bytes": kept, "wanted": {"recompute": 15}},
    )


def scaling_with_batch(plan: Plan) -> Section:
    """The time of a training step as the batch grows."""
    return _scaling(plan, "batch", plan.batches)


def scaling_with_steps(plan: Plan) -> Section:
    """The time of a training step as the number of Runge-Kutta steps grows."""
    return _scaling(plan, "steps", plan.steps)


def _scaling(plan: Plan, axis: str, values: tuple[int, ...]) -> Section:
    problems = {str(v): Problem(_resized(plan.size, axis, v)) for v in values}
    candidates = {name: partial(p.train, "recompute") for name, p in problems.items()}
    timings = interleave(candidates, rounds=max(1, plan.rounds // 2 + 1), track=plan.track)
    rows = [_scaling_row(timings, values[0], value) for value in values]
    return Section(
        f"scaling_{axis}",
        f"Time of a training step with 'recompute' against {axis}",
        [axis, "seconds", f"time / time at {values[0]}", "linear", "part of linear"],
        rows,
        ["Below 1, the fixed costs (G, overhead of small products) are spread over more work."],
        {"seconds": timings.seconds},
    )


def _scaling_row(timings: Timings, smallest: int, value: int) -> list[str]:
    ratio = timings.ratio(str(value), str(smallest))
    linear = value / smallest
    relative = Spread(*(figure / linear for figure in (ratio.median, ratio.low, ratio.high)))
    seconds = timings.median(str(value))
    return [str(value), f"{seconds:.3f}", str(ratio), f"{linear:.2f}", str(relative)]


def memory_with_steps(plan: Plan) -> Section:
    """The memory of a training step with "recompute" as the number of steps grows."""
    figures: dict[int, dict[str, int]] = {}
    for steps in plan.track(plan.steps):
        size = replace(plan.size, steps=steps)
        figures[steps] = {
            "states": steps * size.state_bytes,
            "saved": saved_bytes(partial(Problem(size).log_density, "recompute")),
            "in use": measure_peak("recompute", size, unfragmented=True),
            "resident": measure_peak("recompute", size),
        }
    first = figures[plan.steps[0]]
    rows = [
        [str(steps), *(f"{n / MB:.1f} (+{(n - first[what]) / MB:.1f})" for what, n in row.items())]
        for steps, row in figures.items()
    ]
    return Section(
        "memory_steps",
        f"Memory of a training step with 'recompute', MB (growth from {plan.steps[0]} steps)",
        ["steps", "states between steps", "saved tensors", "peak in use", "peak resident"],
        rows,
        [
            "One state is (H + 1) × B numbers. Peak in use: resident memory where the C library "
            "returns each freed block at once. Peak resident: as the C library does by default, "
            "with the holes that it leaves between the states."
        ],
        {"bytes": figures},
    )


SECTIONS = (
    machine,
    agreement,
    small_flows,
    one_step,
    convolutions,
    symmetry,
    path_gradient,
    networks,
    training,
    evaluation,
    memory,
    scaling_with_batch,
    scaling_with_steps,
    memory_with_steps,
)


def _resized(size: Size, axis: str, value: int) -> Size:
    return replace(size, batch=value) if axis == "batch" else replace(size, steps=value)


def _plan(rounds: int | None, dtype: str, quick: bool, track: Track) -> Plan:
    if quick:
        size = Size(features=400, hidden=256, batch=20, steps=16, time=1.6, dtype=dtype)
        return Plan(size, rounds or 1, (10, 20), (8, 16), quick, track)
    sweep = (25, 50, 100, 200)
    return Plan(Size(dtype=dtype), rounds or 4, sweep, sweep, quick, track)


def _measure(rounds: int | None, dtype: str, quick: bool, console: Console) -> list[Section]:
    """Run all sections behind a progress bar, and print each as soon as it is there."""
    sections = []
    with progress_bars(console) as (progress, track):
        plan = _plan(rounds, dtype, quick, track)
        for measure in progress.track(SECTIONS, description="speed"):
            section = measure(plan)
            section.show(progress.console)
            sections.append(section)
    return sections


def main(
    out: Annotated[
        Path | None, typer.Option(help="Folder for speed.md and results.json.", file_okay=False)
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Rounds at D = 784; 4, or 1 with --quick.")
    ] = None,
    dtype: Annotated[Precision, typer.Option(help="The precision.")] = Precision.float32,
    quick: Annotated[bool, typer.Option(help="Small sizes, to see that it runs.")] = False,
) -> None:
    """Measure the speed and memory of the Monge-Ampère flow, as ratios."""
    console = Console()
    sections = _measure(repeats, dtype.value, quick, console)
    if out is not None:
        write_report(out, "speed", "Speed of the Monge-Ampère flow", sections)
        console.print(f"wrote {out / 'speed.md'} and {out / 'results.json'}")


if __name__ == "__main__":
    typer.run(main)
