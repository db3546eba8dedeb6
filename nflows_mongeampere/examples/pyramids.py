"""Images from coarse to fine: each pixel flows in what a network says of coarser ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from nflows.transforms import (
    CompositeTransform,
    InverseTransform,
    MultiscaleCompositeTransform,
    Permutation,
    SqueezeTransform,
    Transform,
)
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_mongeampere import MongeAmpereCouplingTransform, PixelwisePotential


class AsImages(Transform):
    """Rows of pixels as images of a shape (C, height, width)."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return inputs.view(-1, *self.shape), inputs.new_zeros(len(inputs))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return inputs.flatten(1), inputs.new_zeros(len(inputs))


class FromNormflows(Transform):
    """Flows of normflows, which lead from noise to data, as a transform from images to rows.

    Args:
        flows: from noise to data.
        shape: of one event of noise, as they take it.
    """

    def __init__(self, flows: Sequence[nn.Module], shape: Sequence[int]) -> None:
        super().__init__()
        self.flows, self.shape = nn.ModuleList(flows), tuple(shape)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = inputs.new_zeros(len(inputs))
        inverses: list[Any] = [flow.inverse for flow in reversed(self.flows)]
        for inverse in inverses:
            inputs, logabsdet = inverse(inputs)
            total = total + logabsdet
        return inputs.flatten(1), total

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total, inputs = inputs.new_zeros(len(inputs)), inputs.view(-1, *self.shape)
        for flow in self.flows:
            inputs, logabsdet = flow(inputs)
            total = total + logabsdet
        return inputs, total


class GreyLevels(nn.Module):
    """The grey levels, from 0 to 1, that pixels on the real line stand for, without their noise.

    Args:
        before: the elementwise transforms from the pixels in [0, 1) to the real line, each with the
            same numbers for all pixels.
        number: of grey levels.
    """

    def __init__(self, before: Sequence[Transform], number: int) -> None:
        super().__init__()
        self.number = number
        ends = torch.arange(1, number)[:, None] / number
        with torch.no_grad():
            for transform in before:
                ends, _ = transform(ends)
        self.register_buffer("ends", ends[:, 0].contiguous())

    ends: Tensor

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.bucketize(pixels, self.ends, right=True).to(pixels.dtype) / (self.number - 1)


class PixelNetwork(nn.Module):
    """A residual convolutional network with a map of its own for each place.

    Args:
        channels: of the images that it sees.
        outputs: maps that it returns.
        side: of the images, in pixels.
        width: maps within.
        blocks: of a 3×3 and a 1×1 convolution.
        before: what the images go through first.
    """

    def __init__(
        self, channels: int, outputs: int, side: int, width: int, blocks: int, before: nn.Module
    ) -> None:
        super().__init__()
        self.before = before
        self.first = nn.Conv2d(channels, width, 5, padding=2)
        self.place = nn.Parameter(0.1 * torch.randn(width, side, side))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(width, width, 1),
            )
            for _ in range(blocks)
        )
        self.last = nn.Conv2d(width, outputs, 1)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        h = self.before(images).contiguous(memory_format=torch.channels_last)
        h = self.first(h) + self.place
        for block in self.blocks:
            h = h + block(h)
        maps: Tensor = self.last(F.silu(h))
        return maps


def pyramid(
    side: int, before: nn.Module, *, width: int, blocks: int, ridges: int, maps: int, steps: int
) -> Transform:
    """Nflows' multi-scale transform of grey images of ``side`` pixels, from fine to coarse.

    Every second pixel flows in what a network says of the others, their four neighbours; of these,
    every second one in what another says of the rest, which is an image of half the side; and so
    on, until the side is odd. The last image flows in turns of its black and white fields.

    Args:
        side: of the images, divisible by 2.
        before: what the networks see images through.
        width: maps within the networks.
        blocks: of the networks.
        ridges: at each pixel that flows.
        maps: of context, for each pixel that flows.
        steps: of the solver.
    """

    def coupling(mask: Sequence[int], side: int) -> Transform:
        moving = sum(mask)
        potential = PixelwisePotential(
            (moving, side, side), ridges * moving, context_channels=maps * moving
        )
        potential.initialize(torch.tensor([[-4.5], [4.5]]).expand(2, potential.features))
        return MongeAmpereCouplingTransform(
            mask,
            lambda channels, _: PixelNetwork(channels, maps * moving, side, width, blocks, before),
            potential,
            steps=steps,
        )

    layers: list[tuple[Transform, tuple[int, ...]]] = []
    while side % 2 == 0:
        side //= 2
        # the four pixels of a square: right above, left below, right below, left above
        order = Permutation(torch.tensor([1, 2, 3, 0]))
        fine = CompositeTransform([SqueezeTransform(), order, coupling([1, 1, 0, 0], side)])
        layers += [(fine, (4, side, side)), (coupling([1, 0], side), (2, side, side))]
    layers.append((coarsest(side, ridges, maps, steps), (side * side,)))
    scales = MultiscaleCompositeTransform(len(layers))
    for layer, shape in layers:
        scales.add_transform(layer, shape)
    return scales


def coarsest(side: int, ridges: int, maps: int, steps: int) -> Transform:
    """The smallest image: its black fields flow given the white ones, and in turns."""
    place = torch.arange(side * side)
    black = (place // side + place % side) % 2
    layers: list[Transform] = [InverseTransform(AsImages((1, side, side)))]
    for mask in (black, 1 - black, black, 1 - black):
        moving = int(mask.sum())
        potential = PixelwisePotential((1, moving, 1), ridges, context_channels=maps)
        potential.initialize(torch.tensor([[-4.5], [4.5]]).expand(2, moving))
        layers.append(
            MongeAmpereCouplingTransform(
                mask,
                lambda passing, outputs: nn.Sequential(
                    nn.Linear(passing, 128),
                    nn.SiLU(),
                    nn.Linear(128, 128),
                    nn.SiLU(),
                    nn.Linear(128, outputs),
                ),
                potential,
                steps=steps,
            )
        )
    return CompositeTransform(layers)
