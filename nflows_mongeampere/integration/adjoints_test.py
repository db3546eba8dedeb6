"""torchdyn's continuous adjoints, whose gradients approach those of the discrete solution."""

import sys

import pytest
import torch

from nflows_mongeampere import IntegrationError, MongeAmpereTransform, RidgePotential
from nflows_mongeampere.conftest import ADAPTIVE, make

pytestmark = pytest.mark.parametrize("sensitivity", ["adjoint", "interpolated_adjoint"])


def gradients(problem, sensitivity, solver="rk4", steps=8, **options):
    """Of a loss of both directions, to parameters, inputs and context."""
    potential, x, context = problem
    transform = MongeAmpereTransform(
        potential, solver=solver, steps=steps, sensitivity=sensitivity, **options
    )
    leaves = [x.requires_grad_(), *potential.parameters()]
    if context is not None:
        leaves.append(context.requires_grad_())
    z, forward = transform(x, context)
    y, inverse = transform.inverse(x, context)
    loss = (z.square().sum() - y.sin().sum() + (forward * inverse).sum()) / len(x)
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("name", ["ridge-all", "reduced-all", "images", "lattice", "network-all"])
def test_they_approach_the_gradient_of_the_discrete_solution(name, sensitivity):
    problem = make(name)
    few, many = (
        float((gradients(problem, sensitivity, steps=n) - truth).norm() / (1 + truth.norm()))
        for n in (3, 12)
        for truth in [gradients(problem, "autograd", steps=n)]
    )
    # fourth order, or third at the ends of the spline
    assert many < 5e-5
    assert many < few / 4**2.8 or many < 1e-12


@pytest.mark.parametrize("solver", ["euler", "midpoint", "ieuler", *ADAPTIVE])
def test_every_solver(solver, sensitivity):
    problem = make("ridge-all")
    exact = gradients(problem, "autograd", steps=16)
    options = {"atol": 1e-8, "rtol": 1e-8} if solver in ADAPTIVE else {}
    ours = gradients(problem, sensitivity, solver, 16, **options)
    tolerance = {"euler": 0.2, "ieuler": 0.2, "midpoint": 1e-2}.get(solver, 1e-4)
    assert (ours - exact).norm() < tolerance * (1 + exact.norm())


def test_a_frozen_potential(sensitivity):
    potential, x, _ = problem = make("ridge")
    expected = gradients(problem, "autograd", steps=16)[: x.numel()]
    potential.requires_grad_(False)
    found = gradients(problem, sensitivity, steps=16)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        transform = MongeAmpereTransform(potential, sensitivity=sensitivity)
        assert not any(y.requires_grad for y in transform(x))


def test_no_second_derivatives_rather_than_wrong_ones(sensitivity):
    potential, x, _ = make("ridge")
    z, _ = MongeAmpereTransform(potential, sensitivity=sensitivity)(x.requires_grad_())
    with pytest.raises(NotImplementedError, match=r"^create_graph: got True"):
        torch.autograd.grad(z.sum(), x, create_graph=True)


def test_they_are_bounded(sensitivity):
    potential = RidgePotential(3, 8)
    torch.nn.init.constant_(potential.amplitude, 1e4)
    settings = {"solver": "dopri5", "sensitivity": sensitivity, "max_steps": 20}
    with pytest.raises(IntegrationError, match=r"^solver 'dopri5' did not arrive .*max_steps=20"):
        MongeAmpereTransform(potential, **settings)(torch.randn(4, 3))


def test_times_that_are_too_close(sensitivity):
    transform = MongeAmpereTransform(RidgePotential(2, 4), sensitivity=sensitivity)
    with pytest.raises(IntegrationError, match=r"times: from 0 to 1e-12 .* cannot tell"):
        transform.trajectory(torch.zeros(1, 2), [0.0, 1e-12])


def test_torchvision_that_does_not_fit(sensitivity, monkeypatch):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("torchdyn.core"):
                raise RuntimeError("operator torchvision::nms does not exist")

    for name in [name for name in sys.modules if name.startswith("torchdyn.core")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"^sensitivity=.*torchvision::nms.*'recompute'"):
        MongeAmpereTransform(RidgePotential(2, 2), sensitivity=sensitivity)(torch.ones(1, 2))
