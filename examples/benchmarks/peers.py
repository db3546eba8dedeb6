"""How fast the Monge-Ampère flow is beside the flows of other libraries, as ratios in one run.

    python examples/benchmarks/peers.py [--out DIR] [--repeats N] [--quick]

A training step (log-likelihood, gradient, Adam), a log-density and sampling, of batches of 100 rows
in 64 and 784 dimensions. Hidden layers of all flows are as wide as our potential, H. Timings are
interleaved, and ratios are taken within a round; run it with nothing beside it.

The flows are those of ``flows.py``, at their start. The cost of a continuous flow depends on how
often it evaluates its velocity: ours is given ten Runge-Kutta steps, 40 evaluations with the exact
trace, and three, as ``mnist.py --preset fast`` trains; the others choose their own, to the
tolerances of their libraries or tutorials.
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor

import flows
from benchmark_report import Section, environment, write_report
from flows import FLOWS, Model
from nflows_mongeampere.models import transports
from paired_timing import Timings, Track, interleave, progress_bars

OURS = "Monge-Ampère, 10 steps"
# an exact trace costs the others one backward pass for each dimension and evaluation; samples of
# an autoregressive flow one pass for each dimension, of which MAF stands for both
SLOW = ("zuko CNF, exact trace", "torchdyn CNF, exact trace", "nflows RQ autoregressive")
SLOW_FEATURES = 64


def ours(features: int, hidden: int, steps: int) -> Model:
    """The published potential, at a given number of steps."""
    model = FLOWS["ridge"].build(features, hidden)
    for transport in transports(model):
        transport.steps = steps
    return model


def zuko_exact(features: int, hidden: int) -> Model:
    """The flow of zuko with the exact trace, which it has, settled, up to 64 dimensions."""
    model = FLOWS["zuko"].build(features, hidden)
    model.settle(torch.zeros(1, features))
    return model


PEERS: dict[str, Callable[[int, int], Model]] = {
    OURS: partial(ours, steps=10),
    "Monge-Ampère, 3 steps": partial(ours, steps=3),
    "nflows RealNVP": flows.realnvp,
    "nflows MAF": flows.maf,
    "nflows RQ coupling": flows.spline_coupling,
    "nflows RQ autoregressive": flows.spline_autoregressive,
    "normflows real NVP": FLOWS["normflows-realnvp"].build,
    "normflows residual": FLOWS["normflows-residual"].build,
    "normflows neural spline": FLOWS["normflows-spline"].build,
    "zuko CNF, Hutchinson": FLOWS["zuko"].build,
    "torchdyn CNF, Hutchinson": FLOWS["torchdyn-hutchinson"].build,
    "zuko CNF, exact trace": zuko_exact,
    "torchdyn CNF, exact trace": FLOWS["torchdyn-exact"].build,
}


@dataclass(frozen=True)
class Size:
    """D, H and the rows of a batch."""

    features: int
    hidden: int
    batch: int = 100

    def __str__(self) -> str:
        return f"D = {self.features}, H = {self.hidden}, batch {self.batch}"


def make_models(size: Size) -> dict[str, Model]:
    """Our flow and its peers, those left out that would take minutes."""
    torch.manual_seed(0)
    return {
        name: build(size.features, size.hidden)
        for name, build in PEERS.items()
        if name not in SLOW or size.features <= SLOW_FEATURES
    }


def trainer(model: Model, batch: Tensor) -> Callable[[], object]:
    """A training step, as a loop would make it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-6)  # so small that the flow stays what it is

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        (-model.log_prob(batch).mean()).backward()
        optimizer.step()

    return step


@torch.no_grad()
def evaluate(model: Model, batch: Tensor) -> None:
    """The log-densities of a batch."""
    model.eval()
    model.log_prob(batch)


@torch.no_grad()
def sample(model: Model, batch: Tensor) -> None:
    """As many samples as the batch has rows."""
    model.eval()
    model.sample(len(batch))


def compare(size: Size, rounds: int, track: Track) -> list[Section]:
    """A table for each job, of all flows at one size."""
    models = make_models(size)
    batch = torch.randn(size.batch, size.features, generator=torch.Generator().manual_seed(0))
    jobs: dict[str, dict[str, Callable[[], object]]] = {
        "training step": {name: trainer(model, batch) for name, model in models.items()},
        "log-density": {name: partial(evaluate, model, batch) for name, model in models.items()},
        "sampling": {name: partial(sample, model, batch) for name, model in models.items()},
    }
    sections = []
    for job, candidates in jobs.items():
        timings = interleave(candidates, rounds=rounds, track=track)
        sections.append(section(job, size, models, batch, timings))
    return sections


def section(
    job: str, size: Size, models: dict[str, Model], batch: Tensor, timings: Timings
) -> Section:
    """The table of a job."""
    evaluations = {}
    for name, model in models.items():
        evaluate(model, batch)
        evaluations[name] = model.evaluations
    rows = [
        [
            name,
            f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}",
            str(evaluations[name]),
            f"{timings.median(name):.4f}",
            str(timings.ratio(name, OURS)),
        ]
        for name, model in models.items()
    ]
    rounds = len(timings.seconds[OURS])
    return Section(
        f"{job}, {size.features} dimensions",
        f"{job.capitalize()}: {size}",
        ["flow", "parameters", "evaluations", "seconds", "time / first"],
        rows,
        [
            f"Median, and for ratios (smallest-largest), of {rounds} interleaved rounds. "
            "Monge-Ampère: RK4, exact trace. Evaluations: of the velocity, for a log-density."
        ],
        {"seconds": timings.seconds},
    )


def machine() -> Section:
    """What the timings depend on."""
    rows = [[name, value] for name, value in environment().items()]
    return Section("machine", "Machine", ["", "value"], rows, [], {"environment": environment()})


def main(
    out: Annotated[
        Path | None, typer.Option(help="Folder for peers.md and results.json.", file_okay=False)
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of each timing.")] = 5,
    quick: Annotated[bool, typer.Option(help="A small size, to see that it runs.")] = False,
) -> None:
    """Measure the speed of the Monge-Ampère flow beside other flows, as ratios."""
    console = Console()
    sizes = [Size(64, 32, batch=10)] if quick else [Size(64, 256), Size(784, 1024)]
    sections = [machine()]
    with progress_bars(console) as (progress, track):
        try:
            for size in progress.track(sizes, description="sizes"):
                sections += compare(size, 1 if quick else repeats, track)
        except ImportError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error
    for section in sections:
        section.show(console)
    if out is not None:
        write_report(out, "peers", "Speed beside other flows", sections)
        console.print(f"wrote {out / 'peers.md'} and {out / 'results.json'}")


if __name__ == "__main__":
    typer.run(main)
