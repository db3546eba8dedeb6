"""Class-conditional densities of handwritten digits, by a Monge-Ampère flow with a context.

The pipeline of digits.py, given the class of each image: nflows' ``Flow`` embeds the label, and the
embedding shifts the ridges of the potential, u(x; c). Trained for the same time as the flow that is
not told the class, it gives a density for each class, hence by Bayes' rule

    p(c | x) = p(x | c) / Σ_c' p(x | c')        p(x) = Σ_c p(x | c) / 10,

a classifier that was never trained to classify, and a density of all digits to compare with.

    python examples/conditional_digits.py --out runs/conditional --seconds 40 --seed 0
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

import math
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import torch
import typer
from nflows.flows import Flow
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import digits
from nflows_mongeampere import MongeAmpereTransform, RidgePotential, refined
from nflows_mongeampere.examples.images import Images
from nflows_mongeampere.examples.pictures import draw_rows, save_figure
from nflows_mongeampere.examples.runs import write_results
from nflows_mongeampere.training import EndlessBatches, MaximumLikelihood, endless, fit

CLASSES, EMBEDDING = 10, 16
console = Console()


@dataclass(frozen=True)
class Labels:
    """The classes of the images, in the same three parts."""

    train: Tensor
    validation: Tensor
    test: Tensor


def load() -> tuple[Images, Labels]:
    """The split of digits.py, with its labels."""
    labels = torch.tensor(load_digits().target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, validation, train = labels[order].split([360, 180, len(labels) - 540])
    return digits.load(), Labels(train, validation, test)


def conditional_pipeline(train: Tensor) -> Flow:
    """Pixels -> logits -> whitened logits -> noise, the last step by the class."""

    def ridges(white: Tensor) -> MongeAmpereTransform:
        potential = RidgePotential(digits.FEATURES, 512, context_features=EMBEDDING)
        potential.initialize(white)
        return MongeAmpereTransform(potential, time=1.0, steps=4)

    flow = digits.pipeline(train, ridges)
    return Flow(flow._transform, flow._distribution, nn.Embedding(CLASSES, EMBEDDING))


def dequantised(batch: tuple[Tensor, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same images and classes, with noise on the pixels."""
    images, classes = batch
    return digits.pixels(images, generator), classes


def train_conditional(images: Images, labels: Labels, seconds: float, seed: int) -> Flow:
    """The conditional flow at the checkpoint with the best validation loss."""
    entry = digits.FLOWS[0]
    flow = conditional_pipeline(images.train)

    def optimizer(flow: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            flow.parameters(), lr=entry.learning_rate, weight_decay=entry.weight_decay
        )

    train = (images.train, labels.train)
    watched = (images.validation.repeat(3, 1), labels.validation.repeat(3))
    watched = dequantised(watched, torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        fit(
            MaximumLikelihood(flow, optimizer=optimizer, minutes=seconds / 60, seed=seed),
            endless(EndlessBatches(train, 100, seed, dequantised), interval=120),
            DataLoader(TensorDataset(*watched), batch_size=len(watched[0])),
            folder,
            name="conditional",
        )
    return flow.cpu().eval()


@torch.no_grad()
def class_log_densities(flow: Flow, pixels: Tensor) -> Tensor:
    """The log-density of each image in each class, ln p(x | c), shape (B, 10)."""
    classes = torch.arange(CLASSES).repeat(len(pixels))
    log_prob: Tensor = flow.log_prob(pixels.repeat_interleave(CLASSES, dim=0), context=classes)
    return log_prob.reshape(-1, CLASSES)


@dataclass(frozen=True)
class Score:
    """The test losses of the conditional flow.

    Attributes:
        parameters: how many are trained.
        nll: mean of -ln p(x | c), in nats per image, with the true class c.
        nll_se: its standard error over the test images.
        nll_double_steps: the same at twice the integration steps.
        mixture_nll: mean of -ln p(x) with p(x) the mean of the class densities.
        mixture_nll_se: its standard error.
        accuracy: the part of the test images whose class has the largest p(x | c).
        accuracy_se: its standard error.
    """

    parameters: int
    nll: float
    nll_se: float
    nll_double_steps: float
    mixture_nll: float
    mixture_nll_se: float
    accuracy: float
    accuracy_se: float


@torch.no_grad()
def score(flow: Flow, images: Tensor, labels: Tensor) -> Score:
    """Average over several draws of the dequantisation noise, as digits.py does it."""
    draws = [
        digits.pixels(images, torch.Generator().manual_seed(draw))
        for draw in range(digits.TEST_DRAWS)
    ]

    log_prob = torch.stack([class_log_densities(flow, draw) for draw in draws])
    loss = -log_prob[:, torch.arange(len(labels)), labels].mean(0)
    mixture = -(log_prob.logsumexp(2) - math.log(CLASSES)).mean(0)
    right = (log_prob.argmax(2) == labels).float().mean(0)
    with refined(flow):
        double = -torch.stack([flow.log_prob(draw, context=labels) for draw in draws]).mean()
    return Score(
        parameters=sum(p.numel() for p in flow.parameters()),
        nll=loss.mean().item(),
        nll_se=_standard_error(loss),
        nll_double_steps=double.item(),
        mixture_nll=mixture.mean().item(),
        mixture_nll_se=_standard_error(mixture),
        accuracy=right.mean().item(),
        accuracy_se=_standard_error(right),
    )


def _standard_error(values: Tensor) -> float:
    return values.std().item() / math.sqrt(len(values))


def logistic_accuracy(images: Images, labels: Labels) -> float:
    """The test accuracy of a classifier of scikit-learn, to see the flow's beside it."""
    classifier = LogisticRegression(max_iter=2000)
    classifier.fit(images.train.numpy() / digits.LEVELS, labels.train.numpy())
    return float(classifier.score(images.test.numpy() / digits.LEVELS, labels.test.numpy()))


@torch.no_grad()
def draw(flow: Flow, path: Path, seed: int) -> None:
    """Samples of each class, and the same noise carried into every class."""
    torch.manual_seed(seed)
    samples = flow.sample(12, context=torch.arange(CLASSES))
    noise = torch.randn(CLASSES, digits.FEATURES)
    context = flow._embedding_net(torch.arange(CLASSES))
    carried, _ = flow._transform.inverse(
        noise.repeat_interleave(CLASSES, dim=0), context=context.repeat(CLASSES, 1)
    )
    figure = plt.figure(figsize=(11.5, 5.4), layout="constrained")
    ((left, right),) = figure.subfigures(1, 2, width_ratios=(1.2, 1), squeeze=False)
    left.suptitle("A row for each class: samples")
    right.suptitle("A row for each noise vector, carried into all ten classes")
    draw_rows(left, [(str(c), samples[c]) for c in range(CLASSES)], digits.SIDE, digits.GREYS)
    rows = [("", row) for row in carried.reshape(CLASSES, CLASSES, -1)]
    draw_rows(right, rows, digits.SIDE, digits.GREYS)
    save_figure(figure, path)


def table(unconditional: digits.Score, conditional: Score, logistic: float) -> Table:
    """What knowing the class is worth, and what the densities know of it."""
    result = Table(title="8x8 digits, test set")
    for column in ("density", "NLL (nats)", "at twice the steps", "accuracy"):
        result.add_column(column, justify="left" if column == "density" else "right")
    u, c = unconditional, conditional
    result.add_row(
        "unconditional", f"{u.nll:.2f} ± {u.nll_se:.2f}", f"{u.nll_double_steps:.2f}", ""
    )
    result.add_row(
        "given the class",
        f"{c.nll:.2f} ± {c.nll_se:.2f}",
        f"{c.nll_double_steps:.2f}",
        f"{c.accuracy:.3f} ± {c.accuracy_se:.3f}",
    )
    result.add_row("mean over the classes", f"{c.mixture_nll:.2f} ± {c.mixture_nll_se:.2f}", "", "")
    result.add_row("logistic regression", "", "", f"{logistic:.3f}")
    return result


def main(
    out: Annotated[Path, typer.Option(help="Folder for results.json and conditional.png.")] = Path(
        "runs/conditional"
    ),
    seconds: Annotated[float, typer.Option(min=1, help="Training time of each flow.")] = 40,
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and noise.")] = 0,
) -> None:
    """Train a flow that is told the class and one that is not; compare, classify and draw."""
    out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", module="nflows")
    images, labels = load()
    torch.manual_seed(seed)
    unconditional = digits.train(digits.FLOWS[0], images, seconds, seed)
    torch.manual_seed(seed)
    conditional = train_conditional(images, labels, seconds, seed)

    plain = digits.score(digits.FLOWS[0].name, unconditional, images.test)
    result = score(conditional, images.test, labels.test)
    logistic = logistic_accuracy(images, labels)
    draw(conditional, out / "conditional.png", seed)
    write_results(
        out,
        unconditional=asdict(plain),
        conditional=asdict(result),
        logistic_accuracy=logistic,
    )
    console.print(table(plain, result, logistic))
    console.print(f"picture: {out / 'conditional.png'}    numbers: {out / 'results.json'}")


if __name__ == "__main__":
    typer.run(main)
