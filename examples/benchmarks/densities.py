r"""The data that the architecture benchmark compares flows on.

Toys in two dimensions have a density that is known exactly, and so the best that a flow could do is
known. Two kinds suffice: what is smeared around a curve, and what is constant on the squares of a
mosaic. Images go to logits and are then whitened by a fixed linear map, the same for every flow;
:attr:`Data.volume` takes their density back to where others report it. Tables are those of
``tables.py``.

To add a data set, add a line to :data:`DATA`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from nflows_mongeampere.examples.images import (
    Images,
    Pixels,
    dequantise,
    load_mnist,
    to_logits,
    to_pixels,
)
from nflows_mongeampere.training import EndlessBatches
from tables import TABLES

MISSING = 'install it with: pip install "nflows-mongeampere[examples]"'


class Toy(Protocol):
    """A density in the plane."""

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Points, shape (count, 2)."""

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density at points, shape (B, 2)."""


@dataclass(frozen=True)
class Smeared:
    r"""A curve blurred by a normal distribution.

    .. math:: p(x) = \int_0^1 N(x; c(u), w^2)\, du

    Args:
        curve: c, from u in (0, 1), shape (N,), to points (N, 2).
        width: w.
    """

    curve: Callable[[Tensor], Tensor]
    width: float

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(count, 2, generator=generator)
        return self.curve(torch.rand(count, generator=generator)) + self.width * noise

    def log_prob(self, x: Tensor, nodes: int = 4000) -> Tensor:
        centres = self.curve((torch.arange(nodes) + 0.5) / nodes)
        normalizer = math.log(nodes * 2 * math.pi * self.width**2)
        parts = [
            torch.logsumexp(-torch.cdist(part, centres).square() / (2 * self.width**2), dim=1)
            for part in x.split(500)
        ]
        return torch.cat(parts) - normalizer


@dataclass(frozen=True)
class Mosaic:
    """A density that is constant on each square of a mosaic.

    Args:
        mass: of the squares, rows from the bottom, shape (N, N).
        side: of the whole mosaic, whose centre is at the origin.
    """

    mass: Tensor
    side: float = 4.0

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        cells = torch.multinomial(self.mass.flatten(), count, replacement=True, generator=generator)
        number = len(self.mass)
        corners = torch.stack([cells % number, cells // number], dim=1)
        inside = torch.rand(count, 2, generator=generator)
        return ((corners + inside) / number - 0.5) * self.side

    def log_prob(self, x: Tensor) -> Tensor:
        number = len(self.mass)
        cells = ((x / self.side + 0.5) * number).floor().long()
        outside = ((cells < 0) | (cells >= number)).any(1)
        column, row = cells.clamp(0, number - 1).T
        density = self.mass / self.mass.sum() * (number / self.side) ** 2
        return density[row, column].log().masked_fill(outside, -math.inf)


def _polar(radius: Tensor | float, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)


def _parts(u: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Which of ``number`` equal parts of (0, 1) u is in, and where in it, again in (0, 1)."""
    part = (u * number).floor()
    return part, u * number - part


def moons(u: Tensor) -> Tensor:
    """Two half circles that reach into each other."""
    lower, place = _parts(u, 2)
    sign = 1 - 2 * lower
    arc = sign[:, None] * _polar(1.0, math.pi * place)
    return 1.5 * (arc + sign[:, None] * torch.tensor([-0.5, -0.25]))


def circles(u: Tensor) -> Tensor:
    """Two rings, one around the other."""
    outer, place = _parts(u, 2)
    return _polar(0.8 + 0.8 * outer, 2 * math.pi * place)


def pinwheel(u: Tensor) -> Tensor:
    """Five bent arms, normal along their length."""
    arm, place = _parts(u, 5)
    radius = 1 + 0.35 * torch.special.ndtri(place.double()).float()
    return 1.3 * _polar(radius, 2 * math.pi * arm / 5 + 0.4 * radius.exp())


def gaussians(u: Tensor) -> Tensor:
    """Eight centres on a ring."""
    return _polar(2.0, 2 * math.pi * _parts(u, 8)[0] / 8)


def spirals(u: Tensor) -> Tensor:
    """Two arms of one and a half turns."""
    arm, place = _parts(u, 2)
    angle = 3 * math.pi * place.sqrt()
    return _polar(0.25 * angle, angle + math.pi * arm)


def checkerboard() -> Mosaic:
    """Eight of sixteen squares."""
    place = torch.arange(4)
    return Mosaic(((place + place[:, None]) % 2).float())


def picture() -> Mosaic:
    """A photograph that scikit-learn brings along, CC BY 2.0, flickr.com/photos/vultilion."""
    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise ImportError(f"the picture is scikit-learn's, which is missing; {MISSING}") from error
    rgb = torch.tensor(load_sample_image("flower.jpg"), dtype=torch.float32)
    light = rgb[75:370, 165:460].mean(2) / 255
    tiles = F.adaptive_avg_pool2d(light[None], 96)[0]
    return Mosaic(tiles.flip(0).square())


TOYS: dict[str, Callable[[], Toy]] = {
    "moons": partial(Smeared, moons, 0.12),
    "circles": partial(Smeared, circles, 0.1),
    "pinwheel": partial(Smeared, pinwheel, 0.1),
    "gaussians": partial(Smeared, gaussians, 0.2),
    "spirals": partial(Smeared, spirals, 0.08),
    "checkerboard": checkerboard,
    "picture": picture,
}


@dataclass(frozen=True)
class Data:
    """What flows are trained and judged on.

    Attributes:
        features: D.
        batches: an endless row of training batches, from a seed.
        validation: points that choose the checkpoint, shape (N, D).
        test: points that are read once, shape (draws * N, D): all of a draw together.
        draws: of dequantisation noise for each test image; 1 for toys and tables.
        volume: :math:`\\ln|dy/dx|` of each test point, from where figures are reported (x) to where
            the flow lives (y).
        unit: what a figure is a figure of.
        to_picture: makes the grey levels of images, between 0 and 1, from points; None for others.
        toy: the exact density, for toys.
    """

    features: int
    batches: Callable[[int], EndlessBatches]
    validation: Tensor
    test: Tensor
    volume: Tensor
    unit: str
    draws: int = 1
    to_picture: Callable[[Tensor], Tensor] | None = None
    toy: Toy | None = None


def plane(name: str, data_dir: Path | None = None) -> Data:
    """A toy: every batch is new."""
    toy = TOYS[name]()

    def fresh(rows: Tensor, generator: torch.Generator) -> Tensor:
        return toy.sample(len(rows), generator)

    def points(count: int, seed: int) -> Tensor:
        return toy.sample(count, torch.Generator().manual_seed(seed))

    return Data(
        features=2,
        batches=lambda seed: EndlessBatches(torch.empty(256, 0), 256, seed, fresh),
        validation=points(2000, 1),
        test=points(10_000, 2),
        volume=torch.zeros(10_000),
        unit="nats",
        toy=toy,
    )


def digits(data_dir: Path | None = None) -> Data:
    """scikit-learn's 8x8 digits, in pixels of 17 grey levels, split as examples/digits.py does."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"the digits are scikit-learn's, which is missing; {MISSING}") from error
    images = torch.tensor(load_digits().data, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, validation, train = images[order].split([360, 180, len(images) - 540])
    return _images(Images(train, validation, test), levels=17, margin=0.01, draws=5, pixels=True)


def mnist(data_dir: Path | None = None) -> Data:
    """MNIST in logit space, as it was published; 1,000 images choose, 2,000 test."""
    images = load_mnist(data_dir)
    images = Images(images.train, images.validation[:1000], images.test[:2000])
    return _images(images, levels=256, margin=1e-6, draws=1, pixels=False)


def _images(images: Images, levels: int, margin: float, draws: int, pixels: bool) -> Data:
    """Grey levels -> dequantised -> logits -> whitened by a fixed map set from the training set."""

    def logits(rows: Tensor, generator: torch.Generator) -> Tensor:
        return to_logits(dequantise(rows, generator, levels), margin)

    sample = logits(images.train[:20_000], torch.Generator().manual_seed(0)).double()
    mean, covariance = sample.mean(0).float(), torch.cov(sample.T)
    values, vectors = torch.linalg.eigh(covariance)
    whiten = (vectors @ torch.diag(values.rsqrt()) @ vectors.T).float()
    colour = (vectors @ torch.diag(values.sqrt()) @ vectors.T).float()

    def white(rows: Tensor, generator: torch.Generator) -> Tensor:
        points: Tensor = (logits(rows, generator) - mean) @ whiten
        return points

    def fixed(rows: Tensor, number: int, seed: int) -> Tensor:
        return white(rows.repeat(number, 1), torch.Generator().manual_seed(seed))

    test = fixed(images.test, draws, 2)
    volume = torch.full((len(test),), -0.5 * values.log().sum().item())
    if pixels:  # ln|dy/dx| from grey levels to logits
        volume -= Pixels(margin)(test @ colour + mean)[1] + images.train.shape[1] * math.log(levels)
    return Data(
        features=images.train.shape[1],
        batches=lambda seed: EndlessBatches(images.train, 100, seed, white),
        validation=fixed(images.validation, 3 if draws > 1 else 1, 1),
        test=test,
        volume=volume,
        unit="nats per image" + (", of grey levels" if pixels else ", in logit space"),
        draws=draws,
        to_picture=lambda y: to_pixels(y @ colour + mean, margin).clamp(0, 1),
    )


def rows(name: str, data_dir: Path | None = None) -> Data:
    """A table; 2,000 rows of its validation and 10,000 of its test, of those that there are."""
    train, validation, test = (torch.from_numpy(part).float() for part in TABLES[name](data_dir))

    def some(part: Tensor, count: int) -> Tensor:
        return part[torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[:count]]

    test = some(test, 10_000)
    return Data(
        features=train.shape[1],
        batches=lambda seed: EndlessBatches(train, 256, seed),
        validation=some(validation, 2000),
        test=test,
        volume=torch.zeros(len(test)),
        unit="nats per row, in the prepared units",
    )


DATA: dict[str, Callable[[Path | None], Data]] = {
    **{name: partial(plane, name) for name in TOYS},
    "digits": digits,
    "mnist": mnist,
    **{name: partial(rows, name) for name in TABLES},
}
