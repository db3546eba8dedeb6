"""The words of the checks; who makes them is tested where they are made."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from nflows_mongeampere import validation


@pytest.mark.parametrize("value", [1, 7, np.int64(7), torch.tensor(7)], ids=repr)
def test_integer(value):
    assert validation.integer("steps", value) == int(value)
    assert type(validation.integer("steps", value)) is int


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (True, TypeError),
        (False, TypeError),
        (1.0, TypeError),
        ("1", TypeError),
        (None, TypeError),
        (math.nan, TypeError),
        ([1], TypeError),
    ],
    ids=repr,
)
def test_not_an_integer(value, error):
    with pytest.raises(error, match=r"^steps: got .*, expected an integer >= 1"):
        validation.integer("steps", value)


@pytest.mark.parametrize("value", [1, 0.5, np.float32(0.5), Fraction(1, 2), 1e-300], ids=repr)
def test_positive(value):
    assert validation.positive("time", value) == float(value)
    assert type(validation.positive("time", value)) is float


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (-0.5, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        (-math.inf, ValueError),
        (True, TypeError),
        ("1", TypeError),
        (None, TypeError),
        (1j, TypeError),
        ([1.0], TypeError),
    ],
    ids=repr,
)
def test_not_positive(value, error):
    with pytest.raises(error, match=r"^time: got .*, expected a .*(positive number|> 0)"):
        validation.positive("time", value)


@pytest.mark.parametrize("value", ["c", "A", "", None, 1, ["a"], {}], ids=repr)
def test_choice(value):
    assert validation.choice("probe", "a", ("a", "b")) == "a"
    with pytest.raises(ValueError, match=r"^probe: got .*, expected one of 'a', 'b'"):
        validation.choice("probe", value, ("a", "b"))


@pytest.mark.parametrize("shape", [(3, 2), (0, 2), (3, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_batch(shape, dtype):
    x = torch.zeros(shape, dtype=dtype)
    assert validation.batch("x", x, None) is x
    assert validation.batch("x", x, torch.zeros((), dtype=dtype)) is x


@pytest.mark.parametrize(
    ("value", "error", "remedy"),
    [
        ([[1.0]], TypeError, "torch.as_tensor"),
        (np.ones((2, 2)), TypeError, "torch.as_tensor"),
        (torch.ones(2, 2, dtype=torch.int32), TypeError, "x.to"),
        (torch.ones(2, 2, dtype=torch.bool), TypeError, "x.to"),
        (torch.ones(2, 2, dtype=torch.float64), TypeError, "convert one of them"),
        (torch.ones(2), ValueError, r"x\[None\]"),
        (torch.ones(()), ValueError, r"x\[None\]"),
        (torch.ones(2, 2, device="meta"), ValueError, "move one of them"),
        (torch.tensor([[math.nan]]), ValueError, "clean the data"),
        (torch.tensor([[math.inf]]), ValueError, "clean the data"),
    ],
    ids=["list", "numpy", "int", "bool", "dtype", "row", "()", "device", "nan", "inf"],
)
def test_not_a_batch(value, error, remedy):
    with pytest.raises(error, match=f"^x: got .*{remedy}"):
        validation.batch("x", value, torch.zeros(1))
