"""Pictures of a φ⁴ run: learning, samples, the two-point function."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from nflows_mongeampere.examples.pictures import save_figure
from nflows_mongeampere.targets import Phi4
from nflows_mongeampere.training import History
from nflows_mongeampere.variational import Estimate, WeightedSamples


def draw_learning(history: History, target: Phi4, corrected: float, folder: Path) -> None:
    """The variational free energy above the corrected one against the steps."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    steps = [row["step"] for row in history.rows]
    # validations are of few fields, whose noise is larger than what is left in the end
    axes.plot(steps, [row["train"] / target.sites - corrected for row in history.rows])
    axes.set(
        xlabel="training steps",
        ylabel="free energy above the corrected one, per site (nats)",
        xscale="log",
        yscale="log",
    )
    save_figure(figure, folder / "learning.png")


@torch.no_grad()
def draw_samples(samples: WeightedSamples, target: Phi4, seed: int, folder: Path) -> None:
    """Fields, drawn by their weights."""
    torch.manual_seed(seed)
    chosen = samples.x[torch.multinomial(samples.log_weights.softmax(0), 6, replacement=True)]
    size = float(chosen.abs().max())
    figure, axes = plt.subplots(1, 6, figsize=(10, 1.9), layout="constrained")
    for axis, field in zip(axes, target.field(chosen), strict=True):
        image = axis.imshow(field, cmap="RdBu_r", vmin=-size, vmax=size)
        axis.set(xticks=[], yticks=[])
    figure.colorbar(image, ax=axes, label="φ")
    save_figure(figure, folder / "samples.png")


def draw_two_point(flow: list[Estimate], known: list[Estimate], folder: Path) -> None:
    """The two-point function along an axis, from the flow and from hybrid Monte Carlo."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for estimates, style, label in (
        (known, {"fmt": "s", "mfc": "none"}, "hybrid Monte Carlo"),
        (flow, {"fmt": "."}, "flow, by weights"),
    ):
        values, errors = zip(*estimates, strict=True)
        axes.errorbar(range(len(values)), values, errors, label=label, **style)  # type: ignore[arg-type]
    axes.set(xlabel="distance r", ylabel="two-point function", yscale="log")
    axes.legend(frameon=False)
    save_figure(figure, folder / "two_point.png")
