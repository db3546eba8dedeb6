"""Coupling layers: some features flow in a potential that a network draws from the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from nflows.transforms.coupling import CouplingTransform
from torch import Tensor, nn

from nflows_mongeampere import validation
from nflows_mongeampere.configured import Configured
from nflows_mongeampere.potentials import Potential
from nflows_mongeampere.transform import MongeAmpereTransform


class MongeAmpereCouplingTransform(CouplingTransform):
    r"""A Monge-Ampère flow of some features, in a potential that depends on the others.

    With a mask that splits x into :math:`(x_A, x_B)`, a coupling layer leaves :math:`x_A` as it is
    and lets :math:`x_B` move by

    .. math:: \frac{dx_B}{dt} = \nabla u(x_B, t; f(x_A)), \qquad \ln|\det| = \int \Delta u\, dt

    where the output of the network f is the context of the potential. The network, as deep as may
    be, is evaluated once for each solve and not at each of its stages, so that the layer costs
    little more than its potential, whose trace stays exact. Unlike affine and spline couplings, it
    moves the features of :math:`x_B` together. It is a
    :class:`nflows.transforms.coupling.CouplingTransform`, with the arguments of these.

    Reference: for coupling layers Dinh et al., `arXiv:1605.08803
    <https://arxiv.org/abs/1605.08803>`_.

    Args:
        mask: 1-D; features where it is positive move, the others pass unchanged. Of images, shape
            (B, C, ...), the channels are split.
        transform_net_create_fn: makes f from the number of features (channels) that pass and the
            width of the context. It is called with what passes, and with the layer's context where
            one is given, as nflows' networks are. It learns by heart before the potential does:
            dropout pays.
        potential: conditional, of the features that move.
        unconditional_transform: makes a transform of what passes from ``features``, or None.
        **settings: those of :class:`~nflows_mongeampere.MongeAmpereTransform`: ``time``, ``steps``,
            ``solver``, ...

    Attributes:
        transform_net: holds the network f as ``network``.
        transform: the flow of the features that move.

    Raises:
        TypeError, ValueError: for arguments that do not fit.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from nflows_mongeampere import RidgePotential
        >>> def network(features, outputs):
        ...     inner = [nn.Linear(features, 32), nn.SiLU(), nn.Dropout(0.5)]
        ...     return nn.Sequential(*inner, nn.Linear(32, outputs), nn.SiLU())
        >>> potential = RidgePotential(3, 64, context_features=16)
        >>> layer = MongeAmpereCouplingTransform([0, 1, 0, 1, 1], network, potential)
        >>> y, logabsdet = layer(torch.randn(7, 5))
        >>> y.shape, logabsdet.shape
        (torch.Size([7, 5]), torch.Size([7]))
    """

    def __init__(
        self,
        mask: Tensor | Sequence[int],
        transform_net_create_fn: Callable[[int, int], nn.Module],
        potential: Potential,
        *,
        unconditional_transform: Callable[..., nn.Module] | None = None,
        **settings: Any,
    ) -> None:
        expected = "a Potential, such as RidgePotential(..., context_features=16)"
        validation.kind("potential", potential, isinstance(potential, Potential), expected)
        width = potential.context_features
        if width is None:
            raise ValueError(
                "potential: got one that takes no context, expected one that does, from the "
                "network; build it with context_features=16 or so"
            )
        moving = int((torch.as_tensor(mask) > 0).sum())
        if not 0 < moving < len(mask):
            raise ValueError(
                f"mask: got {moving} positive entries of {len(mask)}, expected some features that "
                "move and some that pass"
            )
        if potential.features is not None and potential.features % moving:
            raise ValueError(
                f"potential: got one of {potential.features} features, expected the {moving} that "
                "the mask lets move"
            )
        super().__init__(
            mask,
            lambda passing, _: _Network(transform_net_create_fn(passing, width)),
            unconditional_transform,
        )
        self.transform = MongeAmpereTransform(potential, **settings)

    def forward(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        r"""Data to noise, and :math:`\ln|dz/dx|` in nats, shape (B,).

        Args:
            inputs: shape (B, features) or (B, channels, height, width).
            context: whatever the network takes beside what passes.

        Raises:
            TypeError, ValueError: for arguments that do not fit.
            IntegrationError: where the solver fails.
        """
        self._accept(inputs)
        y, logabsdet = super().forward(inputs, context)
        return y, logabsdet

    def inverse(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        r"""Noise to data, with :math:`\ln|dx/dz|`; arguments and errors as in :meth:`forward`."""
        self._accept(inputs)
        x, logabsdet = super().inverse(inputs, context)
        return x, logabsdet

    def _accept(self, inputs: Tensor) -> None:
        validation.batch("inputs", inputs, next(self.parameters(), None))

    def _transform_dim_multiplier(self) -> int:
        return 1  # the width of the network is that of the context

    def _coupling_transform_forward(
        self, inputs: Tensor, transform_params: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.transform(inputs, transform_params.flatten(1))  # type: ignore[no-any-return]

    def _coupling_transform_inverse(
        self, inputs: Tensor, transform_params: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.transform.inverse(inputs, transform_params.flatten(1))


class Bumps(Configured, nn.Module):
    r"""A first layer for the network of a coupling layer, whose units see one place each.

    .. math:: \phi_j(x) = e^{-h_j^2}, \qquad h_j = w_j \cdot x + b_j

    Units that bend softly around the origin need hundreds of steps before a network answers one
    place differently from the next. Bumps lie side by side from the start, along each feature in
    turn, and soon tell the two moons apart. For few features, of mean 0 and standard deviation 1 or
    so.

    Args:
        in_features: D, the number of features that pass.
        out_features: H, the number of bumps, at least D.
        sharpness: of the rows, on average: a bump is about as wide as its inverse.
        reach: the bumps are spread evenly from minus this to this.

    Attributes:
        weight: w, shape (H, D). Bump j looks along feature j modulo D.
        bias: b, shape (H,).

    Raises:
        TypeError, ValueError: for arguments that do not fit.

    Example:
        >>> import torch
        >>> from nflows_mongeampere import PixelwisePotential
        >>> def network(features, outputs):
        ...     return nn.Sequential(Bumps(features, 64), nn.Linear(64, outputs), nn.SiLU())
        >>> potential = PixelwisePotential((1, 1, 1), 32, context_channels=64)
        >>> layer = MongeAmpereCouplingTransform([0, 1], network, potential, steps=2)
        >>> layer(torch.randn(7, 2))[0].shape
        torch.Size([7, 2])
    """

    def __init__(
        self, in_features: int, out_features: int, *, sharpness: float = 3.0, reach: float = 2.5
    ) -> None:
        super().__init__()
        self.in_features = validation.integer("in_features", in_features)
        self.out_features = validation.integer("out_features", out_features, minimum=in_features)
        self.sharpness = validation.positive("sharpness", sharpness)
        self.reach = validation.positive("reach", reach)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Spread the bumps anew, from half to twice as sharp as ``sharpness``."""
        number = torch.arange(self.out_features, device=self.weight.device)
        feature, turn = number % self.in_features, number // self.in_features
        share = (turn + 0.5) / math.ceil(self.out_features / self.in_features)
        slope = self.sharpness * torch.exp2(2 * torch.rand_like(self.bias) - 1)
        self.weight.zero_()
        self.weight[number, feature] = slope
        self.bias.copy_(slope * self.reach * (1 - 2 * share))

    def forward(self, x: Tensor) -> Tensor:
        """The bumps at points of shape (B, D), shape (B, H)."""
        return torch.exp(-nn.functional.linear(x, self.weight, self.bias).square())


class _Network(nn.Module):
    """A network that is asked for no context where there is none."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, context: Any) -> Tensor:
        output: Tensor = self.network(x) if context is None else self.network(x, context)
        return output
