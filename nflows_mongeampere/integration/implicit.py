"""Implicit Euler steps, whose root torchdyn finds, with the gradient of the equation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchdyn.numerics.solvers import ode as torchdyn

from nflows_mongeampere.integration.errors import IntegrationError, forbid_second_derivatives
from nflows_mongeampere.integration.methods import Method, Rate

_EPSILON = {torch.float32: 1e-7, torch.float64: 1e-14}


class ImplicitEuler(Method):
    r"""A step of :math:`y' = y + f(t, y')\,dt`.

    torchdyn finds the root outside of autograd. By the implicit function theorem the adjoint
    :math:`\lambda` of :math:`y'` solves :math:`\lambda = g + dt\, J^T \lambda`, which is iterated
    to a fixed point.
    """

    solver = torchdyn.ImplicitEuler
    order, implicit = 1, True

    def __init__(self, solver: Any) -> None:
        self._solver = solver

    def step(
        self, rate: Rate, t: float, dt: float, y: Tensor, first: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        try:
            root = self._solver.step(rate, y, t, dt)[1]
        except RuntimeError as error:
            if type(error) is not RuntimeError:
                raise
            raise IntegrationError(
                f"solver ImplicitEuler found no solution of its step ({error}): the potential is "
                "too steep; use more steps or smaller weights"
            ) from error
        root = root.detach()
        return _attach_gradient(root, rate, t, dt, y), [(root - y).detach() / dt]

    def error(self, dt: float, slopes: Sequence[Tensor], last: Any) -> Tensor:
        raise NotImplementedError


def _attach_gradient(root: Tensor, rate: Rate, t: float, dt: float, y: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return root
    root = root.requires_grad_()
    image = y + dt * rate(t, root)
    if not image.requires_grad:
        return root.detach()
    solution = y + dt * rate(t, root.detach())

    def solve(grad: Tensor) -> Tensor:
        forbid_second_derivatives(grad)
        adjoint = grad
        for _ in range(1000):
            (product,) = torch.autograd.grad(image, root, adjoint, retain_graph=True)
            update = grad + product
            size = update.norm()
            if not bool(size.isfinite()):
                break
            converged = bool((update - adjoint).norm() <= _EPSILON[grad.dtype] * size)
            adjoint = update
            if converged:
                return adjoint
        raise IntegrationError(
            "solver ImplicitEuler: the gradient of a step did not converge, because the step is "
            "too long for the field; use more steps"
        )

    if solution.requires_grad:
        solution.register_hook(solve)
    # the value of the root, whether or not gradients are asked for
    return root.detach() + (solution - solution.detach())
