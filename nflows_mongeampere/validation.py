"""Checks of arguments, made once, at the border of the package.

Every error names the argument, what came, what was expected and what to do.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor

# The largest size that a 32-bit index reaches.
LARGEST = 2**31 - 1


def boolean(name: str, value: object) -> bool:
    """Return ``value`` if it is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected True or False")
    return bool(value)


def integer(name: str, value: object, *, minimum: int = 1) -> int:
    """Return ``value`` if it is an integer that is at least ``minimum``."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except (TypeError, RuntimeError) as error:  # the latter from tensors without data
        raise TypeError(
            f"{name}: got {value!r} ({type(value).__name__}), expected an integer >= {minimum}"
        ) from error
    if number < minimum:
        raise ValueError(f"{name}: got {number}, expected an integer >= {minimum}")
    if number > LARGEST:
        raise ValueError(
            f"{name}: got a number of {number.bit_length()} bits, expected at most {LARGEST}"
        )
    return number


def shape(name: str, value: object, dimensions: int) -> tuple[int, ...]:
    """Return ``value`` as a tuple if it is the shape of a tensor of so many dimensions."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != dimensions:
        raise TypeError(f"{name}: got {value!r}, expected {dimensions} integers >= 1")
    sizes = tuple(integer(f"{name}[{i}]", size) for i, size in enumerate(value))
    if math.prod(sizes) > LARGEST:
        raise ValueError(f"{name}: got {sizes}, expected at most {LARGEST} entries")
    return sizes


def positive(name: str, value: object) -> float:
    """Return ``value`` as a float if it is a finite positive number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name}: got {value!r} ({type(value).__name__}), expected a positive number"
        )
    number = real(value)
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"{name}: got {number}, expected a finite number > 0")
    return number


def number(name: str, value: object, *, minimum: float = -math.inf) -> float:
    """Return ``value`` as a float if it is a finite number that is at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected a number")
    result = real(value)
    if not math.isfinite(result) or result < minimum:
        least = "" if minimum == -math.inf else f" >= {minimum:g}"
        raise ValueError(f"{name}: got {result}, expected a finite number{least}")
    return result


def real(value: Real) -> float:
    """``value`` as a float, infinite where it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def choice(name: str, value: object, choices: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``choices``."""
    allowed = tuple(choices)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, allowed))}")
    return value


def dense(name: str, value: Tensor) -> Tensor:
    """Return ``value`` if it is neither sparse nor nested."""
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(
            f"{name}: got a {_layout(value)} tensor, expected a dense one; "
            f"convert it with {name}.to_dense() or pad it"
        )
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
    dense(name, value)
    if value.is_floating_point() and value.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name}: got dtype {value.dtype}, whose rounding adds up along the path until a "
            "log-density means nothing; convert model and data with .to(torch.float32), and "
            "leave half precision to torch.autocast"
        )
    if not value.is_floating_point():
        raise TypeError(
            f"{name}: got dtype {value.dtype}, expected floating point; "
            f"convert it with {name}.to(torch.get_default_dtype())"
        )
    if value.dim() < 2:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, expected (B, ...) with a leading batch "
            f"dimension; a single row is {name}[None]"
        )
    if like is not None:
        if value.dtype != like.dtype:
            raise TypeError(
                f"{name}: got dtype {value.dtype}, but the model's parameters are {like.dtype}; "
                "convert one of them with .to(...); noise of nflows' own bases has "
                "torch.get_default_dtype()"
            )
        if value.device != like.device:
            raise ValueError(
                f"{name}: got a tensor on {value.device}, but the model's parameters are on "
                f"{like.device}; move one of them with .to(...)"
            )
    if value.is_meta:
        raise ValueError(
            f"{name}: got a tensor on meta, where there are no numbers; "
            "build model and data on a device that has some"
        )
    if not bool(torch.isfinite(value).all()):
        raise ValueError(
            f"{name}: got NaN or infinite entries, expected finite ones; clean the data"
        )
    return value


def instant(name: str, value: object, like: Tensor) -> float | Tensor:
    """Return ``value`` if it is a finite time, or one for each row of ``like``."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(
                f"{name}: got a {_layout(value)} tensor of {value.dtype}, expected a dense one of "
                "real numbers"
            )
        if tuple(value.shape) not in ((), (len(like),)):
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)}, expected () or ({len(like)},): one time "
                "for all rows of x or one for each"
            )
        if value.is_meta:
            raise ValueError(f"{name}: got a tensor on meta, where there are no numbers")
    elif isinstance(value, Real):
        value = real(value)
    else:
        raise TypeError(
            f"{name}: got {value!r}, expected a number or a tensor of shape () or ({len(like)},)"
        )
    if not bool(torch.isfinite(torch.as_tensor(value, dtype=like.dtype)).all()):
        raise ValueError(f"{name}: got {value}, expected finite times in {like.dtype}")
    return value


def returned(name: str, source: object, value: object, shape: torch.Size, what: str) -> Tensor:
    """Return ``value`` if ``source``, code of the user, was right to return it.

    Args:
        name: the argument by which the user gave ``source``.
        source: the object that returned the value.
        value: what it returned.
        shape: the shape that was expected.
        what: the meaning of that shape.
    """
    if (
        not isinstance(value, Tensor)
        or value.shape != shape
        or value.layout != torch.strided
        or value.is_meta
        or not value.is_floating_point()
    ):
        raise ValueError(
            f"{name}: {type(source).__name__} returned {describe(value)}, expected floating-point "
            f"numbers in a tensor of shape {tuple(shape)}: {what}"
        )
    return value


def describe(value: object) -> str:
    """A few words on an argument of the wrong kind."""
    if isinstance(value, Tensor) and not value.is_nested:
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}, on {value.device}"
    return repr(value)


def _layout(value: Tensor) -> str:
    return "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
