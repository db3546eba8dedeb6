"""Implicit Euler: the root of its equation, and the gradient of that root."""

import pytest
import torch
from torch import nn

from nflows_mongeampere import AutogradPotential, IntegrationError, MongeAmpereTransform
from nflows_mongeampere.conftest import Growth, make, ridge

X = torch.tensor([[1.0], [-0.3]], dtype=torch.float64)


def test_every_step_solves_its_equation():
    # y = y0 + rate y / steps, every step
    y, logabsdet = MongeAmpereTransform(Growth(-20.0), solver="ieuler", steps=4).inverse(X)
    torch.testing.assert_close(y, X / 6**4, rtol=1e-6, atol=1e-6)
    assert logabsdet.tolist() == pytest.approx([-20.0, -20.0], abs=1e-6)


@pytest.mark.parametrize("sensitivity", ["autograd", "recompute"])
def test_gradient_is_that_of_the_root(sensitivity):
    potential, x, context = make("ridge-all", rows=2)
    transform = MongeAmpereTransform(potential, solver="ieuler", steps=3, sensitivity=sensitivity)
    options = {"eps": 1e-3, "atol": 1e-4, "rtol": 1e-4, "check_undefined_grad": False}
    inputs = (x.requires_grad_(), context.requires_grad_())
    assert torch.autograd.gradcheck(transform, inputs, **options)


def test_a_step_too_long_for_its_gradient():
    y, _ = MongeAmpereTransform(Growth(-20.0), solver="ieuler", steps=1).inverse(
        X.clone().requires_grad_()
    )
    with pytest.raises(IntegrationError, match=r"did not converge.*more steps"):
        y.sum().backward()


@pytest.mark.parametrize("sensitivity", ["autograd", "recompute"])
def test_overflow_in_the_search_for_a_root(sensitivity):
    potential = ridge(3, 8).float()
    nn.init.constant_(potential.amplitude, 1e25)
    with pytest.raises(IntegrationError, match=r"^solver ImplicitEuler .* more steps"):
        MongeAmpereTransform(potential, solver="ieuler", sensitivity=sensitivity)(torch.ones(4, 3))


def test_the_search_for_a_root_is_not_repeated_to_go_back():
    calls = []

    class Counting(nn.Module):
        def forward(self, x):
            calls.append(len(x))
            return x.sin().sum(1)

    counts = []
    for sensitivity in ("autograd", "recompute"):
        transform = MongeAmpereTransform(
            AutogradPotential(Counting()),
            time=0.1,
            solver="ieuler",
            steps=1,
            sensitivity=sensitivity,
        )
        calls.clear()
        transform(torch.randn(4, 3, requires_grad=True))[0].sum().backward()
        counts.append(len(calls))
    assert counts[1] < 1.5 * counts[0]
