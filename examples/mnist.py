"""Density estimation of MNIST with Monge-Ampère flows, and with flows of nflows beside them.

    python examples/mnist.py --preset fast --data-dir DIR --out runs/fast --minutes 10 --seed 0
    python examples/mnist.py --preset stacked --data patches --out runs/patches --minutes 10

An interrupted run is taken up by the same command. All figures are nats of the dequantised images
in logit space, y = logit(α + (1 - 2α) x) with α = 1e-6, as they were published. Patches are those
of the photographs that scikit-learn ships, of the size of a digit. The flows are in
``mnist_flows.py``.
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from mnist_flows import FEATURES, LEVELS, MARGIN, PRESETS, SIDE, logits, make_optimizer, shifted
from nflows_mongeampere import refined
from nflows_mongeampere.convergence import converged
from nflows_mongeampere.examples.images import Images, Pixels, load_mnist, to_pixels
from nflows_mongeampere.examples.patches import load_patches
from nflows_mongeampere.examples.pictures import draw_rows, mosaic, save_figure
from nflows_mongeampere.examples.runs import (
    command,
    fast_bfloat16,
    one_line_errors,
    open_folder,
    peak_memory,
    resident_memory,
    write_json,
)
from nflows_mongeampere.models import transports
from nflows_mongeampere.training import (
    DivergenceError,
    EndlessBatches,
    History,
    MaximumLikelihood,
    SolverGuard,
    endless,
    fit,
)

DATA = ("mnist", "patches")
TOLERANCE = 0.02  # nats, of a mean loss when the solver's steps are doubled
GREYS: dict[str, Any] = {"cmap": "gray_r", "vmin": 0, "vmax": 1}
PUBLISHED = {  # test set, logit space, arXiv:1809.10188, table 1
    "MADE": 1380.8,
    "RealNVP": 1323.2,
    "MAF": 1300.5,
    "Monge-Ampère": 1255.5,
    "MADE MoG": 1038.5,
}


@dataclass(frozen=True)
class Results:
    """What a run ends with; losses in nats of the test images in logit space.

    Attributes:
        parameters: how many are trained.
        precision: of the networks in training, as Lightning calls it.
        minutes: of training, validation included.
        steps: of the optimiser, up to the checkpoint that the validation set chose.
        nll: mean over the test images and the draws of dequantisation noise.
        nll_se: its standard error over the images.
        nll_draws: the mean of each draw.
        bits_per_dim: the same loss in bits per pixel.
        solver_steps: of each Monge-Ampère transform, for ``nll``.
        nll_double_steps: the same loss at twice these steps; None for other flows.
        reconstruction_error: largest error of pixels sent into noise and back, in grey levels.
        peak_memory_mb: the most that the run held above the imports and the data.
    """

    preset: str
    seed: int
    parameters: int
    precision: str
    minutes: float
    steps: int
    nll: float
    nll_se: float
    nll_draws: list[float]
    bits_per_dim: float
    solver_steps: list[int]
    nll_double_steps: float | None
    reconstruction_error: float
    peak_memory_mb: float
    command: str


@torch.no_grad()
def losses(flow: Flow, points: Tensor) -> Tensor:
    """The negative log-density of each image."""
    return torch.cat([-flow.log_prob(part) for part in points.split(100)])


def evaluate(flow: Flow, test: Tensor, draws: int) -> dict[str, Any]:
    """The test loss, at the solver's steps that the flow has."""
    found, constants = [], []
    for draw in range(draws):
        points = logits(test, torch.Generator().manual_seed(draw))
        found.append(losses(flow, points))
        # ln|dx/dy|, from the density of logits to that of pixels in [0, 1), for bits per pixel
        constants.append(Pixels(MARGIN)(points)[1].mean().item())
    loss, double = torch.stack(found), None
    if transports(flow):
        with refined(flow):
            change = losses(flow, points).mean() - loss[-1].mean()
        double = (loss.mean() + change).item()
    nll = loss.mean().item()
    in_pixels = nll + sum(constants) / draws
    return {
        "nll": nll,
        "nll_se": (loss.mean(0).std() / math.sqrt(len(test))).item(),
        "nll_draws": loss.mean(1).tolist(),
        "bits_per_dim": (in_pixels / FEATURES + math.log(LEVELS)) / math.log(2),
        "solver_steps": [transport.steps for transport in transports(flow)],
        "nll_double_steps": double,
    }


@torch.no_grad()
def draw_samples(flow: Flow, number: int, seed: int, folder: Path) -> None:
    """Samples, the first 64 as a picture and all as an array for comparisons."""
    torch.manual_seed(seed)
    pixels = to_pixels(flow.sample(number, batch_size=min(number, 100)), MARGIN).clamp(0, 1)
    figure, axes = plt.subplots(figsize=(6, 6), layout="constrained")
    axes.imshow(mosaic(pixels[:64], SIDE, 8), **GREYS)
    axes.set_axis_off()
    save_figure(figure, folder / "samples.png")
    levels = (pixels * LEVELS).floor().clamp(max=LEVELS - 1)  # without the noise of dequantisation
    np.save(folder / "samples.npy", levels.byte().numpy())


@torch.no_grad()
def draw_path(flow: Flow, images: Images, folder: Path) -> float:
    """Digits into noise and back, transform by transform; returns the error, in grey levels."""
    originals = logits(images.test[:10], torch.Generator().manual_seed(0))
    digits, points = to_pixels(originals, MARGIN), originals
    rows = [("digits", digits)]
    stages = list(flow._transform._transforms)
    for stage in stages:
        points, _ = stage(points)
        rows.append((type(stage).__name__.removesuffix("Transform"), points.flatten(1)))
    for stage in reversed(stages):
        points, _ = stage.inverse(points)
    restored = to_pixels(points, MARGIN)
    error = float((restored - digits).abs().max()) * LEVELS
    rows.append((f"restored to\n{error:.1g} grey levels", restored))
    figure = plt.figure(figsize=(10, 0.8 * len(rows)), layout="constrained")
    draw_rows(figure, rows, SIDE, GREYS)
    save_figure(figure, folder / "path.png")
    return error


def draw_learning(history: History, name: str, published: dict[str, float], folder: Path) -> None:
    """The loss against the steps, with the published levels."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    steps = [row["step"] for row in history.rows]
    for key in ("train", "validation"):
        axes.plot(steps, [row[key] for row in history.rows], label=f"{name}, {key}")
    top = max([*published.values(), *(row["validation"] for row in history.rows)])
    for label, level in published.items():
        axes.axhline(level, color="grey", linewidth=0.7, linestyle=":")
        axes.text(steps[-1], level, f"{label}, published", fontsize=7, ha="right", va="bottom")
    axes.set(xlabel="training steps", ylabel="NLL in logit space (nats)", xscale="log")
    axes.set_ylim(top=min(top, 1700) + 20)
    axes.legend(frameon=False)
    save_figure(figure, folder / "learning.png")


def run(
    config: dict[str, Any], out: Path, data_dir: Path | None, overwrite: bool, processes: int
) -> Results:
    """One preset from the data to its results."""
    digits = config["data"] == "mnist"
    images = load_mnist(data_dir) if digits else load_patches()
    open_folder(out, config, overwrite)
    before, threads = resident_memory(), torch.get_num_threads()
    preset, seed = PRESETS[config["preset"]], config["seed"]
    precision = preset.precision if fast_bfloat16() else "32-true"
    torch.manual_seed(seed)
    flow = Flow(CompositeTransform(preset.build(images.train)), StandardNormal([FEATURES]))
    objective = MaximumLikelihood(
        flow,
        optimizer=partial(make_optimizer, preset),
        steps=config["steps"],
        minutes=config["minutes"],
        warmup_steps=50 if preset.anneal else 0,
        anneal=preset.anneal,
        seed=seed,
    )
    watched = logits(
        images.validation[: config["validation_images"]], torch.Generator().manual_seed(0)
    )

    def batch(levels: Tensor, generator: torch.Generator) -> Tensor:
        if digits and preset.shift:  # the photographs have none to spare at their edges
            levels = shifted(levels, generator, preset.shift, share=1 - objective.progress)
        return logits(levels, generator)

    history = fit(
        objective,
        endless(EndlessBatches(images.train, preset.batch_size, seed, batch), preset.interval),
        DataLoader(TensorDataset(watched), batch_size=100),
        out,
        name=config["preset"],
        callbacks=[SolverGuard(preset.solver_tolerance)],
        gradient_clip_val=preset.clip,
        precision=precision,
        **(several(processes) if processes > 1 else {}),
    )
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        raise typer.Exit  # the first process goes on alone, with the cores of all
    torch.set_num_threads(threads)
    flow = flow.cpu().eval()
    best = min(history.rows, key=lambda row: row["validation"])
    draw_learning(history, config["preset"], PUBLISHED if digits else {}, out)
    factor = 1
    if transports(flow):
        points = logits(images.validation[: len(watched)], torch.Generator().manual_seed(1))
        factor = converged(flow, lambda: losses(flow, points).mean(), TOLERANCE).factor
    with refined(flow, factor):
        figures = evaluate(flow, images.test[: config["test_images"]], config["draws"])
        draw_samples(flow, config["samples"], seed, out)
        error = draw_path(flow, images, out)
    results = Results(
        preset=config["preset"],
        seed=seed,
        parameters=sum(p.numel() for p in flow.parameters() if p.requires_grad),
        precision=precision,
        minutes=history.rows[-1]["minutes"],
        steps=int(best["step"]),
        reconstruction_error=error,
        peak_memory_mb=peak_memory() - before,
        command=command(),
        **figures,
    )
    write_json(out / "results.json", asdict(results))
    return results


def several(processes: int) -> dict[str, Any]:
    """Settings of training for processes that share each batch, with an equal part of the cores."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    return {"accelerator": "cpu", "devices": processes, "strategy": "ddp"}


def main(
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "fast",
    data: Annotated[str, typer.Option(help=f"One of {', '.join(DATA)}.")] = "mnist",
    data_dir: Annotated[
        Path | None, typer.Option(help="MNIST's IDX files; left out, they are downloaded.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/PRESET.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Training time; 10 if --steps is left out.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps, for a reproducible end.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, batches and noise.")] = 0,
    draws: Annotated[int, typer.Option(min=1, help="Of dequantisation noise in the test.")] = 3,
    validation_images: Annotated[
        int, typer.Option(min=1, max=10_000, help="That choose the checkpoint.")
    ] = 2000,
    test_images: Annotated[
        int, typer.Option(min=10, max=10_000, help="Fewer than all for a quick look alone.")
    ] = 10_000,
    samples: Annotated[int, typer.Option(min=64, help="That are drawn.")] = 64,
    processes: Annotated[int, typer.Option(min=1, help="That share each batch.")] = 1,
    overwrite: Annotated[bool, typer.Option(help="Begin anew in a folder with a run.")] = False,
) -> None:
    """Train a flow on images, evaluate it on the test set and draw what it does."""
    with one_line_errors(ValueError, OSError, DivergenceError):
        if preset not in PRESETS:
            raise ValueError(f"--preset: got {preset!r}, expected one of {', '.join(PRESETS)}")
        if data not in DATA:
            raise ValueError(f"--data: got {data!r}, expected one of {', '.join(DATA)}")
        config = {
            "preset": preset,
            "data": data,
            "minutes": minutes if minutes or steps else 10.0,
            "steps": steps,
            "seed": seed,
            "draws": draws,
            "validation_images": validation_images,
            "test_images": test_images,
            "samples": samples,
        }
        start = time.monotonic()
        results = run(config, out or Path("runs") / preset, data_dir, overwrite, processes)
    typer.echo(json.dumps(asdict(results), indent=2))
    typer.echo(f"{(time.monotonic() - start) / 60:.1f} minutes in all, {os.cpu_count()} cores")


if __name__ == "__main__":
    typer.run(main)
