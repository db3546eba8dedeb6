"""The Monge-Ampère flow as a ready-made nflows ``Flow``."""

from __future__ import annotations

from typing import Any

from nflows.distributions import Distribution, StandardNormal
from nflows.flows import Flow
from torch import nn

from nflows_mongeampere.potentials import RidgePotential
from nflows_mongeampere.transform import MongeAmpereTransform


class MongeAmpereFlow(Flow):
    r"""The published model: a ridge potential drives a standard normal into the data.

    Everything an :class:`nflows.flows.Flow` can do: ``log_prob``, ``sample``,
    ``sample_and_log_prob``, ``transform_to_noise``.

    Args:
        features: D, the number of entries of a row of data.
        hidden_features: H, the number of ridges of the potential.
        context_features: width of the (embedded) context, or None.
        embedding_net: module that embeds the context, or None to use it as it comes.
        distribution: base distribution over rows of ``features`` entries, or None for a standard
            normal.
        time_dependent, activation: see :class:`~nflows_mongeampere.RidgePotential`.
        **transport: ``time``, ``steps``, ``solver``, ``sensitivity``, ... as in
            :class:`~nflows_mongeampere.MongeAmpereTransform`.

    Raises:
        TypeError, ValueError: for arguments that do not fit.

    Example:
        >>> import torch
        >>> flow = MongeAmpereFlow(2, 32)
        >>> flow.log_prob(torch.zeros(1, 2))  # a new flow is its base
        tensor([-1.8379], grad_fn=<AddBackward0>)
        >>> flow.sample(3).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        context_features: int | None = None,
        embedding_net: nn.Module | None = None,
        distribution: Distribution | None = None,
        time_dependent: bool = False,
        activation: str = "softplus",
        **transport: Any,
    ) -> None:
        potential = RidgePotential(
            features,
            hidden_features,
            context_features=context_features,
            time_dependent=time_dependent,
            activation=activation,
        )
        super().__init__(
            transform=MongeAmpereTransform(potential, **transport),
            distribution=StandardNormal([features]) if distribution is None else distribution,
            embedding_net=embedding_net,
        )
