"""The table and the pictures of finished MNIST runs, side by side.

python examples/benchmarks/mnist_table.py runs/stacked runs/fast runs/maf --out docs/results/mnist
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

import csv
import itertools
import math
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer

from nflows_mongeampere.examples.pictures import mosaic, save_figure
from nflows_mongeampere.examples.runs import collect, one_line_errors
from nflows_mongeampere.files import write

# the published run: its loss after so many epochs of 500 steps (arXiv:1809.10188)
PUBLISHED = {5: 1388, 10: 1370, 20: 1336, 50: 1290, 100: 1273, 200: 1264, 400: 1257}
STEPS_OF_AN_EPOCH = 500

NAMES = {
    "paper": "Monge-Ampère, as published",
    "fast": "Monge-Ampère behind whitening",
    "coupling": "Monge-Ampère, coupling layers behind whitening",
    "convolutional": "Monge-Ampère, convolutional, behind marginals",
    "stacked": "Monge-Ampère, coarse to fine, behind marginals",
    "deep": "Monge-Ampère, coarse to fine, deeper networks",
    "whitened": "Monge-Ampère, coarse to fine, behind whitening",
    "whitened-spline": "nflows rational-quadratic coupling behind marginals and whitening",
    "glow": "normflows Glow blocks behind marginals",
    "realnvp": "nflows `SimpleRealNVP` behind whitening",
    "maf": "nflows `MaskedAutoregressiveFlow` behind whitening",
    "spline": "nflows rational-quadratic coupling behind whitening",
}


def line(results: dict[str, Any]) -> str:
    """One row of the table."""
    double = results["nll_double_steps"]
    return (
        f"| {NAMES[results['preset']]} | {results['parameters']:,} | {results['minutes']:.1f} "
        f"| {results['nll']:.2f} ± {results['nll_se']:.2f} "
        f"| {'' if double is None else f'{double:.2f}'} "
        f"| {max(results['nll_draws']) - min(results['nll_draws']):.2f} "
        f"| {results['bits_per_dim']:.4f} | `{results['command']}` |"
    )


def draw_samples(runs: list[tuple[Path, dict[str, Any]]], path: Path) -> None:
    """32 samples of each flow."""
    columns = min(3, len(runs))
    rows = math.ceil(len(runs) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 2.4 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (folder, results) in zip(axes.flat, runs, strict=False):
        samples = torch.from_numpy(np.load(folder / "samples.npy"))[:32].float()
        axis.imshow(mosaic(samples, 28, 8), cmap="gray_r", vmin=0, vmax=255)
        axis.set_title(f"{results['preset']}: {results['nll']:.1f} nats", fontsize=10)
    save_figure(figure, path)


def draw_curves(runs: list[tuple[Path, dict[str, Any]]], path: Path) -> None:
    """Validation loss against time."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    styles = itertools.cycle(
        ("o-", "s--", "^-.", "v:", "D-", "x--")
    )  # colours are not for all eyes
    for (folder, results), style in zip(runs, styles, strict=False):
        with (folder / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        axes.plot(
            [float(row["minutes"]) for row in rows],
            [float(row["validation"]) for row in rows],
            style,
            markersize=4,
            label=results["preset"],
        )
    for level, name in ((1255.5, "Monge-Ampère, published"), (1038.5, "MADE MoG, published")):
        axes.axhline(level, color="grey", linestyle=":", linewidth=0.8)
        axes.text(0.01, level, name, fontsize=7, va="bottom", transform=axes.get_yaxis_transform())
    axes.set(
        xlabel="minutes on two CPU cores",
        ylabel="validation NLL (nats)",
        xscale="log",
        ylim=(None, 1600),
    )
    figure.legend(loc="outside right upper", frameon=False)
    save_figure(figure, path)


def draw_paper(folder: Path, path: Path) -> None:
    """The published flow, trained as published: our learning curve and the published one."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    epochs = [float(row["step"]) / STEPS_OF_AN_EPOCH for row in rows]
    axes.plot(list(PUBLISHED), list(PUBLISHED.values()), "s:", color="grey", label="published")
    axes.plot(epochs, [float(row["validation"]) for row in rows], "o-", label="ours, validation")
    axes.set(xlabel="epochs", ylabel="NLL (nats)", xscale="log")
    axes.legend(frameon=False)
    save_figure(figure, path)


def main(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    out: Annotated[Path, typer.Option(help="Folder for the table, figures and metrics.")],
) -> None:
    """Collect finished runs into a table with figures, best first."""
    with one_line_errors(ValueError):
        found = collect(runs, out, lambda r: r["nll"], "{preset}")
    table = [
        "| flow | parameters | minutes | test NLL (nats) | at twice the steps | spread of draws "
        "| bits/dim | command |",
        "|---|---|---|---|---|---|---|---|",
        *(line(results) for _, results in found),
    ]
    write(out / "table.md", "\n".join(table) + "\n")
    draw_samples(found, out / "samples.png")
    draw_curves(found, out / "learning.png")
    for folder, results in found:
        if results["preset"] == "paper":
            draw_paper(folder, out / "paper.png")
    typer.echo("\n".join(table))


if __name__ == "__main__":
    typer.run(main)
