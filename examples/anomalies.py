"""Which images a flow of digits takes for anomalies: by log-density, by typicality, by complexity.

    python examples/mnist.py --preset stacked --data-dir DIR --out runs/stacked
    python examples/anomalies.py --run runs/stacked --data-dir DIR --out runs/anomalies

Restores a finished run of mnist.py and tells test digits from images that are none. For each kind
of images it prints the area under the ROC curve (1: all told apart, 0.5: chance, 0: all wrong) of

- the log-density: an anomaly is what is unlikely;
- the same in logit space: densities depend on the coordinates;
- typicality (Nalisnick et al., arXiv:1906.02994): what is not as likely as the training images;
- complexity (Serrà et al., arXiv:1909.11480): what takes more bits than as a PNG file.

Log-densities are those of the dequantised pixels in [0, 1), in nats; only the second score is not.
Writes results.json and anomalies.png.
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

import math
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform
from PIL import Image
from rich.progress import track
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F

from mnist import GREYS, losses
from mnist_flows import FEATURES, LEVELS, MARGIN, PRESETS, SIDE, logits
from nflows_mongeampere import refined
from nflows_mongeampere.examples.images import Pixels, load_mnist
from nflows_mongeampere.examples.pictures import draw_rows, save_figure
from nflows_mongeampere.examples.runs import one_line_errors, read_results, write_results
from nflows_mongeampere.training import MaximumLikelihood, restore

SHOWN = 8
SCORES = ("log-density", "logit space", "typicality", "complexity")


def load_flow(run: Path, train: Tensor) -> Flow:
    """The flow of a finished run of mnist.py, with the weights that its validation set chose."""
    name = read_results(run).get("preset")
    if name not in PRESETS:
        raise ValueError(f"--run: {run} is of the preset {name!r}, expected a run of mnist.py")
    flow = Flow(CompositeTransform(PRESETS[name].build(train)), StandardNormal([FEATURES]))
    restore(MaximumLikelihood(flow, steps=1), run / "best.ckpt")
    return flow.eval()


def make_anomalies(digits: Tensor) -> dict[str, Tensor]:
    """Images that are no digits, or no upright ones, each kind of shape (N, 784)."""
    images, generator = digits.view(-1, SIDE, SIDE), torch.Generator().manual_seed(0)
    blurred = gaussian_filter(images.numpy().astype(float), (0, 1, 1))
    greys = torch.randint(LEVELS, (len(images), 1), generator=generator)
    kinds = {
        "inverted": LEVELS - 1 - images,
        "permuted pixels": digits[:, torch.randperm(FEATURES, generator=generator)],
        "uniform noise": torch.randint(LEVELS, digits.shape, generator=generator),
        "rotated by 90°": images.rot90(1, (1, 2)),
        "mirrored": images.flip(2),
        "shifted by 4 pixels": F.pad(images[:, :-4, :-4], (4, 0, 4, 0)),
        "blurred": torch.from_numpy(blurred).round(),
        "8×8 digits, enlarged": enlarged_digits(len(images)),
        "lower half erased": torch.cat([images[:, :14], torch.zeros_like(images[:, 14:])], 1),
        "constant grey": greys.expand(-1, FEATURES),
        "blank": torch.zeros_like(images),
    }
    return {kind: images.reshape(-1, FEATURES).byte() for kind, images in kinds.items()}


def enlarged_digits(count: int) -> Tensor:
    """Scikit-learn's digits of 8×8 pixels and 17 levels, in the frame and size of MNIST's."""
    small = torch.from_numpy(load_digits().images[:count])
    large = F.interpolate(small[:, None], size=20, mode="bilinear", antialias=True)
    return F.pad(large * ((LEVELS - 1) / 16), (4, 4, 4, 4)).round()


@dataclass(frozen=True)
class Densities:
    """Log-densities of images in nats, shape (N,), and how many bits they take as PNG files."""

    pixels: Tensor
    logits: Tensor
    png_bits: Tensor

    @property
    def bits(self) -> Tensor:
        """Information of the grey levels, -log₂ P."""
        return -self.pixels / math.log(2) + FEATURES * math.log2(LEVELS)

    def scores(self, typical: float) -> dict[str, Tensor]:
        """Anomaly scores, high for anomalies; ``typical`` is the training images' mean."""
        return dict(
            zip(
                SCORES,
                (
                    -self.pixels,
                    -self.logits,
                    (self.pixels - typical).abs(),
                    self.bits - self.png_bits,
                ),
                strict=True,
            )
        )


@torch.no_grad()
def evaluate(flow: Flow, levels: Tensor) -> Densities:
    """Log-densities of dequantised images, and the length of their files."""
    points = logits(levels, torch.Generator().manual_seed(0))
    found = -losses(flow, points)
    # p(x) = p(y) |dy/dx|, and the transform gives ln |dx/dy|
    return Densities(found - Pixels(MARGIN)(points)[1], found, png_bits(levels))


def png_bits(levels: Tensor) -> Tensor:
    """The length of each image as a PNG file."""
    lengths = []
    for image in levels.view(-1, SIDE, SIDE).numpy():
        file = BytesIO()
        Image.fromarray(image).save(file, format="png", optimize=True)
        lengths.append(8.0 * len(file.getvalue()))
    return torch.tensor(lengths)


def areas(normal: Densities, anomalies: Densities, typical: float) -> dict[str, float]:
    """Area under the ROC curve of each score."""
    digits, others = normal.scores(typical), anomalies.scores(typical)
    truth = np.repeat([0, 1], [len(normal.pixels), len(anomalies.pixels)])
    return {
        score: float(roc_auc_score(truth, torch.cat([digits[score], others[score]]).numpy()))
        for score in SCORES
    }


def draw(kinds: dict[str, Tensor], found: dict[str, Densities], typical: float, path: Path) -> None:
    """Some images of each kind, and the histogram of their bits."""
    figure = plt.figure(figsize=(11, 0.8 * len(kinds)), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(1.2, 1))
    left, right = parts
    rows = [(kind, images[:SHOWN] / (LEVELS - 1)) for kind, images in kinds.items()]
    draw_rows(left, rows, SIDE, GREYS)
    bits = {kind: (densities.bits / FEATURES).clamp(min=0.01) for kind, densities in found.items()}
    ends = torch.cat(list(bits.values())).aminmax()
    edges = np.geomspace(ends.min.item() * 0.9, ends.max.item() * 1.1, 80)
    axes: Any = right.subplots(len(kinds), 1, sharex=True)
    for axis, values in zip(axes, bits.values(), strict=True):
        axis.hist(values.numpy(), edges)
        axis.axvline(math.log2(LEVELS) - typical / FEATURES / math.log(2), color="black", lw=0.8)
        axis.set(xscale="log", yticks=[])
        axis.spines[["top", "left", "right"]].set_visible(False)
    axes[-1].set_xlabel("bits per pixel; line: mean of training images")
    save_figure(figure, path)


def main(
    run: Annotated[Path, typer.Option(help="Folder of a finished run of mnist.py.")],
    out: Annotated[Path, typer.Option(help="Folder for the figures and the picture.")],
    data_dir: Annotated[
        Path | None, typer.Option(help="MNIST's IDX files; left out, they are downloaded.")
    ] = None,
    count: Annotated[
        int, typer.Option("--images", min=10, max=5000, help="Test digits, and of each kind.")
    ] = 500,
) -> None:
    """Tell digits from other images by the density of a flow."""
    with one_line_errors(ValueError, OSError):
        images = load_mnist(data_dir)
        flow = load_flow(run, images.train)
        out.mkdir(parents=True, exist_ok=True)
    # anomalies are made of other digits than those that they are compared with
    kinds = {"digits": images.test[:count], **make_anomalies(images.test[count : 2 * count])}
    typical = evaluate(flow, images.train[:count]).pixels.mean().item()
    found: dict[str, Densities] = {}
    finer: dict[str, Densities] = {}
    for kind, levels in track(kinds.items(), description="log-densities"):
        found[kind] = evaluate(flow, levels)
        with refined(flow):
            finer[kind] = evaluate(flow, levels)

    table = [
        "| images | bits per pixel | " + " | ".join(SCORES) + " |",
        "|---|---:|" + "---:|" * len(SCORES),
        f"| digits | {found['digits'].bits.mean() / FEATURES:.2f} |" + " |" * len(SCORES),
    ]
    figures: dict[str, dict[str, float]] = {}
    change = 0.0
    for kind in list(kinds)[1:]:
        figures[kind] = areas(found["digits"], found[kind], typical)
        again = areas(finer["digits"], finer[kind], typical)
        change = max(change, *(abs(again[score] - figures[kind][score]) for score in SCORES))
        cells = [f"{found[kind].bits.mean() / FEATURES:.2f}"]
        cells += [f"{figures[kind][score]:.3f}" for score in SCORES]
        table.append(f"| {kind} | " + " | ".join(cells) + " |")
    write_results(
        out,
        run=read_results(run)["command"],
        training_log_density=typical,
        bits_per_pixel={kind: float(d.bits.mean()) / FEATURES for kind, d in found.items()},
        roc_auc=figures,
        largest_change_of_an_area_at_twice_the_steps=change,
    )
    draw(kinds, found, typical, out / "anomalies.png")
    typer.echo("\n".join(table))
    typer.echo(f"at twice the solver's steps no area changes by more than {change:.1e}")


if __name__ == "__main__":
    typer.run(main)
