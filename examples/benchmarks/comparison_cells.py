"""The cells of the comparison: a flow trained on a data set and judged, in a process of its own."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from io import BytesIO, StringIO
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from densities import DATA, Data
from flows import FLOWS, Model
from nflows_mongeampere.examples.runs import peak_memory, resident_memory, write_json
from nflows_mongeampere.files import write
from nflows_mongeampere.training import (
    DivergenceError,
    MaximumLikelihood,
    SolverGuard,
    endless,
    fit,
    restore,
)
from tables import TABLES

SIDE, GRID = 3.0, 120  # the pictures of toys: [-3, 3] squared, 120 by 120 points
PATIENCE = 240.0  # seconds of the processor for what comes before and after the training
LATE = 124  # how a process ends that took longer, as timeout(1) has it
ENOUGH = 5.0  # seconds, after which no larger batch is timed


@dataclass(frozen=True)
class Kind:
    """How data of a kind are learned; the same for every flow.

    Attributes:
        seconds: of the processor for a training, where ``--seconds`` is left out.
        seeds: where ``--seeds`` is left out.
        weight_decay: of AdamW.
        chunk: rows of a batch of the test.
    """

    seconds: float
    seeds: int
    weight_decay: float
    chunk: int


TOY = Kind(seconds=6, seeds=2, weight_decay=0.0, chunk=1000)
TABLE = Kind(seconds=300, seeds=2, weight_decay=0.0, chunk=500)
KINDS = {
    **dict.fromkeys(TABLES, TABLE),
    "digits": Kind(seconds=20, seeds=2, weight_decay=0.1, chunk=200),
    "mnist": Kind(seconds=60, seeds=1, weight_decay=0.0, chunk=100),
}


@dataclass(frozen=True)
class Cell:
    """One flow, trained on one data set from one seed.

    Attributes:
        seconds: of the processor.
        learning_rate: of AdamW, the highest.
        trial: whether only the validation loss is wanted, to choose the learning rate by.
    """

    data: str
    flow: str
    seed: int
    seconds: float
    learning_rate: float
    trial: bool = False

    @property
    def kind(self) -> Kind:
        """How the data are learned."""
        return KINDS.get(self.data, TOY)

    def path(self, out: Path, suffix: str) -> Path:
        """A file of this cell."""
        number = f"{self.learning_rate:g}" if self.trial else self.seed
        return out / "cells" / f"{self.data}_{self.flow}_{number}{suffix}"


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
    """How long a call takes, of the processor: what else it does in the meantime does not count."""
    start = time.process_time()
    call()
    return time.process_time() - start


class Training(MaximumLikelihood):
    """Maximum likelihood with the penalties that belong to a flow, for a time of the processor."""

    clock = staticmethod(time.process_time)

    def _penalised_loss(self, batch: Any) -> Tensor:
        model: Any = self.flow
        loss: Tensor = model.training_loss(batch)
        return loss


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
        model.training_loss(batch).backward()
        optimizer.step()

    step()
    found: list[float] = []
    while len(found) < 10 and sum(found) < 1:
        found.append(seconds_of(step))
    return statistics.median(found)


def train(cell: Cell, model: Model, data: Data) -> tuple[int, float, str]:
    """Train for the time of the cell.

    Returns:
        The steps, the lowest validation loss, and what went wrong; the model has the weights of the
        best checkpoint.
    """
    twin = FLOWS[cell.flow].make(data.features)  # which learns nothing from being timed
    step = time_step(cell, twin, data)
    watched = DataLoader(TensorDataset(data.validation), batch_size=cell.kind.chunk)
    with torch.no_grad():
        batches = len(data.validation) / cell.kind.chunk
        look = batches * seconds_of(lambda: twin.log_prob(data.validation[: cell.kind.chunk]))
    # validation at twice the solver's steps shall take no more than a tenth of the time
    looks = min(20.0, max(2.0, 0.1 * cell.seconds / (2 * look)))
    objective = Training(
        model,
        optimizer=lambda flow: make_optimizer(cell, cell.learning_rate, flow),
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
        start = time.process_time()
        samples = model.to_data(z)
        seconds = time.process_time() - start
        if seconds > ENOUGH:
            break
    error = float((model.to_noise(samples) - z).abs().max().nan_to_num(math.inf))
    return seconds * 1000 / count, count, samples, error


def measure(cell: Cell, data: Data) -> tuple[Figures, dict[str, np.ndarray]]:
    """Train a flow and judge it; also its loss on each test point, and what the pictures need."""
    torch.manual_seed(cell.seed)
    model = FLOWS[cell.flow].make(data.features)
    before = resident_memory()
    steps, validation, failure = train(cell, model, data)
    memory = peak_memory() - before
    if cell.trial:
        rate = cell.learning_rate
        trial = Figures(cell.data, cell.flow, cell.seed, cell.seconds, failure, rate)
        return replace(trial, steps=steps, validation=validation), {}
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
        *(cell.data, cell.flow, cell.seed, cell.seconds, failure, cell.learning_rate),
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
    return figures, {"losses": loss.numpy(), **drawn}


@torch.no_grad()
def pictures(model: Model, data: Data, samples: Tensor) -> dict[str, np.ndarray]:
    """Samples, as grey levels where they are images, and the density of a toy on a grid."""
    if data.to_picture is not None:
        return {"samples": data.to_picture(samples[:10]).numpy()}
    if data.toy is None:
        return {}
    density = torch.cat([model.log_prob(part) for part in grid().split(1000)]).exp()
    return {"samples": samples.numpy(), "density": density.view(GRID, GRID).numpy()}


def grid() -> Tensor:
    """The points of a picture of a toy, shape (GRID², 2), row by row."""
    axis = SIDE * ((torch.arange(GRID) + 0.5) / GRID * 2 - 1)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], dim=-1).view(-1, 2)


def run_cell(cell: Cell, out: Path, data_dir: Path | None) -> None:
    """Train and judge: the file of a cell, whole, is the sign that it is done."""
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
    rate = cell.learning_rate
    return Figures(cell.data, cell.flow, cell.seed, cell.seconds, failure, rate)


def save(figures: Figures, cell: Cell, out: Path) -> None:
    """Write the file of a cell."""
    write_json(cell.path(out, ".json"), asdict(figures))


def work(cell: Cell, out: Path, data_dir: Path | None, limit: float) -> None:
    """What the process of a cell does: on one thread, and for so many seconds of the processor."""

    def end_late() -> None:
        while time.process_time() < limit:
            time.sleep(0.5)
        os._exit(LATE)  # RLIMIT_CPU would do it, too, but makes the clock coarse

    torch.set_num_threads(1)
    Thread(target=end_late, daemon=True).start()
    run_cell(cell, out, data_dir)


def run_cells(cells: list[Cell], out: Path, data_dir: Path | None, console: Console) -> None:
    """One after the other, each in a process of its own; those that are done are left alone."""
    waiting = [cell for cell in cells if not cell.path(out, ".json").exists()]
    console.print(f"{len(cells)} cells, {len(cells) - len(waiting)} of them done before")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["nflows_mongeampere.training", "normflows", "torchdyn.core", "matplotlib.pyplot"]
    )
    with Progress(console=console, refresh_per_second=1) as progress:
        task = progress.add_task("cells", total=len(waiting))
        for cell in waiting:
            progress.update(task, description=f"{cell.data}, {cell.flow}, seed {cell.seed}")
            limit = cell.seconds + PATIENCE
            process = context.Process(target=work, args=(cell, out, data_dir, limit), daemon=True)
            process.start()
            process.join()
            if process.exitcode == LATE:
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


def read_arrays(out: Path, data: str, flow: str, seed: int) -> dict[str, np.ndarray]:
    """What a cell left beside its figures, losses and pictures; nothing if it has no test."""
    path = Cell(data, flow, seed, 0, 0).path(out, ".npz")
    return dict(np.load(path)) if path.exists() else {}
