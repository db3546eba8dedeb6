import math

import pytest
import torch

from nflows_mongeampere.activations import ACTIVATIONS
from nflows_mongeampere.conftest import close

H = torch.linspace(-40, 40, 801, dtype=torch.float64)
FORMULAS = {
    "softplus": lambda h: max(h, 0) + math.log1p(math.exp(-abs(h))),
    "logcosh": lambda h: abs(h) + math.log1p(math.exp(-2 * abs(h))) - math.log(2),
}


def test_every_activation_has_a_formula():
    assert set(FORMULAS) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_is_that_of_the_formula(name):
    expected = torch.tensor([FORMULAS[name](float(h)) for h in H], dtype=torch.float64)
    close(ACTIVATIONS[name].value(H), expected, 1e-13)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_are_those_of_autograd(name):
    activation = ACTIVATIONS[name]
    h = H.clone().requires_grad_()
    (first,) = torch.autograd.grad(activation.value(h).sum(), h, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), h)
    close(activation.first(H), first.detach(), 1e-13)
    close(activation.second(activation.first(H)), second, 1e-13)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_overflows_far_out(name, dtype):
    h = torch.tensor([-1e4, -100, 0, 100, 1e4], dtype=dtype, requires_grad=True)
    activation = ACTIVATIONS[name]
    p = activation.first(h)
    for y in (activation.value(h), p, activation.second(p)):
        assert y.isfinite().all()
        (grad,) = torch.autograd.grad(y.sum(), h, retain_graph=True)
        assert grad.isfinite().all()


def test_logcosh_is_even():
    close(ACTIVATIONS["logcosh"].value(-H), ACTIVATIONS["logcosh"].value(H), 1e-14)
