import math

import pytest
import torch

from nflows_mongeampere.conftest import close
from nflows_mongeampere.potentials.activations import ACTIVATIONS

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
    (second,) = torch.autograd.grad(first.sum(), h, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), h)
    p = activation.first(H)
    close(p, first.detach(), 1e-13)
    close(activation.second(p), second.detach(), 1e-13)
    close(activation.third(p), third, 1e-13)

    room = torch.empty_like(H)
    for results in (activation.first(H, room), activation.second(p, room)):
        assert results is room
    close(activation.steepness(p) * activation.second(p), third, 1e-13)

    force, bend = torch.randn(2, *H.shape, dtype=torch.float64)
    for bent in (bend, None):
        g, curvature = activation.pull_back(p, force.clone(), bent, room)
        close(g, second * force + (0 if bent is None else third * bent), 1e-13)
        close(curvature, second.detach(), 1e-13)


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
