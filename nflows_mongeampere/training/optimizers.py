"""Optimisers for flows of few parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pytorch_optimizer import SOAP
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector


class FullMatrixSOAP(SOAP):
    r"""SOAP that takes all parameters of a group as one vector.

    Adam in the eigenbasis Q of the second moments of the gradient,

    .. math:: \theta \leftarrow \theta - \eta\, Q \frac{Q^T m}{\sqrt v + \epsilon}, \qquad
              m = \langle g \rangle, \quad v = \langle (Q^T g)^2 \rangle, \quad
              \langle g g^T \rangle \approx Q \Lambda Q^T,

    with running means :math:`\langle \cdot \rangle`, and Q brought up to date every few steps by a
    power iteration. Where parameters of unlike kinds act together, as the kernels, amplitudes and
    offsets of a potential do, their correlations are seen, which are lost where each tensor has a
    matrix of its own. Memory and time grow with the square and the cube of the size of a group:
    some thousands of parameters are the most.

    Vyas et al., `arXiv:2409.11321 <https://arxiv.org/abs/2409.11321>`_.

    Args:
        groups: of parameters, as PyTorch's optimisers take them; each is one vector.
        lr: the learning rate :math:`\eta`.
        betas: of the running means of g, and of its squares and products.
        every: how many steps Q is kept.

    Example:
        >>> import torch
        >>> from nflows_mongeampere import MongeAmpereFlow
        >>> flow = MongeAmpereFlow(2, 16)
        >>> optimizer = FullMatrixSOAP([{"params": flow.parameters()}], lr=1e-2)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     (-flow.log_prob(torch.randn(64, 2)).mean()).backward()
        ...     optimizer.step()
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.95),
        every: int = 10,
    ) -> None:
        vectors = []
        self._parts: list[list[nn.Parameter]] = []
        for group in groups:
            parts = [part for part in group["params"] if part.requires_grad]
            vector = parameters_to_vector(parts).detach()
            vectors.append({**group, "params": [nn.Parameter(vector)]})
            self._parts.append(parts)
        super().__init__(
            vectors,
            lr=lr,
            betas=betas,
            weight_decay=0.0,
            precondition_frequency=every,
            precondition_1d=True,
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for part in (part for parts in self._parts for part in parts):
            part.grad = None if set_to_none or part.grad is None else part.grad.zero_()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, parts in zip(self.param_groups, self._parts, strict=True):
            (vector,) = group["params"]
            vector.copy_(parameters_to_vector(parts))
            vector.grad = parameters_to_vector([_gradient(part) for part in parts])
        super().step()
        for group, parts in zip(self.param_groups, self._parts, strict=True):
            (vector,) = group["params"]
            sizes = [part.numel() for part in parts]
            for part, values in zip(parts, vector.split(sizes), strict=True):
                part.copy_(values.view_as(part))  # each in memory of its own, as before
        return loss


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
