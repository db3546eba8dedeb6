"""Patches of photographs: their parts share no pixel, and they look like the photographs."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image

from nflows_mongeampere.examples import patches
from nflows_mongeampere.examples.patches import load_patches


def test_parts_share_no_column(monkeypatch):
    """In pictures whose levels count the columns, patches tell where they are from."""
    columns = np.broadcast_to(np.arange(640)[:, None] // 3, (427, 640, 3)).astype(np.uint8)
    monkeypatch.setattr(patches, "load_sample_image", lambda name: columns)
    images = load_patches(counts=(3000, 2000, 1000))
    limits = [(part.min().item(), part.max().item()) for part in vars(images).values()]
    assert limits == [(0, 447 // 3), (448 // 3, 543 // 3), (544 // 3, 639 // 3)]


def test_patches_are_pieces_of_the_photographs():
    images = load_patches(side=8, counts=(40, 10, 10))
    assert [part.shape for part in vars(images).values()] == [(40, 64), (10, 64), (10, 64)]
    windows = []
    for name in ("china.jpg", "flower.jpg"):
        red, green, blue = np.moveaxis(load_sample_image(name).astype(float), 2, 0)
        picture = np.rint(0.299 * red + 0.587 * green + 0.114 * blue)
        windows.append(np.lib.stride_tricks.sliding_window_view(picture, (8, 8)))
    found = np.zeros((2, 10), dtype=bool)
    for i, patch in enumerate(images.test.view(-1, 8, 8).numpy()):
        for j, window in enumerate(windows):
            corner = (window[..., 0, 0] == patch[0, 0]) & (window[..., 7, 7] == patch[7, 7])
            found[j, i] = (window[corner] == patch).all((1, 2)).any()
    assert found.any(0).all()
    assert (found.sum(1) >= 5).all()  # half of each


def test_places_are_those_of_the_seed():
    first, again, other = (load_patches(counts=(20, 2, 2), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.train, again.train)
    assert not torch.equal(first.train, other.train)


def test_patches_fit_into_their_strips():
    assert load_patches(side=96, counts=(2, 2, 2)).test.shape == (2, 96 * 96)
    with pytest.raises(ValueError, match="side: got 97, expected 1 to 96"):
        load_patches(side=97, counts=(2, 2, 2))
