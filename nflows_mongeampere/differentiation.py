"""Differentiation inside the flow, whatever the mode of autograd outside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

# a tensor, or none where that is allowed
MaybeTensor = TypeVar("MaybeTensor", Tensor, "Tensor | None")


def compiling() -> bool:
    """Whether a compiler, an exporter or a tracer is at work, which sees sizes and no numbers."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a function transform, or forward-mode differentiation of some tensors, is at work."""
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    given = (tensor for tensor in tensors if tensor is not None)
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given)


def vectorized(*tensors: Tensor | None) -> bool:
    """Whether ``torch.func.vmap`` gives some tensors many values, of which none can be read."""
    functorch = torch._C._functorch
    for tensor in tensors:
        while tensor is not None and functorch.is_functorch_wrapped_tensor(tensor):
            if functorch.is_batchedtensor(tensor):
                return True
            tensor = functorch.get_unwrapped(tensor)
    return False


def full_precision(device: str) -> AbstractContextManager[object]:
    """Neither autocast nor inference mode within.

    Errors add up along a path: a log-density in half precision means nothing. And networks and
    implicit steps differentiate, which inference mode forbids.
    """
    if compiling():
        return nullcontext()
    inference, half = torch.is_inference_mode_enabled(), torch.is_autocast_enabled(device)
    if not inference and not half:
        return nullcontext()
    stack = ExitStack()
    if inference:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
    if half:
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def ordinary(x: MaybeTensor) -> MaybeTensor:
    """x, or a copy that autograd may save where x was made in inference mode."""
    if x is None or compiling() or torch.is_inference_mode_enabled() or not x.is_inference():
        return x
    return x.clone()


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
