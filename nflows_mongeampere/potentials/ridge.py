"""Ridge potentials: one hidden layer, everything in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nflows_mongeampere import validation
from nflows_mongeampere.activations import ACTIVATIONS
from nflows_mongeampere.dynamics import Dynamics, ReducedCostDynamics, ReducedDynamics
from nflows_mongeampere.potentials.base import Potential, Time


class RidgePotential(Potential):
    r"""A sum of ridges, the potential of the published flow, in closed form.

    .. math:: u(x, t; c) = \sum_{j=1}^{H} a_j\, \sigma(h_j), \qquad h = Wx + vt + Vc + b

    has the gradient :math:`\nabla u = W^T (a \odot \sigma'(h))` and the Laplacian
    :math:`\Delta u = (a \odot r) \cdot \sigma''(h)` with :math:`r_j = \|w_j\|^2`. Trajectories
    stay in the row space of W, which :class:`~nflows_mongeampere.dynamics.ReducedDynamics` uses to
    integrate them several times faster.

    The amplitude starts at zero: a new flow is the identity map.

    Reference: Zhang, E and Wang, `arXiv:1809.10188 <https://arxiv.org/abs/1809.10188>`_, eq. 10.

    Args:
        features: D, the number of entries of one event, whatever its shape.
        hidden_features: H, the number of ridges.
        context_features: width of the context :math:`c`, or None for none.
        time_dependent: whether the ridges move in time (:math:`v \ne 0`).
        activation: ``"softplus"``, :math:`\ln(1 + e^h)`, or ``"logcosh"``, :math:`\ln \cosh h`.
        bias: whether there is a :math:`b`. Without bias, time and context, ``"logcosh"`` makes
            :math:`u(-x) = u(x)`, so that the flow keeps the sign symmetry of its base.

    Attributes:
        weight: W, shape (H, D).
        bias: b, shape (H,), or None.
        amplitude: a, shape (H,).
        time_weight: v, shape (H,), or None.
        context_weight: V, shape (H, C), or None.

    Example:
        >>> import torch
        >>> potential = RidgePotential(2, 16, activation="logcosh")
        >>> x = torch.randn(5, 2)
        >>> potential(x).shape, potential.gradient(x).shape, potential.laplacian(x).shape
        (torch.Size([5]), torch.Size([5, 2]), torch.Size([5]))
    """

    features: int

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        context_features: int | None = None,
        time_dependent: bool = False,
        activation: str = "softplus",
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.features = validation.integer("features", features)
        self.hidden_features = validation.integer("hidden_features", hidden_features)
        if context_features is not None:
            context_features = validation.integer("context_features", context_features)
        self.context_features = context_features
        self.time_dependent = validation.boolean("time_dependent", time_dependent)
        self.activation = validation.choice("activation", activation, ACTIVATIONS)
        bias = validation.boolean("bias", bias)

        def parameter(*shape: int, scale: float) -> nn.Parameter:
            try:
                return nn.Parameter(scale * torch.randn(*shape))
            except RuntimeError as error:
                raise ValueError(
                    f"hidden_features: a weight of shape {shape} does not fit into memory; use "
                    f"fewer features, hidden_features or context_features ({error})"
                ) from error

        hidden = self.hidden_features
        self.weight = parameter(hidden, self.features, scale=1 / math.sqrt(self.features))
        self.amplitude = nn.Parameter(torch.zeros(hidden))
        self.bias = parameter(hidden, scale=1.0) if bias else None
        self.time_weight = parameter(hidden, scale=1.0) if self.time_dependent else None
        self.context_weight = (
            None
            if context_features is None
            else parameter(hidden, context_features, scale=1 / math.sqrt(context_features))
        )

    @property
    def even(self) -> bool:
        """Whether u(-x) = u(x) by construction."""
        moves = (self.bias, self.time_weight, self.context_weight)
        return self.activation == "logcosh" and all(offset is None for offset in moves)

    def dynamics(
        self, inputs: Tensor, context: Tensor | None, evaluations: int, costs: bool = False
    ) -> Dynamics:
        hidden, features, batch = self.hidden_features, self.features, len(inputs)
        # multiplications: G once, W x(0) and Wᵀ s(T), then G s, or W x and Wᵀ(a σ'), each time
        reduced = hidden * hidden * features + batch * (
            2 * hidden * features + evaluations * hidden * hidden
        )
        direct = batch * evaluations * 2 * hidden * features
        if reduced > direct:
            return super().dynamics(inputs, context, evaluations, costs)
        coordinates = ReducedCostDynamics if costs else ReducedDynamics
        offset = self._offset(inputs, context)
        return coordinates(
            inputs,
            self.weight,
            offset.T,
            self.amplitude,
            self.time_weight,
            ACTIVATIONS[self.activation],
        )

    def _offset(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Vc + b, shape (B, H) or (1, H)."""
        offset = self.weight.new_zeros(1, 1) if self.bias is None else self.bias[None]
        if self.context_weight is not None and context is not None:
            offset = offset + context @ self.context_weight.T
        return offset.expand(-1, self.hidden_features)

    def _preactivation(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        h = self._offset(x, context) + x.flatten(1) @ self.weight.T
        if self.time_weight is not None:
            time = torch.as_tensor(t, dtype=h.dtype, device=h.device).reshape(-1, 1)
            h = h + time * self.time_weight
        return h

    def _value(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        return (
            ACTIVATIONS[self.activation].value(self._preactivation(x, t, context)) @ self.amplitude
        )

    def _gradient(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        return self._gradient_and_laplacian(x, t, context)[0]

    def _laplacian(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        return self._gradient_and_laplacian(x, t, context)[1]

    def _gradient_and_laplacian(
        self, x: Tensor, t: Time | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        activation = ACTIVATIONS[self.activation]
        p = activation.first(self._preactivation(x, t, context))
        gradient = (self.amplitude * p) @ self.weight
        laplacian = activation.second(p) @ (self.amplitude * self.weight.square().sum(1))
        return gradient.reshape(x.shape), laplacian

    def extra_repr(self) -> str:
        return (
            f"features={self.features}, hidden_features={self.hidden_features}, "
            f"context_features={self.context_features}, time_dependent={self.time_dependent}, "
            f"activation={self.activation!r}, bias={self.bias is not None}"
        )
