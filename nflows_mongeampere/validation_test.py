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
        (torch.tensor([1, 2]), TypeError),
        (torch.tensor(1.5), TypeError),
        (np.array([1, 2]), TypeError),
    ],
    ids=repr,
)
def test_not_an_integer(value, error):
    with pytest.raises(error, match=r"^steps: got .*, expected an integer >= 1"):
        validation.integer("steps", value)


@pytest.mark.parametrize("value", [2**31, 10**400], ids=["32 bits", "more than a float"])
def test_integer_beyond_every_size(value):
    with pytest.raises(ValueError, match=r"^steps: got .*, expected at most 2147483647"):
        validation.integer("steps", value)


@pytest.mark.parametrize("value", [None, 0, "yes", torch.tensor([True, False])], ids=repr)
def test_boolean(value):
    assert validation.boolean("bias", np.bool_(True)) is True
    with pytest.raises(TypeError, match=r"^bias: got .*, expected True or False"):
        validation.boolean("bias", value)


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
        (10**400, ValueError),
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
        (torch.ones(2, 2, dtype=torch.bool), TypeError, "x.to"),
        (torch.ones(2, 2, dtype=torch.complex64), TypeError, "x.to"),
        (torch.ones(2, 2, dtype=torch.float16), TypeError, "autocast"),
        (torch.ones(2, 2, dtype=torch.bfloat16), TypeError, "autocast"),
        (torch.ones(2, 2).to_sparse(), TypeError, "x.to_dense"),
        (torch.nested.nested_tensor([torch.ones(2)]), TypeError, "pad"),
        (torch.ones(2, 2, dtype=torch.float64), TypeError, "convert one of them"),
        (torch.ones(2), ValueError, r"x\[None\]"),
        (torch.ones(()), ValueError, r"x\[None\]"),
        (torch.ones(2, 2, device="meta"), ValueError, "move one of them"),
        (torch.tensor([[math.nan]]), ValueError, "clean the data"),
        (torch.tensor([[math.inf]]), ValueError, "clean the data"),
    ],
    ids=repr,
)
def test_not_a_batch(value, error, remedy):
    with pytest.raises(error, match=rf"^x: got .*{remedy}"):
        validation.batch("x", value, torch.zeros(1))


def test_batch_without_numbers():
    meta = torch.ones(2, 2, device="meta")
    with pytest.raises(ValueError, match=r"^x: got a tensor on meta"):
        validation.batch("x", meta, meta)


@pytest.mark.parametrize(
    "value", [0, 0.5, Fraction(1, 2), torch.tensor(1), torch.ones(3), torch.ones(()).double()]
)
def test_instant(value):
    torch.testing.assert_close(
        torch.as_tensor(validation.instant("t", value, torch.zeros(3, 1)), dtype=torch.float32),
        torch.as_tensor(value if isinstance(value, torch.Tensor) else float(value)).float(),
    )


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("0", TypeError),
        (1j, TypeError),
        (torch.tensor(1j), TypeError),
        (torch.tensor(True), TypeError),
        (torch.ones(3).to_sparse(), TypeError),
        (torch.ones(2), ValueError),
        (torch.ones((), device="meta"), ValueError),
        (math.nan, ValueError),
        (10**400, ValueError),
        (1e300, ValueError),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_not_an_instant(value, error):
    with pytest.raises(error, match=r"^t: got "):
        validation.instant("t", value, torch.zeros(3, 1))


@pytest.mark.parametrize(
    "value",
    [
        None,
        torch.ones(2),
        torch.ones(3, dtype=torch.int64),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3).to_sparse(),
        torch.ones(3, device="meta"),
    ],
    ids=repr,
)
def test_returned(value):
    shape, good = torch.Size([3]), torch.ones(3)
    assert validation.returned("module", [], good, shape, "one for each") is good
    with pytest.raises(ValueError, match=r"^module: list returned .* shape \(3,\): one for each"):
        validation.returned("module", [], value, shape, "one for each")


@pytest.mark.parametrize("value", [True, np.bool_(True), np.bool_(False)], ids=repr)
def test_booleans_are_no_integers(value):
    with pytest.raises(TypeError, match=r"^steps: got .* expected an integer"):
        validation.integer("steps", value)
