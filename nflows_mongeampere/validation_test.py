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
    ("value", "error"), [(0, ValueError), (True, TypeError), (1.0, TypeError), (None, TypeError)]
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
        (True, TypeError),
        ("1", TypeError),
        (None, TypeError),
    ],
)
def test_not_positive(value, error):
    with pytest.raises(error, match=r"^time: got .*, expected a (finite )?number"):
        validation.positive("time", value)


def test_number_of_at_least():
    assert validation.number("weight", -1) == -1.0
    with pytest.raises(ValueError, match=r"^weight: got -1.0, expected a finite number >= 0"):
        validation.number("weight", -1, minimum=0)


def test_boolean_shape_and_choice():
    assert validation.boolean("bias", True)
    with pytest.raises(TypeError, match=r"^bias: got 1 \(int\), expected True or False"):
        validation.boolean("bias", 1)
    assert validation.shape("shape", [2, np.int64(3)]) == (2, 3)
    with pytest.raises(TypeError, match=r"^shape: got 'ab', expected a sequence of integers"):
        validation.shape("shape", "ab")
    with pytest.raises(TypeError, match=r"^shape: got \(1, 2\), expected a sequence of 3 integers"):
        validation.shape("shape", (1, 2), 3)
    assert validation.choice("probe", "a", ("a", "b")) == "a"
    for value in ("c", "A", None, ["a"]):
        with pytest.raises(ValueError, match=r"^probe: got .*, expected one of 'a', 'b'"):
            validation.choice("probe", value, ("a", "b"))


@pytest.mark.parametrize("shape", [(3, 2), (0, 2), (3, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
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
        (torch.ones(2, 2, dtype=torch.bfloat16), TypeError, "autocast"),
        (torch.ones(2, 2, dtype=torch.float64), TypeError, "convert one of them"),
        (torch.ones(2), ValueError, r"x\[None\]"),
        (torch.ones(2, 0), ValueError, r"got shape \(2, 0\)"),
        (torch.ones(2, 2, device="meta"), ValueError, "move one of them"),
        (torch.tensor([[math.nan]]), ValueError, "clean the data"),
    ],
    ids=repr,
)
def test_not_a_batch(value, error, remedy):
    with pytest.raises(error, match=rf"^x: .*{remedy}"):
        validation.batch("x", value, torch.zeros(1))


def test_finite_numbers():
    assert validation.looks_finite(torch.full((9,), 3e38))  # whose sum is not
    for value in (math.nan, math.inf, -math.inf):
        x = torch.tensor([0.0, value])
        assert not validation.looks_finite(x)
        with validation.unchecked():
            assert validation.looks_finite(x)
    assert not validation.looks_finite(torch.tensor([math.inf, -math.inf]))
    assert validation.looks_finite(torch.ones(2, device="meta"))  # there are none


@pytest.mark.parametrize("value", [None, torch.ones(2), torch.ones(3, dtype=torch.int64)], ids=repr)
def test_returned(value):
    shape, good = torch.Size([3]), torch.ones(3)
    assert validation.returned("module", [], good, shape, "one for each") is good
    with pytest.raises(ValueError, match=r"^module: list returned .* shape \(3,\): one for each"):
        validation.returned("module", [], value, shape, "one for each")
