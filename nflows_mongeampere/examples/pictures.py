"""Pictures of the examples: rows of images, written atomically."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure, SubFigure
from torch import Tensor
from torch.nn import functional as F

from nflows_mongeampere.files import write


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture atomically."""
    picture = BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    plt.close(figure)
    write(path, picture.getvalue())


def mosaic(images: Tensor, side: int, columns: int) -> Tensor:
    """Flattened images, side by side in rows, with a gap of one pixel between them."""
    tiles = F.pad(images.reshape(-1, columns, side, side), (0, 1, 0, 1), value=math.nan)
    rows = tiles.movedim(2, 1).reshape(-1, columns * (side + 1))
    return rows[:-1, :-1]


def draw_rows(
    figure: Figure | SubFigure, rows: Sequence[tuple[str, Tensor]], side: int, greys: dict[str, Any]
) -> None:
    """One row of images for each entry, labelled; coloured where values take both signs."""
    axes: Any = figure.subplots(len(rows), 1, squeeze=False)
    for (label, images), axis in zip(rows, axes[:, 0], strict=True):
        signed = bool((images < -1).any())
        style = {"cmap": "RdBu_r", "vmin": -3, "vmax": 3} if signed else greys
        axis.imshow(mosaic(images.float(), side, len(images)), **style)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
