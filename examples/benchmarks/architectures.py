"""Flows of four libraries on the same data, for the same training time each, over several seeds.

    python examples/benchmarks/architectures.py --out runs/architectures --data-dir DIR
    python examples/benchmarks/architectures.py --out DIR --data moons --flow ridge --flow maf

Each cell (a data set, a flow, a seed) is trained and measured in a process of its own, and leaves a
file when it is done: the same command takes up a run that was interrupted, and more cells can be
added to a folder. The validation set chooses the checkpoint, the test set is read once. A flow that
fails in some way leaves a file that says so.

The flows are in ``flows.py``, the data in ``densities.py``.
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

import contextlib
import csv
import json
import math
import multiprocessing
import os
import shutil
import statistics
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from io import BytesIO, StringIO
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmark_report import environment
from densities import DATA, TOYS, Data
from flows import FLOWS, Model
from nflows_mongeampere.examples.pictures import draw_rows, save_figure
from nflows_mongeampere.examples.runs import open_folder, peak_memory, resident_memory
from nflows_mongeampere.files import write
from nflows_mongeampere.training import (
    DivergenceError,
    MaximumLikelihood,
    SolverGuard,
    endless,
    fit,
    restore,
)

SIDE, GRID = 3.0, 120  # the pictures of toys: [-3, 3] squared, 120 by 120 points
PATIENCE = 240.0  # seconds for what comes after the training
ENOUGH = 5.0  # seconds, after which no larger batch is timed
console = Console()


@dataclass(frozen=True)
class Kind:
    """How data of a kind are learned; the same for every flow.

    Attributes:
        seconds: of training, where ``--seconds`` is left out.
        seeds: where ``--seeds`` is left out.
        weight_decay: of AdamW.
        chunk: rows of a batch of the test.
    """

    seconds: float
    seeds: int
    weight_decay: float
    chunk: int


TOY = Kind(seconds=6, seeds=2, weight_decay=0.0, chunk=1000)
KINDS = {
    "digits": Kind(seconds=20, seeds=2, weight_decay=0.1, chunk=200),
    "mnist": Kind(seconds=60, seeds=1, weight_decay=0.0, chunk=100),
}


@dataclass(frozen=True)
class Cell:
    """One flow, trained on one data set from one seed."""

    data: str
    flow: str
    seed: int
    seconds: float
    learning_rate: float | None = None

    @property
    def kind(self) -> Kind:
        """How the data are learned."""
        return KINDS.get(self.data, TOY)

    def path(self, out: Path, suffix: str) -> Path:
        """A file of this cell."""
        return out / "cells" / f"{self.data}_{self.flow}_{self.seed}{suffix}"


@dataclass(frozen=True)
class Figures:
    """What a cell ends with; NaN where it did not come so far.

    Attributes:
        failure: what went wrong, or nothing.
        learning_rate: the highest.
        parameters: how many are trained.
        steps: of the optimiser within the time.
        validation: the lowest loss on the validation set, in the coordinates of the flow.
        nll: the mean loss on the test set, in the unit of the data.
        nll_se: its standard error.
        step_seconds: the time of the training, validations included, for each of its steps.
        log_prob_seconds: for 1,000 log-densities.
        sample_seconds: for 1,000 samples.
        samples_timed: the largest batch of samples that was timed.
        peak_memory_mb: the most that the training held above imports and data.
        round_trip_error: largest difference of noise and noise sent to data and back.
        evaluations: of the velocity for one log-density; 1 for flows that have none.
    """

    data: str
    flow: str
    seed: int
    seconds: float
    failure: str = ""
    learning_rate: float = math.nan
    parameters: int = 0
    steps: int = 0
    validation: float = math.nan
    nll: float = math.nan
    nll_se: float = math.nan
    step_seconds: float = math.nan
    log_prob_seconds: float = math.nan
    sample_seconds: float = math.nan
    samples_timed: int = 0
    peak_memory_mb: float = math.nan
    round_trip_error: float = math.nan
    evaluations: int = 0


def seconds_of(call: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def make_optimizer(cell: Cell, rate: float, flow: nn.Module) -> torch.optim.Optimizer:
    """AdamW, the same for every flow but for its learning rate."""
    trained = [p for p in flow.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=rate, weight_decay=cell.kind.weight_decay)


def time_step(cell: Cell, model: Model, data: Data) -> float:
    """Seconds of a training step, the median of at most ten, so short that nothing is learned."""
    model.train()
    optimizer = make_optimizer(cell, 1e-9, model)
    batch = data.batches(0)[0]

    def step() -> None:
        optimizer.zero_grad()
        (-model.log_prob(batch).mean()).backward()
        optimizer.step()

    step()
    found: list[float] = []
    while len(found) < 10 and sum(found) < 1:
        found.append(seconds_of(step))
    return statistics.median(found)


def train(cell: Cell, model: Model, data: Data, rate: float) -> tuple[int, float, str]:
    """Train for the time of the cell.

    Returns:
        The steps, the lowest validation loss, and what went wrong; the model has the weights of the
        best checkpoint.
    """
    step = time_step(cell, FLOWS[cell.flow].make(data.features), data)  # not the one to be trained
    watched = DataLoader(TensorDataset(data.validation), batch_size=cell.kind.chunk)
    with torch.no_grad():
        batches = len(data.validation) / cell.kind.chunk
        look = batches * seconds_of(lambda: model.log_prob(data.validation[: cell.kind.chunk]))
    # validation at twice the solver's steps shall take no more than a tenth of the time
    looks = min(20.0, max(2.0, 0.1 * cell.seconds / (2 * look)))
    objective = MaximumLikelihood(
        model,
        optimizer=lambda flow: make_optimizer(cell, rate, flow),
        minutes=cell.seconds / 60,
        seed=cell.seed,
    )
    failure = ""
    with tempfile.TemporaryDirectory() as folder:
        best, metrics = Path(folder) / "best.ckpt", Path(folder) / "metrics.csv"
        try:
            fit(
                objective,
                endless(data.batches(cell.seed), max(1, round(cell.seconds / looks / step))),
                watched,
                folder,
                callbacks=[SolverGuard(max(0.02, 1e-3 * data.features))],
                gradient_clip_val=10 * math.sqrt(data.features),
            )
        except DivergenceError as error:
            if not best.exists():
                raise
            failure = str(error).partition(";")[0]
            restore(objective, best)
        rows = list(csv.DictReader(StringIO(metrics.read_text())))
    return int(rows[-1]["step"]), min(float(row["validation"]) for row in rows), failure


@torch.no_grad()
def time_samples(model: Model, features: int) -> tuple[float, int, Tensor, float]:
    """Larger and larger batches of samples, as long as these take no more than a few seconds.

    Returns:
        Seconds for 1,000 samples, the batch that was timed, the samples, and the largest difference
        of their noise from the noise that they come back to (infinite where it is no number).
    """
    for count in (10, 100, 1000):
        z = torch.randn(count, features)
        start = time.perf_counter()
        samples = model.to_data(z)
        seconds = time.perf_counter() - start
        if seconds > ENOUGH:
            break
    error = float((model.to_noise(samples) - z).abs().max().nan_to_num(math.inf))
    return seconds * 1000 / count, count, samples, error


def measure(cell: Cell, data: Data) -> tuple[Figures, dict[str, np.ndarray]]:
    """Train a flow and judge it; also what the pictures need."""
    architecture = FLOWS[cell.flow]
    rate = cell.learning_rate or architecture.rates[data.features]
    torch.manual_seed(cell.seed)
    model = architecture.make(data.features)
    before = resident_memory()
    steps, validation, failure = train(cell, model, data, rate)
    memory = peak_memory() - before
    model = model.cpu().eval()
    torch.manual_seed(cell.seed)
    model.settle(data.validation[: cell.kind.chunk])
    with torch.no_grad():
        parts = data.test.split(cell.kind.chunk)
        timed = seconds_of(lambda: model.log_prob(parts[0]))
        evaluations = model.evaluations
        loss = -torch.cat([model.log_prob(part) for part in parts]) - data.volume
    loss = loss.view(data.draws, -1).mean(0)
    per_sample, timed_samples, samples, error = time_samples(model, data.features)
    drawn = pictures(model, data, samples)
    figures = Figures(
        *(cell.data, cell.flow, cell.seed, cell.seconds, failure, rate),
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        steps=steps,
        validation=validation,
        nll=loss.mean().item(),
        nll_se=(loss.std() / math.sqrt(len(loss))).item(),
        step_seconds=math.nan if failure else cell.seconds / steps,
        log_prob_seconds=timed * 1000 / len(parts[0]),
        sample_seconds=per_sample,
        samples_timed=timed_samples,
        peak_memory_mb=memory,
        round_trip_error=error,
        evaluations=evaluations,
    )
    return figures, drawn


@torch.no_grad()
def pictures(model: Model, data: Data, samples: Tensor) -> dict[str, np.ndarray]:
    """Samples, as grey levels where they are images, and the density of a toy on a grid."""
    if data.to_picture is not None:
        return {"samples": data.to_picture(samples[:10]).numpy()}
    density = torch.cat([model.log_prob(part) for part in grid().split(1000)]).exp()
    return {"samples": samples.numpy(), "density": density.view(GRID, GRID).numpy()}


def grid() -> Tensor:
    """The points of a picture of a toy, shape (GRID², 2), row by row."""
    axis = SIDE * ((torch.arange(GRID) + 0.5) / GRID * 2 - 1)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], dim=-1).view(-1, 2)


def run_cell(cell: Cell, out: Path, data_dir: Path | None) -> None:
    """What the process of a cell does: its file, whole, is the sign that it is done."""
    warnings.filterwarnings("ignore")
    with contextlib.redirect_stderr(StringIO()), contextlib.redirect_stdout(StringIO()):
        try:
            figures, arrays = measure(cell, DATA[cell.data](data_dir))
            buffer = BytesIO()
            np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
            write(cell.path(out, ".npz"), buffer.getvalue())
        except Exception as error:  # whatever goes wrong in a flow is a result of the comparison
            figures = failed(cell, f"{type(error).__name__}: {str(error).splitlines()[0][:100]}")
    save(figures, cell, out)


def failed(cell: Cell, failure: str) -> Figures:
    """The figures of a cell that has none."""
    return Figures(cell.data, cell.flow, cell.seed, cell.seconds, failure)


def save(figures: Figures, cell: Cell, out: Path) -> None:
    """Write the file of a cell."""
    write(cell.path(out, ".json"), json.dumps(asdict(figures), indent=2) + "\n")


def run_cells(cells: list[Cell], out: Path, data_dir: Path | None) -> None:
    """One after the other, each in a process of its own, behind a progress bar."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["nflows_mongeampere.training", "normflows", "torchdyn.core", "matplotlib.pyplot"]
    )
    with Progress(console=console, refresh_per_second=1) as progress:
        task = progress.add_task("cells", total=len(cells))
        for cell in cells:
            progress.update(task, description=f"{cell.data}, {cell.flow}, seed {cell.seed}")
            process = context.Process(target=run_cell, args=(cell, out, data_dir), daemon=True)
            process.start()
            process.join(cell.seconds + PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()
                late = f"not done {PATIENCE:g} s after its time of training"
                save(failed(cell, late), cell, out)
            elif not cell.path(out, ".json").exists():
                ended = f"its process ended with code {process.exitcode} (-9: out of memory)"
                save(failed(cell, ended), cell, out)
            progress.advance(task)


def read_figures(out: Path) -> list[Figures]:
    """The figures of every finished cell in the folder, in the order of the registries."""
    files = (out / "cells").glob("*.json")
    found = [Figures(**json.loads(path.read_text())) for path in files]
    data, flows = list(DATA), list(FLOWS)
    known = [f for f in found if f.data in DATA and f.flow in FLOWS]
    return sorted(known, key=lambda f: (data.index(f.data), flows.index(f.flow), f.seed))


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


def load_pictures(out: Path, data: str, flow: str, seed: int) -> dict[str, np.ndarray] | None:
    """What a cell left for the pictures, if anything."""
    path = Cell(data, flow, seed, 0).path(out, ".npz")
    return dict(np.load(path)) if path.exists() else None


def label(flow: str) -> str:
    """The title of a flow in short lines, for the margin of a picture."""
    return textwrap.fill(FLOWS[flow].title, 14, break_on_hyphens=False)


def draw_toys(out: Path, data: dict[str, Data], figures: list[Figures], path: Path) -> None:
    """A row for each flow, and for each toy its density and its samples side by side."""
    flows = list(dict.fromkeys(f.flow for f in figures if f.data in data))
    seeds = {(f.data, f.flow): f.seed for f in reversed(figures)}
    size = (2.1 * len(data) + 1.4, 1.05 * (len(flows) + 1) + 0.3)
    tight = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
    figure = plt.figure(figsize=size, layout=tight)
    axes: Any = figure.subplots(len(flows) + 1, 2 * len(data), squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], aspect="equal")
        axis.spines[:].set_visible(False)
    for column, (name, each) in enumerate(data.items()):
        assert each.toy is not None
        density = each.toy.log_prob(grid()).exp().view(GRID, GRID).numpy()
        top = np.quantile(density, 0.995)
        truth = {"density": density, "samples": each.test[:1000].numpy()}
        entries = [load_pictures(out, name, f, seeds.get((name, f), 0)) for f in flows]
        for line, found in enumerate([truth, *entries]):
            if found is None:
                continue
            left, right = axes[line, 2 * column : 2 * column + 2]
            box = (-SIDE, SIDE, -SIDE, SIDE)
            left.imshow(found["density"], origin="lower", extent=box, vmin=0, vmax=top)
            right.scatter(*found["samples"][:1000].T, s=0.3, color="black", linewidths=0)
            right.set(xlim=box[:2], ylim=box[2:])
        axes[0, 2 * column].set_title(name, loc="left", fontsize=9)
    for line, text in enumerate(["the data", *map(label, flows)]):
        axes[line, 0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8)
    save_figure(figure, path)


def draw_images(out: Path, name: str, data: Data, figures: list[Figures], path: Path) -> None:
    """A row of samples for each flow."""
    assert data.to_picture is not None
    rows = [("the data", data.to_picture(data.test[:10]))]
    for each in figures:
        title = label(each.flow)
        found = load_pictures(out, name, each.flow, each.seed)
        if each.data == name and found is not None and title not in dict(rows):
            rows.append((title, torch.from_numpy(found["samples"])))
    figure = plt.figure(figsize=(8, 0.66 * len(rows)), layout="constrained")
    draw_rows(figure, rows, math.isqrt(data.features), {"cmap": "gray_r", "vmin": 0, "vmax": 1})
    save_figure(figure, path)


def choose(option: str, names: list[str] | None, known: Iterable[str]) -> list[str]:
    """The names that were asked for, all if none."""
    for name in names or ():
        if name not in known:
            raise ValueError(f"{option}: got {name!r}, expected some of {', '.join(known)}")
    return list(dict.fromkeys(names or known))


def plan(
    data: list[str], flows: list[str], seconds: float | None, seeds: int | None, rate: float | None
) -> list[Cell]:
    """The cells of the comparison; none where a flow is too slow for the data by its nature."""
    cells = []
    for name in data:
        kind = KINDS.get(name, TOY)
        width = {"digits": 64, "mnist": 784}.get(name, 2)
        for seed in range(seeds or kind.seeds):
            for flow in flows:
                if width in FLOWS[flow].widths:
                    cells.append(Cell(name, flow, seed, seconds or kind.seconds, rate))
    return cells


def main(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/architectures"),
    data: Annotated[
        list[str] | None, typer.Option(help=f"Some of {', '.join(DATA)}; all if left out.")
    ] = None,
    flow: Annotated[
        list[str] | None, typer.Option(help=f"Some of {', '.join(FLOWS)}; all if left out.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.1, help="Of training; 6 for toys, 20 and 60 for images.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="For each flow; 2 for toys and digits, 1 for MNIST.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="MNIST's IDX files; left out, they are downloaded.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=1e-6, help="Instead of each flow's own.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Begin anew in a folder with a run.")] = False,
) -> None:
    """Compare flows: a table, its figures and pictures."""
    try:
        chosen = choose("--data", data, DATA)
        flows = choose("--flow", flow, FLOWS)
        for name in chosen:  # so that what is missing is told before hours of work
            DATA[name](data_dir)
        for name in flows:
            FLOWS[name].make(2)
        open_folder(out, {"seconds": seconds, "learning_rate": learning_rate}, overwrite)
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    if overwrite:
        shutil.rmtree(out / "cells", ignore_errors=True)
    (out / "cells").mkdir(exist_ok=True)
    cells = plan(chosen, flows, seconds, seeds, learning_rate)
    waiting = [cell for cell in cells if not cell.path(out, ".json").exists()]
    console.print(f"{len(cells)} cells, {len(cells) - len(waiting)} of them done before")
    run_cells(waiting, out.resolve(), data_dir and data_dir.resolve())
    report(out, data_dir)
    console.print(f"wrote {out / 'architectures.md'} and {out / 'architectures'}")


if __name__ == "__main__":
    typer.run(main)
