"""Checks of arguments, made once, in the public call.

Every error names the argument, what came, what was expected and what to do.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Real

import torch
from torch import Tensor

from nflows_mongeampere.differentiation import compiling

_checking: ContextVar[bool] = ContextVar("checking", default=True)


@contextmanager
def unchecked() -> Iterator[None]:
    """Within it flows do not look whether numbers are finite: rows that are not come out as NaN."""
    token = _checking.set(False)
    try:
        yield
    finally:
        _checking.reset(token)


def looks_finite(value: Tensor) -> bool:
    """Whether all entries are finite, or nothing may branch on them here.

    Compilers, tracers and function transforms see no numbers, and :func:`unchecked` asks not to
    look.
    """
    if compiling() or not _checking.get():
        return True
    if torch._C._are_functorch_transforms_active() or value.is_meta:
        return True
    # one number is quicker to look at than all; a sum that overflows decides nothing
    value = value.detach()
    return math.isfinite(value.sum().item()) or bool(torch.isfinite(value).all())


def kind(name: str, value: object, fits: bool, expected: str) -> None:
    """Raise unless ``value`` is of a kind that ``fits``."""
    if not fits:
        raise TypeError(f"{name}: got {describe(value)}, expected {expected}")


def integer(name: str, value: object, *, minimum: int = 1) -> int:
    """Return ``value`` if it is an integer that is at least ``minimum``."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(
            f"{name}: got {value!r} ({type(value).__name__}), expected an integer >= {minimum}"
        ) from error
    if number < minimum:
        raise ValueError(f"{name}: got {number}, expected an integer >= {minimum}")
    return number


def optional_integer(name: str, value: object, *, minimum: int = 1) -> int | None:
    """Return ``value`` if it is None or an integer that is at least ``minimum``."""
    return None if value is None else integer(name, value, minimum=minimum)


def divisor(name: str, value: object, whole_name: str, whole: int) -> int:
    """Return ``value`` if it is an integer that divides ``whole``, another argument."""
    part = integer(name, value)
    if whole % part:
        raise ValueError(
            f"{name}: got {part}, expected a divisor of {whole_name}={whole}; "
            f"use {whole_name}={part * (whole // part + 1)}"
        )
    return part


def shape(name: str, value: object, dimensions: int | None = None) -> tuple[int, ...]:
    """Return ``value`` as a tuple if it is the shape of a tensor."""
    wanted = "integers" if dimensions is None else f"{dimensions} integers"
    if (
        isinstance(value, str)
        or not isinstance(value, Sequence)
        or len(value) not in (dimensions or len(value),)
    ):
        raise TypeError(f"{name}: got {value!r}, expected a sequence of {wanted} >= 1")
    return tuple(integer(f"{name}[{i}]", size) for i, size in enumerate(value))


def number(name: str, value: object, *, minimum: float = -math.inf) -> float:
    """Return ``value`` as a float if it is a finite number that is at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected a number")
    result = float(value)
    if not math.isfinite(result) or result < minimum:
        least = "" if minimum == -math.inf else f" >= {minimum:g}"
        raise ValueError(f"{name}: got {result}, expected a finite number{least}")
    return result


def positive(name: str, value: object) -> float:
    """Return ``value`` as a float if it is a finite positive number."""
    result = number(name, value)
    if result <= 0:
        raise ValueError(f"{name}: got {result}, expected a finite number > 0")
    return result


def boolean(name: str, value: object) -> bool:
    """Return ``value`` if it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected True or False")
    return value


def choice(name: str, value: object, choices: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``choices``."""
    allowed = tuple(choices)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, allowed))}")
    return value


def batch(name: str, value: object, like: Tensor | None) -> Tensor:
    """Return ``value`` if it is a batch of finite floating-point rows.

    Args:
        name: what the argument is called where the user passed it.
        value: the argument.
        like: a tensor whose dtype and device the batch must share (usually a
            parameter of the model), or None.
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: got {type(value).__name__}, expected a torch.Tensor of shape (B, ...); "
            "convert it with torch.as_tensor"
        )
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name}: got dtype {value.dtype}, expected float32 or float64; convert it with "
            f"{name}.to(torch.get_default_dtype()), and leave half precision to torch.autocast"
        )
    if value.dim() < 2 or value.shape[1:].numel() == 0:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, expected (B, ...) with a leading batch "
            f"dimension; a single row is {name}[None]"
        )
    if like is not None and value.dtype != like.dtype:
        raise TypeError(
            f"{name}: got dtype {value.dtype}, but the model's parameters are {like.dtype}; "
            "convert one of them with .to(...); noise of nflows' own bases has "
            "torch.get_default_dtype()"
        )
    if like is not None and value.device != like.device:
        raise ValueError(
            f"{name}: got a tensor on {value.device}, but the model's parameters are on "
            f"{like.device}; move one of them with .to(...)"
        )
    if not looks_finite(value):
        raise ValueError(
            f"{name}: got NaN or infinite entries, expected finite ones; clean the data"
        )
    return value


def context(value: object, width: int, rows: str, count: int, like: Tensor | None) -> Tensor:
    """Return ``value`` if it is a context of ``width`` numbers for each of ``count`` ``rows``.

    The count is a ``shape[0]``: ``len`` would be a constant to torch.export.
    """
    if value is None:
        raise ValueError(
            f"context: got None, expected a tensor of shape (B, {width}), because the flow was "
            f"built with context_features={width}"
        )
    found = batch("context", value, like)
    if tuple(found.shape) != (count, width):
        raise ValueError(
            f"context: got shape {tuple(found.shape)}, expected ({count}, {width}): one row for "
            f"each row of {rows}"
        )
    return found


def returned(name: str, source: object, value: object, shape: torch.Size, what: str) -> Tensor:
    """Return ``value`` if ``source``, code of the user, was right to return it.

    Args:
        name: the argument by which the user gave ``source``.
        source: the object that returned the value.
        value: what it returned.
        shape: the shape that was expected.
        what: the meaning of that shape.
    """
    if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
        raise ValueError(
            f"{name}: {type(source).__name__} returned {describe(value)}, expected floating-point "
            f"numbers in a tensor of shape {tuple(shape)}: {what}"
        )
    return value


def describe(value: object) -> str:
    """A few words on an argument of the wrong kind."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}, on {value.device}"
    plain = value is None or isinstance(value, (Real, str, tuple, type))
    return repr(value) if plain else type(value).__name__
