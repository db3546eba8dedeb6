"""A potential written after the recipe of the base class, and the checks that it inherits."""

import pytest
import torch

from nflows_mongeampere import MongeAmpereTransform, Potential
from nflows_mongeampere.conftest import POTENTIALS, SHAPES, close, make_potential


class Harmonic(Potential):
    """u = k(t) |x|² / 2 with k = 1 + t, whose flow is x(T) = exp(T + T²/2) x(0)."""

    time_dependent = True

    def _value(self, x, t, context):
        return (1 + t) * x.flatten(1).square().sum(1) / 2

    def _gradient(self, x, t, context):
        return (1 + t) * x

    def _laplacian(self, x, t, context):
        return (1 + t) * x.new_full(x.shape[:1], float(x[0].numel()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_three_methods_make_a_flow(shape):
    x = torch.randn(4, *shape, dtype=torch.float64)
    transform = MongeAmpereTransform(Harmonic(), time=0.5, steps=100)
    growth = torch.tensor(0.5 + 0.5**2 / 2, dtype=torch.float64)
    for solve, sign in ((transform.inverse, 1), (transform, -1)):
        y, logabsdet = solve(x)
        close(y, x * torch.exp(sign * growth), 1e-8)
        close(logabsdet, (sign * growth * x[0].numel()).expand(4), 1e-8)


@pytest.mark.parametrize("kind", POTENTIALS)
@pytest.mark.parametrize("method", ["forward", "gradient", "laplacian"])
class TestChecks:
    """Every potential answers bad arguments in the same words."""

    def call(self, kind, method, *, x=None, t=0.5, context="fits", **options):
        options = {"time_dependent": True, "context_features": 2} | options
        potential = make_potential(kind, 3, **options)
        x = torch.randn(4, 3, dtype=torch.float64) if x is None else x
        if isinstance(context, str):
            context = torch.randn(4, 2, dtype=torch.float64)
        return getattr(potential, method)(x, t, context)

    def test_good_arguments(self, kind, method):
        assert self.call(kind, method).isfinite().all()
        assert self.call(kind, method, t=torch.tensor(0.5)).isfinite().all()

    @pytest.mark.parametrize(
        ("x", "error"),
        [
            ([[1.0, 2.0, 3.0]] * 4, TypeError),
            (None.__class__, TypeError),
            (torch.ones(4, 3, dtype=torch.int64), TypeError),
            (torch.ones(4, 3, dtype=torch.bool), TypeError),
            (torch.ones(4, 3, dtype=torch.complex64), TypeError),
            (torch.ones(4, 3), TypeError),  # float32 for a model in float64
            (torch.ones(4, dtype=torch.float64), ValueError),
            (torch.tensor(1.0, dtype=torch.float64), ValueError),
            (torch.full((4, 3), torch.nan, dtype=torch.float64), ValueError),
            (torch.full((4, 3), torch.inf, dtype=torch.float64), ValueError),
            (torch.full((4, 3), -torch.inf, dtype=torch.float64), ValueError),
        ],
        ids=[
            "list", "class", "int", "bool", "complex", "dtype", "(B,)", "()", "nan", "inf", "-inf",
        ],
    )  # fmt: skip
    def test_x(self, kind, method, x, error):
        with pytest.raises(error, match=r"^x: got .* (expected|but)"):
            self.call(kind, method, x=x)

    @pytest.mark.parametrize(
        ("context", "error"),
        [
            (None, ValueError),
            ([[1.0, 2.0]] * 4, TypeError),
            (torch.ones(4, 2, dtype=torch.int64), TypeError),
            (torch.ones(4, 2), TypeError),
            (torch.ones(2, dtype=torch.float64), ValueError),
            (torch.ones(3, 2, dtype=torch.float64), ValueError),
            (torch.ones(1, 2, dtype=torch.float64), ValueError),
            (torch.full((4, 2), torch.nan, dtype=torch.float64), ValueError),
            (torch.full((4, 2), torch.inf, dtype=torch.float64), ValueError),
        ],
        ids=["missing", "list", "int", "dtype", "(C,)", "(3,C)", "(1,C)", "nan", "inf"],
    )
    def test_context(self, kind, method, context, error):
        with pytest.raises(error, match=r"^context: got .* (expected|but)"):
            self.call(kind, method, context=context)

    def test_unexpected_context(self, kind, method):
        with pytest.raises(ValueError, match=r"^context: got .* expected None"):
            self.call(kind, method, context_features=None)

    @pytest.mark.parametrize(
        "t",
        [
            None,
            torch.zeros(3),
            torch.zeros(4, 1),
            float("nan"),
            float("inf"),
            torch.tensor(torch.nan),
            torch.tensor([0.0, 0.0, 0.0, torch.inf]),
        ],
        ids=["missing", "(3,)", "(B,1)", "nan", "inf", "nan tensor", "inf row"],
    )
    def test_time(self, kind, method, t):
        with pytest.raises(ValueError, match=r"^t: got .* expected"):
            self.call(kind, method, t=t)

    @pytest.mark.parametrize("t", ["0.5", [0.5], 1j], ids=repr)
    def test_type_of_time(self, kind, method, t):
        with pytest.raises(TypeError, match=r"^t: got .* expected"):
            self.call(kind, method, t=t)

    def test_time_is_ignored_where_nothing_depends_on_it(self, kind, method):
        x = torch.randn(4, 3, dtype=torch.float64)
        potential = make_potential(kind, 3)
        assert torch.equal(getattr(potential, method)(x, 0.5), getattr(potential, method)(x))

    def test_empty_batch(self, kind, method):
        empty = torch.zeros(0, 3, dtype=torch.float64)
        result = self.call(kind, method, x=empty, context=torch.zeros(0, 2, dtype=torch.float64))
        assert result.shape == ((0, 3) if method == "gradient" else (0,))


@pytest.mark.parametrize("activation", ["softplus", "logcosh"])
@pytest.mark.parametrize("shape", [(2,), (4,), (1, 2, 2), (0,)], ids=str)
def test_feature_count(activation, shape):
    with pytest.raises(ValueError, match=r"^x: got .* features .* expected 3; build"):
        make_potential(activation, 3)(torch.zeros(4, *shape, dtype=torch.float64))


@pytest.mark.parametrize("activation", ["softplus", "logcosh"])
def test_context_width(activation):
    potential = make_potential(activation, 3, context_features=2)
    x, context = torch.zeros(4, 3).double(), torch.zeros(4, 5).double()
    with pytest.raises(ValueError, match=r"^context: got shape \(4, 5\), expected \(4, 2\)"):
        potential(x, context=context)


@pytest.mark.parametrize("method", ["forward", "gradient", "laplacian"])
def test_what_is_not_written_is_named(method):
    with pytest.raises(NotImplementedError, match=r"^potential: Potential has no method _"):
        getattr(Potential(), method)(torch.zeros(2, 3))


def test_rows_without_entries():
    with pytest.raises(ValueError, match=r"^x: got shape .*expected an entry"):
        Potential()(torch.zeros(2, 0))


@pytest.mark.parametrize("kind", POTENTIALS)
@pytest.mark.parametrize("method", ["forward", "gradient", "laplacian"])
def test_nan_is_no_answer(kind, method):
    potential = make_potential(kind, 3)
    with torch.no_grad():
        next(potential.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match=r"^x: the (value|gradient|laplacian) of .* is NaN"):
        getattr(potential, method)(torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("kind", POTENTIALS)
def test_tensors_made_in_inference_mode(kind):
    potential = make_potential(kind, 3, context_features=2)
    with torch.inference_mode():
        x, context = torch.ones(2, 3).double(), torch.ones(2, 2).double()
    potential(x, None, context).sum().backward()
    for method in (potential, potential.gradient, potential.laplacian):
        same = method(torch.ones(2, 3).double(), None, torch.ones(2, 2).double())
        assert torch.equal(method(x, None, context), same)
    assert MongeAmpereTransform(potential)(x, context)[1].requires_grad


@pytest.mark.parametrize("broken", ["_gradient", "_laplacian"])
@pytest.mark.parametrize("value", [None, torch.zeros(()), torch.zeros(4, 3, dtype=torch.int64)])
def test_what_a_potential_must_return(broken, value):
    potential = Harmonic()
    setattr(potential, broken, lambda x, t, context: value)
    with pytest.raises(ValueError, match=r"^potential: Harmonic returned .*(gradient|Laplacian)"):
        MongeAmpereTransform(potential)(torch.zeros(4, 3))
