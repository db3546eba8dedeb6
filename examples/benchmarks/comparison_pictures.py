"""The pictures of the comparison: densities of toys, samples of images."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.layout_engine import ConstrainedLayoutEngine

from comparison_cells import GRID, Figures, grid, read_arrays
from densities import Data
from flows import FLOWS
from nflows_mongeampere.examples.pictures import draw_rows, save_figure


def label(flow: str) -> str:
    """The title of a flow in short lines, for the margin of a picture."""
    return textwrap.fill(FLOWS[flow].title, 14, break_on_hyphens=False)


def draw_toys(out: Path, data: dict[str, Data], figures: list[Figures], path: Path) -> None:
    """The density of each toy, and below it those of the flows."""
    flows = list(dict.fromkeys(f.flow for f in figures if f.data in data))
    seeds = {(f.data, f.flow): f.seed for f in reversed(figures)}
    size = (1.05 * len(data) + 1.4, 1.05 * (len(flows) + 1) + 0.3)
    tight = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
    figure = plt.figure(figsize=size, layout=tight)
    axes: Any = figure.subplots(len(flows) + 1, len(data), squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], aspect="equal")
        axis.spines[:].set_visible(False)
    for column, (name, each) in enumerate(data.items()):
        assert each.toy is not None
        truth = each.toy.log_prob(grid()).exp().view(GRID, GRID).numpy()
        top = np.quantile(truth, 0.995)
        entries = [read_arrays(out, name, f, seeds.get((name, f), 0)) for f in flows]
        for line, density in enumerate([truth, *(found.get("density") for found in entries)]):
            if density is not None:
                axes[line, column].imshow(density, origin="lower", vmin=0, vmax=top)
        axes[0, column].set_title(name, fontsize=9)
    for line, text in enumerate(["the data", *map(label, flows)]):
        axes[line, 0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8)
    save_figure(figure, path)


def draw_images(out: Path, name: str, data: Data, figures: list[Figures], path: Path) -> None:
    """A row of samples for each flow."""
    assert data.to_picture is not None
    rows = [("the data", data.to_picture(data.test[:10]))]
    for each in figures:
        title = label(each.flow)
        found = read_arrays(out, name, each.flow, each.seed)
        if each.data == name and found and title not in dict(rows):
            rows.append((title, torch.from_numpy(found["samples"])))
    figure = plt.figure(figsize=(8, 0.66 * len(rows)), layout="compressed")
    draw_rows(figure, rows, math.isqrt(data.features), {"cmap": "gray_r", "vmin": 0, "vmax": 1})
    save_figure(figure, path)
