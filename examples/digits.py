"""Density estimation of handwritten digits with a Monge-Ampère flow inside an nflows pipeline.

The data are scikit-learn's 8x8 digits, 1797 images of 64 pixels with 17 grey levels, dequantised by
uniform noise. The same pipeline, pixels -> logits -> nflows' own linear transform -> flow ->
standard normal, is trained by maximum likelihood with a Monge-Ampère flow, coupling layers of them,
a neural spline flow and a RealNVP, each for the same wall-clock time; the validation set chooses
the checkpoint and the test set is read once. Without a flow the pipeline is a
full-covariance Gaussian on the logits.

    python examples/digits.py --out runs/digits --seconds 50 --seed 0
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

import math
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import torch
import typer
from nflows.distributions import StandardNormal
from nflows.flows import Flow, SimpleRealNVP
from nflows.nn.nets import ResidualNet
from nflows.transforms import (
    CompositeTransform,
    IdentityTransform,
    Logit,
    LULinear,
    PiecewiseRationalQuadraticCouplingTransform,
    PointwiseAffineTransform,
    Transform,
)
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nflows_mongeampere import (
    MongeAmpereCouplingTransform,
    MongeAmpereTransform,
    RidgePotential,
    refined,
)
from nflows_mongeampere.examples.images import Images, dequantise, whitening
from nflows_mongeampere.examples.pictures import draw_rows, save_figure
from nflows_mongeampere.examples.runs import write_results
from nflows_mongeampere.training import (
    EndlessBatches,
    MaximumLikelihood,
    SolverGuard,
    endless,
    fit,
)

LEVELS, SIDE = 17, 8
FEATURES = SIDE * SIDE
MARGIN = 0.01  # of the unit interval, kept free at both ends before the logit
TEST_DRAWS = 10
SOLVER_TOLERANCE = 0.02  # nats, above which training takes more of the solver's steps
GREYS: dict[str, Any] = {"cmap": "gray_r", "vmin": 0, "vmax": LEVELS}
console = Console()


@dataclass(frozen=True)
class Entry:
    """A flow to compare, with the settings that the validation set chose for it.

    Attributes:
        name: how tables call it.
        make: makes it for whitened logits, of which it gets some.
        learning_rate, weight_decay: of AdamW.
    """

    name: str
    make: Callable[[Tensor], Transform]
    learning_rate: float
    weight_decay: float


def ridges(white: Tensor) -> Transform:
    """The published potential, its first ridges along the pixels."""
    potential = RidgePotential(FEATURES, 512)
    potential.initialize(white)
    return MongeAmpereTransform(potential, time=1.0, steps=4)


def couplings(white: Tensor) -> Transform:
    """Half of the pixels flow in ridges that a small network draws from the others, in turns."""
    width = 64

    def network(passing: int, outputs: int) -> nn.Module:
        inner = (nn.Linear(passing, width), nn.SiLU(), nn.Dropout(0.5))
        return nn.Sequential(*inner, nn.Linear(width, outputs), nn.SiLU())

    layers = []
    for i in range(4):
        # every other column, then every other row
        place = torch.arange(FEATURES) % SIDE if i < 2 else torch.arange(FEATURES) // SIDE
        moves = place % 2 == i % 2
        potential = RidgePotential(FEATURES // 2, 128, context_features=width)
        potential.initialize(white[:, moves])
        layers.append(MongeAmpereCouplingTransform(moves.int(), network, potential, steps=2))
    return CompositeTransform([LULinear(FEATURES), *layers])


def splines(white: Tensor) -> Transform:
    """Rational-quadratic coupling layers behind a linear one, which mixes the pixels."""
    layers = [
        PiecewiseRationalQuadraticCouplingTransform(
            (torch.arange(FEATURES) % 2 == i % 2).int(),
            lambda inputs, outputs: ResidualNet(inputs, outputs, 128, num_blocks=2),
            num_bins=8,
            tails="linear",
            tail_bound=5.0,
        )
        for i in range(4)
    ]
    return CompositeTransform([LULinear(FEATURES), *layers])


FLOWS = (
    Entry(
        "Monge-Ampère",
        ridges,
        learning_rate=1e-2,
        weight_decay=0.3,
    ),
    Entry("Monge-Ampère coupling", couplings, learning_rate=1e-2, weight_decay=0.1),
    Entry("nflows RQ coupling", splines, learning_rate=1e-2, weight_decay=0.1),
    Entry(
        "nflows RealNVP",
        lambda white: SimpleRealNVP(FEATURES, 64, 6, 1, dropout_probability=0.2)._transform,
        learning_rate=1e-3,
        weight_decay=0.1,
    ),
)


def load() -> Images:
    """Split 1257 : 180 : 360, the same way every time."""
    images = torch.tensor(load_digits().data, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, validation, train = images[order].split([360, 180, len(images) - 540])
    return Images(train, validation, test)


def pixels(levels: Tensor, generator: torch.Generator) -> Tensor:
    """Dequantised images, grey levels in [0, 17)."""
    return LEVELS * dequantise(levels, generator, LEVELS)


def pixels_to_logits() -> list[Transform]:
    """[0, 17] -> the real line."""
    return [PointwiseAffineTransform(MARGIN, (1 - 2 * MARGIN) / LEVELS), Logit()]


def pipeline(train: Tensor, make: Callable[[Tensor], Transform]) -> Flow:
    """Pixels -> logits -> whitened logits -> noise."""
    to_logits = pixels_to_logits()
    generator = torch.Generator().manual_seed(0)
    logits, _ = CompositeTransform(to_logits)(pixels(train.repeat(10, 1), generator))
    whiten = whitening(logits)
    flow = make(whiten(logits)[0])
    return Flow(CompositeTransform([*to_logits, whiten, flow]), StandardNormal([FEATURES]))


def train(entry: Entry, digits: Images, seconds: float, seed: int) -> Flow:
    """The flow of ``entry`` at the checkpoint with the best validation loss."""
    flow = pipeline(digits.train, entry.make)

    def optimizer(flow: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            flow.parameters(), lr=entry.learning_rate, weight_decay=entry.weight_decay
        )

    watched = pixels(digits.validation.repeat(3, 1), torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        fit(
            MaximumLikelihood(flow, optimizer=optimizer, minutes=seconds / 60, seed=seed),
            endless(EndlessBatches(digits.train, 100, seed, pixels), interval=120),
            DataLoader(TensorDataset(watched), batch_size=len(watched)),
            folder,
            name=f"{entry.name:>21}",
            callbacks=[SolverGuard(SOLVER_TOLERANCE)],
        )
    return flow.cpu().eval()


@dataclass(frozen=True)
class Score:
    """The test loss of a flow.

    Attributes:
        name: of the flow.
        parameters: how many are trained.
        nll: mean negative log-likelihood, in nats per image, of grey levels in [0, 17).
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
        draws = [pixels(test, torch.Generator().manual_seed(draw)) for draw in range(TEST_DRAWS)]
        return torch.stack([-flow.log_prob(draw) for draw in draws]).mean(0)

    loss = losses()
    nll, double = loss.mean().item(), None
    if any(isinstance(module, MongeAmpereTransform) for module in flow.modules()):
        with refined(flow):
            double = losses().mean().item()
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
        name = column == "flow"
        result.add_column(column, justify="left" if name else "right", no_wrap=name)
    for s in sorted(scores, key=lambda s: s.nll):
        double = "" if s.nll_double_steps is None else f"{s.nll_double_steps:.3f}"
        nll = f"{s.nll:.2f} ± {s.nll_se:.2f}" if not double else f"{s.nll:.3f} ± {s.nll_se:.2f}"
        result.add_row(s.name, f"{s.parameters:,}", nll, f"{s.bits_per_dim:.4f}", double)
    return result


@torch.no_grad()
def draw(flows: dict[str, Flow], digits: Images, path: Path) -> float:
    """Draw samples of every flow, and digits on their way into noise and back.

    Returns:
        The largest error of the reconstructed pixels, in grey levels.
    """
    count = 8
    flow = flows[FLOWS[0].name]
    *before, transport = flow._transform._transforms
    whiten = CompositeTransform(before)
    originals = pixels(digits.test[:count], torch.Generator().manual_seed(0))
    times = torch.linspace(transport.time, 0, 3)
    inwards = transport.trajectory(whiten(originals)[0], times).points
    outwards = transport.trajectory(inwards[-1], times.flip(0)).points
    restored, _ = whiten.inverse(outwards[-1])
    error = float((restored - originals).abs().max())

    samples = {"data": digits.test[count : 2 * count]}
    samples |= {name: f.sample(count) for name, f in flows.items()}
    path_images = [
        ("digits", originals),
        ("whitened\nt = T", inwards[0]),
        ("t = T/2", inwards[1]),
        ("noise\nt = 0", inwards[2]),
        ("t = T/2", outwards[1]),
        ("t = T", outwards[2]),
        (f"restored to\n{error:.0e} of 17", restored),
    ]
    figure = plt.figure(figsize=(13, 6.2), layout="constrained")
    ((left, right),) = figure.subfigures(1, 2, width_ratios=(1.06, 1), squeeze=False)
    left.suptitle("Samples after the same training time")
    right.suptitle(f"{FLOWS[0].name}: digits into noise and back")
    draw_rows(left, list(samples.items()), SIDE, GREYS)
    draw_rows(right, path_images, SIDE, GREYS)
    save_figure(figure, path)
    return error


def main(
    out: Annotated[Path, typer.Option(help="Folder for results.json and digits.png.")] = Path(
        "runs/digits"
    ),
    seconds: Annotated[float, typer.Option(min=1, help="Training time of each flow.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and noise.")] = 0,
) -> None:
    """Train flows on scikit-learn's digits for the same time each, compare and draw them."""
    # on batches this small a second thread gains little, and beside other work it waits for long
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", module="nflows")
    digits = load()
    console.print(
        f"{len(digits.train)} digits to train on, {len(digits.validation)} to choose by, "
        f"{len(digits.test)} to test on; {seconds:g} s for each of {len(FLOWS)} flows"
    )
    torch.manual_seed(seed)
    flows = {entry.name: train(entry, digits, seconds, seed) for entry in FLOWS}
    flows["Gaussian"] = pipeline(digits.train, lambda white: IdentityTransform()).eval()

    scores = [score(name, flow, digits.test) for name, flow in flows.items()]
    error = draw(flows, digits, out / "digits.png")
    write_results(
        out,
        reconstruction_error=error,
        scores=[asdict(s) for s in scores],
    )
    console.print(table(scores, seconds))
    console.print(f"pictures: {out / 'digits.png'}    numbers: {out / 'results.json'}")


if __name__ == "__main__":
    typer.run(main)
