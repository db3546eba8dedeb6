"""The Monge-Ampère flow as a ready-made nflows ``Flow``."""

from __future__ import annotations

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
    """The standard normal of nflows, drawn in the dtype of the flow instead of the default."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(shape)
        self.register_buffer("_like", torch.empty(0), persistent=False)

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        rows = (num_samples,) if context is None else (len(context), num_samples)
        return torch.randn(*rows, *self._shape, dtype=self._like.dtype, device=self._like.device)


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
        if embedding_net is not None and not isinstance(embedding_net, nn.Module):
            raise TypeError(
                f"embedding_net: got {type(embedding_net).__name__}, expected a torch.nn.Module"
            )
        if distribution is not None and not isinstance(distribution, Distribution):
            raise TypeError(
                f"distribution: got {type(distribution).__name__}, expected an nflows Distribution"
            )
        shape = torch.Size(getattr(distribution, "_shape", [features]))
        if shape.numel() != potential.features:
            raise ValueError(
                f"distribution: got one over rows of shape {tuple(shape)}, expected {features} "
                "entries, as many as features"
            )
        super().__init__(
            transform=MongeAmpereTransform(potential, **transport),
            distribution=Noise([features]) if distribution is None else distribution,
            embedding_net=embedding_net,
        )

    @property
    def transform(self) -> MongeAmpereTransform:
        """The transform from data to noise, with its steps and its potential."""
        transform: MongeAmpereTransform = self._transform
        return transform

    # the methods of nflows, with checks where nflows makes none
    def log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        inputs, context = _tensor("inputs", inputs), _rows("context", context)
        if context is not None and inputs.shape[:1] != context.shape[:1]:
            raise ValueError(
                f"context: got {len(context)} rows for inputs of shape {tuple(inputs.shape)}, "
                "expected one for each"
            )
        rows = inputs.shape[1:]
        base = torch.Size(getattr(self._distribution, "_shape", rows))
        if rows != base and rows.numel() == base.numel():
            raise ValueError(
                f"inputs: got shape {tuple(inputs.shape)}, expected {('B', *base)}, the shape of "
                "the base distribution; reshape inputs"
            )
        log_prob: Tensor = super().log_prob(inputs, context)
        return log_prob

    def sample(
        self, num_samples: int, context: Tensor | None = None, batch_size: int | None = None
    ) -> Tensor:
        num_samples = validation.integer("num_samples", num_samples)
        size = num_samples
        if batch_size is not None:
            size = validation.integer("batch_size", batch_size)
        context = _rows("context", context)
        parts = []
        for first in range(0, num_samples, size):
            parts.append(super().sample(min(size, num_samples - first), context))
        # nflows would join batches along the contexts
        return torch.cat(parts, dim=0 if context is None else 1)

    def sample_and_log_prob(
        self, num_samples: int, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        num_samples = validation.integer("num_samples", num_samples)
        result: tuple[Tensor, Tensor] = super().sample_and_log_prob(
            num_samples, _rows("context", context)
        )
        return result

    def transform_to_noise(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        noise: Tensor = super().transform_to_noise(
            _tensor("inputs", inputs), _rows("context", context)
        )
        return noise


def _tensor(name: str, value: object) -> Tensor:
    """``value`` as a tensor; nflows takes whatever can be made one."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(
            f"{name}: got {value!r} ({type(value).__name__}), expected a tensor"
        ) from error
    return validation.dense(name, tensor)


def _rows(name: str, value: object) -> Tensor | None:
    if value is None:
        return None
    rows = _tensor(name, value)
    if rows.dim() == 0:
        raise ValueError(f"{name}: got shape (), expected (B, ...) with a leading batch dimension")
    return rows
