"""The equations of motion of ridges, in x and in the coordinates of the ridges."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nflows_mongeampere import validation
from nflows_mongeampere.differentiation import compiling
from nflows_mongeampere.dynamics import Dynamics, Time, as_rows
from nflows_mongeampere.potentials.activations import ACTIVATIONS, Activation


class Ridges(NamedTuple):
    r"""The ridges :math:`\sum_j a_j \sigma(w_j x + v_j t + o_j)` as a batch meets them.

    Attributes:
        weight: W, shape (H, D).
        amplitude: a, shape (H,).
        offset: o, shape (H, B) or (H, 1).
        speed: v, shape (H,), or None.
        activation: name of :math:`\sigma`.
    """

    weight: Tensor
    amplitude: Tensor
    offset: Tensor
    speed: Tensor | None
    activation: str

    def dynamics(self, inputs: Tensor, evaluations: int, costs: bool = False) -> Dynamics:
        """The equations of motion in x or in reduced coordinates, whichever is cheaper."""
        if costs:
            return ReducedCostDynamics(self, inputs)
        reduced = reduces(self.weight, inputs, evaluations)
        return ReducedDynamics(self, inputs) if reduced else RidgeDynamics(self, inputs)


def reduces(weight: Tensor, inputs: Tensor, evaluations: int) -> bool:
    """Whether a batch is followed faster in the coordinates of the rows of W than in x."""
    hidden, features = weight.shape
    # multiplications: G once, W x(0) and Wᵀ s(T), then G s, or W x and Wᵀ(a σ'), each time
    reduced = 2 * hidden * features + evaluations * hidden * hidden
    direct = evaluations * 2 * hidden * features
    if not compiling():  # which is for batches of any size
        reduced = hidden * hidden * features + inputs.shape[0] * reduced
        direct = inputs.shape[0] * direct
    return reduced <= direct


class RidgeTensors(NamedTuple):
    r"""What the equations of motion in :math:`x` are made of.

    Attributes:
        rows: :math:`\kappa [W \mid b]^T`, shape (D + 1, H).
        push: :math:`\kappa (a \odot W)^T` above two rows of zeros, shape (D + 2, H).
        bend: :math:`-\kappa^2 (a \odot r)^T`, shape (1, H).
        drift: the part of the rate that is the same everywhere, shape (D + 2, 1).
        moved: :math:`\kappa o`, where it is not the same b for all points, shape (H, B), or None.
        speed: :math:`\kappa v`, shape (H, 1), or None.
    """

    rows: Tensor
    push: Tensor
    bend: Tensor
    drift: Tensor
    moved: Tensor | None
    speed: Tensor | None


class RidgeDynamics(Dynamics):
    r"""The equations of motion of ridges in :math:`x`: the state is :math:`[x; 1; \ell]`.

    Both activations are :math:`\sigma(h) = \ln\cosh\kappa h + \rho\, \kappa h` and a constant, with
    :math:`\kappa = 1, \rho = 0` for log-cosh and :math:`\kappa = \frac12, \rho = 1` for softplus.
    So one hyperbolic tangent, :math:`p = \tanh \kappa h` with :math:`h = Wx + vt + o`, serves both:

    .. math:: \dot x = \kappa (a \odot W)^T (p + \rho), \qquad
              \dot\ell = \kappa^2 (a \odot r)^T (1 - p^2).

    The Jacobian's product with an adjoint :math:`[\lambda; \lambda_\ell]` is
    :math:`\kappa W^T g` with

    .. math:: g = (1 - p^2) \odot \big[\kappa (a \odot W) \lambda
                  - 2 p \odot \kappa^2 (a \odot r) \lambda_\ell^T\big].

    The row of ones makes :math:`Wx + b` a single product, and so the gradients of W and b.
    """

    by_hand = True
    tensors: RidgeTensors

    def __init__(self, ridges: Ridges, inputs: Tensor) -> None:
        weight, amplitude, offset, speed, activation = ridges
        scale, rise = ACTIVATIONS[activation].scale, ACTIVATIONS[activation].rise
        self._event_shape, self._features = inputs.shape[1:], weight.shape[1]
        self.coordinates = self._features + 1
        points, columns = inputs.flatten(1).T, scale * weight.T
        zeros = torch.zeros_like(points[:1])
        self.state = torch.cat([points, zeros + 1, zeros])
        shared, offset = offset.shape[1] == 1, scale * offset
        push, none = columns * amplitude, torch.zeros_like(amplitude)[None]
        curvature = (columns * push).sum(0, keepdim=True)
        self.tensors = RidgeTensors(
            torch.cat([columns, offset.T if shared else none]),
            torch.cat([push, none, none]),
            -curvature,
            torch.cat([rise * push, none, curvature]).sum(1, keepdim=True),
            None if shared else offset,
            None if speed is None else scale * speed[:, None],
        )

    def rate(self, t: Time, state: Tensor) -> Tensor:
        p = torch.tanh(self._arguments(t, state[:-1]))
        rate = torch.addmm(self.tensors.drift, self.tensors.push, p)
        return torch.cat([rate[:-1], rate[-1:] + self.tensors.bend @ p.square()])

    def stage(self, t: Time, state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        p = torch.empty_like(self._room[0])
        return self._evaluate(t, state, p), (state[:-1], p)

    def evaluate(self, t: Time, state: Tensor) -> Tensor:
        return self._evaluate(t, state, self._room[0])

    def _evaluate(self, t: Time, state: Tensor, p: Tensor) -> Tensor:
        _, push, bend, drift, _, _ = self.tensors
        torch.tanh(self._arguments(t, state[:-1], p), out=p)
        rate = torch.addmm(drift, push, p)
        rate[-1:].addmm_(bend, torch.mul(p, p, out=self._room[1]))
        return rate

    def _arguments(self, t: Time, x: Tensor, out: Tensor | None = None) -> Tensor:
        r""":math:`\kappa h`, shape (H, B)."""
        rows, moved, speed = self.tensors.rows, self.tensors.moved, self.tensors.speed
        if moved is None:
            h = torch.mm(rows.T, x, out=out)
        else:
            h = torch.addmm(moved, rows.T, x, out=out)
        return h if speed is None else torch.add(h, speed * t, out=out)

    def pullback(
        self,
        t: Time,
        kept: tuple[Tensor, ...],
        adjoint: Tensor,
        gradients: list[Tensor | None],
    ) -> Tensor:
        x, p = kept
        rows, push, bend, _, _, _ = self.tensors
        d_rows, d_push, d_bend, d_drift, d_moved, d_speed = gradients
        of_l = adjoint[self.coordinates :]
        g, room = self._room
        torch.mm(push[: len(adjoint)].T, adjoint, out=g)
        if len(of_l):
            g.addcmul_(torch.mul(bend.T, of_l, out=room), p, value=2)
        square = torch.mul(p, p, out=room)
        g.addcmul_(g, square, value=-1)
        if d_rows is not None:
            d_rows.addmm_(x, g.T)
        if d_push is not None:
            d_push[: len(adjoint)].addmm_(adjoint, p.T)
        if d_bend is not None and len(of_l):
            d_bend.addmm_(of_l, square.T)
        if d_drift is not None:
            d_drift[: len(adjoint)].add_(adjoint.sum(1, keepdim=True))
        if d_moved is not None:
            d_moved.add_(g)
        if d_speed is not None:
            d_speed.add_(g.sum(1, keepdim=True) * t)
        return rows @ g

    def points(self, state: Tensor) -> Tensor:
        return as_rows(state[: self._features], self._event_shape)

    @cached_property
    def _room(self) -> tuple[Tensor, ...]:
        """Room for what an evaluation makes of each ridge and point and does not keep."""
        return self.state.new_empty(2, self.tensors.rows.shape[1], self.state.shape[1]).unbind()


class ReducedTensors(NamedTuple):
    r"""What the equations of motion in reduced coordinates are made of.

    Attributes:
        gram: :math:`G = WW^T`, shape (H, H).
        origin: :math:`h_0 = Wx(0) + Vc + b`, shape (H, B).
        amplitude: :math:`a`, shape (H, 1).
        curvature: :math:`(a \odot r)^T`, shape (1, H).
        speed: :math:`v`, shape (H, 1), or None.
    """

    gram: Tensor
    origin: Tensor
    amplitude: Tensor
    curvature: Tensor
    speed: Tensor | None


class ReducedDynamics(Dynamics):
    r"""The equations of motion of ridges, in the coordinates of the ridges.

    The gradient lies in the row space of W, so the trajectory is :math:`x(t) = x(0) + W^T s(t)`
    with

    .. math:: \dot s = a \odot \sigma'(h), \qquad
              \dot\ell = (a \odot r)^T \sigma''(h), \qquad
              h = h_0 + G s + v t,

    where :math:`h_0 = Wx(0) + Vc + b`, :math:`G = WW^T` and :math:`r_j = \|w_j\|^2`. One evaluation
    costs one H×H product for each point instead of two H×D ones. Runge-Kutta methods commute with
    affine maps, so the numbers are those of :class:`RidgeDynamics`.

    The state is :math:`[s; \ell]`, shape (H + 1, B). The Jacobian's product with an adjoint is
    :math:`G g` with :math:`g = \sigma''(h) \odot a \odot \lambda
    + \sigma'''(h) \odot (a \odot r) \lambda_\ell^T`.
    """

    by_hand = True
    tensors: ReducedTensors

    def __init__(self, ridges: Ridges, inputs: Tensor) -> None:
        weight, amplitude, offset, speed, activation = ridges
        self._activation: Activation = ACTIVATIONS[activation]
        self._inputs, self._weight = inputs, weight
        self.coordinates = len(weight)
        self.tensors = ReducedTensors(
            weight @ weight.T,
            torch.addmm(offset, weight, inputs.flatten(1).T),
            amplitude[:, None],
            (amplitude * weight.square().sum(1))[None],
            None if speed is None else speed[:, None],
        )
        self.state = torch.zeros_like(self.tensors.origin[:1]).repeat(self._rows, 1)

    @property
    def _rows(self) -> int:
        return self.coordinates + 1

    def rate(self, t: Time, state: Tensor) -> Tensor:
        return self._evaluate(t, state)[0]

    def stage(self, t: Time, state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self._evaluate(t, state, in_place=True)

    def _evaluate(
        self, t: Time, state: Tensor, in_place: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        gram, origin, amplitude, curvature, speed = self.tensors
        s = state[: self.coordinates]
        h = torch.addmm(origin if speed is None else origin + speed * t, gram, s)
        p = self._activation.first(h, out=h if in_place else None)
        return torch.cat([amplitude * p, curvature @ self._activation.second(p)]), (s, p)

    def pullback(
        self,
        t: Time,
        kept: tuple[Tensor, ...],
        adjoint: Tensor,
        gradients: list[Tensor | None],
    ) -> Tensor:
        s, p = kept
        gram, _, amplitude, curvature, _ = self.tensors
        of_s, of_l = adjoint[: self.coordinates], adjoint[self.coordinates :]
        bend = curvature.T * of_l if len(of_l) else None
        g, second = self._activation.pull_back(p, amplitude * of_s, bend)
        d_gram, d_origin, d_amplitude, d_curvature, d_speed = gradients
        if d_gram is not None:
            d_gram.addmm_(g, s.T)
        if d_amplitude is not None:
            d_amplitude.add_((of_s * p).sum(1, keepdim=True))
        if d_curvature is not None and len(of_l):
            d_curvature.addmm_(of_l, second.T)
        if d_origin is not None:
            d_origin.add_(g)
        if d_speed is not None:
            d_speed.add_(g.sum(1, keepdim=True) * t)
        return gram @ g

    def points(self, state: Tensor) -> Tensor:
        displacement = state[: len(self._weight)].T @ self._weight
        return (self._inputs + displacement.view_as(self._inputs)).contiguous()


class ReducedCostDynamics(ReducedDynamics):
    r"""Reduced coordinates with the costs of transport, at the same number of products.

    Where :math:`g = Gs` is carried beside :math:`s`, the one product of an evaluation,
    :math:`\dot g = G \dot s = W \nabla u`, also gives

    .. math:: \|\nabla u\|^2 = \dot s \cdot \dot g, \qquad
              \frac{d \Delta u}{dt} = (a \odot r) \cdot (\sigma^{(3)}(h) \odot (\dot g + v)).

    The state is :math:`[s; g; \ell; E; R]`, shape (2H + 3, B).
    """

    by_hand = False

    def __init__(self, ridges: Ridges, inputs: Tensor) -> None:
        super().__init__(ridges, inputs)
        self.coordinates = 2 * len(self._weight)

    @property
    def _rows(self) -> int:
        return 2 * len(self._weight) + 3

    def rate(self, t: Time, state: Tensor) -> Tensor:
        gram, origin, amplitude, curvature, speed = self.tensors
        hidden = len(self._weight)
        h = origin + state[hidden : 2 * hidden]
        p = self._activation.first(h if speed is None else h + speed * t)
        s_rate = amplitude * p
        g_rate = gram @ s_rate
        h_rate = g_rate if speed is None else g_rate + speed
        integrands = [
            curvature @ self._activation.second(p),
            (s_rate * g_rate).sum(0, keepdim=True),
            (curvature @ (self._activation.third(p) * h_rate)).square(),
        ]
        return torch.cat([s_rate, g_rate, *integrands])

    def stage(self, t: Time, state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return Dynamics.stage(self, t, state)

    def pullback(
        self,
        t: Time,
        kept: tuple[Tensor, ...],
        adjoint: Tensor,
        gradients: list[Tensor | None],
    ) -> Tensor:
        return Dynamics.pullback(self, t, kept, adjoint, gradients)


@torch.no_grad()
def start_from(data: Tensor, weight: Tensor, bias: Tensor | None, sharpness: float) -> None:
    """Write rows and offsets that suit data over those of ridges."""
    validation.batch("data", data, weight)
    hidden, features = weight.shape
    points = data.flatten(1)
    if points.shape[1] != features or len(points) < 2:
        raise ValueError(
            f"data: got shape {tuple(data.shape)}, expected at least 2 rows of {features} features"
        )
    spread = points.std(0)
    if not spread.all():
        raise ValueError(
            f"data: got the same number in all rows of feature {int(spread.argmin())}, expected "
            "features that vary"
        )
    rows = F.normalize(torch.randn_like(weight), dim=1)
    rows[:features] = torch.eye(features, dtype=rows.dtype, device=rows.device)[:hidden]
    weight.copy_(validation.positive("sharpness", sharpness) * rows / spread)
    if bias is not None:
        at = points[torch.randint(len(points), (hidden,), device=points.device)]
        bias.copy_(-(weight * at).sum(1))
