"""Density estimation of MNIST with Monge-Ampère flows, and with flows of nflows beside them.

    python examples/mnist.py --preset fast --data-dir DIR --out runs/fast --minutes 10 --seed 0
    python examples/mnist.py --preset stacked --data patches --out runs/patches --minutes 10

An interrupted run is taken up by the same command. All figures are nats of the dequantised images
in logit space, y = logit(α + (1 - 2α) x) with α = 1e-6, as they were published. Patches are those
of the photographs that scikit-learn ships, of the size of a digit.
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import normflows
import numpy as np
import torch
import typer
from nflows.distributions import StandardNormal
from nflows.flows import Flow, MaskedAutoregressiveFlow, SimpleRealNVP
from nflows.nn.nets import ResidualNet
from nflows.transforms import (
    CompositeTransform,
    LULinear,
    PiecewiseRationalQuadraticCouplingTransform,
    RandomPermutation,
    Transform,
)
from pytorch_optimizer import Muon
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nflows_mongeampere import (
    ConvolutionalPotential,
    MongeAmpereCouplingTransform,
    MongeAmpereTransform,
    PixelwisePotential,
    RidgePotential,
    refined,
)
from nflows_mongeampere.convergence import converged
from nflows_mongeampere.examples.images import (
    Images,
    Marginals,
    Pixels,
    Quantile,
    dequantise,
    load_mnist,
    to_logits,
    to_pixels,
    whitening,
)
from nflows_mongeampere.examples.networks import FromNormflows, GreyLevels
from nflows_mongeampere.examples.patches import load_patches
from nflows_mongeampere.examples.pictures import draw_rows, mosaic, save_figure
from nflows_mongeampere.examples.runs import (
    command,
    one_line_errors,
    open_folder,
    peak_memory,
    resident_memory,
    write_json,
)
from nflows_mongeampere.models import transports
from nflows_mongeampere.multiscale import AsImages, PixelNetwork, coarse_to_fine
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
SIDE, LEVELS, MARGIN = 28, 256, 1e-6
TOLERANCE = 0.02  # nats, of a mean loss when the solver's steps are doubled
FEATURES = SIDE * SIDE
GREYS: dict[str, Any] = {"cmap": "gray_r", "vmin": 0, "vmax": 1}
PUBLISHED = {  # test set, logit space, arXiv:1809.10188, table 1
    "MADE": 1380.8,
    "RealNVP": 1323.2,
    "MAF": 1300.5,
    "Monge-Ampère": 1255.5,
    "MADE MoG": 1038.5,
}


@dataclass(frozen=True)
class Preset:
    """A flow, with the settings of its training.

    Attributes:
        build: makes the transforms, from logits to noise, from the training images.
        learning_rate: the highest, of Adam.
        batch_size: images.
        interval: steps between two validations.
        weight_decay: as Adam has it.
        anneal: whether the learning rate falls to zero with the budget.
        clip: largest norm of the gradient.
        solver_tolerance: nats, above which training takes more of the solver's steps.
        linear_rate: learning rate of linear transforms, relative to the rest.
        kernel_rate: learning rate of the kernels within networks, which Muon turns; None leaves
            them to Adam, as the rest.
        precision: of the networks in training, as Lightning calls it; flows keep theirs.
    """

    build: Callable[[Tensor], list[Transform]]
    learning_rate: float
    batch_size: int = 100
    interval: int = 100
    weight_decay: float = 0.0
    anneal: bool = True
    clip: float | None = 200.0
    solver_tolerance: float = 0.5
    linear_rate: float = 1.0
    kernel_rate: float | None = None
    precision: str = "32-true"


def paper(levels: Tensor) -> list[Transform]:
    """The published flow: one potential, on raw logits."""
    potential = RidgePotential(FEATURES, 1024)
    return [MongeAmpereTransform(potential, time=10.0, steps=100)]


def behind_whitening(flow: Callable[[], Transform], levels: Tensor) -> list[Transform]:
    """A linear transform of nflows that whitens the data, then the flow."""
    return [whitening(images_through([], levels)), flow()]


def fast() -> Transform:
    """The published potential; its ridges start along the whitened pixels."""
    potential = RidgePotential(FEATURES, 1024)
    with torch.no_grad():
        potential.weight[:FEATURES] = torch.eye(FEATURES)
    return MongeAmpereTransform(potential, time=2.0, steps=3)


def couplings(levels: Tensor) -> list[Transform]:
    """Half of the whitened pixels flow in ridges that a network draws from the others, in turns."""
    whiten, width = whitening(images_through([], levels)), 128
    white = images_through([whiten], levels[:5000])
    row, column = torch.arange(FEATURES) // SIDE, torch.arange(FEATURES) % SIDE

    def network(passing: int, outputs: int) -> nn.Module:
        inner = (nn.Linear(passing, 2 * width), nn.SiLU(), nn.Dropout(0.2))
        return nn.Sequential(*inner, nn.Linear(2 * width, outputs), nn.SiLU())

    layers: list[Transform] = [whiten]
    for place in (row + column, row + column + 1, column, column + 1):
        moves = place % 2 == 0
        potential = RidgePotential(FEATURES // 2, 512, context_features=width)
        potential.initialize(white[:, moves])
        layers.append(MongeAmpereCouplingTransform(moves.int(), network, potential, steps=2))
    return layers


def convolutional(levels: Tensor) -> list[Transform]:
    """Marginals made normal, then potentials of neighbouring pixels, then a linear transform."""
    before = [Pixels(MARGIN), Marginals(levels, LEVELS), Quantile()]
    flows = [
        MongeAmpereTransform(ConvolutionalPotential((1, SIDE, SIDE), 16), steps=2) for _ in range(2)
    ]
    return [*before, *flows, whitening(images_through(before, levels))]


def whitened_multiscale(levels: Tensor) -> list[Transform]:
    """Whitened pixels flow in what networks say of coarser ones; whitening keeps their places."""
    scales = coarse_to_fine((1, SIDE, SIDE), stiffness=10.0, steps=4)
    return [whitening(images_through([], levels)), AsImages((1, SIDE, SIDE)), scales]


def multiscale(width: int, blocks: int, ridges: int, maps: int, levels: Tensor) -> list[Transform]:
    """From fine to coarse, pixels flow in what networks say of coarser ones."""
    # paper and ink, where there is any, apart from grey: clusters, which a smooth flow tells apart
    ends = {-3.0: levels == 0, 3.0: levels >= 252}
    weights = {mean: float(end.double().mean()) for mean, end in ends.items()}
    weights = {mean: weight for mean, weight in weights.items() if weight > 0.01}
    weights[0.0] = 1 - sum(weights.values())
    means = sorted(weights)
    before = [
        Marginals(levels, LEVELS, shared=True),
        Quantile([weights[mean] for mean in means], means),
    ]
    network = partial(PixelNetwork, width=width, blocks=blocks, before=GreyLevels(before, LEVELS))
    scales = coarse_to_fine(
        (1, SIDE, SIDE),
        network,
        hidden_features=ridges,
        context_channels=maps,
        stiffness=10.0,
        steps=3,
    )
    return [Pixels(MARGIN), *before, AsImages((1, SIDE, SIDE)), scales]


def realnvp() -> Transform:
    """Affine coupling layers."""
    return SimpleRealNVP(FEATURES, 512, 5, 2)._transform


def maf() -> Transform:
    """Masked autoregressive layers."""
    return MaskedAutoregressiveFlow(FEATURES, 512, 5, 2)._transform


def spline() -> Transform:
    """Rational-quadratic coupling layers."""
    layers: list[Transform] = []
    for i in range(5):
        mask = torch.arange(FEATURES) % 2 == i % 2
        layers += [
            RandomPermutation(FEATURES),
            PiecewiseRationalQuadraticCouplingTransform(
                mask.int(),
                lambda inputs, outputs: ResidualNet(inputs, outputs, 256, num_blocks=2),
                num_bins=8,
                tails="linear",
                tail_bound=5.0,
            ),
        ]
    return CompositeTransform(layers)


def whitened_spline(levels: Tensor) -> list[Transform]:
    """Marginals made normal, a linear transform that whitens them, then splines."""
    before = [Pixels(MARGIN), Marginals(levels, LEVELS), Quantile()]
    return [*before, whitening(images_through(before, levels)), spline()]


def glow(levels: Tensor) -> list[Transform]:
    """Marginals made normal, then blocks of Glow on images squeezed once and twice."""
    before = [Pixels(MARGIN), Marginals(levels, LEVELS), Quantile()]
    flows: list[normflows.flows.Flow] = []
    for channels in (16, 4):  # from noise to data
        flows += [normflows.flows.GlowBlock(channels, 64, scale_map="exp") for _ in range(6)]
        flows.append(normflows.flows.Squeeze())
    return [*before, AsImages((1, SIDE, SIDE)), FromNormflows(flows, (16, 7, 7))]


PRESETS = {
    "paper": Preset(
        paper, 1e-3, interval=500, weight_decay=1e-3, anneal=False, clip=None, solver_tolerance=5.0
    ),
    "fast": Preset(
        partial(behind_whitening, fast),
        6e-3,
        batch_size=200,
        interval=200,
        solver_tolerance=1.5,
        linear_rate=0.02,
    ),
    "coupling": Preset(
        couplings, 4e-3, batch_size=200, interval=200, solver_tolerance=1.5, linear_rate=0.02
    ),
    "whitened": Preset(
        whitened_multiscale,
        6e-3,
        interval=250,
        linear_rate=0.02,
        kernel_rate=0.05,
        solver_tolerance=0.3,
    ),
    "convolutional": Preset(
        convolutional, 2e-2, interval=200, linear_rate=0.02, solver_tolerance=2.0
    ),
    "stacked": Preset(
        partial(multiscale, 64, 2, 16, 16),
        6e-3,
        interval=500,
        kernel_rate=0.05,
        precision="bf16-mixed",
        solver_tolerance=0.2,
    ),
    "deep": Preset(
        partial(multiscale, 96, 4, 24, 24),
        3e-3,
        interval=500,
        kernel_rate=0.05,
        precision="bf16-mixed",
        solver_tolerance=0.2,
    ),
    "whitened-spline": Preset(whitened_spline, 5e-4, linear_rate=0.1),
    "glow": Preset(glow, 1e-3),
    "realnvp": Preset(partial(behind_whitening, realnvp), 5e-4, linear_rate=0.1),
    "maf": Preset(partial(behind_whitening, maf), 5e-4, linear_rate=0.1),
    "spline": Preset(partial(behind_whitening, spline), 5e-4, linear_rate=0.1),
}


def logits(levels: Tensor, generator: torch.Generator) -> Tensor:
    """Dequantised images in logit space, what the flows see."""
    return to_logits(dequantise(levels, generator, LEVELS), MARGIN)


def images_through(before: list[Transform], levels: Tensor) -> Tensor:
    """The training images behind the first transforms."""
    points = logits(levels, torch.Generator().manual_seed(0))
    with torch.no_grad():
        parts = [CompositeTransform(before)(part)[0] for part in points.split(5000)]
    return torch.cat(parts)


def make_optimizer(preset: Preset, flow: nn.Module) -> torch.optim.Optimizer:
    """Adam, with learning rates of their own for linear transforms and slopes; Muon for kernels.

    Muon (K. Jordan et al., https://kellerjordan.github.io/posts/muon) takes steps along orthogonal
    matrices.
    """
    layers = [module for module in flow.modules() if isinstance(module, LULinear)]
    linear = [parameter for layer in layers for parameter in layer.parameters()]
    slopes = [m.weight for m in flow.modules() if isinstance(m, PixelwisePotential)]
    networks = [m for m in flow.modules() if isinstance(m, PixelNetwork)]
    kernels = [p for m in networks for p in m.blocks.parameters() if p.dim() > 1]
    kernels = kernels if preset.kernel_rate else []
    known = set(map(id, [*linear, *slopes, *kernels]))
    rest = [p for p in flow.parameters() if p.requires_grad and id(p) not in known]
    betas = (0.9, 0.99) if preset.anneal else (0.9, 0.999)
    settings: dict[str, Any] = {"weight_decay": preset.weight_decay, "betas": betas}
    groups: list[dict[str, Any]] = [
        {"params": rest, "lr": preset.learning_rate, **settings},
        {"params": linear, "lr": preset.learning_rate * preset.linear_rate, **settings},
        # the slopes would sharpen until the solver misses what they do
        {"params": slopes, "lr": preset.learning_rate * 0.1, **settings},
    ]
    groups = [group for group in groups if group["params"]]
    if not kernels:
        return torch.optim.Adam(groups)
    groups = [{**group, "use_muon": False} for group in groups]
    return Muon([*groups, {"params": kernels, "lr": preset.kernel_rate, "use_muon": True}])


@dataclass(frozen=True)
class Results:
    """What a run ends with; losses in nats of the test images in logit space.

    Attributes:
        parameters: how many are trained.
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
    before = resident_memory()
    preset, seed = PRESETS[config["preset"]], config["seed"]
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
    history = fit(
        objective,
        endless(EndlessBatches(images.train, preset.batch_size, seed, logits), preset.interval),
        DataLoader(TensorDataset(watched), batch_size=100),
        out,
        name=config["preset"],
        callbacks=[SolverGuard(preset.solver_tolerance)],
        gradient_clip_val=preset.clip,
        precision=preset.precision,
        **(several(processes) if processes > 1 else {}),
    )
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        raise typer.Exit  # the first process goes on alone
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
    processes: Annotated[
        int, typer.Option(min=1, help="That share each batch, with the same result.")
    ] = 1,
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
