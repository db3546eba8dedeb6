"""What every potential promises, and a potential written after the recipe of the base class."""

import pytest
import torch

from nflows_mongeampere import MongeAmpereTransform, Potential
from nflows_mongeampere.conftest import POTENTIALS, close, definition, differentiate, make

DERIVATIVES = ["forward", "gradient", "laplacian"]


class Harmonic(Potential):
    """u = k(t) |x|² / 2 with k = 1 + t, whose flow is x(T) = exp(T + T²/2) x(0)."""

    time_dependent = True

    def _value(self, x, t, context):
        return (1 + t) * x.flatten(1).square().sum(1) / 2

    def _gradient(self, x, t, context):
        return (1 + t) * x

    def _laplacian(self, x, t, context):
        return (1 + t) * x.new_full(x.shape[:1], float(x[0].numel()))


@pytest.mark.parametrize("shape", [(3,), (2, 1, 3)], ids=str)
def test_three_methods_make_a_flow(shape):
    x = torch.randn(4, *shape, dtype=torch.float64)
    transform = MongeAmpereTransform(Harmonic(), time=0.5, steps=100)
    growth = torch.tensor(0.5 + 0.5**2 / 2, dtype=torch.float64)
    for solve, sign in ((transform.inverse, 1), (transform, -1)):
        y, logabsdet = solve(x)
        close(y, x * torch.exp(sign * growth), 1e-8)
        close(logabsdet, (sign * growth * x[0].numel()).expand(4), 1e-8)


def test_a_method_that_is_not_written_is_named():
    with pytest.raises(TypeError, match="abstract"):
        Potential()


@pytest.mark.parametrize("name", POTENTIALS)
def test_value_gradient_laplacian(name):
    """At a time of each row, or at one for all, a number or a tensor."""
    potential, x, context = make(name)
    value, rows = definition(potential, context), torch.rand(3).double()
    gradient, laplacian = differentiate(value, x, rows)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            close(potential(x, rows, context), value(x, rows))
            found = potential.gradient(x, rows, context)
            close(found.detach(), gradient)
            close(potential.laplacian(x, rows, context).detach(), laplacian)
            assert found.is_contiguous()
            assert found.requires_grad == grad
    for d in DERIVATIVES:
        expected = getattr(potential, d)(x, torch.full_like(rows, 0.7), context)
        for t in (0.7, torch.tensor(0.7, dtype=torch.float64)):
            close(getattr(potential, d)(x, t, context), expected, 1e-14)


@pytest.mark.parametrize("name", POTENTIALS)
def test_derivatives_can_be_differentiated(name):
    """By autograd, once more: penalties need it."""
    potential, x, context = make(name, rows=2)
    (by_definition,) = torch.autograd.grad(
        definition(potential, context)(x.requires_grad_(), 0.7).sum(), x, create_graph=True
    )
    leaves = [x, *potential.parameters()]
    for ours, theirs in zip(
        *(
            torch.autograd.grad(g.sin().sum(), leaves, allow_unused=True, materialize_grads=True)
            for g in (potential.gradient(x, 0.7, context), by_definition)
        ),
        strict=True,
    ):
        close(ours, theirs)
    assert torch.autograd.gradcheck(
        lambda x: potential.laplacian(x, 0.7, context), x, fast_mode=True
    )


@pytest.mark.parametrize("name", POTENTIALS)
def test_inference_mode(name):
    potential, x, context = make(name)
    expected = [getattr(potential, d)(x, 0.7, context) for d in DERIVATIVES]
    with torch.inference_mode():
        inside = x.clone(), 0.7, None if context is None else context.clone()
        found = [getattr(potential, d)(*inside) for d in DERIVATIVES]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", POTENTIALS)
def test_a_context_or_time_that_is_not_taken_is_ignored(name):
    potential, x, context = make(name)
    for d in DERIVATIVES:
        derivative = getattr(potential, d)
        expected = derivative(x, 0.7, context)
        if context is None:
            assert torch.equal(derivative(x, 0.7, torch.ones(5, 5)), expected)
        if not potential.time_dependent:
            assert torch.equal(derivative(x, None, context), expected)


@pytest.mark.parametrize("name", POTENTIALS)
def test_reset_parameters(name):
    """Parameters are drawn anew; a new potential in closed form is constant."""
    potential, x, context = make(name)
    before = {key: p.detach().clone() for key, p in potential.named_parameters()}
    potential.reset_parameters()
    for key, parameter in potential.named_parameters():
        assert not torch.equal(parameter, before[key])
    if "network" not in name:
        assert not potential.gradient(x, 0.7, context).any()


MISTAKES = [
    (lambda x: x.tolist(), TypeError, r"x: got list, .*torch.as_tensor"),
    (lambda x: x.int(), TypeError, r"x: got dtype torch.int32"),
    (lambda x: x.float(), TypeError, r"x: got dtype torch.float32, but .*torch.float64"),
    (lambda x: x.flatten()[:3], ValueError, r"x: got shape \(3,\), .*x\[None\]"),
    (lambda x: x * torch.nan, ValueError, r"x: got NaN"),
]


@pytest.mark.parametrize("name", POTENTIALS)
class TestMistakes:
    """Every potential answers the usual mistakes in the same words."""

    def test_x(self, name):
        potential, x, context = make(name)
        for derivative in (getattr(potential, d) for d in DERIVATIVES):
            for change, error, message in MISTAKES:
                with pytest.raises(error, match=f"^{message}"):
                    derivative(change(x), 0.5, context)
            if potential.features is not None:  # others take any width
                with pytest.raises(ValueError, match=r"^x: got 20 features .* expected"):
                    derivative(torch.zeros(3, 20).double(), 0.5, context)

    def test_context_and_time(self, name):
        potential, x, context = make(name)
        for derivative in (getattr(potential, d) for d in DERIVATIVES):
            if context is not None:
                for wrong in (None, context[:2], context.float(), context * torch.inf):
                    message = r"^context: got .*(expected|but)"
                    with pytest.raises((TypeError, ValueError), match=message):
                        derivative(x, 0.5, wrong)
            if potential.time_dependent:
                with pytest.raises(ValueError, match=r"^t: got None, expected a time"):
                    derivative(x, None, context)
