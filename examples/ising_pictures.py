"""Pictures of an Ising run: learning, samples, a path from noise to data, the structure factor."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from nflows.flows import Flow
from torch import Tensor

from ising_monte_carlo import Reference
from nflows_mongeampere import MongeAmpereTransform
from nflows_mongeampere.examples.pictures import save_figure
from nflows_mongeampere.targets import Ising
from nflows_mongeampere.training import History
from nflows_mongeampere.variational import WeightedSamples

# free energy per site of the critical model at L = 16, arXiv:1809.10188
PUBLISHED = {16: (-2.2940, Ising(16).free_energy)}


def draw_learning(history: History, target: Ising, folder: Path) -> None:
    """The gap to the exact free energy against the steps, with the published one."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    exact, steps = target.free_energy, [row["step"] for row in history.rows]
    for key, label in (("train", "training"), ("validation", "at twice the solver's steps")):
        gaps = [row[key] / target.sites - exact for row in history.rows]
        axes.plot(steps, gaps, label=label)
    published, critical = PUBLISHED.get(target.length, (0.0, None))
    if exact == critical:
        axes.axhline(published - exact, color="grey", linestyle=":", label="published")
    axes.set(
        xlabel="training steps",
        ylabel="free energy above the exact one, per site (nats)",
        xscale="log",
        yscale="log",
    )
    axes.legend(frameon=False)
    save_figure(figure, folder / "learning.png")


@torch.no_grad()
def draw_samples(samples: WeightedSamples, target: Ising, seed: int, folder: Path) -> None:
    """Fields, and spins drawn from them."""
    torch.manual_seed(seed)
    chosen = samples.x[torch.multinomial(samples.log_weights.softmax(0), 6, replacement=True)]
    fields, spins = target.field(chosen), target.sample_spins(chosen)
    figure, axes = plt.subplots(2, 6, figsize=(10, 3.6), layout="constrained")
    for column in range(6):
        axes[0, column].imshow(spins[column], cmap="gray", vmin=-1, vmax=1)
        image = axes[1, column].imshow(fields[column], cmap="RdBu_r", vmin=-4, vmax=4)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("spins")
    axes[1, 0].set_ylabel("field x")
    figure.colorbar(image, ax=axes[1])
    save_figure(figure, folder / "samples.png")


@torch.no_grad()
def draw_path(flow: Flow, target: Ising, seed: int, folder: Path) -> None:
    """One draw of noise on its way into a critical configuration, transform by transform."""
    torch.manual_seed(seed)
    points = [flow._distribution.sample(1)]
    names = ["noise"]
    for number, transform in enumerate(reversed(list(flow._transform._transforms)), 1):
        points.append(transform.inverse(points[-1])[0])
        names.append(f"after {number}" if isinstance(transform, MongeAmpereTransform) else "field")
    shown = [*range(0, len(points) - 1, max(1, len(points) // 5)), len(points) - 1]
    points = [points[i] for i in shown] + [target.mean_spins(points[-1]).flatten(1)]
    names = [names[i] for i in shown] + ["mean spin"]
    figure, axes = plt.subplots(
        1, len(points), figsize=(1.7 * len(points), 2.1), layout="constrained"
    )
    for axis, point, name in zip(axes, points, names, strict=True):
        size = float(point.abs().max())
        axis.imshow(target.field(point)[0], cmap="RdBu_r", vmin=-size, vmax=size)
        axis.set(xticks=[], yticks=[], title=name)
    save_figure(figure, folder / "path.png")


def draw_structure(structure: Tensor, error: Tensor, known: Reference, folder: Path) -> None:
    """The structure factor along an axis of the lattice, from the flow and from Monte Carlo."""
    length = len(structure)
    modes = torch.arange(length // 2 + 1)
    wave = 2 * math.pi * modes / length
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    exact, exact_error = known.structure
    axes.errorbar(
        wave,
        exact[0, modes],
        exact_error[0, modes],
        fmt="s",
        mfc="none",
        label="cluster Monte Carlo",
    )
    axes.errorbar(wave, structure[0, modes], error[0, modes], fmt=".", label="flow, by weights")
    axes.set(xlabel="k", ylabel="S(k)", yscale="log")
    axes.legend(frameon=False)
    save_figure(figure, folder / "structure.png")
