"""Deep potentials: several hidden layers, everything in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nflows_mongeampere import validation
from nflows_mongeampere.dynamics import Dynamics, FieldDynamics, Time
from nflows_mongeampere.potentials.activations import ACTIVATIONS
from nflows_mongeampere.potentials.base import ClosedFormPotential
from nflows_mongeampere.potentials.layers import Layer, Layers, LayersDynamics, at, number_of_modes
from nflows_mongeampere.potentials.ridges import start_from


class DeepPotential(ClosedFormPotential):
    r"""A potential of several hidden layers, with exact gradient and Laplacian in closed form.

    .. math:: u(x, t; c) = \sum_{l=1}^{L} a_l(t) \cdot \sigma(h_l)
                           + \tfrac12 x^T S x + o \cdot x, \qquad
              h_1 = Wx + vt + Vc + b, \qquad h_{l+1} = K_l\, \sigma'(h_l) + d_l.

    With one layer it is a :class:`~nflows_mongeampere.RidgePotential` and its quadratic part. The
    Laplacian is carried through the layers, at D + 2 times the price of a value, for which it suits
    data of few features (:class:`~nflows_mongeampere.potentials.layers.LayersDynamics`). Where S
    would have too many numbers, :math:`S = A^T \mathrm{diag}(q) A` has a rank.

    All amplitudes and S start at zero: a new flow is the identity map.

    Reference: for the carried Laplacian Li et al., `arXiv:2307.08214
    <https://arxiv.org/abs/2307.08214>`_; for deep potentials with an exact trace Onken et al.,
    `arXiv:2006.00104 <https://arxiv.org/abs/2006.00104>`_.

    Args:
        features: D, the number of entries of one event, whatever its shape.
        hidden_features: the units of each layer: a sequence of numbers, or one number for two
            layers of that width.
        rank: r, the rank of S; None for any.
        context_features: width of the context :math:`c`, or None for none.
        time_dependent: whether the first layer moves in time (:math:`v \ne 0`), and the amplitudes
            :math:`a_l(t) = \sum_k a_{lk} \cos \pi k t` with k up to ``modes - 1``.
        modes: numbers of functions of time for each amplitude of a time-dependent potential.
        activation: ``"logcosh"``, so that units are hyperbolic tangents, or ``"softplus"``,
            sigmoids.

    Attributes:
        weight: W, shape (H, D).
        bias: b, shape (H,).
        amplitude: a of all layers, one below the other, shape (units, modes).
        hidden_weights: K, a list of tensors.
        hidden_biases: d, a list of tensors.
        quadratic: S before it is made symmetric, shape (D, D); of a given rank A, shape (r, D).
        stiffness: q, shape (r,), of a given rank, or None.
        drift: o, shape (D,).
        time_weight: v, shape (H,), or None.
        context_weight: V, shape (H, C), or None.

    Raises:
        TypeError, ValueError: for arguments that do not fit.

    Example:
        >>> import torch
        >>> potential = DeepPotential(2, 16)
        >>> x = torch.randn(5, 2)
        >>> potential(x).shape, potential.gradient(x).shape, potential.laplacian(x).shape
        (torch.Size([5]), torch.Size([5, 2]), torch.Size([5]))
    """

    features: int

    def __init__(
        self,
        features: int,
        hidden_features: int | Sequence[int],
        *,
        rank: int | None = None,
        context_features: int | None = None,
        time_dependent: bool = False,
        modes: int = 1,
        activation: str = "logcosh",
    ) -> None:
        super().__init__()
        self.features = validation.integer("features", features)
        widths = hidden_features if isinstance(hidden_features, Sequence) else [hidden_features] * 2
        self.hidden_features = [validation.integer("hidden_features", width) for width in widths]
        if not self.hidden_features:
            raise ValueError("hidden_features: got no layers, expected at least one width")
        self.rank = validation.optional_integer("rank", rank)
        self.context_features = validation.optional_integer("context_features", context_features)
        self.time_dependent = bool(time_dependent)
        self.modes = number_of_modes(modes, self.time_dependent)
        self.activation = validation.choice("activation", activation, ACTIVATIONS)
        first, *deeper = self.hidden_features
        self.weight = nn.Parameter(torch.empty(first, self.features))
        self.bias = nn.Parameter(torch.empty(first))
        self.hidden_weights = nn.ParameterList(
            torch.empty(after, before)
            for before, after in zip(self.hidden_features, deeper, strict=False)
        )
        self.hidden_biases = nn.ParameterList(torch.empty(width) for width in deeper)
        self.amplitude = nn.Parameter(torch.empty(sum(self.hidden_features), self.modes))
        self.quadratic = nn.Parameter(torch.empty(self.rank or self.features, self.features))
        self.stiffness = None if rank is None else nn.Parameter(torch.empty(len(self.quadratic)))
        self.drift = nn.Parameter(torch.empty(self.features))
        self.time_weight = nn.Parameter(torch.empty(first)) if self.time_dependent else None
        self.context_weight = (
            None if context_features is None else nn.Parameter(torch.empty(first, context_features))
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the units anew, for standardised data; amplitudes of zero."""
        for zero in (self.amplitude, self.quadratic, self.drift, self.stiffness):
            if zero is not None:
                nn.init.zeros_(zero)
        if self.stiffness is not None:
            nn.init.normal_(self.quadratic, std=1 / math.sqrt(self.features))
        nn.init.normal_(self.weight, std=3 / math.sqrt(self.features))
        nn.init.normal_(self.bias, std=3)
        for weight, bias in zip(self.hidden_weights, self.hidden_biases, strict=True):
            nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1]))
            nn.init.normal_(bias)
        if self.time_weight is not None:
            nn.init.normal_(self.time_weight)
        if self.context_weight is not None:
            nn.init.normal_(self.context_weight, std=1 / math.sqrt(self.context_weight.shape[1]))

    def initialize(self, data: Tensor, *, sharpness: float = 3.0) -> None:
        r"""Draw the first layer anew to suit data; what is above it and the amplitudes stay.

        Rows and bends as in :meth:`RidgePotential.initialize
        <nflows_mongeampere.RidgePotential.initialize>`.

        Args:
            data: rows as the potential will meet them, behind the layers in front, shape (N, ...).
            sharpness: how much sharper than the data the first layer starts.

        Raises:
            TypeError, ValueError: for arguments that do not fit.
        """
        start_from(data, self.weight, self.bias, sharpness)

    def dynamics(
        self, inputs: Tensor, context: Tensor | None, evaluations: int, costs: bool = False
    ) -> Dynamics:
        if costs:
            return FieldDynamics(self._gradient_and_laplacian, inputs, context, self, costs)
        return LayersDynamics(self._layers(context), inputs)

    def _layers(self, context: Tensor | None) -> Layers:
        offset = self.bias[:, None]
        if self.context_weight is not None and context is not None:
            offset = torch.addmm(offset, self.context_weight, context.T)
        amplitudes = self.amplitude.split(self.hidden_features)
        weights = [self.weight, *self.hidden_weights]
        offsets = [offset, *(bias[:, None] for bias in self.hidden_biases)]
        return Layers(
            [Layer(*parts) for parts in zip(weights, offsets, amplitudes, strict=True)],
            None if self.time_weight is None else self.time_weight[:, None],
            self._symmetric(),
            self.drift,
            self.activation,
        )

    def _symmetric(self) -> Tensor:
        """The matrix S of the quadratic part."""
        if self.stiffness is None:
            return (self.quadratic + self.quadratic.T) / 2
        return self.quadratic.T @ (self.stiffness[:, None] * self.quadratic)

    def _value(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        potential, points = self._layers(context), x.flatten(1).T
        sigma, t = ACTIVATIONS[self.activation], 0.0 if t is None else t
        value = (points * (potential.quadratic @ points) / 2).sum(0) + potential.drift @ points
        y = points
        for i, (weight, offset, amplitude) in enumerate(potential.layers):
            h = torch.addmm(offset, weight, y)
            if i == 0 and potential.speed is not None:
                h = h + potential.speed * t
            value = value + (at(t, amplitude) * sigma.value(h)).sum(0)
            y = sigma.first(h)
        return value
