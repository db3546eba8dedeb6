"""Images from coarse to fine, against the Jacobian by autograd and the chain rule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nflows_mongeampere import MongeAmpereCouplingTransform
from nflows_mongeampere.conftest import close
from nflows_mongeampere.multiscale import AsImages, PixelNetwork, coarse_to_fine


def build(shape, **options):
    """A flow that bends, in float64."""
    options = {"hidden_features": 3, "context_channels": 2, "steps": 8, **options}
    flow = coarse_to_fine(shape, **options).double()
    for parameter in flow.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return flow


def jacobian(flow, image):
    rows = torch.autograd.functional.jacobian(lambda x: flow(x[None])[0][0], image)
    return rows.flatten(1)


@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 2, 6), (1, 3, 3), (3, 1, 1)], ids=str)
def test_the_log_determinant_is_that_of_the_jacobian_and_the_way_back_exists(shape):
    flow = build(shape)
    x = torch.randn(2, *shape, dtype=torch.float64)
    noise, logabsdet = flow(x)
    determinants = [torch.linalg.slogdet(jacobian(flow, image))[1] for image in x]
    close(logabsdet, torch.stack(determinants), tolerance=1e-4)
    back, inverse = flow.inverse(noise)
    close(back, x, tolerance=1e-4)
    close(inverse, -logabsdet, tolerance=1e-4)


def test_finer_pixels_follow_coarser_ones_and_not_the_reverse():
    """Of a 4x4 image: of each square one pixel after the other, and the coarsest image."""
    flow = build((1, 4, 4))
    moved = jacobian(flow, torch.randn(1, 4, 4, dtype=torch.float64)).abs() > 0
    place = torch.arange(16).view(4, 4)
    scales = [
        place[1::2, ::2].flatten(),
        place[::2, 1::2].flatten(),
        place[1::2, 1::2].flatten(),
        place[::2, ::2].flatten(),
    ]
    start = 0
    for number, pixels in enumerate(scales):
        rows = moved[start : start + len(pixels)]
        coarser = torch.cat([*scales[number + 1 :], pixels[:0]])
        others = [p for p in range(16) if p not in {*pixels.tolist(), *coarser.tolist()}]
        assert rows[torch.arange(len(pixels)), pixels].all()
        assert rows[:, coarser].all()
        assert not rows[:, others].any()
        start += len(pixels)


def test_a_new_flow_moves_nothing():
    x = torch.randn(3, 2, 4, 4)
    noise, logabsdet = coarse_to_fine((2, 4, 4))(x)
    close(noise.sort(1).values, x.flatten(1).sort(1).values)
    assert not logabsdet.any()


def test_networks_are_evaluated_once():
    calls = []

    class Counted(PixelNetwork):
        def forward(self, images, context=None):
            calls.append(images.shape[1:])
            return super().forward(images, context)

    flow = coarse_to_fine((1, 8, 8), Counted, steps=5)
    noise, _ = flow(torch.randn(2, 1, 8, 8))
    assert calls == [(known, size, size) for size in (4, 2) for known in (3, 2, 1)]
    flow.inverse(noise)
    assert len(calls) == 12


def test_a_context_moves_every_pixel():
    """Each image flows in its own context, there and back; the exact log-determinant."""
    flow = build((1, 4, 4), context_features=2)
    x, context = torch.randn(2, 1, 4, 4).double(), torch.randn(2, 2).double()
    noise, logabsdet = flow(x, context)
    close(flow.inverse(noise, context)[0], x, tolerance=1e-4)
    other = flow(x, context.flip(0))[0]
    assert ((other - noise).abs() > 1e-6).all()
    for image, row, expected in zip(x, context, logabsdet, strict=True):
        found = torch.autograd.functional.jacobian(
            lambda x, c=row: flow(x[None], c[None])[0][0], image
        ).flatten(1)
        close(torch.linalg.slogdet(found)[1], expected, tolerance=1e-4)


def test_autocast_may_halve_a_context():
    flow = build((1, 4, 4), context_features=2).float()
    x, context = torch.randn(2, 1, 4, 4), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flow(x, context.bfloat16())[0], flow(x, context)[0])


@pytest.mark.parametrize(
    ("context", "message"),
    [(None, "got None, expected a tensor of shape"), (torch.ones(2, 3).double(), "got shape")],
)
def test_a_context_is_missed(context, message):
    flow, x = build((1, 4, 4), context_features=2), torch.randn(2, 1, 4, 4).double()
    for call in (flow, lambda x, context: flow.inverse(x.flatten(1), context)):
        with pytest.raises(ValueError, match=rf"^context: {message}"):
            call(x, context)


def test_a_flow_without_context_features_ignores_a_context():
    flow, x = build((1, 4, 4)), torch.randn(2, 1, 4, 4).double()
    assert torch.equal(flow(x, torch.ones(2, 3))[0], flow(x)[0])


def test_networks_see_images_through_what_is_before():
    before = nn.Threshold(0.0, 0.0)
    network = PixelNetwork(1, 2, (3, 3), width=4, before=before)
    images = torch.randn(5, 1, 3, 3)
    close(network(images), network(images.clamp(min=0)))


def test_settings_go_to_all_couplings():
    flow = coarse_to_fine((1, 4, 4), steps=3, solver="midpoint")
    layers = [m for m in flow.modules() if isinstance(m, MongeAmpereCouplingTransform)]
    assert [layer.transform.steps for layer in layers] == [3] * len(layers)
    assert {layer.transform.integrator.solver for layer in layers} == {"midpoint"}


def test_rows_and_images():
    rows = torch.randn(4, 12)
    images, logabsdet = AsImages((3, 2, 2))(rows)
    assert images.shape == (4, 3, 2, 2)
    assert not logabsdet.any()
    assert torch.equal(AsImages((3, 2, 2)).inverse(images)[0], rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (4, 4)}, r"shape: got \(4, 4\)"),
        ({"hidden_features": 0}, "hidden_features: got 0"),
        ({"context_channels": -1}, "context_channels: got -1"),
        ({"span": 0.0}, "span: got 0.0"),
        ({"context_features": 0}, "context_features: got 0"),
        ({"steps": 0}, "steps: got 0"),
    ],
)
def test_mistakes_name_the_argument(options, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        coarse_to_fine(**{"shape": (1, 4, 4), **options})
