"""What goes wrong in an integration."""

from __future__ import annotations

import torch
from torch import Tensor


class IntegrationError(RuntimeError):
    """A solver did not reach the end of the interval with a finite state."""


def forbid_second_derivatives(grad: Tensor) -> None:
    """Raise if the gradient that passes here is to be differentiated again."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "create_graph: got True, but the adjoint sensitivities and solver 'ieuler' have no "
            "second derivatives; use an explicit solver with sensitivity='autograd' or 'recompute'"
        )
