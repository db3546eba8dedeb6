"""The Monge-Ampère flow as a ready-made nflows ``Flow``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from nflows.distributions import Distribution, StandardNormal
from nflows.flows import Flow
from torch import Tensor, nn

from nflows_mongeampere import validation
from nflows_mongeampere.potentials import RidgePotential
from nflows_mongeampere.transform import MongeAmpereTransform


class Noise(StandardNormal):
    """The standard normal of nflows, drawn where and as its flow computes."""

    def __init__(self, shape: Sequence[int], flow: nn.Module | None = None) -> None:
        super().__init__(shape)
        del self._log_z  # a buffer, which would stay behind where models are built without numbers
        # in a tuple, because the noise is part of the flow and not the other way round
        self._flow = () if flow is None else (flow,)
        self.register_buffer("_like", torch.empty(0), persistent=False)

    def _log_prob(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        entries = self._shape.numel()
        log_prob: Tensor = inputs.square().flatten(1).sum(1) + entries * math.log(2 * math.pi)
        return -0.5 * log_prob

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        rows = (num_samples,) if context is None else (len(context), num_samples)
        like = next((p for flow in self._flow for p in flow.parameters()), self._like)
        return torch.randn(*rows, *self._shape, dtype=like.dtype, device=like.device)


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
        fits = embedding_net is None or isinstance(embedding_net, nn.Module)
        validation.kind("embedding_net", embedding_net, fits, "a torch.nn.Module")
        fits = distribution is None or isinstance(distribution, Distribution)
        validation.kind("distribution", distribution, fits, "an nflows Distribution")
        shape = torch.Size(getattr(distribution, "_shape", [features]))
        if shape.numel() != potential.features:
            raise ValueError(
                f"distribution: got one over rows of shape {tuple(shape)}, expected {features} "
                "entries, as many as features"
            )
        transform = MongeAmpereTransform(potential, **transport)
        base = Noise([features], potential) if distribution is None else distribution
        super().__init__(transform, base, embedding_net)
        transform._base = (base,)

    def arguments(self) -> dict[str, Any]:
        """The arguments that build a flow like this one, without what it has learnt."""
        transport, embedding = self.transform.arguments(), self._embedding_net
        potential = transport.pop("potential").arguments()
        del potential["bias"]
        return {
            **potential,
            "embedding_net": None if isinstance(embedding, nn.Identity) else embedding,
            "distribution": None if isinstance(self._distribution, Noise) else self._distribution,
            **transport,
        }

    @property
    def transform(self) -> MongeAmpereTransform:
        """The transform from data to noise, with its steps and its potential."""
        transform: MongeAmpereTransform = self._transform
        return transform

    def log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """The log-density of rows of data in nats, shape (B,)."""
        shape = tuple(torch.as_tensor(inputs).shape)
        if len(shape) == 0 or shape[1:] != tuple(getattr(self._distribution, "_shape", shape[1:])):
            raise ValueError(
                f"inputs: got shape {shape}, expected (B, {self.transform.potential.features}), "
                "rows of the base distribution; reshape inputs"
            )
        log_prob: Tensor = super().log_prob(inputs, context)
        return log_prob

    def sample(
        self, num_samples: int, context: Tensor | None = None, batch_size: int | None = None
    ) -> Tensor:
        """Samples, shape (N, D), or (C, N, D) for C rows of context.

        Args:
            num_samples: N.
            context: shape (C, ...), where the flow is conditional.
            batch_size: how many are drawn at once; None for all.
        """
        num_samples = validation.integer("num_samples", num_samples)
        size = num_samples if batch_size is None else validation.integer("batch_size", batch_size)
        parts = [
            super(MongeAmpereFlow, self).sample(min(size, num_samples - first), context)
            for first in range(0, num_samples, size)
        ]
        # nflows would join batches along the contexts
        return torch.cat(parts, dim=0 if context is None else 1)

    def sample_and_log_prob(
        self, num_samples: int, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Samples with their log-densities in nats, from one solve; gradients go through both.

        Args:
            num_samples: N.
            context: shape (C, ...), where the flow is conditional.

        Returns:
            Samples, shape (N, D) or (C, N, D), and log-densities, shape (N,) or (C, N).
        """
        num_samples = validation.integer("num_samples", num_samples)
        drawn: tuple[Tensor, Tensor] = super().sample_and_log_prob(num_samples, context)
        return drawn
