r"""The equations of motion of a batch, in the form that a solver integrates.

A point and the log-density that it carries move together,

.. math:: \frac{dx}{dt} = \nabla u(x, t; c), \qquad \frac{d\ell}{dt} = \Delta u(x, t; c),

where :math:`\ell` is the log-determinant of the map from the starting points, so that
:math:`\ln p` changes by :math:`-\ell`. Solvers see both as one state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_mongeampere import validation
from nflows_mongeampere.activations import Activation
from nflows_mongeampere.differentiation import derivatives, differentiation

Field = Callable[[Tensor, "float | Tensor | None", "Tensor | None"], "tuple[Tensor, Tensor]"]


class Dynamics:
    """The equations of motion of one batch: a state and its time derivative.

    Attributes:
        state: the state that stands for the starting points and :math:`\\ell = 0`.
        parameters: the tensors that the derivative depends on, besides time and state.
    """

    state: Tensor
    parameters: tuple[Tensor, ...]

    def __call__(self, t: float | Tensor, state: Tensor) -> Tensor:
        """The time derivative of ``state`` at time ``t``."""
        raise NotImplementedError

    def outputs(self, state: Tensor) -> tuple[Tensor, Tensor]:
        r"""The points, in the shape of the inputs, and :math:`\ell`, shape (B,)."""
        raise NotImplementedError

    def costs(self, state: Tensor) -> tuple[Tensor, Tensor]:
        r"""The costs of transport, shape (B,), where the state carries them.

        .. math:: E = \int \|\nabla u\|^2 dt, \qquad
                  R = \int \left(\frac{d \Delta u}{dt}\right)^2 dt \quad \text{along the path.}
        """
        raise NotImplementedError


class DirectDynamics(Dynamics):
    r"""The equations of motion in :math:`x` itself: the state is :math:`[x \mid \ell]`, (B, D + 1).

    With ``costs`` these follow: :math:`[x \mid \ell \mid E \mid R]`, (B, D + 3).

    Args:
        field: maps (x, t, context) to :math:`(\nabla u, \Delta u)`.
        inputs: starting points, shape (B, ...).
        context: shape (B, ...) or None.
        potential: the module whose parameters the field depends on.
        costs: whether the state carries the costs of transport.
        parameters: the tensors that the field depends on, where these are not the parameters of
            ``potential`` and ``context``.
    """

    def __init__(
        self,
        field: Field,
        inputs: Tensor,
        context: Tensor | None,
        potential: nn.Module,
        costs: bool = False,
        parameters: tuple[Tensor, ...] | None = None,
    ) -> None:
        self._field, self._costs = field, costs
        self._potential, self._context = potential, context
        self._event_shape = inputs.shape[1:]
        self.state = F.pad(inputs.flatten(1), (0, 3 if costs else 1))
        if parameters is None:
            parameters = (*potential.parameters(), *(() if context is None else (context,)))
        self.parameters = parameters

    def __call__(self, t: float | Tensor, state: Tensor) -> Tensor:
        x = self._points(state)
        gradient, laplacian = self._field(x, t, self._context)
        gradient, laplacian = self._check(gradient, laplacian, x)
        velocity = gradient.flatten(1)
        if not self._costs:
            return torch.cat([velocity, laplacian[:, None]], dim=1)
        rate = self._laplacian_rate(x, t, gradient)
        integrands = [laplacian, velocity.square().sum(1), rate.square()]
        return torch.cat([velocity, torch.stack(integrands, dim=1)], dim=1)

    def outputs(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return self._points(state), state[:, self._event_shape.numel()].clone()

    def costs(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return state[:, -2].clone(), state[:, -1].clone()

    def _laplacian_rate(self, x: Tensor, t: float | Tensor, velocity: Tensor) -> Tensor:
        r""":math:`d\Delta u/dt = \partial_t\Delta u + \nabla\Delta u \cdot \dot x`, shape (B,)."""
        with differentiation(x, self._context) as (point, context, keep_graph):
            time = torch.as_tensor(t, dtype=x.dtype, device=x.device).detach().requires_grad_()
            laplacian = self._field(point, time, context)[1]
            # twice in reverse is once forward: the derivative of <w, d(laplacian)> to w
            weights = torch.ones_like(laplacian).requires_grad_()
            in_space, in_time = derivatives((laplacian * weights).sum(), (point, time), True)
            along_path = (in_space * velocity).sum() + in_time
            (rate,) = derivatives(along_path, (weights,), keep_graph)
        return rate

    def _check(self, gradient: Tensor, laplacian: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        validation.returned("potential", self._potential, gradient, x.shape, "the gradient")
        validation.returned("potential", self._potential, laplacian, x.shape[:1], "the Laplacian")
        return gradient.to(x.dtype), laplacian.to(x.dtype)

    def _points(self, state: Tensor) -> Tensor:
        return state[:, : self._event_shape.numel()].reshape(len(state), *self._event_shape)


class ReducedDynamics(Dynamics):
    r"""The equations of motion of a ridge potential, in the coordinates of its ridges.

    The gradient of :math:`u = \sum_j a_j \sigma(h_j)` with :math:`h = Wx + vt + Vc + b` lies in the
    row space of W, so the trajectory is :math:`x(t) = x(0) + W^T s(t)` with

    .. math:: \frac{ds}{dt} = a \odot \sigma'(h), \qquad
              \frac{d\ell}{dt} = (a \odot r) \cdot \sigma''(h), \qquad
              h = h_0 + G s + v t,

    where :math:`h_0 = Wx(0) + Vc + b`, :math:`G = WW^T` and :math:`r_j = \|w_j\|^2`. One evaluation
    costs one H×H product for each point instead of two H×D ones. Runge-Kutta methods commute with
    affine maps, so the numbers are those of :class:`DirectDynamics`.

    The state is :math:`[s \mid \ell]` with one column for each point, shape (H + 1, B).

    Args:
        inputs: starting points, shape (B, ...).
        weight: :math:`W`, shape (H, D).
        offset: :math:`Vc + b`, shape (H, B) or (H, 1).
        amplitude: :math:`a`, shape (H,).
        time_weight: :math:`v`, shape (H,), or None for :math:`v = 0`.
        activation: :math:`\sigma`.
    """

    def __init__(
        self,
        inputs: Tensor,
        weight: Tensor,
        offset: Tensor,
        amplitude: Tensor,
        time_weight: Tensor | None,
        activation: Activation,
    ) -> None:
        self._inputs = inputs
        self._weight = weight
        self._h0 = torch.addmm(offset, weight, inputs.flatten(1).T)
        self._gram = weight @ weight.T
        self._amplitude = amplitude[:, None]
        self._curvature = amplitude * weight.square().sum(1)
        self._time_weight = None if time_weight is None else time_weight[:, None]
        self._activation = activation
        self.state = inputs.new_zeros(self._state_rows, len(inputs))
        self.parameters = (self._h0, self._gram, self._amplitude, self._curvature)
        if self._time_weight is not None:
            self.parameters += (self._time_weight,)

    def __call__(self, t: float | Tensor, state: Tensor) -> Tensor:
        p = self._slopes(t, _gram_product(self._gram, state[:-1]))
        laplacian = self._curvature @ self._activation.second(p)
        return torch.cat([self._amplitude * p, laplacian[None]])

    def outputs(self, state: Tensor) -> tuple[Tensor, Tensor]:
        displacement = state[: len(self._weight)].T @ self._weight
        return self._inputs + displacement.view_as(self._inputs), self._integrals(state)[0].clone()

    @property
    def _state_rows(self) -> int:
        return len(self._weight) + 1

    def _slopes(self, t: float | Tensor, g: Tensor) -> Tensor:
        r""":math:`\sigma'(h)` where :math:`g = Gs`."""
        h = self._h0 + g
        if self._time_weight is not None:
            h = h + self._time_weight * t
        return self._activation.first(h)

    def _integrals(self, state: Tensor) -> Tensor:
        return state[len(self._weight) :]


class ReducedCostDynamics(ReducedDynamics):
    r"""Reduced coordinates with the costs of transport, at the same number of products.

    Where :math:`g = Gs` is carried beside :math:`s`, the one product of an evaluation,
    :math:`\dot g = G \dot s = W \nabla u`, also gives

    .. math:: \|\nabla u\|^2 = \dot s \cdot \dot g, \qquad
              \frac{d \Delta u}{dt} = (a \odot r) \cdot (\sigma^{(3)}(h) \odot (\dot g + v)).

    The state is :math:`[s \mid g \mid \ell \mid E \mid R]`, shape (2H + 3, B).
    """

    def __call__(self, t: float | Tensor, state: Tensor) -> Tensor:
        hidden = len(self._weight)
        p = self._slopes(t, state[hidden : 2 * hidden])
        s_rate = self._amplitude * p
        g_rate = _gram_product(self._gram, s_rate)
        h_rate = g_rate if self._time_weight is None else g_rate + self._time_weight
        integrands = [
            self._curvature @ self._activation.second(p),
            (s_rate * g_rate).sum(0),
            (self._curvature @ (self._activation.third(p) * h_rate)).square(),
        ]
        return torch.cat([s_rate, g_rate, torch.stack(integrands)])

    def costs(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return state[-2].clone(), state[-1].clone()

    @property
    def _state_rows(self) -> int:
        return 2 * len(self._weight) + 3

    def _integrals(self, state: Tensor) -> Tensor:
        return state[2 * len(self._weight) :]


def _gram_product(gram: Tensor, s: Tensor) -> Tensor:
    """The product of a symmetric (H, H) and an (H, B) matrix."""
    if gram.device.type == "cpu" and gram.dtype == torch.float32 and len(gram) >= 256:
        product: Tensor = _ConvolutionProduct.apply(gram, s)
        return product
    return gram @ s


class _ConvolutionProduct(torch.autograd.Function):
    """A product with a symmetric matrix, as a convolution with a kernel of one point.

    PyTorch gives matrix products to MKL and, with two threads or more, convolutions to oneDNN. On
    some AMD processors oneDNN takes half the time (docs/results/README.md, Speed).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(gram: Tensor, s: Tensor) -> Tensor:
        return F.conv1d(s[None], gram[:, :, None])[0]

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        gram, s = ctx.saved_tensors
        return (
            grad @ s.T if ctx.needs_input_grad[0] else None,
            _gram_product(gram, grad) if ctx.needs_input_grad[1] else None,
        )
