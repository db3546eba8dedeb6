"""The normflows adapter: a Monge-Ampère flow as a ``Flow`` layer."""

from __future__ import annotations

from normflows.flows import Flow
from torch import Tensor

from nflows_mongeampere.transport import Transport


class MongeAmpere(Transport, Flow):
    r"""The Monge-Ampère flow as a :class:`normflows.flows.Flow`, from noise to data.

    :meth:`forward` integrates :math:`dx/dt = \nabla u(x, t; c)` from :math:`t = 0` to :math:`T` and
    returns :math:`\ln|dx/dz| = +\int_0^T \Delta u\, dt`; :meth:`inverse` goes back. The same model
    as :class:`~nflows_mongeampere.MongeAmpereTransform`, with the same ``state_dict``, in the
    other direction.

    Reference: Zhang, E and Wang, `arXiv:1809.10188 <https://arxiv.org/abs/1809.10188>`_.

    Args:
        potential, time, steps, solver, sensitivity, atol, rtol, max_steps: as in
            :class:`~nflows_mongeampere.MongeAmpereTransform`.

    Example:
        >>> import normflows, torch
        >>> from nflows_mongeampere import RidgePotential
        >>> from nflows_mongeampere.normflows import MongeAmpere
        >>> flows = [MongeAmpere(RidgePotential(2, 32))]
        >>> model = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(2), flows)
        >>> model.log_prob(torch.randn(5, 2)).shape
        torch.Size([5])
    """

    _forward_to_data = True

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Noise to data.

        Args:
            z: noise, shape (B, ...).
            context: one row for each row of ``z``, where the potential is conditional.

        Returns:
            Data in the shape of ``z``, and :math:`\ln|dx/dz|` in nats, shape (B,).

        Raises:
            TypeError, ValueError: for arguments that do not fit.
            IntegrationError: where the solver fails.
        """
        return self._map("z", z, context, to_data=True)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Data to noise, with :math:`\ln|dz/dx|`; arguments and errors as in :meth:`forward`."""
        return self._map("z", z, context, to_data=False)
