"""Flows of normflows in nflows, and what networks see of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from nflows.transforms import Transform
from torch import Tensor, nn


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
        level = torch.bucketize(pixels.contiguous(), self.ends, right=True)
        return level.to(pixels.dtype) / (self.number - 1)
