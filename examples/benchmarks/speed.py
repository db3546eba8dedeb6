"""How fast the Monge-Ampère flow is, as ratios measured in one run.

    python examples/benchmarks/speed.py [--out DIR] [--repeats N] [--dtype float64] [--quick]

compares this package with the plain published arithmetic, and its use of torchdyn with a loop
written by hand, and shows how time and memory grow. Timings are interleaved and ratios are taken
within a round, so that they survive a machine whose speed drifts; run it with nothing beside it.

A section is a function from a ``Plan`` to a ``Section``; to add one, append it to ``SECTIONS``.
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import typer
from rich.console import Console

from benchmark_report import Section, environment, write_report
from nflows_mongeampere import (
    MongeAmpereTransform,
    Potential,
    RidgePotential,
    SymmetrizedPotential,
)
from nflows_mongeampere.dynamics import _gram_product
from nflows_mongeampere.groups import translations
from nflows_mongeampere.potentials import symmetrized
from paired_timing import Spread, Timings, Track, interleave, progress_bars
from peak_memory import measure_peak
from speed_problem import SOLVERS, VARIANTS, Problem, Size, plain_products, saved_bytes

MB = 1e6


class Precision(str, Enum):
    """The precisions of the flow."""

    float32 = "float32"
    float64 = "float64"


@dataclass(frozen=True)
class Plan:
    """What is measured: the main size, rounds, the sizes of the sweeps, and a progress bar."""

    size: Size
    rounds: int
    batches: tuple[int, ...]
    steps: tuple[int, ...]
    lattices: tuple[int, ...]
    track: Track


def machine(plan: Plan) -> Section:
    """The environment, and what the package's own H×H by H×B product gains here."""
    size, dtype = plan.size, getattr(torch, plan.size.dtype)
    gram = torch.randn(size.hidden, size.hidden, dtype=dtype)
    s = torch.randn(size.hidden, size.batch, dtype=dtype)
    calls = 200

    def repeat(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        for _ in range(calls):
            product(gram, s)

    candidates = {"matmul": partial(repeat, torch.matmul), "own": partial(repeat, _gram_product)}
    timings = interleave(candidates, rounds=2 * plan.rounds, track=plan.track)
    gain = timings.ratio("matmul", "own")
    rate = 2 * size.hidden**2 * size.batch * calls / 1e9
    rows = [[name, value] for name, value in environment().items()]
    for label, name in (("torch.matmul", "matmul"), ("this package's product", "own")):
        seconds = timings.median(name)
        rows.append([label, f"{1e3 * seconds / calls:.3f} ms, {rate / seconds:.0f} Gflop/s"])
    rows.append(["matmul / this package's product", str(gain)])
    return Section(
        "machine",
        f"Machine, and one product of {size.hidden}×{size.hidden} by {size.hidden}×{size.batch}",
        ["", "value"],
        rows,
        [
            "The package leaves this product in float32 on CPUs to oneDNN (PyTorch does so with "
            "two threads or more), the published arithmetic leaves its own to MKL. Where "
            "oneDNN is the faster one, a part of the ratios below is owed to that "
            "rather than to reduced coordinates; the rows 'plain matmul' show the rest."
        ],
        {"environment": environment(), "seconds_for_calls": timings.seconds, "calls": calls},
    )


def agreement(plan: Plan) -> Section:
    """Whether everything that is timed computes the same numbers."""
    problem = Problem(plan.size)
    values, gradients = {}, {}
    for variant in plan.track(VARIANTS):
        values[variant] = problem.evaluate(variant)
        gradients[variant] = problem.train(variant)
    names = [name for name, _ in problem.potential.named_parameters()]
    rows, figures = [], {}
    for variant in VARIANTS[1:]:
        pairs = zip(
            [values[variant], *gradients[variant]],
            [values["published"], *gradients["published"]],
            strict=True,
        )
        differences = [float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs]
        figures[variant] = dict(zip(["log density", *names], differences, strict=True))
        rows.append([variant, *(f"{difference:.1e}" for difference in differences)])
    return Section(
        "agreement",
        f"Relative difference from the plain published arithmetic, {plan.size.dtype}",
        ["sensitivity", "log density", *(f"gradient: {name}" for name in names)],
        rows,
        [],
        figures,
    )


def training(plan: Plan) -> Section:
    """A training step against the plain published arithmetic."""
    problem = Problem(plan.size)
    return _comparison(
        plan, "training", "Training step: log-likelihood and gradient", problem.train
    )


def evaluation(plan: Plan) -> Section:
    """An evaluation of the density against the plain published arithmetic."""
    problem = Problem(plan.size)
    return _comparison(plan, "evaluation", "Evaluation: log-density, no graph", problem.evaluate)


def _comparison(plan: Plan, name: str, title: str, call: Callable[[str], object]) -> Section:
    def plainly(variant: str) -> object:
        with plain_products():
            return call(variant)

    ours = VARIANTS[1:] if name == "training" else VARIANTS[1:2]
    candidates: dict[str, Callable[[], object]] = {v: partial(call, v) for v in VARIANTS[:1] + ours}
    candidates |= {f"{v}, plain matmul": partial(plainly, v) for v in ours}
    timings = interleave(candidates, rounds=plan.rounds, track=plan.track)
    rows = [
        [
            candidate,
            f"{timings.median(candidate):.3f}",
            str(timings.ratio("published", candidate)),
            str(timings.ratio(candidate, "autograd")),
        ]
        for candidate in candidates
    ]
    return Section(
        name,
        title,
        ["arithmetic", "seconds", "times faster than published", "time / autograd"],
        rows,
        [f"{plan.size}. Median and (smallest-largest) over {plan.rounds} interleaved rounds."],
        {"seconds": timings.seconds},
    )


def overhead(plan: Plan) -> Section:
    """Torchdyn against a loop written by hand, over the same reduced equations of motion."""
    problem = Problem(plan.size)
    rows, figures = [], {}
    for job, call in (("training step", problem.train), ("evaluation", problem.evaluate)):
        candidates = {solver: partial(call, solver) for solver in SOLVERS}
        timings = interleave(candidates, rounds=2 * plan.rounds, track=plan.track)
        medians = [f"{timings.median(solver):.3f}" for solver in SOLVERS]
        rows.append([job, *medians, str(timings.ratio("torchdyn", "hand loop"))])
        figures[job] = timings.seconds
    return Section(
        "overhead",
        "torchdyn's rk4 and a Runge-Kutta loop written by hand",
        ["", "hand loop: seconds", "torchdyn: seconds", "torchdyn / hand loop"],
        rows,
        [f"{plan.size}. Median and (smallest-largest) over {2 * plan.rounds} interleaved rounds."],
        {"seconds": figures},
    )


def memory(plan: Plan) -> Section:
    """The peak memory of a training step, each in a process of its own."""
    problem = Problem(plan.size)
    peaks: dict[str, int] = {}
    kept: dict[str, int] = {}
    for variant in plan.track(VARIANTS):
        peaks[variant] = measure_peak(variant, plan.size)
        kept[variant] = saved_bytes(problem, variant)
    rows = [
        [
            variant,
            f"{peak / MB:.0f}",
            f"{peaks['published'] / peak:.1f}",
            f"{kept[variant] / MB:.0f}",
            f"{kept['published'] / kept[variant]:.1f}",
        ]
        for variant, peak in peaks.items()
    ]
    return Section(
        "memory",
        "Peak memory of a training step",
        ["arithmetic", "peak: MB", "times less", "saved tensors: MB", "times less"],
        rows,
        [
            f"{plan.size}. Peak: resident memory of a process that makes one step, less its peak "
            "after imports and the creation of model and data; what libraries load at first use "
            "counts. Saved tensors: what the forward pass keeps for the backward pass."
        ],
        {"peak_bytes": peaks, "saved_bytes": kept},
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
            "saved": saved_bytes(Problem(size), "recompute"),
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


def symmetry(plan: Plan) -> Section:
    """What the average over the translations of a lattice costs, by product and by Fourier."""
    dtype = getattr(torch, plan.size.dtype)
    rows, figures = [], {}
    for length in plan.lattices:
        sites = length**2
        group, x = translations((length, length)), torch.randn(64, sites, dtype=dtype)
        flows = {}
        for name, least in (("plain", None), ("product", sites + 1), ("fourier", 0)):
            torch.manual_seed(0)
            potential: Potential = RidgePotential(sites, 8, activation="logcosh", bias=False)
            if least is not None:
                with mock.patch.object(symmetrized, "FOURIER_SITES", least):
                    potential = SymmetrizedPotential(potential, group)
            flows[name] = MongeAmpereTransform(potential, steps=4).to(dtype)

        def train(flow: MongeAmpereTransform, x: torch.Tensor = x) -> None:
            flow.zero_grad()
            outputs, logabsdet = flow.inverse(x)
            (outputs.square().sum() - logabsdet.sum()).backward()

        timings = interleave(
            {name: partial(train, flow) for name, flow in flows.items()},
            rounds=2 * plan.rounds,
            track=plan.track,
        )
        product, fourier = (timings.ratio(name, "plain") for name in ("product", "fourier"))
        faster = timings.ratio("product", "fourier")
        figures[str(length)] = timings.seconds
        rows.append([f"{length}x{length}", *map(str, (product, fourier, faster))])
    return Section(
        "symmetry",
        "A training step of a potential averaged over all translations, relative to the plain one",
        ["lattice", "one product with all rows", "Fourier", "product / Fourier"],
        rows,
        ["8 ridges, 64 fields, 4 RK4 steps. Each ridge has become one for each site."],
        figures,
    )


SECTIONS = (
    machine,
    agreement,
    training,
    evaluation,
    memory,
    overhead,
    scaling_with_batch,
    scaling_with_steps,
    memory_with_steps,
    symmetry,
)


def _resized(size: Size, axis: str, value: int) -> Size:
    return replace(size, batch=value) if axis == "batch" else replace(size, steps=value)


def _plan(rounds: int | None, dtype: str, quick: bool, track: Track) -> Plan:
    if quick:
        size = Size(features=400, hidden=256, batch=20, steps=16, time=1.6, dtype=dtype)
        return Plan(size, rounds or 1, (10, 20), (8, 16), (4, 6), track)
    sweep = (25, 50, 100, 200)
    return Plan(Size(dtype=dtype), rounds or 4, sweep, sweep, (4, 8, 16, 32), track)


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
        int | None, typer.Option(min=1, help="Rounds of each timing; 4, or 1 with --quick.")
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
