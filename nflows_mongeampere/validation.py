"""Checks of arguments, made once, at the border of the package.

Every error names the argument, what came, what was expected and what to do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real

import torch
from torch import Tensor


def integer(name: str, value: object, *, minimum: int = 1) -> int:
    """Return ``value`` if it is an integer that is at least ``minimum``."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(
            f"{name}: got {value!r} ({type(value).__name__}), expected an integer >= {minimum}"
        )
    number = int(value.__index__())
    if number < minimum:
        raise ValueError(f"{name}: got {number}, expected an integer >= {minimum}")
    return number


def positive(name: str, value: object) -> float:
    """Return ``value`` as a float if it is a finite positive number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name}: got {value!r} ({type(value).__name__}), expected a positive number"
        )
    number = float(value)
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"{name}: got {number}, expected a finite number > 0")
    return number


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
                f"convert one of them with .to(...)"
            )
        if value.device != like.device:
            raise ValueError(
                f"{name}: got a tensor on {value.device}, but the model's parameters are on "
                f"{like.device}; move one of them with .to(...)"
            )
    if not bool(torch.isfinite(value).all()):
        raise ValueError(
            f"{name}: got NaN or infinite entries, expected finite ones; clean the data"
        )
    return value
