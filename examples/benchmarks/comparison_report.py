"""The page of the comparison: a table for each data set, and the figures of every cell."""

from __future__ import annotations

import csv
import math
import os
import statistics
from collections.abc import Iterable
from dataclasses import asdict, fields
from io import StringIO
from pathlib import Path

from benchmark_report import environment
from comparison_cells import Figures, read_figures
from comparison_pictures import draw_images, draw_toys
from densities import DATA, TOYS, Data
from flows import FLOWS
from nflows_mongeampere.files import write

COLUMNS = (
    "flow",
    "test NLL",
    "s.e.",
    "parameters",
    "steps",
    "ms per step",
    "s per 1,000 log-probs",
    "s per 1,000 samples",
    "peak MB",
    "round trip",
    "evaluations",
)

HEAD = """\
Flows of four libraries, trained by maximum likelihood for the same wall-clock time each, one after
the other, by the same harness ({CPU}, {cores} cores, threads: {threads}, torch {torch}). Learning
rates were chosen by validation on moons and digits; on MNIST they are those of the libraries'
examples. Validation chose the checkpoint, the test set was read once. Test NLL: median over the
seeds (smallest to largest), its standard error over the test set, which is the same for all flows.
Times and memory are medians, that of a step with its share of the validations; a time of samples
with ≤ was scaled up from a smaller batch. Memory is that of the training, above imports and data.
Round trip: noise to data and back, the largest difference. Evaluations: of the velocity, for a
log-density. Continuous flows are judged at steps or tolerances that the figures do not depend on,
with the exact trace up to 64 dimensions, Hutchinson's unbiased estimate above.
Every cell is in [`architectures.csv`](architectures/architectures.csv)."""

PICTURE_HEAD = """\
Densities and samples of the first seed; white is where a density is no number. The picture of a
flower is flickr.com/photos/vultilion/6056698931, CC BY 2.0, as scikit-learn brings it along."""


def middle(values: Iterable[float], form: str) -> str:
    """The median and, of several values, the range."""
    good = [value for value in values if not math.isnan(value)]
    if not good:
        return ""
    if len(good) == 1:
        return format(good[0], form)
    return f"{statistics.median(good):{form}} ({min(good):{form}} to {max(good):{form}})"


def median(values: Iterable[float], form: str) -> str:
    """The median alone."""
    good = [value for value in values if not math.isnan(value)]
    return format(statistics.median(good), form) if good else ""


def row(flow: str, runs: list[Figures]) -> str:
    """The line of a flow in the table of a data set."""
    digits = ".3f" if runs[0].data in TOYS else ".2f"
    samples = median((r.sample_seconds for r in runs), ".2g")
    batch = min(r.samples_timed for r in runs)
    if 0 < batch < 1000:
        samples = f"≤ {samples} (from {batch})"
    notes = sorted({r.failure for r in runs if r.failure})
    cells = [
        FLOWS[flow].title,
        "; ".join([middle((r.nll for r in runs), digits), *notes]).removeprefix("; "),
        median((r.nll_se for r in runs), digits),
        f"{max(r.parameters for r in runs):,}",
        median((r.steps for r in runs), ".0f"),
        median((1000 * r.step_seconds for r in runs), ".1f"),
        median((r.log_prob_seconds for r in runs), ".2g"),
        samples,
        median((r.peak_memory_mb for r in runs), ".0f"),
        median((r.round_trip_error for r in runs), ".0e"),
        median((r.evaluations for r in runs), ".0f"),
    ]
    return f"| {' | '.join(cells)} |"


def table(name: str, figures: list[Figures], data: Data) -> list[str]:
    """The section of a data set: its flows, best first, and above them what nothing can beat."""
    runs: dict[str, list[Figures]] = {}
    for each in figures:
        runs.setdefault(each.flow, []).append(each)

    def rank(flow: str) -> float:
        losses = [r.nll for r in runs[flow] if not math.isnan(r.nll)]
        return statistics.median(losses) if losses else math.inf

    seeds = sorted({r.seed for r in figures})
    lines = [f"## {name}", "", f"NLL in {data.unit}; {len(seeds)} seed{'s'[: len(seeds) - 1]}, "]
    lines[-1] += f"{figures[0].seconds:g} s of training each."
    options = f"--data {name} --seconds {figures[0].seconds:g} --seeds {len(seeds)}"
    lines += ["", f"    python examples/benchmarks/architectures.py {options}"]
    lines += ["", f"| {' | '.join(COLUMNS)} |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    if data.toy is not None:
        best = -data.toy.log_prob(data.test)
        error = best.std().item() / math.sqrt(len(best))
        blank = " |" * (len(COLUMNS) - 3)
        lines.append(f"| *the density of the data* | {best.mean():.3f} | {error:.3f} |{blank}")
    return [*lines, *(row(flow, runs[flow]) for flow in sorted(runs, key=rank)), ""]


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
    machine = environment()
    machine["cores"] = str(os.cpu_count())
    lines = ["# Architectures", "", HEAD.format(**machine), ""]
    toys = [name for name in names if name in TOYS]
    if toys:
        draw_toys(out, {name: data[name] for name in toys}, figures, folder / "toys.png")
        lines += [PICTURE_HEAD, "", f"![Densities and samples]({folder.name}/toys.png)", ""]
    for name in names:
        lines += table(name, [f for f in figures if f.data == name], data[name])
        if name not in TOYS:
            draw_images(out, name, data[name], figures, folder / f"{name}.png")
            lines += [f"![Samples of {name}]({folder.name}/{name}.png)", ""]
    write(out / "architectures.md", "\n".join(lines))
