"""The contract of normflows: layers, divergences and their gradients."""

import copy

import normflows
import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian

from cases import POTENTIALS, SENSITIVITIES, Case, Model
from nflows_mongeampere import RidgePotential
from nflows_mongeampere.conftest import every_pair
from nflows_mongeampere.normflows import MongeAmpere

pytestmark = pytest.mark.usefixtures("float64")

FEATURES = 2


def layer(potential="direct", features=FEATURES, **keywords):
    case = Case(potential, keywords={"time": 1.0, "steps": 16, **keywords})
    if potential == "ridge":
        ridge = RidgePotential(features, 6)
        nn.init.normal_(ridge.amplitude, std=0.5)
        return MongeAmpere(ridge, **case.settings)
    return MongeAmpere(case.build_potential(), **case.settings)


def contexts(case, size):
    """The contexts that a batch may come with: an unconditional potential takes any, or none."""
    context = case.batch(size)[1]
    return [None, torch.randn(size, 3)] if context is None else [context]


@pytest.mark.parametrize("potential", POTENTIALS)
def test_density(potential):
    """Samples in the shape of an event, with their densities, and the divergence from them."""
    case, size = Case(potential), 5
    model = Model(case, "normflows").density
    for context in contexts(case, size):
        samples, log_prob = model.sample(size, context)
        assert samples.shape == (size, *case.shape)
        torch.manual_seed(2)
        again = model.log_prob(samples, context)
        assert again.shape == log_prob.shape == (size,)
        if potential != "hutchinson":
            torch.testing.assert_close(again, log_prob, rtol=0, atol=1e-5)
        torch.manual_seed(2)
        torch.testing.assert_close(model.forward_kld(samples, context), -again.mean())


def coupling():
    network = normflows.nets.MLP([2, 8, 4], init_zeros=False)
    return normflows.flows.AffineCouplingBlock(network)


STACKS = {
    "alone": lambda: [layer("ridge", 4)],
    "reverse": lambda: [normflows.flows.Reverse(layer("ridge", 4))],
    "beside others": lambda: [
        normflows.flows.ActNorm(4),
        layer("ridge", 4),
        normflows.flows.LULinearPermute(4),
        coupling(),
        layer("ridge", 4, sensitivity="recompute"),
        normflows.flows.Permute(4),
    ],
    "composite": lambda: [
        normflows.flows.Composite(
            [layer("ridge", 4), coupling(), normflows.flows.Reverse(layer("ridge", 4))]
        )
    ],
}


@pytest.mark.parametrize("name", STACKS)
def test_stack(name):
    """ln|det| is that of the Jacobian by autograd; the inverse undoes both outputs."""
    model = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(4), STACKS[name]())
    model.sample(50)  # ActNorm initialises itself on its first batch
    z = torch.randn(3, 4)
    x, log_det = model.forward_and_log_det(z)
    assert (x - z).abs().max() > 0.1
    for row, value in zip(z, log_det, strict=True):
        matrix = jacobian(lambda v: model.forward(v[None])[0], row)
        torch.testing.assert_close(value, torch.linalg.slogdet(matrix)[1], rtol=0, atol=1e-4)
    back, log_det_back = model.inverse_and_log_det(x)
    torch.testing.assert_close(back, z, rtol=0, atol=1e-4)
    torch.testing.assert_close(log_det_back, -log_det, rtol=0, atol=1e-4)
    log_prob = torch.distributions.Normal(0, 1).log_prob(z).sum(1) - log_det
    torch.testing.assert_close(model.log_prob(x), log_prob, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.forward_kld(x), -log_prob.mean(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", STACKS)
def test_samples_carry_their_density(name):
    model = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(4), STACKS[name]())
    model.sample(50)
    samples, log_prob = model.sample(6)
    assert samples.shape == (6, 4)
    torch.testing.assert_close(model.log_prob(samples), log_prob, rtol=0, atol=1e-4)


def test_conditional_flow():
    encoder = nn.Linear(1, 12)
    model = normflows.ConditionalNormalizingFlow(
        normflows.distributions.base.ConditionalDiagGaussian(6, encoder),
        [layer("reduced-context"), normflows.flows.LULinearPermute(6), layer("reduced-context")],
    )
    context = torch.randn(5, 1)
    samples, log_prob = model.sample(5, context)
    torch.testing.assert_close(model.log_prob(samples, context), log_prob, rtol=0, atol=1e-4)
    back = model.forward(model.inverse(samples, context), context)
    torch.testing.assert_close(back, samples, rtol=0, atol=1e-4)
    loss = model.forward_kld(samples.detach(), context)
    torch.testing.assert_close(loss, -log_prob.mean(), rtol=0, atol=1e-4)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    assert encoder.weight.grad.abs().max() > 0
    swapped = model.log_prob(samples, context.flip(0))
    assert (swapped - log_prob).abs().max() > 1e-3


class Target(normflows.distributions.Target):
    """A banana in any number of dimensions."""

    def log_prob(self, z):
        z = z.flatten(1)
        return -z.square().sum(1) / 2 - (z[:, 0] ** 2 - z[:, 1]).square()


def variational(potential, **keywords):
    flow = layer(potential, **{"time": 0.5, "steps": 6, **keywords})
    shape = Case(potential).shape
    base = normflows.distributions.DiagGaussian(shape, trainable=False)
    target = Target(prop_scale=torch.tensor(1.0), prop_shift=torch.tensor(0.0))
    return normflows.NormalizingFlow(base, [flow], target), flow


DIVERGENCES = {
    "kld": lambda model: model.reverse_kld(8, beta=0.7),
    "alpha": lambda model: model.reverse_alpha_div(8, alpha=0.5),
    "path kld": lambda model: model.reverse_kld(8, beta=0.7, score_fn=False),
    "dreg alpha": lambda model: model.reverse_alpha_div(8, alpha=0.5, dreg=True),
}
UNCONDITIONAL = ("reduced", "direct", "reduced-time", "reduced-image", "network", "hutchinson")


def gradient(model, divergence):
    torch.manual_seed(3)
    loss = DIVERGENCES[divergence](model)
    grads = torch.autograd.grad(loss, list(model.flows.parameters()))
    return loss.detach(), torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("divergence", ["kld", "alpha"])
@pytest.mark.parametrize("potential", UNCONDITIONAL)
def test_divergence_gradient_by_finite_differences(divergence, potential):
    model, flow = variational(potential)
    _, computed = gradient(model, divergence)
    parameters = list(flow.parameters())
    assert all(g.abs().max() > 0 for g in computed.split([p.numel() for p in parameters]))
    direction = torch.randn(len(computed))

    @torch.no_grad()
    def shifted(size):
        torch.manual_seed(3)
        moved = copy.deepcopy(model)
        vector = nn.utils.parameters_to_vector(flow.parameters()) + size * direction
        nn.utils.vector_to_parameters(vector, moved.flows.parameters())
        return DIVERGENCES[divergence](moved)

    difference = (shifted(1e-4) - shifted(-1e-4)) / 2e-4
    torch.testing.assert_close(computed @ direction, difference, rtol=1e-5, atol=1e-6)


def path_gradient(model, flow, divergence):
    """The gradient through the samples alone, by the chain rule over a frozen copy of q."""
    torch.manual_seed(3)
    z, _ = model.q0(8)
    x, log_det = flow.forward(z)
    frozen = copy.deepcopy(model).requires_grad_(False)
    point = x.detach().requires_grad_()
    log_ratio = model.p.log_prob(point) - frozen.log_prob(point)
    if divergence == "path kld":
        loss = (frozen.log_prob(point) - 0.7 * model.p.log_prob(point)).mean()
    else:
        weight = (model.p.log_prob(x) - model.q0.log_prob(z) + log_det).detach().exp() ** 0.5
        weight = weight / weight.mean()
        loss = -0.5 * ((0.5 * weight + 0.5 * weight**2) * log_ratio).mean()
    (force,) = torch.autograd.grad(loss, point)
    grads = torch.autograd.grad(x, list(flow.parameters()), force)
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize(
    ("potential", "sensitivity", "divergence"),
    every_pair(
        [p for p in UNCONDITIONAL if p != "hutchinson"],
        SENSITIVITIES,
        ["path kld", "dreg alpha"],
    ),
)
def test_path_gradient(divergence, sensitivity, potential):
    """normflows freezes the parameters and differentiates the density by its argument."""
    model, _ = variational(potential, sensitivity=sensitivity)
    exact, flow = variational(potential)
    _, computed = gradient(model, divergence)
    expected = path_gradient(exact, flow, divergence)
    error = (computed - expected).norm() / expected.norm()
    assert error < {"adjoint": 1e-3, "interpolated_adjoint": 2e-2}.get(sensitivity, 1e-6)
    assert all(p.requires_grad for p in model.flows.parameters())


@pytest.mark.parametrize("solver", ["euler", "midpoint", "dopri5", "tsit5", "ieuler", "alf"])
def test_recomputed_path_gradient(solver):
    """Frozen in the forward pass, thawed when the steps are computed again."""
    keywords = {"solver": solver, "steps": 3}
    expected = gradient(variational("direct", **keywords)[0], "path kld")
    computed = gradient(variational("direct", sensitivity="recompute", **keywords)[0], "path kld")
    torch.testing.assert_close(computed, expected, rtol=1e-6, atol=1e-9)


def test_training_approaches_a_target():
    """The free energy falls towards the target's, which bounds it."""
    target = normflows.distributions.TwoMoons()
    grid = torch.cartesian_prod(*[torch.linspace(-5, 5, 400)] * 2)
    log_normaliser = torch.logsumexp(target.log_prob(grid), 0) + 2 * torch.log(
        torch.tensor(10 / 399)
    )
    model = normflows.NormalizingFlow(
        normflows.distributions.DiagGaussian(2, trainable=False),
        [MongeAmpere(RidgePotential(2, 32), steps=4)],
        target,
    )
    before = model.reverse_kld(2000).detach()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        model.reverse_kld(100).backward()
        optimizer.step()
    model.flows[0].steps = 16
    after = model.reverse_kld(2000).detach()
    assert after < before - 1
    assert after > -log_normaliser - 0.01
