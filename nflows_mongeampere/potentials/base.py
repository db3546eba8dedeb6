"""The scalar potential that drives a Monge-Ampère flow."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from nflows_mongeampere import validation
from nflows_mongeampere.configured import Configured
from nflows_mongeampere.dynamics import Dynamics, Field, FieldDynamics, Time, field_of
from nflows_mongeampere.groups import Group
from nflows_mongeampere.potentials.orbits import Average, ImageAverage


class Potential(Configured, nn.Module, ABC):
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
    that the flow calls. Where trajectories can be followed faster than in :math:`x`, or the
    gradient of a solution can be written by hand, subclass :class:`ClosedFormPotential` and
    implement :meth:`dynamics`. Set ``features``, ``context_features`` and ``time_dependent`` for
    the checks, and keep each argument of the constructor under its own name.

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

    @property
    def stochastic(self) -> bool:
        """Whether the Laplacian is a random estimate, so that log-densities are too."""
        return False

    @property
    def by_hand(self) -> bool:
        """Whether the equations of motion have a gradient that is written by hand."""
        return False

    def forward(self, x: Tensor, t: Time | None = None, context: Tensor | None = None) -> Tensor:
        r"""The value :math:`u(x, t; c)`.

        Args:
            x: points, shape (B, ...).
            t: time, a number or a tensor of shape () or (B,); required by a time-dependent
                potential, ignored by others.
            context: one row for each point, where the potential is conditional; ignored by others.

        Returns:
            Tensor of shape (B,).

        Raises:
            TypeError: for an argument of the wrong type or dtype.
            ValueError: for an argument of the wrong shape or with entries that are not finite.
        """
        return self._value(*self._check(x, t, context))

    def gradient(self, x: Tensor, t: Time | None = None, context: Tensor | None = None) -> Tensor:
        r"""The gradient :math:`\nabla u(x, t; c)`, in the shape of ``x``; see :meth:`forward`."""
        return self._gradient(*self._check(x, t, context))

    def laplacian(self, x: Tensor, t: Time | None = None, context: Tensor | None = None) -> Tensor:
        r"""The Laplacian :math:`\Delta u(x, t; c)`, shape (B,); see :meth:`forward`."""
        return self._laplacian(*self._check(x, t, context))

    def reset_parameters(self) -> None:
        """Draw anew what the potential learns, or what the modules in it know how to."""
        for module in self.children():
            for layer in module.modules():
                if callable(getattr(layer, "reset_parameters", None)):
                    layer.reset_parameters()  # type: ignore[operator]

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
        return FieldDynamics(self._field(inputs), inputs, context, self, costs)

    def averaged(self, group: Group) -> Average:
        """The average of this potential over a finite group of symmetries."""
        return ImageAverage(self, group)

    def accept(self, name: str, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Check a batch, which the user knows as ``name``, and its context; done once, in public.

        Returns:
            The batch, and the context or None where the potential takes none.
        """
        like = next(self.parameters(), None)
        validation.batch(name, x, like)
        if self.features is not None and x.shape[1:].numel() != self.features:
            raise ValueError(
                f"{name}: got {x.shape[1:].numel()} features (shape {tuple(x.shape)}), expected "
                f"{self.features}; build the potential with features={x.shape[1:].numel()} "
                f"or reshape {name}"
            )
        return x, self._accept_context(name, x, context, like)

    def _accept_context(
        self, name: str, x: Tensor, context: Tensor | None, like: Tensor | None
    ) -> Tensor | None:
        if self.context_features is None:
            return None
        return validation.context(context, self.context_features, name, x.shape[0], like)

    def _check(
        self, x: Tensor, t: Time | None, context: Tensor | None
    ) -> tuple[Tensor, Time | None, Tensor | None]:
        x, context = self.accept("x", x, context)
        if not self.time_dependent:
            return x, None, context
        if t is None:
            raise ValueError("t: got None, expected a time, because the potential depends on it")
        return x, torch.as_tensor(t, dtype=x.dtype, device=x.device), context

    @abstractmethod
    def _value(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor: ...

    @abstractmethod
    def _gradient(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor: ...

    @abstractmethod
    def _laplacian(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor: ...

    def _field(self, inputs: Tensor) -> Field:
        """What one solve from ``inputs`` integrates, with everything random in it drawn."""
        return self._gradient_and_laplacian

    def _gradient_and_laplacian(
        self, x: Tensor, t: Time | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self._gradient(x, t, context), self._laplacian(x, t, context)


class ClosedFormPotential(Potential):
    """A potential that has equations of motion of its own, in which its derivatives are written.

    Subclasses implement :meth:`_value` and :meth:`dynamics`, which for a single evaluation gives
    the equations of motion in x.
    """

    @property
    def by_hand(self) -> bool:
        return True

    @abstractmethod
    def dynamics(
        self, inputs: Tensor, context: Tensor | None, evaluations: int, costs: bool = False
    ) -> Dynamics: ...

    def _gradient(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        return self._gradient_and_laplacian(x, t, context)[0]

    def _laplacian(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        return self._gradient_and_laplacian(x, t, context)[1]

    def _gradient_and_laplacian(
        self, x: Tensor, t: Time | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return field_of(self.dynamics(x, context, evaluations=1), t)
