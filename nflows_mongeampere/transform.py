"""The nflows adapter: a Monge-Ampère flow as a ``Transform``."""

from __future__ import annotations

from nflows.transforms import Transform
from torch import Tensor

from nflows_mongeampere.transport import Transport


class MongeAmpereTransform(Transport, Transform):
    r"""The Monge-Ampère flow as an :class:`nflows.transforms.Transform`, from data to noise.

    :meth:`forward` integrates :math:`dx/dt = \nabla u(x, t; c)` from :math:`t = T` to :math:`0` and
    returns :math:`\ln|dz/dx| = -\int_0^T \Delta u\, dt`; :meth:`inverse` goes from :math:`0` to
    :math:`T` and returns :math:`+\int_0^T \Delta u\, dt`. It stacks with every other transform of
    nflows, in any order.

    Reference: Zhang, E and Wang, *Monge-Ampère Flow for Generative Modeling*,
    `arXiv:1809.10188 <https://arxiv.org/abs/1809.10188>`_.

    Args:
        potential: the scalar potential :math:`u`.
        time: T, the time from noise to data.
        steps: number of equal steps over that time, for fixed-step solvers.
        solver: a torchdyn solver, by name or as an instance.
        sensitivity: ``"autograd"``, ``"recompute"``, ``"adjoint"`` or ``"interpolated_adjoint"``.
        atol, rtol, max_steps: tolerances and bound of adaptive solvers. All of these are explained
            at :class:`~nflows_mongeampere.integration.Integrator`.

    Raises:
        TypeError, ValueError: for arguments that do not fit.

    Example:
        >>> import torch
        >>> from nflows.distributions import StandardNormal
        >>> from nflows.flows import Flow
        >>> from nflows_mongeampere import MongeAmpereTransform, RidgePotential
        >>> flow = Flow(MongeAmpereTransform(RidgePotential(2, 32)), StandardNormal([2]))
        >>> flow.log_prob(torch.randn(5, 2)).shape
        torch.Size([5])
    """

    _forward_to_data = False

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Data to noise.

        Args:
            inputs: data, shape (B, ...).
            context: one row for each input, where the potential is conditional.

        Returns:
            Noise in the shape of ``inputs``, and :math:`\ln|dz/dx|` in nats, shape (B,).

        Raises:
            TypeError, ValueError: for arguments that do not fit.
            IntegrationError: where the solver fails.
        """
        return self._map("inputs", inputs, context, to_data=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Noise to data, with :math:`\ln|dx/dz|`; arguments and errors as in :meth:`forward`."""
        return self._map("inputs", inputs, context, to_data=True)
