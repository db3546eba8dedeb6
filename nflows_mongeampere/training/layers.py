"""What goes in and out of the layers of a flow, of either library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nflows_mongeampere.transport import Transport

# nflows goes forward on the way to noise and inverse on the way back, normflows the other way round
METHODS = ("forward", "inverse", "log_prob", "sample")

# takes the place of a layer, the layer, its inputs and its outputs
Note = Callable[[str, nn.Module, tuple[Any, ...], Any], None]


@contextmanager
def observed(flow: nn.Module, note: Note) -> Iterator[None]:
    """Call ``note`` after each call of a layer, also of methods that PyTorch's hooks do not see.

    A Monge-Ampère flow is one layer; of nested layers the inner ones come first.
    """
    replaced = []
    for place, layer in _layers(flow, ""):
        for name in METHODS:
            if hasattr(layer, name):
                method, attributes = getattr(layer, name), vars(layer)
                replaced.append((attributes, name, attributes.get(name)))
                attributes[name] = partial(_call, method, partial(note, place, layer))
    try:
        yield
    finally:
        for attributes, name, original in reversed(replaced):  # a layer may have several places
            del attributes[name]
            if original is not None:
                attributes[name] = original


def first_not_finite(flow: nn.Module, evaluate: Callable[[], object]) -> str:
    """The first layer whose outputs are not finite though its inputs are, or nothing.

    Args:
        flow: whose layers are looked at.
        evaluate: evaluates the flow; it may raise, as layers do that are given NaN.
    """
    found: list[str] = []

    def note(place: str, layer: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
        if not found and finite(inputs) and not finite(outputs):
            rows = next((len(x) for x in inputs if isinstance(x, Tensor) and x.dim() > 0), None)
            size = "" if rows is None else f", given {rows} row{'s' * (rows != 1)}"
            found.append(f"{place} ({type(layer).__name__}){size}")

    with observed(flow, note), suppress(Exception):
        evaluate()
    return "".join(found)


def finite(value: Any) -> bool:
    """Whether all tensors in ``value`` are finite."""
    if isinstance(value, (list, tuple)):
        return all(map(finite, value))
    return not isinstance(value, Tensor) or bool(torch.isfinite(value).all())


def _layers(module: nn.Module, place: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers below a module, by their places."""
    for name, layer in module.named_children():
        within = f"{place}.{name}" if place else name
        yield within, layer
        if not isinstance(layer, Transport):
            yield from _layers(layer, within)


def _call(method: Callable[..., Any], note: Callable[..., None], *inputs: Any, **named: Any) -> Any:
    outputs = method(*inputs, **named)
    note(inputs, outputs)
    return outputs
