"""Differentiation inside the flow, whatever the mode of autograd outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(method: Callable[P, R]) -> Callable[P, R]:
    """``method`` outside of the graphs of torch.compile, which cannot be differentiated twice.

    Unlike ``torch.compiler.disable`` alone it loads no compiler where none is used.
    """

    @wraps(method)
    def call(*arguments: P.args, **keywords: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            outside: Callable[P, R] = torch.compiler.disable(method)
            return outside(*arguments, **keywords)
        return method(*arguments, **keywords)

    return call


@contextmanager
def differentiation(
    x: Tensor, context: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None, bool]]:
    """Let autograd see x, whatever the mode outside; tell whether results keep their graph."""
    keep_graph = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        if x.is_inference():
            x = x.clone()
        if context is not None and context.is_inference():
            context = context.clone()
        # a view, so that a context computed from x does not count as x
        point = x.view_as(x) if keep_graph and x.requires_grad else x.detach().requires_grad_()
        yield point, context, keep_graph


def usable(x: Tensor) -> Tensor:
    """x, or a copy that autograd may save where x was made in inference mode."""
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x


def derivative(scalars: Tensor, x: Tensor, keep_graph: bool) -> Tensor:
    """The derivative of the sum of ``scalars``, zero where they do not depend on x."""
    return derivatives(scalars.sum(), (x,), keep_graph)[0]


def derivatives(scalar: Tensor, xs: Sequence[Tensor], keep_graph: bool) -> tuple[Tensor, ...]:
    """The derivatives of ``scalar``, zero with respect to those it does not depend on."""
    if not scalar.requires_grad:
        return tuple(torch.zeros_like(x) for x in xs)
    return torch.autograd.grad(
        scalar, xs, create_graph=keep_graph, allow_unused=True, materialize_grads=True
    )
