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

Field = Callable[[Tensor, "float | Tensor", "Tensor | None"], "tuple[Tensor, Tensor]"]


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


class DirectDynamics(Dynamics):
    r"""The equations of motion in :math:`x` itself: the state is :math:`[x \mid \ell]`, (B, D + 1).

    Args:
        field: maps (x, t, context) to :math:`(\nabla u, \Delta u)`.
        inputs: starting points, shape (B, ...).
        context: shape (B, ...) or None.
        potential: the module whose parameters the field depends on.
    """

    def __init__(
        self, field: Field, inputs: Tensor, context: Tensor | None, potential: nn.Module
    ) -> None:
        self._field = field
        self._context = context
        self._event_shape = inputs.shape[1:]
        self.state = F.pad(inputs.flatten(1), (0, 1))
        self.parameters = (*potential.parameters(), *(() if context is None else (context,)))

    def __call__(self, t: float | Tensor, state: Tensor) -> Tensor:
        gradient, laplacian = self._field(self._points(state), t, self._context)
        return torch.cat([gradient.flatten(1), laplacian[:, None]], dim=1)

    def outputs(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return self._points(state), state[:, -1].clone()

    def _points(self, state: Tensor) -> Tensor:
        return state[:, :-1].reshape(len(state), *self._event_shape)


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
        first: :math:`\sigma'(h)`.
        second: :math:`\sigma''(h)` as a function of :math:`\sigma'(h)`.
    """

    def __init__(
        self,
        inputs: Tensor,
        weight: Tensor,
        offset: Tensor,
        amplitude: Tensor,
        time_weight: Tensor | None,
        first: Callable[[Tensor], Tensor],
        second: Callable[[Tensor], Tensor],
    ) -> None:
        self._inputs = inputs
        self._weight = weight
        self._h0 = torch.addmm(offset, weight, inputs.flatten(1).T)
        self._gram = weight @ weight.T
        self._amplitude = amplitude[:, None]
        self._curvature = amplitude * weight.square().sum(1)
        self._time_weight = None if time_weight is None else time_weight[:, None]
        self._first, self._second = first, second
        self.state = inputs.new_zeros(len(weight) + 1, len(inputs))
        self.parameters = (self._h0, self._gram, self._amplitude, self._curvature)
        if self._time_weight is not None:
            self.parameters += (self._time_weight,)

    def __call__(self, t: float | Tensor, state: Tensor) -> Tensor:
        h = self._h0 + _gram_product(self._gram, state[:-1])
        if self._time_weight is not None:
            h = h + self._time_weight * t
        p = self._first(h)
        laplacian = self._curvature @ self._second(p)
        return torch.cat([self._amplitude * p, laplacian[None]])

    def outputs(self, state: Tensor) -> tuple[Tensor, Tensor]:
        displacement = state[:-1].T @ self._weight
        return self._inputs + displacement.view_as(self._inputs), state[-1].clone()


def _gram_product(gram: Tensor, s: Tensor) -> Tensor:
    """The product of a symmetric (H, H) and an (H, B) matrix."""
    if gram.device.type == "cpu" and gram.dtype == torch.float32 and len(gram) >= 256:
        product: Tensor = _ConvolutionProduct.apply(gram, s)
        return product
    return gram @ s


class _ConvolutionProduct(torch.autograd.Function):
    """A product with a symmetric matrix, as a convolution with a kernel of one point.

    PyTorch gives matrix products to MKL and convolutions to oneDNN. On CPUs that are not Intel's
    MKL leaves half of the arithmetic units idle; oneDNN does not, and is as fast elsewhere.
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
