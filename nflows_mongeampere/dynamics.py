r"""The equations of motion of a batch, in the form that a solver integrates.

A point and the log-density that it carries move together,

.. math:: \frac{dx}{dt} = \nabla u(x, t; c), \qquad \frac{d\ell}{dt} = \Delta u(x, t; c),

where :math:`\ell` is the log-determinant of the map from the starting points, so that
:math:`\ln p` changes by :math:`-\ell`. Solvers see both as one state with the batch as its last
dimension: the products of a small matrix with a batch are several times faster that way.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nflows_mongeampere.differentiation import (
    compiling,
    derivatives,
    differentiation,
    transformed,
)

Time = float | Tensor
Field = Callable[[Tensor, "Time | None", "Tensor | None"], "tuple[Tensor, Tensor]"]


class Dynamics(ABC):
    r"""The equations of motion of one batch, :math:`\dot y = f(t, y; \theta)`.

    The state :math:`y` has one column for each point: some rows of coordinates, in which the point
    moves, then rows of integrals along the path, which do not act back on it: :math:`\ell`, and
    the costs of transport where these are recorded.

    **Writing new equations of motion.** Implement :meth:`rate` and :meth:`points`. For the gradient
    of a solution by hand implement :meth:`stage` and :meth:`pullback` as well and set ``by_hand``;
    else autograd differentiates :meth:`rate`.

    Attributes:
        state: :math:`y` at the starting points, shape (coordinates + integrals, B).
        coordinates: the number of rows of coordinates.
        tensors: :math:`\theta`, all that the rate depends on besides time and state; None stands
            for what is absent.
        by_hand: whether :meth:`pullback` is written by hand.
    """

    state: Tensor
    coordinates: int
    tensors: Sequence[Tensor | None]
    by_hand: bool = False

    @abstractmethod
    def rate(self, t: Time, state: Tensor) -> Tensor:
        r"""The time derivative :math:`f(t, y)`, in the shape of ``state``."""

    def rebound(self, tensors: Sequence[Tensor | None]) -> Dynamics:
        """The same equations of motion with other tensors."""
        twin = copy.copy(self)
        named = hasattr(self.tensors, "_fields")
        twin.tensors = type(self.tensors)(*tensors) if named else tuple(tensors)
        return twin

    @abstractmethod
    def points(self, state: Tensor) -> Tensor:
        """The points of a state, in the shape of the inputs."""

    def logabsdet(self, state: Tensor) -> Tensor:
        r""":math:`\ell` of a state in nats, shape (B,)."""
        return state[self.coordinates].clone()

    def costs(self, state: Tensor) -> tuple[Tensor, Tensor]:
        r"""The costs of transport, shape (B,), where the state carries them.

        .. math:: E = \int \|\nabla u\|^2 dt, \qquad
                  R = \int \left(\frac{d \Delta u}{dt}\right)^2 dt \quad \text{along the path.}
        """
        return state[-2].clone(), state[-1].clone()

    def stage(self, t: Time, state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The rate, and what :meth:`pullback` needs of it; called where gradients are off."""
        with torch.enable_grad():
            point = state.detach().requires_grad_()
            rate = self.rate(t, point)
        return rate.detach(), (point, rate)

    def evaluate(self, t: Time, state: Tensor) -> Tensor:
        """The rate, where nothing goes back through it."""
        return self.stage(t, state)[0]

    def pullback(
        self,
        t: Time,
        kept: tuple[Tensor, ...],
        adjoint: Tensor,
        gradients: list[Tensor | None],
    ) -> Tensor:
        r"""The product :math:`J^T \lambda` with the Jacobian of one evaluation of the rate.

        Args:
            t: the time of the evaluation.
            kept: what :meth:`stage` kept.
            adjoint: :math:`\lambda`, in the shape of the state; or its coordinates alone, where
                the rest is zero.
            gradients: :math:`(\partial f / \partial \theta)^T \lambda` is added to each of these
                that is not None.

        Returns:
            The rows of :math:`(\partial f / \partial y)^T \lambda` that are coordinates; the
            others are zero.
        """
        point, rate = kept
        with torch.enable_grad():
            rate = rate[: len(adjoint)]
        wanted = [i for i, gradient in enumerate(gradients) if gradient is not None]
        targets: list[Any] = [point, *(self.tensors[i] for i in wanted)]
        if not rate.requires_grad:
            return torch.zeros_like(point[: self.coordinates])
        along_state, *products = torch.autograd.grad(
            rate, targets, adjoint, allow_unused=True, materialize_grads=True
        )
        for i, product in zip(wanted, products, strict=True):
            gradients[i] += product  # type: ignore[operator]
        return along_state[: self.coordinates]


class FieldDynamics(Dynamics):
    r"""The equations of motion in :math:`x` itself, of any field: the state is :math:`[x; \ell]`.

    The state has D + 1 rows; with ``costs`` it is :math:`[x; \ell; E; R]`, D + 3 rows.

    Args:
        field: maps points of shape (B, ...), time and context to :math:`(\nabla u, \Delta u)`.
        inputs: starting points, shape (B, ...).
        context: shape (B, ...) or None.
        module: what the field is made of, whose parameters it depends on, or None.
        costs: whether the state carries the costs of transport.
    """

    def __init__(
        self,
        field: Field,
        inputs: Tensor,
        context: Tensor | None,
        module: nn.Module | None = None,
        costs: bool = False,
    ) -> None:
        self._field, self._costs, self._module = field, costs, module
        self._event_shape = inputs.shape[1:]
        self.coordinates = self._event_shape.numel()
        self.state = start(inputs, 3 if costs else 1)
        self.tensors = (context, *(() if module is None else module.parameters()))

    def rebound(self, tensors: Sequence[Tensor | None]) -> FieldDynamics:
        twin: FieldDynamics = super().rebound(tensors)  # type: ignore[assignment]
        if self._module is not None:
            names = [f"module.{name}" for name, _ in self._module.named_parameters()]
            parameters: Any = dict(zip(names, tensors[1:], strict=True))
            carrier = _Carrier(self._module, self._field)
            twin._field = lambda *arguments: functional_call(carrier, parameters, arguments)
        return twin

    def rate(self, t: Time, state: Tensor) -> Tensor:
        x, context = self.points(state), self.tensors[0]
        gradient, laplacian = self._field(x, t, context)
        velocity = gradient.flatten(1).T
        if not self._costs:
            return torch.cat([velocity, laplacian[None]])
        bend = self._laplacian_rate(x, t, context, gradient)
        return torch.cat(
            [velocity, torch.stack([laplacian, velocity.square().sum(0), bend.square()])]
        )

    def points(self, state: Tensor) -> Tensor:
        return as_rows(state[: self.coordinates], self._event_shape)

    def _laplacian_rate(
        self, x: Tensor, t: Time, context: Tensor | None, velocity: Tensor
    ) -> Tensor:
        r""":math:`d\Delta u/dt = \partial_t\Delta u + \nabla\Delta u \cdot \dot x`, shape (B,)."""
        if compiling() or transformed(x, *self.tensors):
            time = torch.as_tensor(t, dtype=x.dtype, device=x.device)
            along = (velocity, torch.ones_like(time))
            bend: Tensor = torch.func.jvp(
                lambda x, t: self._field(x, t, context)[1], (x, time), along
            )[1]
            return bend
        with differentiation(x, context) as (point, row_context, keep_graph):
            time = torch.as_tensor(t, dtype=x.dtype, device=x.device).detach().requires_grad_()
            laplacian = self._field(point, time, row_context)[1]
            # twice in reverse is once forward: the derivative of <w, d(laplacian)> to w
            weights = torch.ones_like(laplacian).requires_grad_()
            in_space, in_time = derivatives((laplacian * weights).sum(), (point, time), True)
            along_path = (in_space * velocity).sum() + in_time
            (rate,) = derivatives(along_path, (weights,), keep_graph)
        return rate


class _Carrier(nn.Module):
    """A field as the forward method of what it is made of, for other parameters to be put there."""

    def __init__(self, module: nn.Module, field: Field) -> None:
        super().__init__()
        self.module, self._field = module, field

    def forward(self, x: Tensor, t: Time, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._field(x, t, context)


class ScoredDynamics(Dynamics):
    r"""Equations of motion that carry the score of the density along, above which they stand.

    The slope :math:`s = \nabla \ln p_t(x(t))` of the log-density that moves with a flow obeys

    .. math:: \frac{ds}{dt} = -(\nabla \nabla u)^T s - \nabla \Delta u,

    the negative product of the Jacobian with the adjoint :math:`[s; 1]` (Vaitl, Nicoli, Nakajima
    and Kessel, `arXiv:2206.09016 <https://arxiv.org/abs/2206.09016>`_). The state is that of the
    dynamics, then s. Gradients go through the points alone: the score is a given number to them.

    Args:
        dynamics: equations of motion in x, with a gradient by hand.
        score: at the starting points, shape (B, ...).
    """

    by_hand = True

    def __init__(self, dynamics: Dynamics, score: Tensor) -> None:
        self._dynamics, self._event_shape = dynamics, score.shape[1:]
        self.coordinates, self.tensors = dynamics.coordinates, dynamics.tensors
        self._size = len(dynamics.state)
        slopes = torch.zeros_like(dynamics.state[: self.coordinates]).detach()
        slopes[: self._event_shape.numel()] = score.detach().flatten(1).T
        self.state = torch.cat([dynamics.state, slopes])

    def rebound(self, tensors: Sequence[Tensor | None]) -> ScoredDynamics:
        twin: ScoredDynamics = super().rebound(tensors)  # type: ignore[assignment]
        twin._dynamics = self._dynamics.rebound(tensors)
        return twin

    def rate(self, t: Time, state: Tensor) -> Tensor:
        with torch.no_grad():
            rest = self.stage(t, state)[0][self.coordinates :]
        velocity = self._dynamics.rate(t, state[: self._size])[: self.coordinates]
        return torch.cat([velocity, rest])

    def stage(self, t: Time, state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        rate, kept = self._dynamics.stage(t, state[: self._size])
        one = torch.ones_like(state[:1])
        adjoint = torch.cat([state[self._size :], one])
        slopes = self._dynamics.pullback(t, kept, adjoint, [None] * len(self.tensors))
        return torch.cat([rate, slopes.neg_()]), kept

    def pullback(
        self,
        t: Time,
        kept: tuple[Tensor, ...],
        adjoint: Tensor,
        gradients: list[Tensor | None],
    ) -> Tensor:
        return self._dynamics.pullback(t, kept, adjoint[: self.coordinates], gradients)

    def points(self, state: Tensor) -> Tensor:
        return self._dynamics.points(state)

    def score(self, state: Tensor) -> Tensor:
        """The score of a state, in the shape of the inputs."""
        slopes = state[self._size :].detach()
        return as_rows(slopes[: self._event_shape.numel()], self._event_shape)


def field_of(motion: Dynamics, t: Time | None) -> tuple[Tensor, Tensor]:
    r""":math:`(\nabla u, \Delta u)` where equations of motion in :math:`x` start."""
    rate = motion.rate(0.0 if t is None else t, motion.state)
    return motion.points(rate), motion.logabsdet(rate)


def start(inputs: Tensor, integrals: int) -> Tensor:
    """Points of shape (B, ...) as columns, above rows of integrals that begin at zero."""
    points = inputs.flatten(1).T
    return torch.cat([points, torch.zeros_like(points[:1]).expand(integrals, -1)])


def as_rows(columns: Tensor, event_shape: torch.Size) -> Tensor:
    """Points that are columns, (D, B), in the shape (B, ...) of a batch of events, contiguous."""
    return columns.T.contiguous().view(columns.shape[1], *event_shape)
