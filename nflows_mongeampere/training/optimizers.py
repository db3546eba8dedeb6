"""Optimisers for flows of few parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pytorch_optimizer import SOAP
from torch import nn
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
    some thousands of parameters are the most, and a group of more than 10,000 learns as by Adam.
    The first step only starts the averages and moves nothing.

    Vyas et al., `arXiv:2409.11321 <https://arxiv.org/abs/2409.11321>`_.

    Args:
        params: parameters or groups of them, as PyTorch's optimisers take them; each group is one
            vector, of the parameters that have a gradient.
        lr: the learning rate :math:`\eta`.
        betas: of the running means of g, and of its squares and products.
        every: how many steps Q is kept.

    Raises:
        ValueError: in a step in which other parameters have a gradient than in the step before.

    Example:
        >>> import torch
        >>> from nflows_mongeampere import MongeAmpereFlow
        >>> flow = MongeAmpereFlow(2, 16)
        >>> optimizer = FullMatrixSOAP(flow.parameters(), lr=1e-2)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     (-flow.log_prob(torch.randn(64, 2)).mean()).backward()
        ...     optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.95),
        every: int = 10,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            weight_decay=0.0,
            precondition_frequency=every,
            precondition_1d=True,
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all groups; the result is that of ``closure``, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        whole = [(group, group["params"]) for group in self.param_groups]
        moving = [[part for part in parts if part.grad is not None] for _, parts in whole]
        try:
            for (group, _), parts in zip(whole, moving, strict=True):
                group["params"] = [self._joined(parts, of=group["params"][0])] if parts else []
            super().step()
            for (group, given), parts in zip(whole, moving, strict=True):
                if parts:
                    self._take_apart(group["params"][0], parts, of=given[0])
        finally:
            for group, parts in whole:
                group["params"] = parts
        return loss

    def _joined(self, parts: list[nn.Parameter], of: nn.Parameter) -> nn.Parameter:
        """Parameters as one vector, whose state is kept as that of one of them."""
        vector = nn.Parameter(parameters_to_vector(parts).detach())
        vector.grad = parameters_to_vector([part.grad for part in parts if part.grad is not None])
        state = self.state[of]
        if state and len(state["exp_avg"]) != len(vector):
            raise ValueError(
                f"params: {len(vector)} entries of a group have a gradient, expected the "
                f"{len(state['exp_avg'])} of the step before; make a new optimiser where other "
                "parameters are to be trained"
            )
        self.state[vector] = self.state.pop(of)
        return vector

    def _take_apart(
        self, vector: nn.Parameter, parts: list[nn.Parameter], of: nn.Parameter
    ) -> None:
        self.state[of] = self.state.pop(vector)
        values = vector.split([part.numel() for part in parts])
        for part, value in zip(parts, values, strict=True):
            part.copy_(value.view_as(part))
