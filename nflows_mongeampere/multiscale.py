"""Images from coarse to fine: each pixel flows in what a network says of coarser ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
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

from nflows_mongeampere import validation
from nflows_mongeampere.coupling import MongeAmpereCouplingTransform
from nflows_mongeampere.potentials import PixelwisePotential

Network = Callable[..., nn.Module]

# of the four pixels of a square, in the order in which they flow; the last one stays
ORDER = (2, 1, 3, 0)


class AsImages(Transform):
    """Rows of pixels as images.

    Args:
        shape: (C, height, width) of one image.

    Example:
        >>> import torch
        >>> AsImages((1, 2, 3))(torch.zeros(5, 6))[0].shape
        torch.Size([5, 1, 2, 3])
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = validation.shape("shape", shape, 3)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rows of shape (B, C·height·width) as images; the log-determinant is zero."""
        return inputs.reshape(-1, *self.shape), inputs.new_zeros(len(inputs))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images as rows; the log-determinant is zero."""
        return inputs.flatten(1), inputs.new_zeros(len(inputs))


class PixelNetwork(nn.Module):
    """A residual convolutional network that knows where in the image it is.

    A 5×5 convolution, a bias for each map and place, ``blocks`` of a 3×3 and a 1×1 convolution, and
    a 1×1 convolution at the end.

    Args:
        channels: of the images that it sees.
        outputs: maps that it returns.
        size: (height, width) of the images.
        width: maps within.
        blocks: number of residual blocks.
        dropout: the probability with which training leaves out a map within a block.
        before: what the images go through first, or None.
        context_features: width of a context of the whole image, such as its class, which moves the
            biases of the first convolution; or None to ignore one.

    Example:
        >>> import torch
        >>> PixelNetwork(2, 8, (4, 4))(torch.randn(5, 2, 4, 4)).shape
        torch.Size([5, 8, 4, 4])
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        size: tuple[int, int],
        *,
        width: int = 48,
        blocks: int = 2,
        dropout: float = 0.0,
        before: nn.Module | None = None,
        context_features: int | None = None,
    ) -> None:
        super().__init__()
        self.before = nn.Identity() if before is None else before
        self.first = nn.Conv2d(channels, width, 5, padding=2)
        self.place = nn.Parameter(0.1 * torch.randn(width, *size))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.SiLU(),
                nn.Dropout2d(dropout),
                nn.Conv2d(width, width, 1),
            )
            for _ in range(blocks)
        )
        self.last = nn.Conv2d(width, outputs, 1)
        self.context = None if context_features is None else nn.Linear(context_features, width)
        self.to(memory_format=torch.channels_last)  # faster on a CPU

    def forward(self, images: Tensor, context: Tensor | None = None) -> Tensor:
        """Maps of shape (B, outputs, height, width)."""
        h = self.before(images).contiguous(memory_format=torch.channels_last)
        h = self.first(h)
        h = h + self.place.to(h.dtype)
        if self.context is not None:
            context = _rows(context, self.context.in_features, images)
            h = h + self.context(context)[:, :, None, None]
        for block in self.blocks:
            h = h + block(h)
        maps: Tensor = self.last(F.silu(h))
        return maps


def coarse_to_fine(
    shape: Sequence[int],
    network: Network = PixelNetwork,
    *,
    hidden_features: int = 16,
    context_channels: int = 16,
    span: float = 3.0,
    stiffness: float = 8.0,
    context_features: int | None = None,
    **settings: Any,
) -> MultiscaleCompositeTransform:
    r"""A multi-scale flow of images, in which each pixel moves once, given all coarser ones.

    .. math:: \ln p(x) = \ln p(x_\text{coarsest})
              + \sum_\text{scales} \ln p(x_\text{finer} \mid x_\text{coarser})

    Of each square of four pixels the first one flows in a
    :class:`~nflows_mongeampere.PixelwisePotential` whose coefficients a network draws from the
    other three, all around it; the second in what another network says of the last two; the third
    in what a third one says of the last. That one is a pixel of an image of half the size, which
    goes the same way; and so on, as long as height and width are even. The black fields of the last
    image flow given the white ones, and in turns. All networks are evaluated once, for a likelihood
    as for samples.

    It is made of nflows' :class:`nflows.transforms.base.MultiscaleCompositeTransform` and
    ``SqueezeTransform`` and of :class:`~nflows_mongeampere.MongeAmpereCouplingTransform`: images of
    shape (B, C, height, width) become rows of noise, finest first. A new flow moves nothing.

    Args:
        shape: (C, height, width) of one image.
        network: makes a network from the channels that it sees, the maps that it returns and the
            (height, width) of both; and from the keyword ``context_features``, if that is given.
        hidden_features: ridges of each number that flows.
        context_channels: maps of context for each number that flows.
        span: pixels lie within ± ``span`` or not far beyond; ridges start to bend all over 1.5
            times that. Give their slopes (``potential.weight``) a small learning rate: they
            sharpen until a solver misses them.
        stiffness: of the potentials; at most about four times the solver's steps in a unit of time.
        context_features: width of a context, such as a class, in which all networks draw; or None
            to ignore one.
        **settings: those of :class:`~nflows_mongeampere.MongeAmpereTransform`: ``steps``, ...

    Raises:
        TypeError, ValueError: for arguments that do not fit.

    Example:
        >>> import torch
        >>> transform = coarse_to_fine((1, 8, 8), hidden_features=4, steps=4)
        >>> noise, logabsdet = transform(torch.randn(5, 1, 8, 8))
        >>> noise.shape, logabsdet.shape
        (torch.Size([5, 64]), torch.Size([5]))
    """
    channels, height, width = validation.shape("shape", shape, 3)
    context_features = validation.optional_integer("context_features", context_features)
    given = {} if context_features is None else {"context_features": context_features}
    network, dense = partial(network, **given), partial(_Dense, **given)
    make = _Couplings(network, dense, hidden_features, context_channels, span, stiffness, settings)
    layers: list[tuple[Transform, tuple[int, ...]]] = []
    while height % 2 == 0 and width % 2 == 0 and channels * height * width > 4:
        height, width = size = height // 2, width // 2
        order = [4 * c + place for place in ORDER for c in range(channels)]
        finer = [
            SqueezeTransform(),
            Permutation(torch.tensor(order)),
            make.of_images(channels, size, known=3),
            make.of_images(channels, size, known=2, noise=1),
        ]
        layers += [
            (CompositeTransform(finer), (4 * channels, *size)),
            (make.of_images(channels, size, known=1), (2 * channels, *size)),
        ]
    features = channels * height * width
    layers.append((make.in_turns((channels, height, width)), (features,)))
    flow = MultiscaleCompositeTransform(len(layers))
    for layer, outputs in layers:
        flow.add_transform(layer, outputs)
    return flow


class _Couplings:
    """Coupling layers with pixelwise potentials."""

    def __init__(
        self,
        network: Network,
        dense: Network,
        ridges: int,
        maps: int,
        span: float,
        stiffness: float,
        settings: dict[str, Any],
    ) -> None:
        self._network, self._dense = network, dense
        self._stiffness, self._settings = stiffness, settings
        self._ridges = validation.integer("hidden_features", ridges)
        self._maps = validation.integer("context_channels", maps)
        self._span = validation.positive("span", span)

    def of_images(
        self, channels: int, size: tuple[int, int], *, known: int, noise: int = 0
    ) -> Transform:
        """Images of some channels flow, given known ones behind them; those before are noise."""

        def network(passing: int, outputs: int) -> nn.Module:
            drawn = self._network(known * channels, self._maps * channels, size)
            return _Behind(noise * channels, drawn) if noise else drawn

        return MongeAmpereCouplingTransform(
            [0] * noise * channels + [1] * channels + [0] * known * channels,
            network,
            self._potential((channels, *size), channels),
            **self._settings,
        )

    def in_turns(self, shape: tuple[int, int, int]) -> Transform:
        """Black and white fields of an image flow in turns, as rows of noise."""
        places = torch.cartesian_prod(*map(torch.arange, shape)).view(-1, 3).sum(1)
        layers: list[Transform] = [InverseTransform(AsImages(shape))]
        for turn in range(4 if len(places) > 1 else 0):
            black = (places + turn) % 2
            moving = int(black.sum())
            layers.append(
                MongeAmpereCouplingTransform(
                    black, self._dense, self._potential((1, moving, 1), 1), **self._settings
                )
            )
        return CompositeTransform(layers)

    def _potential(self, shape: tuple[int, int, int], channels: int) -> PixelwisePotential:
        potential = PixelwisePotential(
            shape,
            self._ridges * channels,
            context_channels=self._maps * channels,
            stiffness=self._stiffness,
        )
        ends = torch.tensor([[-1.5 * self._span], [1.5 * self._span]])
        potential.initialize(ends.expand(2, potential.features))
        return potential


def _rows(context: Tensor | None, width: int, inputs: Tensor) -> Tensor:
    """The context of each of the inputs, which autocast may have halved."""
    if context is not None:
        context = context.to(torch.promote_types(context.dtype, torch.float32))
    return validation.context(context, width, "inputs", inputs.shape[0], None)


class _Behind(nn.Module):
    """A network that does not see the first channels of images."""

    def __init__(self, channels: int, network: nn.Module) -> None:
        super().__init__()
        self.channels, self.network = channels, network

    def forward(self, images: Tensor, *context: Tensor) -> Tensor:
        maps: Tensor = self.network(images[:, self.channels :], *context)
        return maps


class _Dense(nn.Sequential):
    """A network of two hidden layers."""

    def __init__(self, features: int, outputs: int, context_features: int | None = None) -> None:
        width = 128
        first = nn.Linear(features + (context_features or 0), width)
        hidden = (first, nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        super().__init__(*hidden, nn.Linear(width, outputs))
        self._context_features = context_features

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self._context_features is not None:
            x = torch.cat([x, _rows(context, self._context_features, x)], 1)
        outputs: Tensor = super().forward(x)
        return outputs
