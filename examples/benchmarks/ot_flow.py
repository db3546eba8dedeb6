r"""The potential of OT-Flow (Onken et al., `arXiv:2006.00104 <https://arxiv.org/abs/2006.00104>`_)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_mongeampere.dynamics import Time
from nflows_mongeampere.potentials import Potential

RANK = 10


def antiderivative_of_tanh(x: Tensor) -> Tensor:
    r""":math:`\sigma(x) = \ln(e^x + e^{-x})`, without overflow."""
    return F.softplus(2 * x) - x


class OTFlowPotential(Potential):
    r"""A residual network and a quadratic form in :math:`s = (x, \tau)`, :math:`\tau = 1 - t`.

    .. math:: u(x, t) = \Phi(s) = w^T N(s) + \tfrac12 s^T A^T A s + b^T s + c,

    with :math:`u_0 = \sigma(K_0 s + b_0)`, :math:`u_i = u_{i-1} + h\,\sigma(K_i u_{i-1} + b_i)`,
    :math:`N = u_M`, :math:`h = 1/M`. The published flow goes from data at :math:`\tau = 0` to noise
    at :math:`\tau = 1` by :math:`dx/d\tau = -\nabla\Phi`. Derivatives are in closed form. With
    :math:`v_M = w` and :math:`v_{i-1} = v_i + h K_i^T (\sigma'(z_i) \odot v_i)`, where
    :math:`z_i = K_i u_{i-1} + b_i`, and with :math:`J_i = \partial u_i / \partial x`,

    .. math:: \nabla\Phi = K_0^T (\sigma'(z_0) \odot v_0) + A^T A s + b, \qquad
              \Delta\Phi = \sigma''(z_0) \odot v_0 \cdot \|K_0^x\|^2
              + h \sum_i \sigma''(z_i) \odot v_i \cdot \|K_i J_{i-1}\|^2 + \|A^x\|^2

    (norms of rows; the index x leaves :math:`\tau` out). Parameters start as in the published code.

    Args:
        features: D.
        hidden_features: m, the width of the network.
        layers: M, of the network beyond the first.
    """

    time_dependent = True

    def __init__(self, features: int, hidden_features: int, *, layers: int = 1) -> None:
        super().__init__()
        self.features = features
        self.hidden_features, self.layers = hidden_features, layers
        inner = nn.Linear(features + 1, hidden_features)
        rest = (nn.Linear(hidden_features, hidden_features) for _ in range(layers))
        self.network = nn.ModuleList([inner, *rest])
        self.outer = nn.Parameter(torch.ones(hidden_features))
        self.root = nn.Parameter(torch.empty(min(RANK, features + 1), features + 1))
        nn.init.xavier_uniform_(self.root)
        self.slope = nn.Parameter(torch.zeros(features + 1))
        self.constant = nn.Parameter(torch.zeros(()))
        self._rates: list[Tensor] | None = None

    @property
    def _linear(self) -> list[nn.Linear]:
        return list(self.network)  # type: ignore[arg-type]

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        r"""Collect the mean rates of the penalties at each evaluation of the field, shape (2,).

        These are :math:`L' = \tfrac12 \|\nabla\Phi\|^2` of the transport cost and
        :math:`R' = |\partial_\tau\Phi - \tfrac12 \|\nabla\Phi\|^2|` of the Hamilton-Jacobi-Bellman
        equation.
        """
        self._rates = []
        try:
            yield self._rates
        finally:
            self._rates = None

    def _space_time(self, x: Tensor, t: Time | None) -> Tensor:
        tau = 1 - torch.as_tensor(t, dtype=x.dtype, device=x.device)
        return torch.cat([x, tau.expand(len(x))[:, None]], dim=1)

    def _value(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        s = self._space_time(x, t)
        first, *rest = self._linear
        u = antiderivative_of_tanh(first(s))
        for layer in rest:
            u = u + antiderivative_of_tanh(layer(u)) / self.layers
        quadratic = (s @ self.root.T).square().sum(1) / 2
        return u @ self.outer + quadratic + s @ self.slope + self.constant

    def _gradient(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        return self._gradient_and_laplacian(x, t, context)[0]

    def _laplacian(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        return self._gradient_and_laplacian(x, t, context)[1]

    def _gradient_and_laplacian(
        self, x: Tensor, t: Time | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        s, h, size = self._space_time(x, t), 1 / self.layers, x.shape[1]
        first, *rest = self._linear
        z = first(s)
        u, slopes = antiderivative_of_tanh(z), [torch.tanh(z)]  # σ'(z) = tanh z
        for i, layer in enumerate(rest, start=1):
            z = layer(u)
            slopes.append(torch.tanh(z))
            if i < self.layers:
                u = u + h * antiderivative_of_tanh(z)
        v = [self.outer.expand_as(u)]  # v_M, v_{M-1}, ..., v_0
        for layer, slope in zip(reversed(rest), reversed(slopes), strict=False):
            v.append(v[-1] + h * (slope * v[-1]) @ layer.weight)
        gradient = (slopes[0] * v[-1]) @ first.weight + s @ self.root.T @ self.root + self.slope

        # σ'' = 1 - tanh²; the Jacobian has the batch in the middle: (m, B, D) is one product
        columns = first.weight[:, :size]
        laplacian = ((1 - slopes[0].square()) * v[-1]) @ columns.square().sum(1)
        jacobian = slopes[0].T[:, :, None] * columns[:, None]
        for i, layer in enumerate(rest, start=1):
            product = (layer.weight @ jacobian.flatten(1)).view_as(jacobian)
            bend = (1 - slopes[i].square()) * v[self.layers - i]
            laplacian = laplacian + h * (bend * product.square().sum(2).T).sum(1)
            if i < self.layers:
                jacobian = jacobian + h * slopes[i].T[:, :, None] * product
        laplacian = laplacian + self.root[:, :size].square().sum()
        if self._rates is not None:
            kinetic = gradient[:, :size].square().sum(1) / 2
            residual = (gradient[:, size] - kinetic).abs()
            self._rates.append(torch.stack([kinetic.mean(), residual.mean()]))
        return gradient[:, :size], laplacian
