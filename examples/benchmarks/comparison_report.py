"""The page of the comparison: all toys at a glance, a table for each data set, every cell."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from io import StringIO
from pathlib import Path

import numpy as np

from benchmark_report import environment
from comparison_cells import Figures, read_arrays, read_figures
from comparison_pictures import draw_images, draw_toys
from densities import DATA, TOYS, Data
from flows import FLOWS
from nflows_mongeampere.files import write

COLUMNS = (
    "flow",
    "test NLL",
    "s.e.",
    "behind the first",
    "parameters",
    "learning rate",
    "steps",
    "ms per step",
    "s per 1,000 log-probs",
    "s per 1,000 samples",
    "peak MB",
    "round trip",
    "evaluations",
)

HEAD = """\
Flows of five libraries, trained by maximum likelihood, each on one thread for the same
time of the processor, by the same harness ({CPU}, torch
{torch}). All times are seconds of the processor. Learning rates were chosen by validation, for each
flow on each data set out of the same list (`--tune`). Flows of nflows are behind a trained linear
layer, LU up to 64 features, a scale for each feature above. Validation chose the checkpoint, the
test set was read once.

Test NLL: mean over the seeds and the test set; its standard error is that over test points, with
that over seeds where there are several. Behind the first: the mean difference, and its standard
error over the same test points and seeds. Bold: the first, and those within one standard error of
it. A diverged training is judged at its best checkpoint. Times and memory are medians, that of a
step with its share of the validations; a time of samples with ≤ was scaled up from a smaller batch.
Memory is that of the training, above imports and data. Round trip: noise to data and back, the
largest difference. Evaluations: of the velocity, for a log-density. Continuous flows are judged at
steps or tolerances that the figures do not depend on, with the exact trace up to 64 dimensions,
Hutchinson's unbiased estimate above. Every cell is in
[`architectures.csv`](architectures/architectures.csv)."""

OVERVIEW = """\
Test NLL in nats, in brackets half the range of the seeds in units of the last digit; best flow on
average first."""

PICTURE_HEAD = """\
Densities of the first seed; white is where one is no number. The picture of a
flower is flickr.com/photos/vultilion/6056698931, CC BY 2.0, as scikit-learn brings it along."""


@dataclass(frozen=True)
class Standing:
    """Where a flow stands on a data set.

    Attributes:
        losses: on each test point, the mean over the seeds, shape (N,).
        means: on the test set, of each seed.
    """

    losses: np.ndarray
    means: np.ndarray

    @property
    def nll(self) -> float:
        """The mean loss."""
        return float(self.means.mean())

    @property
    def error(self) -> float:
        """Its standard error."""
        return math.sqrt(_variance(self.losses) + _variance(self.means))

    def behind(self, first: Standing) -> tuple[float, float]:
        """By how much it is behind another flow on the same points, and the standard error."""
        points = _variance(self.losses - first.losses)
        seeds = _variance(self.means) + _variance(first.means)
        return self.nll - first.nll, math.sqrt(points + seeds)


def _variance(values: np.ndarray) -> float:
    """Of the mean; unknown of a single value, and left out."""
    return float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0


def standing(out: Path, runs: list[Figures]) -> Standing | None:
    """Of the seeds that came to a test."""
    arrays = [read_arrays(out, r.data, r.flow, r.seed) for r in runs if math.isfinite(r.nll)]
    losses = [each["losses"] for each in arrays if each]
    if not losses:
        return None
    return Standing(np.mean(losses, axis=0), np.array([each.mean() for each in losses]))


def median(values: Iterable[float], form: str) -> str:
    """The median of those that are numbers."""
    good = [value for value in values if not math.isnan(value)]
    return format(statistics.median(good), form) if good else ""


def row(flow: str, runs: list[Figures], own: Standing | None, first: Standing | None) -> str:
    """The line of a flow in the table of a data set."""
    digits = ".3f" if runs[0].data in TOYS else ".2f"
    nll, error, behind, title = "", "", "", FLOWS[flow].title
    if own is not None and first is not None:
        nll, error = f"{own.nll:{digits}}", f"{own.error:{digits}}"
        difference, uncertainty = own.behind(first)
        if own is not first:
            behind = f"{difference:{digits}} ± {uncertainty:{digits}}"
        if own is first or difference <= uncertainty:
            title, nll = f"**{title}**", f"**{nll}**"
    samples = median((r.sample_seconds for r in runs), ".2g")
    batch = min(r.samples_timed for r in runs)
    if 0 < batch < 1000:
        samples = f"≤ {samples} (from {batch})"
    notes = sorted({r.failure for r in runs if r.failure})
    cells = [
        title,
        "; ".join([nll, *notes]).removeprefix("; "),
        error,
        behind,
        f"{max(r.parameters for r in runs):,}",
        median((r.learning_rate for r in runs), "g"),
        median((r.steps for r in runs), ".0f"),
        median((1000 * r.step_seconds for r in runs), ".1f"),
        median((r.log_prob_seconds for r in runs), ".2g"),
        samples,
        median((r.peak_memory_mb for r in runs), ".0f"),
        median((r.round_trip_error for r in runs), ".0e"),
        median((r.evaluations for r in runs), ".0f"),
    ]
    return f"| {' | '.join(cells)} |"


def by_flow(figures: list[Figures]) -> dict[str, list[Figures]]:
    """The runs of each flow."""
    runs: dict[str, list[Figures]] = {}
    for each in figures:
        runs.setdefault(each.flow, []).append(each)
    return runs


def judge(out: Path, runs: dict[str, list[Figures]]) -> dict[str, Standing]:
    """Where the flows of one data set stand, those that came to a test, best first."""
    found = {flow: standing(out, each) for flow, each in runs.items()}
    judged = {flow: each for flow, each in found.items() if each is not None}
    return dict(sorted(judged.items(), key=lambda item: item[1].nll))


def overview(out: Path, figures: list[Figures], data: dict[str, Data]) -> list[str]:
    """Every flow on all toys: mean test NLL, half the range of the seeds, best flow first."""
    judged = {name: judge(out, by_flow([f for f in figures if f.data == name])) for name in data}
    runs = by_flow([f for f in figures if f.data in data])

    def distance(flow: str) -> float:
        """How far it is behind, on average; a toy that it has not been tried on counts most."""
        return statistics.fmean(
            each[flow].nll - next(iter(each.values())).nll if flow in each else math.inf
            for each in judged.values()
        )

    lines = [f"| flow | parameters | steps | {' | '.join(data)} |"]
    lines.append("|---" + "|---:" * (len(data) + 2) + "|")
    best = [f"{-d.toy.log_prob(d.test).mean():.3f}" for d in data.values() if d.toy is not None]
    lines.append(f"| *the density of the data* | | | {' | '.join(best)} |")
    for flow in sorted(runs, key=distance):
        steps = [each.steps for each in runs[flow]]
        parameters = max(each.parameters for each in runs[flow])
        cells = [FLOWS[flow].title, f"{parameters:,}", f"{min(steps):,}-{max(steps):,}"]
        for each in judged.values():
            own, first = each.get(flow), next(iter(each.values()), None)
            if own is None or first is None:
                cells.append("failed")
                continue
            cells.append(f"{own.nll:.3f}({500 * np.ptp(own.means):.0f})")
            difference, uncertainty = own.behind(first)
            if own is first or difference <= uncertainty:
                cells[-1] = f"**{cells[-1]}**"
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def table(out: Path, name: str, figures: list[Figures], data: Data) -> list[str]:
    """The section of a data set: its flows, best first, and above them what nothing can beat."""
    runs = by_flow(figures)
    judged = judge(out, runs)
    first = next(iter(judged.values()), None)
    flows = [*judged, *(flow for flow in runs if flow not in judged)]

    seeds = sorted({r.seed for r in figures})
    lines = [f"## {name}", "", f"NLL in {data.unit}; {len(seeds)} seed{'s'[: len(seeds) - 1]}, "]
    lines[-1] += f"{figures[0].seconds:g} CPU seconds of one thread for each training."
    options = f"--data {name} --seconds {figures[0].seconds:g} --seeds {len(seeds)}"
    lines += ["", f"    python examples/benchmarks/architectures.py {options}"]
    lines += ["", f"| {' | '.join(COLUMNS)} |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    if data.toy is not None:
        best = -data.toy.log_prob(data.test)
        error = best.std().item() / math.sqrt(len(best))
        blank = " |" * (len(COLUMNS) - 3)
        lines.append(f"| *the density of the data* | {best.mean():.3f} | {error:.3f} |{blank}")
    return [*lines, *(row(flow, runs[flow], judged.get(flow), first) for flow in flows), ""]


def report(out: Path, data_dir: Path | None) -> None:
    """Tables, figures and pictures of every finished cell in the folder."""
    figures = read_figures(out)
    names = list(dict.fromkeys(f.data for f in figures))
    data = {name: DATA[name](data_dir) for name in names}
    text = StringIO()
    columns = [field.name for field in fields(Figures)]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(f) for f in figures)
    folder = out / "architectures"
    folder.mkdir(exist_ok=True)
    write(folder / "architectures.csv", text.getvalue())
    lines = ["# Architectures", "", HEAD.format(**environment()), ""]
    toys = [name for name in names if name in TOYS]
    if toys:
        plane = {name: data[name] for name in toys}
        draw_toys(out, plane, figures, folder / "toys.png")
        lines += ["## All toys", "", OVERVIEW, "", *overview(out, figures, plane), ""]
        lines += [PICTURE_HEAD, "", f"![Densities]({folder.name}/toys.png)", ""]
    for name in names:
        lines += table(out, name, [f for f in figures if f.data == name], data[name])
        if data[name].to_picture is not None:
            draw_images(out, name, data[name], figures, folder / f"{name}.png")
            lines += [f"![Samples of {name}]({folder.name}/{name}.png)", ""]
    write(out / "architectures.md", "\n".join(lines))
