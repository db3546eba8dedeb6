"""Whether the samples of finished MNIST runs look like digits: a classifier's verdict.

    python examples/benchmarks/mnist_samples.py runs/stacked runs/fast --data-dir DIR --out OUT

A classifier of scikit-learn, trained on real digits, says how sure it is of samples, relative to
real digits of the validation set; and which digits it takes them for. For a scale, it is asked of
images that have each pixel from another digit as well. The nearest training image of each sample
shows that samples are no copies. Writes samples_verdict.json and samples_verdict.png.
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from torch import Tensor

from nflows_mongeampere.examples.images import load_labels, load_mnist
from nflows_mongeampere.examples.pictures import draw_rows, save_figure
from nflows_mongeampere.examples.runs import command, one_line_errors, read_results, write_json
from nflows_mongeampere.examples.verdict import (
    WHITE,
    Verdict,
    grey,
    judge,
    nearest,
    train_classifier,
)

SIDE, SHOWN = 28, 16
CLASSIFIER_IMAGES, REAL_IMAGES = 10_000, 2000


def read_samples(folder: Path) -> Tensor:
    """The grey levels of a run's samples, shape (N, 784)."""
    path = folder / "samples.npy"
    if not path.is_file():
        raise ValueError(f"{folder} holds no samples.npy: let its run end first")
    levels = np.load(path)
    if levels.dtype != np.uint8 or levels.shape[1:] != (SIDE * SIDE,):
        raise ValueError(
            f"{path} has {levels.dtype} of shape {levels.shape}, expected uint8 of shape (N, 784): "
            "name runs of mnist.py"
        )
    return torch.from_numpy(levels)


def shuffled(levels: Tensor) -> Tensor:
    """Each pixel from another image: the marginals of digits, and nothing else of them."""
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.permuted(levels.numpy(), axis=0))


def line(name: str, verdict: Verdict, real: Verdict, nll: float | None = None) -> str:
    """One row of the table."""
    return (
        f"| {name} | {'' if nll is None else f'{nll:.1f}'} | {verdict.count} "
        f"| {verdict.confidence:.3f} ± {verdict.confidence_se:.3f} "
        f"| {verdict.confidence / real.confidence:.3f} | {verdict.entropy:.3f} "
        f"| {verdict.distance:.2f} | {verdict.copies:.1%} |"
    )


def draw(rows: list[tuple[str, Tensor]], path: Path) -> None:
    """One row of images for each entry."""
    figure = plt.figure(figsize=(11, 0.75 * len(rows)), layout="constrained")
    greys = {"cmap": "gray_r", "vmin": 0, "vmax": 1}
    draw_rows(figure, [(label, levels / WHITE) for label, levels in rows], SIDE, greys)
    save_figure(figure, path)


def main(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    out: Annotated[Path, typer.Option(help="Folder for the figures and the picture.")],
    data_dir: Annotated[
        Path | None, typer.Option(help="MNIST's IDX files; left out, they are downloaded.")
    ] = None,
) -> None:
    """Judge the samples of finished runs by a classifier and by the training images."""
    with one_line_errors(ValueError, OSError):
        found = [(read_results(folder), read_samples(folder)) for folder in runs]
        images, labels = load_mnist(data_dir), load_labels(data_dir)
        out.mkdir(parents=True, exist_ok=True)
    train, validation = images.train, images.validation[:REAL_IMAGES]
    classifier = train_classifier(train[:CLASSIFIER_IMAGES], labels.train[:CLASSIFIER_IMAGES])
    accuracy = float(classifier.score(grey(validation), labels.validation[:REAL_IMAGES].numpy()))

    real, without_shape = (judge(classifier, x, train) for x in (validation, shuffled(validation)))
    table = [
        "| images | test NLL (nats) | number | confidence | relative to real digits "
        "| class balance | distance to the nearest training image | copies |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        line("real digits", real, real),
        line("each pixel from another digit", without_shape, real),
    ]
    judged: list[dict[str, Any]] = []
    rows = [("real digits", validation[:SHOWN])]
    for results, samples in found:
        verdict = judge(classifier, samples, train)
        judged.append(
            {
                **{key: results[key] for key in ("preset", "nll", "minutes", "command")},
                "relative_confidence": verdict.confidence / real.confidence,
                **asdict(verdict),
            }
        )
        table.append(line(results["preset"], verdict, real, results["nll"]))
        some = samples[:SHOWN]
        places, _ = nearest(some, train)
        rows += [(results["preset"], some), ("nearest training image", train[places])]
    write_json(
        out / "samples_verdict.json",
        {
            "command": command(),
            "classifier_accuracy": accuracy,
            "real": asdict(real),
            "each_pixel_from_another_digit": asdict(without_shape),
            "runs": judged,
        },
    )
    draw(rows, out / "samples_verdict.png")
    typer.echo("\n".join(table))
    typer.echo(f"the classifier is right of {accuracy:.2%} of {REAL_IMAGES} validation images")


if __name__ == "__main__":
    typer.run(main)
