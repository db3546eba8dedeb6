"""The flow as PyTorch's own ``torch.distributions`` sees it, for Pyro and zuko."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from nflows.transforms import Transform
from torch import Size, Tensor
from torch.distributions import constraints

from nflows_mongeampere import validation


class FlowTransform(torch.distributions.Transform):
    r"""A transform of nflows as one of ``torch.distributions``: from noise z to data x.

    .. math:: x = f(z), \qquad \ln p(x) = \ln p(z) - \ln|\partial f / \partial z|.

    The map and its determinant come from one solve: the last pair is kept, so that ``log_prob`` of
    a ``TransformedDistribution`` costs what it costs in nflows. Any transform of nflows will do, a
    :class:`~nflows_mongeampere.MongeAmpereTransform` or a composite with one inside.

    Args:
        transform: a transform of nflows, whose ``forward`` leads from data to noise.
        event_shape: the shape of one event, (D,) for rows of D entries.
        context: what every evaluation is conditioned on, shape (C,), or one for each element of a
            batch, shape (batch..., C); or None.

    Raises:
        TypeError, ValueError: for arguments that do not fit, and for events of another shape.

    Example:
        >>> from nflows_mongeampere import MongeAmpereTransform, RidgePotential
        >>> from torch.distributions import Independent, Normal, TransformedDistribution
        >>> base = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
        >>> flow = FlowTransform(MongeAmpereTransform(RidgePotential(2, 16)), (2,))
        >>> TransformedDistribution(base, [flow]).rsample((3,)).shape
        torch.Size([3, 2])
    """

    bijective = True

    def __init__(
        self,
        transform: Transform,
        event_shape: Sequence[int],
        context: Tensor | None = None,
        cache_size: int = 0,
    ) -> None:
        if not isinstance(transform, Transform):
            raise TypeError(
                f"transform: got {type(transform).__name__}, expected a transform of nflows; of a "
                "Flow, its _transform"
            )
        if not isinstance(event_shape, Sequence) or isinstance(event_shape, str):
            raise TypeError(
                f"event_shape: got {event_shape!r}, expected the shape of one event, such as (2,)"
            )
        if not event_shape:
            raise ValueError("event_shape: got (), expected at least one dimension, such as (2,)")
        if context is not None and not isinstance(context, Tensor):
            raise TypeError(f"context: got {type(context).__name__}, expected a tensor or None")
        super().__init__(cache_size=cache_size)
        self.transform = transform
        self.event_shape = Size(validation.integer("event_shape", side) for side in event_shape)
        self.context = context
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:
        """Real events."""
        return constraints.independent(constraints.real, len(self.event_shape))

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:
        """Real events."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def condition(self, context: Tensor) -> FlowTransform:
        """The same transform under another context, as Pyro's conditional transforms have it."""
        return FlowTransform(self.transform, self.event_shape, context, self._cache_size)

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """The same transform; PyTorch's cache of one pair spares an inverse after a sample."""
        return FlowTransform(self.transform, self.event_shape, self.context, cache_size)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``ln |det dy/dx|`` of noise ``x`` and data ``y``, for each event."""
        if self._last is None or self._last[0] is not x or self._last[1] is not y:
            self._call(x)
        assert self._last is not None
        return self._last[2]

    def _call(self, x: Tensor) -> Tensor:
        y, logabsdet = self._apply(self.transform.inverse, "x", x)
        self._last = x, y, logabsdet
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x, logabsdet = self._apply(self.transform, "y", y)
        self._last = x, y, -logabsdet
        return x

    def _apply(self, call: Callable[..., Any], name: str, events: Tensor) -> tuple[Tensor, Tensor]:
        """``call`` on events of any batch shape, which nflows takes as rows."""
        dims = len(self.event_shape)
        if events.shape[-dims:] != self.event_shape:
            raise ValueError(
                f"{name}: got shape {tuple(events.shape)}, expected (..., "
                f"{', '.join(map(str, self.event_shape))})"
            )
        batch, context = events.shape[:-dims], self.context
        if context is not None:
            batch = torch.broadcast_shapes(batch, context.shape[:-1])
            events = events.expand(*batch, *self.event_shape)
            context = context.expand(*batch, context.shape[-1]).reshape(-1, context.shape[-1])
        outputs, logabsdet = call(events.reshape(-1, *self.event_shape), context)
        return outputs.view(*batch, *self.event_shape), logabsdet.view(batch)
