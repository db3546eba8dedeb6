"""Patches of photographs that ship with scikit-learn: a second set of real images."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_sample_image
from sklearn.feature_extraction.image import extract_patches_2d
from torch import Tensor

from nflows_mongeampere.examples.images import Images

PICTURES = ("china.jpg", "flower.jpg")
LUMINANCE = np.array([0.299, 0.587, 0.114])  # of red, green and blue, ITU-R BT.601
PARTS = (0.0, 0.7, 0.85, 1.0)  # of the width: where training, validation and test begin and end


def load_patches(
    side: int = 28, counts: tuple[int, int, int] = (50_000, 10_000, 10_000), seed: int = 0
) -> Images:
    """Random grey patches of two photographs, shape (N, side²), levels from 0 to 255.

    Training, validation and test patches are of strips side by side, from top to bottom, so that
    no pixel is in two of them.

    Args:
        side: of the patches, in pixels; at most the width of the narrowest strip.
        counts: of the patches for training, validation and test, half of each photograph.
        seed: of their places.

    Raises:
        ValueError: if a patch does not fit into a strip.
    """
    pictures = [np.rint(load_sample_image(name) @ LUMINANCE).astype(np.uint8) for name in PICTURES]
    rng = np.random.RandomState(seed)
    parts = []
    for begin, end, count in zip(PARTS[:-1], PARTS[1:], counts, strict=True):
        strips = [p[:, round(begin * p.shape[1]) : round(end * p.shape[1])] for p in pictures]
        room = min(min(strip.shape) for strip in strips)
        if not 0 < side <= room:
            raise ValueError(f"side: got {side}, expected 1 to {room}, the width of a strip")
        parts.append(_patches(strips, side, count, rng))
    return Images(*parts)


def _patches(strips: list[np.ndarray], side: int, count: int, rng: np.random.RandomState) -> Tensor:
    """As many patches of each strip, in random order."""
    numbers = (count - count // 2, count // 2)
    found = [
        extract_patches_2d(strip, (side, side), max_patches=number, random_state=rng)
        for strip, number in zip(strips, numbers, strict=True)
    ]
    return torch.from_numpy(rng.permutation(np.concatenate(found))).flatten(1)
