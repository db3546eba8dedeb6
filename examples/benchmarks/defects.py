r"""How good the free estimate of the solver's error is, on flows that are being trained.

    python examples/benchmarks/defects.py --out runs/defects

Flows learn two spirals, two moons and 8x8 digits: with steps enough, with too few, and with one
step for each of four layers at a learning rate at which a training lives off its solver. At three
times of a training the error of each layer's log-determinant, against 64 times the steps, is
compared with ``solver_error``, row by row; in float64, so that both are errors of the solver alone.
It notes at which step the training was warned of its solver.

To add a training, add a line to ``TRAININGS``.
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import torch
import typer
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform
from rich.console import Console
from torch import Tensor

import densities
from benchmark_report import Section, write_report
from nflows_mongeampere import AccuracyWarning, MongeAmpereTransform, RidgePotential
from nflows_mongeampere.examples.pictures import save_figure
from nflows_mongeampere.integration import IntegrationError
from paired_timing import progress_bars

FINER = 64
TIMES = (0.1, 1 / 3, 1.0)  # of a training, at which errors are looked at


@dataclass(frozen=True)
class Training:
    """A flow and how it is trained, by Adam.

    Attributes:
        data: one of ``densities.DATA``.
        layers: ridge potentials in a row, each with a time of 1.
        steps: of the solver, for each layer.
        rate: the learning rate.
        iterations: batches.
        hidden: H of each layer.
        solver: of each layer.
        honest: whether it is expected to keep its solver's error small.
    """

    data: str
    layers: int
    steps: int
    rate: float
    iterations: int
    hidden: int = 128
    solver: str = "rk4"
    honest: bool = True

    def __str__(self) -> str:
        steps = f"{self.steps} {self.solver} step{'s' if self.steps > 1 else ''}"
        return f"{self.data}, {f'{self.layers} × ' if self.layers > 1 else ''}{steps}"


TRAININGS = (
    Training("moons", 1, 4, 1e-2, 600),
    Training("spirals", 1, 8, 1e-2, 600),
    Training("digits", 1, 4, 3e-3, 300, hidden=256),
    Training("digits", 1, 8, 1e-2, 300, hidden=256),
    Training("moons", 1, 8, 1e-2, 600, solver="midpoint"),
    Training("moons", 1, 32, 1e-2, 600, solver="euler"),
    Training("spirals", 1, 4, 3e-2, 600),
    Training("moons", 1, 2, 3e-2, 600, solver="midpoint", honest=False),
    Training("moons", 1, 4, 3e-2, 600, solver="euler", honest=False),
    Training("spirals", 4, 1, 3e-2, 600, honest=False),
    Training("digits", 4, 1, 3e-2, 300, honest=False),
)


@dataclass
class Look:
    """A layer at some time of a training.

    Attributes:
        iteration: how many batches the flow has seen.
        layer: its number.
        true, estimated: errors of log-determinants in nats, shape (B,).
    """

    iteration: int
    layer: int
    true: Tensor
    estimated: Tensor

    def figures(self) -> dict[str, float]:
        """What the table and the JSON file hold."""
        true, estimated = rms(self.true), rms(self.estimated)
        high, estimated_high = float(self.true.quantile(0.95)), float(self.estimated.quantile(0.95))
        return {
            "iteration": self.iteration,
            "layer": self.layer,
            "true": true,
            "estimated": estimated,
            "ratio": estimated / true,
            "true_95": high,
            "estimated_95": estimated_high,
            "ratio_95": estimated_high / high,
            "rank_correlation": rank_correlation(self.true, self.estimated),
        }


@dataclass
class Story:
    """What came of a training: the looks at it, and what was said meanwhile."""

    training: Training
    seed: int
    looks: list[Look]
    warned_at: int | None = None
    warning: str = ""
    diverged_at: int | None = None


def rms(errors: Tensor) -> float:
    """The root mean square."""
    return float(errors.square().mean().sqrt())


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's."""
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


@cache
def data_set(name: str) -> densities.Data:
    """The data of a training."""
    return densities.DATA[name](None)


@torch.no_grad()
def look_at(flow: Flow, rows: Tensor, iteration: int) -> Iterator[Look]:
    """The errors of each layer of a flow, in float64."""
    x = rows.double()
    for number, layer in enumerate(flow._transform._transforms):
        twin = copy.deepcopy(layer).double()
        outputs, logabsdet = twin(x)
        estimated = twin.solver_error
        twin.steps = FINER * layer.steps
        yield Look(iteration, number, (twin(x)[1] - logabsdet).abs(), estimated)
        x = outputs


def train(training: Training, seed: int, rows: int) -> Story:
    """Train a flow in a plain loop, and look at it now and then."""
    torch.manual_seed(seed)
    data = data_set(training.data)
    layers = [
        MongeAmpereTransform(
            RidgePotential(data.features, training.hidden),
            steps=training.steps,
            solver=training.solver,
        )
        for _ in range(training.layers)
    ]
    flow = Flow(CompositeTransform(layers), StandardNormal([data.features]))
    optimizer = torch.optim.Adam(flow.parameters(), lr=training.rate)
    batches, story = data.batches(seed), Story(training, seed, [])
    times = {max(1, round(time * training.iterations)) for time in TIMES}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for iteration in range(1, training.iterations + 1):
            try:
                optimizer.zero_grad()
                (-flow.log_prob(batches[iteration]).mean()).backward()
                optimizer.step()
                if iteration in times:
                    story.looks += look_at(flow, data.validation[:rows], iteration)
            except IntegrationError:
                story.diverged_at = iteration
                break
            found = [str(w.message) for w in caught if w.category is AccuracyWarning]
            if found and story.warned_at is None:
                story.warned_at, story.warning = iteration, found[0]
    return story


def overview(stories: list[Story]) -> Section:
    """One line for each training, of all seeds."""
    columns = [
        *("training", "true error: nats", "estimated / true", "of 95 % quantiles"),
        *("rank correlation of rows", "warned at step"),
    ]
    rows = []
    for training in dict.fromkeys(story.training for story in stories):
        own = [story for story in stories if story.training == training]
        looks = [look.figures() for story in own for look in story.looks]
        rows.append(
            [
                f"{training}{'' if training.honest else ' (too few)'}",
                span([look["true"] for look in looks], ".1e"),
                span([look["ratio"] for look in looks], ".2f"),
                span([look["ratio_95"] for look in looks], ".2f"),
                span([look["rank_correlation"] for look in looks], ".2f"),
                ", ".join(map(warned, own)),
            ]
        )
    counts = [
        f"{sum(s.warned_at is not None for s in some)} of {len(some)} {what}"
        for honest, what in ((True, "with steps enough"), (False, "with too few"))
        if (some := [story for story in stories if story.training.honest is honest])
    ]
    note = f"Trainings that were warned: {'; '.join(counts)}."
    return Section("trainings", "All layers, at three times", columns, rows, [note])


def warned(story: Story) -> str:
    """The step at which a training was warned."""
    if story.warned_at is not None:
        return str(story.warned_at)
    return "never" if story.diverged_at is None else f"never (diverged at {story.diverged_at})"


def span(figures: list[float], form: str) -> str:
    """The smallest and the largest."""
    return f"{min(figures):{form}} to {max(figures):{form}}" if figures else ""


def agreement(stories: list[Story]) -> Section:
    """Estimates and true errors over all flows, layers and times, by the size of the error."""
    looks = [look for story in stories for look in story.looks]
    true = torch.tensor([rms(look.true) for look in looks])
    estimated = torch.tensor([rms(look.estimated) for look in looks])
    ratio = estimated / true
    rows, figures = [], {"rank_correlation": rank_correlation(true, estimated)}
    for low, high in ((0, 1e-3), (1e-3, 0.05), (0.05, 1), (1, float("inf"))):
        some = ratio[(true >= low) & (true < high)]
        if len(some):
            numbers = (some.median(), some.min(), some.max())
            cells = [f"{float(number):.2f}" for number in numbers]
            rows.append([f"{low:g} to {high:g}", str(len(some)), *cells])
    return Section(
        "agreement",
        "Estimated / true error (root mean squares), by the size of the true error in nats",
        ["true error", "layers", "median", "smallest", "largest"],
        rows,
        [
            f"Rank correlation over {len(looks)} layers of all flows at all times: "
            f"{figures['rank_correlation']:.3f}. True errors from {float(true.min()):.1e} to "
            f"{float(true.max()):.2g} nats."
        ],
        figures,
    )


def details(stories: list[Story]) -> Section:
    """A line for each layer at each time."""
    columns = [
        *("training", "seed", "step", "layer", "true", "estimated", "ratio", "of 95 % quantiles"),
        "rank correlation",
    ]
    rows = []
    for story in stories:
        for look in story.looks:
            f = look.figures()
            rows.append(
                [
                    *(str(story.training), str(story.seed), str(look.iteration), str(look.layer)),
                    *(f"{f['true']:.1e}", f"{f['estimated']:.1e}", f"{f['ratio']:.2f}"),
                    *(f"{f['ratio_95']:.2f}", f"{f['rank_correlation']:.2f}"),
                ]
            )
    found: dict[str, Any] = {
        f"{story.training}, seed {story.seed}": {
            **vars(story.training),
            "warned_at": story.warned_at,
            "warning": story.warning,
            "diverged_at": story.diverged_at,
            "layers": [look.figures() for look in story.looks],
        }
        for story in stories
    }
    return Section("layers", "Layer by layer", columns, rows, [], found)


def draw(stories: list[Story], path: Path) -> None:
    """True against estimated errors: a dot for each row, a disc for each layer."""
    figure, axis = plt.subplots(figsize=(9, 6.5), layout="constrained")
    colours, drawn = plt.get_cmap("tab20"), list(dict.fromkeys(s.training for s in stories))
    for story in stories:
        colour = colours(drawn.index(story.training))
        for look in story.looks:
            axis.scatter(look.true[:30], look.estimated[:30], s=3, color=colour, alpha=0.3, lw=0)
        axis.scatter(
            [rms(look.true) for look in story.looks],
            [rms(look.estimated) for look in story.looks],
            s=40,
            color=colour,
            edgecolors="black",
            lw=0.5,
            zorder=3,
            marker="o" if story.training.honest else "^",
            label=None if story.seed else str(story.training),
        )
    ends = [1e-9, 1e2]
    for factor, line in ((1, "-"), (5, "--"), (1 / 5, "--")):
        axis.plot(ends, [factor * end for end in ends], line, color="grey", lw=1, zorder=0)
    axis.set(
        xscale="log",
        yscale="log",
        xlim=ends,
        ylim=ends,
        xlabel=f"true error of the log-determinant, from {FINER} times the steps (nats)",
        ylabel="solver_error (nats)",
    )
    figure.legend(loc="outside right upper", fontsize=8, title="large: rms of a layer; dots: rows")
    save_figure(figure, path)


def main(
    out: Annotated[Path, typer.Option(help="Folder for defects.md, .png and results.json.")],
    seeds: Annotated[int, typer.Option(min=1, help="Flows for each training.")] = 3,
    quick: Annotated[bool, typer.Option(help="Two short trainings, to see that it runs.")] = False,
) -> None:
    """Compare the free estimate of the solver's error with the true one, in trainings."""
    torch.set_num_threads(1)
    console, trainings, rows = Console(), list(TRAININGS), 500
    if quick:
        trainings = [replace(t, iterations=60, hidden=32) for t in TRAININGS[::9]]
        rows = 50
    with progress_bars(console) as (progress, _):
        plans = [(training, seed) for training in trainings for seed in range(seeds)]
        stories = [train(*plan, rows) for plan in progress.track(plans, description="defects")]
    sections = [overview(stories), agreement(stories), details(stories)]
    for section in sections[:2]:
        section.show(console)
    write_report(out, "defects", "The free estimate of the solver's error", sections)
    draw(stories, out / "defects.png")
    console.print(f"wrote {out / 'defects.md'}, {out / 'defects.png'} and {out / 'results.json'}")


if __name__ == "__main__":
    typer.run(main)
