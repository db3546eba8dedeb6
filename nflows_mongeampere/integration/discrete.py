r"""The exact gradient of a discrete solution, by hand.

The steps are taken without a graph. On the way back the adjoint of the state goes through them in
reverse (:meth:`~nflows_mongeampere.integration.methods.Method.step_back`), and each evaluation of
the equations of motion adds its part to the gradient of the tensors that they depend on
(:meth:`~nflows_mongeampere.dynamics.Dynamics.pullback`). The numbers are those of autograd through
every stage, in a fraction of the time and memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nflows_mongeampere.dynamics import Dynamics

if TYPE_CHECKING:
    from nflows_mongeampere.integration.integrator import Solve


class Tape:
    """The evaluations of the rate in some steps, in order, with what their pullbacks need."""

    def __init__(self, dynamics: Dynamics, gradients: list[Tensor | None] | None = None) -> None:
        self._dynamics, self._gradients = dynamics, gradients or []
        self.evaluations: list[tuple[float, tuple[Tensor, ...]]] = []

    def rate(self, t: float, y: Tensor) -> Tensor:
        """Evaluate, and keep what the way back needs."""
        slope, kept = self._dynamics.stage(t, y)
        self.evaluations.append((t, kept))
        return slope

    def pullback(self, adjoint: Tensor) -> Tensor:
        """Go back through the last evaluation that is left."""
        t, kept = self.evaluations.pop()
        return self._dynamics.pullback(t, kept, adjoint, self._gradients)


class DiscreteAdjoint(torch.autograd.Function):
    """The states of a :class:`Solve` at its times, from the state at the first one.

    Either all evaluations are kept for the way back, or the states between the steps alone, from
    which each step is evaluated again.
    """

    @staticmethod
    def forward(
        ctx: Any, solve: Solve, recompute: bool, state: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        tape = Tape(solve.dynamics)
        path = solve.march(state, solve.dynamics.evaluate if recompute else tape.rate)
        ctx.solve, ctx.recompute, ctx.path = solve, recompute, path.steps
        ctx.arrivals, ctx.flags = path.arrivals, [_learns(t) for t in solve.dynamics.tensors]
        kept = path.before if recompute else [part for _, k in tape.evaluations for part in k]
        ctx.layout = [(t, len(kept)) for t, kept in tape.evaluations]
        ctx.save_for_backward(state, *tensors, *kept)
        return tuple(path.states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        solve, count = ctx.solve, len(ctx.flags)
        state, *rest = ctx.saved_tensors
        tensors, saved = rest[:count], list(rest[count:])
        if torch.is_grad_enabled():
            return (None, None, *_differentiable(ctx, state, tensors, grads))
        needed = ctx.needs_input_grad[3:]
        gradients = [
            torch.zeros_like(t) if n else None for t, n in zip(tensors, needed, strict=True)
        ]
        tape = Tape(solve.dynamics, gradients)
        for t, parts in ctx.layout:
            tape.evaluations.append((t, tuple(saved[:parts])))
            del saved[:parts]
        with thawed(solve.dynamics, ctx.flags):
            adjoint = _carry_back(ctx, tape, state, saved, grads)
        return (None, None, adjoint, *gradients)


def _carry_back(
    ctx: Any, tape: Tape, state: Tensor, before: list[Tensor], grads: tuple[Tensor, ...]
) -> Tensor:
    """The adjoint of the state at the first time."""
    solve, method = ctx.solve, ctx.solve.method
    moving = solve.dynamics.coordinates
    arrivals = dict(zip(ctx.arrivals, grads, strict=True))
    adjoint = torch.zeros_like(method.end_back(state))
    for number in reversed(range(len(ctx.path))):
        if number in arrivals:
            adjoint += method.end_back(arrivals[number])
        t, dt = ctx.path[number]
        if ctx.recompute:
            method.step(tape.rate, t, dt, before[number])
        adjoint = method.step_back(tape.pullback, dt, adjoint, moving)
    if ctx.recompute:
        method.begin(tape.rate, solve.times[0], state)
    first: Tensor = method.begin_back(tape.pullback, adjoint, moving)
    return first


def _differentiable(
    ctx: Any, state: Tensor, tensors: list[Tensor | None], grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """The same gradients, by autograd through every stage, so that they have derivatives."""
    # views, because a tensor may depend on another one, and the derivatives wanted are partial
    start = state.view_as(state)
    views = [None if t is None else t.view_as(t) for t in tensors]
    states = ctx.solve.rebound(views).march(start).states
    inputs: list[Any] = [start, *views]
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
    products = torch.autograd.grad(
        states,
        [inputs[i] for i in wanted],
        grads,
        create_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    result: list[Tensor | None] = [None] * len(inputs)
    for i, product in zip(wanted, products, strict=True):
        result[i] = product
    return tuple(result)


@contextmanager
def thawed(dynamics: Dynamics, flags: list[bool]) -> Iterator[None]:
    """Let tensors require gradients as in the forward pass, even if they were frozen since.

    normflows freezes all parameters between a forward and a backward pass.
    """
    frozen: list[Any] = [
        tensor
        for tensor, flag in zip(dynamics.tensors, flags, strict=True)
        if flag and not _learns(tensor)
    ]
    for tensor in frozen:
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)


def _learns(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad
