"""Density estimation of handwritten digits with a Monge-Ampère flow inside an nflows pipeline.

The data are scikit-learn's 8x8 digits, 1797 images of 64 pixels with 17 grey levels, dequantised by
uniform noise. The same pipeline, pixels -> logits -> nflows' own linear transform -> flow ->
standard normal, is trained by maximum likelihood with a Monge-Ampère flow, a masked autoregressive
flow and a RealNVP, each for the same wall-clock time; the validation set chooses the checkpoint and
the test set is read once. Without a flow the pipeline is a full-covariance Gaussian on the logits.

    python examples/digits.py --out runs/digits --seconds 50 --seed 0
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import pytorch_lightning as lightning
import torch
import typer
from matplotlib.figure import SubFigure
from nflows.distributions import StandardNormal
from nflows.flows import Flow, MaskedAutoregressiveFlow, SimpleRealNVP
from nflows.transforms import (
    CompositeTransform,
    IdentityTransform,
    Logit,
    LULinear,
    PointwiseAffineTransform,
    Transform,
)
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from nflows_mongeampere import MongeAmpereTransform, RidgePotential

LEVELS, SIDE = 17, 8
FEATURES = SIDE * SIDE
MARGIN = 0.01  # of the unit interval, kept free at both ends before the logit
TEST_DRAWS = 10
WARMUP_STEPS = 50
GREYS = {"cmap": "gray_r", "vmin": 0, "vmax": LEVELS}
console = Console()


@dataclass(frozen=True)
class Entry:
    """A flow to compare, with the settings that the validation set chose for it."""

    name: str
    make: Callable[[], Transform]
    learning_rate: float
    weight_decay: float


FLOWS = (
    Entry(
        "Monge-Ampère",
        lambda: MongeAmpereTransform(RidgePotential(FEATURES, 512), time=1.0, steps=4),
        learning_rate=1e-2,
        weight_decay=0.3,
    ),
    Entry(
        "nflows MAF",
        lambda: MaskedAutoregressiveFlow(FEATURES, 128, 5, 2)._transform,
        learning_rate=1e-3,
        weight_decay=0.1,
    ),
    Entry(
        "nflows RealNVP",
        lambda: SimpleRealNVP(FEATURES, 64, 6, 1, dropout_probability=0.2)._transform,
        learning_rate=1e-3,
        weight_decay=0.1,
    ),
)


@dataclass(frozen=True)
class Digits:
    """Images as rows of grey levels 0 ... 16."""

    train: Tensor
    validation: Tensor
    test: Tensor

    @classmethod
    def load(cls) -> Digits:
        """Split 1257 : 180 : 360, the same way every time."""
        images = torch.tensor(load_digits().data, dtype=torch.get_default_dtype())
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        test, validation, train = images[order].split([360, 180, len(images) - 540])
        return cls(train, validation, test)


def dequantise(levels: Tensor) -> Tensor:
    """Spread each grey level over an interval of length one, so that densities bound masses."""
    return levels + torch.rand_like(levels)


def pixels_to_logits() -> list[Transform]:
    """[0, 17] -> the real line."""
    return [PointwiseAffineTransform(MARGIN, (1 - 2 * MARGIN) / LEVELS), Logit()]


def whitening(logits: Tensor) -> LULinear:
    r"""A linear transform of nflows, set to :math:`\Sigma^{-1/2} (y - \mu)` of the data (ZCA)."""
    linear = LULinear(FEATURES)
    values, vectors = torch.linalg.eigh(torch.cov(logits.T))
    matrix = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    factor = torch.linalg.cholesky(matrix)
    scale = factor.diagonal()
    lower, upper = factor / scale, scale[:, None] * factor.T
    with torch.no_grad():
        linear.lower_entries.copy_(lower[linear.lower_indices])
        linear.upper_entries.copy_(upper[linear.upper_indices])
        linear.unconstrained_upper_diag.copy_((upper.diagonal() - linear.eps).expm1().log())
        linear.bias.copy_(-matrix @ logits.mean(0))
    return linear


def pipeline(train: Tensor, flow: Transform) -> Flow:
    """Pixels -> logits -> whitened logits -> noise."""
    to_logits = pixels_to_logits()
    logits, _ = CompositeTransform(to_logits)(dequantise(train.repeat(10, 1)))
    return Flow(
        CompositeTransform([*to_logits, whitening(logits), flow]), StandardNormal([FEATURES])
    )


class MaximumLikelihood(lightning.LightningModule):
    """Trains a flow on dequantised images; the learning rate falls to zero as time runs out."""

    def __init__(self, flow: Flow, entry: Entry, seconds: float) -> None:
        super().__init__()
        self.flow, self.entry, self.seconds = flow, entry, seconds
        self.start = time.monotonic()

    @property
    def progress(self) -> float:
        """The part of the time that has gone."""
        return min(1.0, (time.monotonic() - self.start) / self.seconds)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The negative log-likelihood of a batch, in nats per image."""
        loss: Tensor = -self.flow.log_prob(dequantise(batch[0])).mean()
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        """Log the mean over three draws of the dequantisation noise."""
        draws = [-self.flow.log_prob(dequantise(batch[0])).mean() for _ in range(3)]
        self.log("validation", torch.stack(draws).mean())

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW; the rate rises for some steps and then falls as a cosine of wall-clock time."""
        optimizer = torch.optim.AdamW(
            self.flow.parameters(),
            lr=self.entry.learning_rate,
            weight_decay=self.entry.weight_decay,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: (
                min(1, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * self.progress))
            ),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Bar(Callback):
    """One progress bar for the time of one flow, with its validation loss."""

    def __init__(self, progress: Progress, name: str) -> None:
        self.progress = progress
        self.task = progress.add_task(name, total=1.0, loss="")

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, *_: object
    ) -> None:
        """Show the time that has gone and stop when it has run out."""
        assert isinstance(module, MaximumLikelihood)
        validation = trainer.callback_metrics.get("validation")
        loss = "" if validation is None else f"validation {validation:.2f} nats"
        self.progress.update(self.task, completed=module.progress, loss=loss)
        trainer.should_stop = module.progress >= 1


def train(entry: Entry, digits: Digits, seconds: float, progress: Progress) -> Flow:
    """The flow of ``entry`` at the checkpoint with the best validation loss."""
    module = MaximumLikelihood(pipeline(digits.train, entry.make()), entry, seconds)
    # Lightning validates after each ten passes over these few images
    ten_epochs = RandomSampler(digits.train, replacement=True, num_samples=10 * len(digits.train))
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="validation", save_weights_only=True)
        trainer = lightning.Trainer(
            accelerator="auto",
            devices=1,
            max_epochs=-1,
            gradient_clip_val=10.0,
            callbacks=[best, Bar(progress, entry.name)],
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
        )
        trainer.fit(
            module,
            DataLoader(TensorDataset(digits.train), batch_size=100, sampler=ten_epochs),
            DataLoader(TensorDataset(digits.validation), batch_size=len(digits.validation)),
        )
        state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    module.load_state_dict(state)
    return module.flow.cpu().eval()


@dataclass(frozen=True)
class Score:
    """The test loss of a flow.

    Attributes:
        name: of the flow.
        parameters: how many are trained.
        nll: mean negative log-likelihood, in nats per image, of pixels in [0, 17).
        nll_se: its standard error over the test images.
        bits_per_dim: the same in bits per pixel.
        nll_double_steps: the same, at twice the integration steps; None for other flows.
    """

    name: str
    parameters: int
    nll: float
    nll_se: float
    bits_per_dim: float
    nll_double_steps: float | None


@torch.no_grad()
def score(name: str, flow: Flow, test: Tensor) -> Score:
    """Average over several draws of the dequantisation noise."""

    def losses() -> Tensor:
        torch.manual_seed(0)
        draws = [-flow.log_prob(dequantise(test)) for _ in range(TEST_DRAWS)]
        return torch.stack(draws).mean(0)

    loss = losses()
    nll, double = loss.mean().item(), None
    transport = flow._transform._transforms[-1]
    if isinstance(transport, MongeAmpereTransform):
        transport.steps *= 2
        double = losses().mean().item()
        transport.steps //= 2
    return Score(
        name=name,
        parameters=sum(p.numel() for p in flow.parameters()),
        nll=nll,
        nll_se=loss.std().item() / math.sqrt(len(test)),
        bits_per_dim=nll / (FEATURES * math.log(2)),
        nll_double_steps=double,
    )


def table(scores: list[Score], seconds: float) -> Table:
    """The comparison, best first."""
    result = Table(title=f"8x8 digits, test set, {seconds:g} s of training each")
    for column in ("flow", "parameters", "NLL (nats)", "bits/dim", "at twice the steps"):
        result.add_column(column, justify="left" if column == "flow" else "right")
    for s in sorted(scores, key=lambda s: s.nll):
        double = "" if s.nll_double_steps is None else f"{s.nll_double_steps:.3f}"
        nll = f"{s.nll:.2f} ± {s.nll_se:.2f}" if not double else f"{s.nll:.3f} ± {s.nll_se:.2f}"
        result.add_row(s.name, f"{s.parameters:,}", nll, f"{s.bits_per_dim:.4f}", double)
    return result


@torch.no_grad()
def draw(flows: dict[str, Flow], digits: Digits, path: Path) -> float:
    """Draw samples of every flow, and digits on their way into noise and back.

    Returns:
        The largest error of the reconstructed pixels, in grey levels.
    """
    count = 8
    flow = flows[FLOWS[0].name]
    *before, transport = flow._transform._transforms
    whiten = CompositeTransform(before)
    originals = dequantise(digits.test[:count])
    times = torch.linspace(transport.time, 0, 3)
    inwards = transport.trajectory(whiten(originals)[0], times).points
    outwards = transport.trajectory(inwards[-1], times.flip(0)).points
    restored, _ = whiten.inverse(outwards[-1])
    error = float((restored - originals).abs().max())

    samples = {"data": digits.test[count : 2 * count]}
    samples |= {name: f.sample(count) for name, f in flows.items()}
    path_images = {
        "digits": originals,
        "whitened\nt = T": inwards[0],
        "t = T/2": inwards[1],
        "noise\nt = 0": inwards[2],
        "t = T/2 ": outwards[1],
        "t = T": outwards[2],
        f"restored\nto {error:.0e}": restored,
    }
    figure = plt.figure(figsize=(13, 6.2), layout="constrained")
    ((left, right),) = figure.subfigures(1, 2, width_ratios=(1.06, 1), squeeze=False)
    left.suptitle("Samples after the same training time")
    right.suptitle(f"{FLOWS[0].name}: digits into noise and back")
    draw_rows(left, samples)
    draw_rows(right, path_images)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    plt.close(figure)
    partial.replace(path)
    return error


def draw_rows(figure: SubFigure, rows: dict[str, Tensor]) -> None:
    """One row of images for each entry, labelled; coloured where values take both signs."""
    axes: Any = figure.subplots(len(rows), len(next(iter(rows.values()))))
    for (label, images), line in zip(rows.items(), axes, strict=True):
        signed = bool((images < -1).any())
        style = {"cmap": "RdBu_r", "vmin": -3, "vmax": 3} if signed else GREYS
        for image, axis in zip(images, line, strict=True):
            axis.imshow(image.view(SIDE, SIDE), **style)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text)
    partial.replace(path)


def main(
    out: Annotated[Path, typer.Option(help="Folder for results.json and digits.png.")] = Path(
        "runs/digits"
    ),
    seconds: Annotated[float, typer.Option(min=1, help="Training time of each flow.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and noise.")] = 0,
) -> None:
    """Train flows on scikit-learn's digits for the same time each, compare and draw them."""
    out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning|nflows")
    digits = Digits.load()
    console.print(
        f"{len(digits.train)} digits to train on, {len(digits.validation)} to choose by, "
        f"{len(digits.test)} to test on; {seconds:g} s for each of {len(FLOWS)} flows"
    )
    torch.manual_seed(seed)
    flows = {}
    columns = (
        TextColumn("{task.description:>14}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=console) as progress:
        for entry in FLOWS:
            flows[entry.name] = train(entry, digits, seconds, progress)
    flows["Gaussian"] = pipeline(digits.train, IdentityTransform()).eval()

    scores = [score(name, flow, digits.test) for name, flow in flows.items()]
    error = draw(flows, digits, out / "digits.png")
    results = {
        "command": f"python examples/digits.py --seconds {seconds:g} --seed {seed}",
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "reconstruction_error": error,
        "scores": [asdict(s) for s in scores],
    }
    write(out / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    console.print(table(scores, seconds))
    console.print(f"pictures: {out / 'digits.png'}    numbers: {out / 'results.json'}")


if __name__ == "__main__":
    typer.run(main)
