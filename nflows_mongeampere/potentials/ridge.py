"""Ridge potentials: one hidden layer, everything in closed form."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from nflows_mongeampere import validation
from nflows_mongeampere.dynamics import Dynamics, Time
from nflows_mongeampere.groups import Group
from nflows_mongeampere.potentials.activations import ACTIVATIONS
from nflows_mongeampere.potentials.base import ClosedFormPotential
from nflows_mongeampere.potentials.orbits import RidgeOrbits
from nflows_mongeampere.potentials.ridges import Ridges, start_from


class RidgePotential(ClosedFormPotential):
    r"""A sum of ridges, the potential of the published flow, in closed form.

    .. math:: u(x, t; c) = \sum_{j=1}^{H} a_j\, \sigma(h_j), \qquad h = Wx + vt + Vc + b

    has the gradient :math:`\nabla u = W^T (a \odot \sigma'(h))` and the Laplacian
    :math:`\Delta u = (a \odot r) \cdot \sigma''(h)` with :math:`r_j = \|w_j\|^2`. Trajectories
    stay in the row space of W, in whose coordinates they are integrated several times faster where
    there are many dimensions (:class:`~nflows_mongeampere.potentials.ridges.ReducedDynamics`).

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

    Raises:
        TypeError, ValueError: for arguments that do not fit.

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
        self.hidden_features = hidden = validation.integer("hidden_features", hidden_features)
        self.context_features = validation.optional_integer("context_features", context_features)
        self.time_dependent = bool(time_dependent)
        self.activation = validation.choice("activation", activation, ACTIVATIONS)
        self.weight = nn.Parameter(torch.empty(hidden, self.features))
        self.amplitude = nn.Parameter(torch.empty(hidden))
        self.bias = nn.Parameter(torch.empty(hidden)) if bias else None
        self.time_weight = nn.Parameter(torch.empty(hidden)) if self.time_dependent else None
        self.context_weight = (
            None
            if context_features is None
            else nn.Parameter(torch.empty(hidden, context_features))
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the ridges anew: unit vectors on average, amplitudes of zero."""
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.features))
        nn.init.zeros_(self.amplitude)
        for offset in (self.bias, self.time_weight):
            if offset is not None:
                nn.init.normal_(offset)
        if self.context_weight is not None:
            nn.init.normal_(self.context_weight, std=1 / math.sqrt(self.context_weight.shape[1]))

    def initialize(self, data: Tensor, *, sharpness: float = 1.0) -> None:
        r"""Draw the ridges anew to suit data; amplitudes stay as they are.

        The first rows are the axes, the others point in random directions, and each has the length
        ``sharpness`` / s.d. of the data; each ridge bends at a random row of the data. Axes pay
        wherever features mean something by themselves, as whitened pixels do: a random mixture of
        many features is nearly normal and has little to learn.

        Args:
            data: rows as the potential will meet them, behind the layers in front, shape (N, ...).
            sharpness: how much sharper than the data ridges start: 1 for many features, 3 to 6 for
                thin shapes in the plane.

        Raises:
            TypeError, ValueError: for arguments that do not fit.
        """
        start_from(data, self.weight, self.bias, sharpness)

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "bias": self.bias is not None}

    @property
    def even(self) -> bool:
        """Whether u(-x) = u(x) by construction."""
        moves = (self.bias, self.time_weight, self.context_weight)
        return self.activation == "logcosh" and all(offset is None for offset in moves)

    def averaged(self, group: Group) -> RidgeOrbits:
        """The ridge potential whose rows are the orbits of the rows of this one."""
        return RidgeOrbits(self, group)

    def dynamics(
        self, inputs: Tensor, context: Tensor | None, evaluations: int, costs: bool = False
    ) -> Dynamics:
        offset = self.offset(context)
        ridges = Ridges(self.weight, self.amplitude, offset, self.time_weight, self.activation)
        return ridges.dynamics(inputs, evaluations, costs)

    def offset(self, context: Tensor | None) -> Tensor:
        """Vc + b, with a column for each row of context: shape (H, B) or (H, 1)."""
        zero = self.amplitude.new_zeros(self.hidden_features) if self.bias is None else self.bias
        if self.context_weight is None or context is None:
            return zero[:, None]
        return torch.addmm(zero[:, None], self.context_weight, context.T)

    def _value(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        h = torch.addmm(self.offset(context), self.weight, x.flatten(1).T)
        if self.time_weight is not None:
            h = h + self.time_weight[:, None] * (0.0 if t is None else t)
        return self.amplitude @ ACTIVATIONS[self.activation].value(h)
