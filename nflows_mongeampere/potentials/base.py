"""The scalar potential that drives a Monge-Ampère flow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nflows_mongeampere import validation
from nflows_mongeampere.differentiation import usable
from nflows_mongeampere.dynamics import DirectDynamics, Dynamics, Field

Time = float | Tensor


class Potential(nn.Module):
    r"""A scalar potential :math:`u(x, t; c)`, the one thing that a flow learns.

    The flow moves a point along the gradient and thins the density by the Laplacian,

    .. math:: \frac{dx}{dt} = \nabla u(x, t; c), \qquad
              \frac{d \ln p}{dt} = -\Delta u(x, t; c),

    which is the continuity equation of a curl-free compressible fluid (Zhang, E and Wang,
    `arXiv:1809.10188 <https://arxiv.org/abs/1809.10188>`_, eq. 6).

    **Writing a new potential.** Subclass and implement three methods on a batch
    ``x`` of shape (B, ...): :meth:`_value` and :meth:`_laplacian`, which return (B,), and
    :meth:`_gradient`, which returns the shape of ``x``. They receive arguments that have been
    checked. Where two of them share work, override :meth:`_gradient_and_laplacian`, the only one
    that the flow calls. Where the trajectories can be followed in fewer coordinates than those
    of ``x``, override :meth:`dynamics`. Set ``features``, ``context_features`` and
    ``time_dependent`` for the checks.

    Attributes:
        features: number of entries of one event, or None where any shape will do.
        context_features: width of a row of context, or None where no context is taken.
        time_dependent: whether :math:`u` depends on :math:`t`.

    Example:
        >>> import torch
        >>> class Harmonic(Potential):
        ...     "u(x) = |x|² / 2: the flow is x(t) = eᵗ x(0)"
        ...     def _value(self, x, t, context):
        ...         return x.flatten(1).square().sum(1) / 2
        ...     def _gradient(self, x, t, context):
        ...         return x
        ...     def _laplacian(self, x, t, context):
        ...         return x.new_full(x.shape[:1], float(x[0].numel()))
        >>> Harmonic().laplacian(torch.ones(2, 3))
        tensor([3., 3.])
    """

    features: int | None = None
    context_features: int | None = None
    time_dependent: bool = False

    def forward(self, x: Tensor, t: Time | None = None, context: Tensor | None = None) -> Tensor:
        r"""The value :math:`u(x, t; c)`.

        Args:
            x: points, shape (B, ...).
            t: time, a number or a tensor of shape () or (B,); required by a time-dependent
                potential, ignored by others.
            context: one row for each point, where the potential is conditional.

        Returns:
            Tensor of shape (B,).

        Raises:
            TypeError: for an argument of the wrong type or dtype.
            ValueError: for an argument of the wrong shape or with entries that are not finite.
        """
        return self._evaluate(self._value, x, t, context)

    def gradient(self, x: Tensor, t: Time | None = None, context: Tensor | None = None) -> Tensor:
        r"""The gradient :math:`\nabla u(x, t; c)`, in the shape of ``x``; see :meth:`forward`."""
        return self._evaluate(self._gradient, x, t, context)

    def laplacian(self, x: Tensor, t: Time | None = None, context: Tensor | None = None) -> Tensor:
        r"""The Laplacian :math:`\Delta u(x, t; c)`, shape (B,); see :meth:`forward`."""
        return self._evaluate(self._laplacian, x, t, context)

    def dynamics(
        self, inputs: Tensor, context: Tensor | None, evaluations: int, costs: bool = False
    ) -> Dynamics:
        """The equations of motion of a checked batch, in the coordinates that suit the potential.

        Args:
            inputs: where the trajectories start, shape (B, ...).
            context: shape (B, ...) or None.
            evaluations: about how often the equations will be evaluated; a potential may spend
                work on better coordinates when that pays.
            costs: whether the state carries the costs of transport.
        """
        return DirectDynamics(self._field(inputs), inputs, context, self, costs)

    def check(
        self, x: Tensor, t: Time | None, context: Tensor | None
    ) -> tuple[Tensor, Time | None, Tensor | None]:
        """Return the arguments if the potential can be evaluated on them, else raise."""
        self.check_batch("x", x, context)
        context = None if context is None else usable(context)
        return usable(x), self._check_time(t, x), context

    def check_batch(self, name: str, x: Tensor, context: Tensor | None) -> None:
        """Raise unless ``x``, which the user knows as ``name``, and ``context`` fit."""
        like = next(self.parameters(), None)
        validation.batch(name, x, like)
        if self.features is not None and x.shape[1:].numel() != self.features:
            raise ValueError(
                f"{name}: got {x.shape[1:].numel()} features (shape {tuple(x.shape)}), expected "
                f"{self.features}; build the potential with features={x.shape[1:].numel()} "
                f"or reshape {name}"
            )
        if x.shape[1:].numel() == 0:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected an entry in each row")
        self._check_context(name, x, context, like)

    def _check_context(
        self, name: str, x: Tensor, context: Tensor | None, like: Tensor | None
    ) -> None:
        if self.context_features is None:
            if context is not None:
                raise ValueError(
                    f"context: got {validation.describe(context)}, expected None, because the "
                    "potential was built without context; build it with context_features=..."
                )
            return
        if context is None:
            raise ValueError(
                f"context: got None, expected a tensor of shape (B, {self.context_features}), "
                f"because the potential was built with context_features={self.context_features}"
            )
        validation.batch("context", context, like)
        if tuple(context.shape) != (len(x), self.context_features):
            raise ValueError(
                f"context: got shape {tuple(context.shape)}, expected "
                f"({len(x)}, {self.context_features}): one row for each row of {name}"
            )

    def _check_time(self, t: Time | None, x: Tensor) -> Time | None:
        if not self.time_dependent:
            return None
        if t is None:
            raise ValueError("t: got None, expected a time, because the potential depends on it")
        return validation.instant("t", t, x)

    def _evaluate(
        self,
        function: Callable[..., Tensor],
        x: Tensor,
        t: Time | None,
        context: Tensor | None,
    ) -> Tensor:
        """The value of one of the methods below, which does not surprise the user with NaN."""
        result = function(*self.check(x, t, context))
        name = function.__name__.removeprefix("_")
        shape = x.shape if name == "gradient" else x.shape[:1]
        validation.returned("potential", self, result, shape, f"the {name}")
        if not bool(torch.isfinite(result).all()):
            raise ValueError(
                f"x: the {name} of {type(self).__name__} is NaN or infinite here; use smaller "
                "entries, finite parameters, or float64"
            )
        return result

    def _value(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        raise self._missing("_value")

    def _gradient(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        raise self._missing("_gradient")

    def _laplacian(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        raise self._missing("_laplacian")

    def _missing(self, method: str) -> NotImplementedError:
        return NotImplementedError(
            f"potential: {type(self).__name__} has no method {method}; write one, as "
            "nflows_mongeampere.Potential explains"
        )

    def _field(self, inputs: Tensor) -> Field:
        """What one solve from ``inputs`` integrates, with everything random in it drawn."""
        return self._gradient_and_laplacian

    def _gradient_and_laplacian(
        self, x: Tensor, t: Time | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self._gradient(x, t, context), self._laplacian(x, t, context)
