"""Images: MNIST, pixels as real numbers, transforms of nflows set from data."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from nflows.transforms import (
    LULinear,
    PiecewiseLinearCDF,
    Transform,
)
from torch import Tensor
from torch.nn import functional as F

from nflows_mongeampere import tabular

MNIST_FILES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")
LABEL_FILES = ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True)
class Images:
    """Grey levels as rows of integers, in three parts."""

    train: Tensor
    validation: Tensor
    test: Tensor


def load_mnist(folder: Path | None) -> Images:
    """MNIST, split 50,000 : 10,000 : 10,000.

    Args:
        folder: where the IDX files are, gzipped or not; None to download them with torchvision.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if one is damaged.
        OSError: if they cannot be downloaded.
    """
    return _load(folder, MNIST_FILES, (28, 28))


def load_labels(folder: Path | None) -> Images:
    """Which digit each image of :func:`load_mnist` shows, in the same three parts, shape (N,).

    Args:
        folder: where the IDX files of the labels are, gzipped or not; None to download them.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if one is damaged.
        OSError: if they cannot be downloaded.
    """
    return _load(folder, LABEL_FILES, ())


def _download() -> Path:
    from torchvision.datasets import MNIST  # imports slowly, and only here is it needed

    root = Path(torch.hub.get_dir()).parent / "nflows-mongeampere"
    try:
        MNIST(root, download=True)
    except (RuntimeError, OSError) as error:
        raise OSError(
            f"--data-dir: MNIST could not be downloaded ({error}); get {', '.join(MNIST_FILES)} "
            "by other means and name their folder"
        ) from error
    return root / "MNIST" / "raw"


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"--data-dir: there is no {name} or {name}.gz in {folder}; give the folder that holds "
        "MNIST's IDX files, or leave the option out to download them"
    )


def _load(folder: Path | None, names: Sequence[str], shape: tuple[int, ...]) -> Images:
    """The three parts of two files with entries of some shape."""
    folder = _download() if folder is None else folder
    train, test = (_read_idx(_find(folder, name), shape) for name in names)
    if len(train) != 60_000 or len(test) != 10_000:
        raise ValueError(
            f"--data-dir: got {len(train)} and {len(test)} entries in {folder}, expected MNIST's "
            "60000 and 10000"
        )
    return Images(train[:50_000], train[50_000:], test)


def _read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The bytes of an IDX file with entries of this shape, (N,) or a row for each, (N, D)."""
    content, sizes = path.read_bytes(), f">{2 + len(shape)}i"
    try:
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"--data-dir: {path} is damaged ({error}); fetch it again") from error
    start, size = struct.calcsize(sizes), math.prod(shape)
    number = max(0, len(content) - start) // size
    header = struct.pack(sizes, 0x801 + len(shape), number, *shape)
    if content[:start] != header or len(content) != start + number * size:
        raise ValueError(
            f"--data-dir: {path} is damaged: got {len(content)} bytes that begin with "
            f"{content[:start].hex()}, expected {header.hex()} and {number} entries; fetch it again"
        )
    values = torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).copy())
    return values.view(number, size) if shape else values


def dequantise(levels: Tensor, generator: torch.Generator, number: int) -> Tensor:
    """Spread each of ``number`` grey levels over an interval of [0, 1): densities bound masses."""
    noise = torch.rand(levels.shape, generator=generator)
    return (levels + noise) / number


def to_logits(pixels: Tensor, margin: float) -> Tensor:
    """From pixels in [0, 1) to the real line: y = ln s - ln(1 - s) with s = α + (1 - 2α) x."""
    return torch.logit(margin + (1 - 2 * margin) * pixels)


def to_pixels(logits: Tensor, margin: float) -> Tensor:
    """The inverse of :func:`to_logits`."""
    return (torch.sigmoid(logits) - margin) / (1 - 2 * margin)


class Pixels(Transform):
    """From logits to pixels in [0, 1), as nflows' Sigmoid but for the margin."""

    def __init__(self, margin: float) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        slopes = F.logsigmoid(inputs) + F.logsigmoid(-inputs) - math.log(1 - 2 * self.margin)
        return to_pixels(inputs, self.margin).clamp(0, 1), slopes.sum(1)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs = to_logits(inputs, self.margin)
        return outputs, -self.forward(outputs)[1]


class Quantile(Transform):
    r"""From [0, 1] to the real line, :math:`y = F^{-1}(x)`, for a mixture F of normals.

    What is uniform becomes a mixture of normals of width 1: a single one, or clusters far from each
    other, each for a range of x whose length is its weight. Where x is discrete, as grey levels
    are, a smooth flow of y can then change the odds of two ranges without a sharp edge.

    Args:
        weights: of the clusters.
        means: of the clusters, rising.
        eps: x is clamped to [eps, 1 - eps].
    """

    grid: Tensor
    heights: Tensor

    def __init__(
        self, weights: Sequence[float] = (1.0,), means: Sequence[float] = (0.0,), eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float64))
        self.register_buffer("means", torch.tensor(means, dtype=torch.float64))
        self.register_buffer("grid", torch.linspace(means[0] - 7, means[-1] + 7, 2**14).double())
        self.register_buffer("heights", self._distribution(self.grid))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = inputs.double().clamp(self.eps, 1 - self.eps)
        place = torch.searchsorted(self.heights, x.contiguous()).clamp(1, len(self.grid) - 1)
        below, above = self.heights[place - 1], self.heights[place]
        share = (x - below) / (above - below)
        y = self.grid[place - 1] + share * (self.grid[1] - self.grid[0])
        # a line is off by 1e-7; one step of Newton's method leaves nothing
        y = y - (self._distribution(y) - x) * (-self._log_density(y)).exp()
        return y.to(inputs.dtype), -self._log_density(y).flatten(1).sum(1).to(inputs.dtype)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = inputs.double()
        logabsdet = self._log_density(y).flatten(1).sum(1)
        return self._distribution(y).to(inputs.dtype), logabsdet.to(inputs.dtype)

    def _distribution(self, y: Tensor) -> Tensor:
        heights: Tensor = torch.special.ndtr(y[..., None] - self.means) @ self.weights
        return heights

    def _log_density(self, y: Tensor) -> Tensor:
        squares = (y[..., None] - self.means).square()
        return torch.logsumexp(self.weights.log() - 0.5 * squares, -1) - 0.5 * math.log(2 * math.pi)


class Marginals(PiecewiseLinearCDF):
    """nflows' piecewise linear distribution function of each pixel, set to the data's histogram.

    nflows computes the tables anew for each image of a batch; here they are computed once.

    Args:
        levels: the training images, integers from 0 to ``number - 1``, shape (N, D).
        number: of grey levels.
        prior: a pseudo-count, added to every grey level of every pixel.
        shared: whether all pixels share the histogram of all.
    """

    def __init__(
        self, levels: Tensor, number: int, prior: float = 0.01, shared: bool = False
    ) -> None:
        levels = levels.reshape(-1, 1) if shared else levels
        super().__init__(levels.shape[1:], number)
        counts = torch.stack([row.bincount(minlength=number) for row in levels.T.int()])
        self.unnormalized_pdf.data = (counts.double() + prior).log().to(self.unnormalized_pdf.dtype)
        self.unnormalized_pdf.requires_grad_(False)

    def _spline(self, inputs: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        number = self.unnormalized_pdf.shape[1]
        mass = self.unnormalized_pdf.double().softmax(1).expand(inputs.shape[1], -1)
        below = (mass.cumsum(1) - mass).to(inputs.dtype)
        mass = mass.to(inputs.dtype)
        if inverse:
            bins = torch.searchsorted(below, inputs.T.contiguous(), right=True).T - 1
        else:
            bins = (inputs * number).floor().long().clamp(0, number - 1)
        column = torch.arange(inputs.shape[1], device=inputs.device).expand_as(bins)
        mass, below = mass[column, bins], below[column, bins]
        logabsdet = (mass * number).log().sum(1)
        if inverse:
            inside = ((inputs - below) / mass).clamp(0, 1)
            return (bins + inside) / number, -logabsdet
        return below + mass * (inputs * number - bins), logabsdet


def whitening(points: Tensor) -> LULinear:
    r"""A linear transform of nflows, set to :math:`\Sigma^{-1/2} (y - \mu)` of the data (ZCA)."""
    points = points.double()
    return tabular.whitening(points.mean(0), torch.cov(points.T))
