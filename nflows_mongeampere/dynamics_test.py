"""Both coordinates against each other, and the products they are made of."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nflows_mongeampere.activations import ACTIVATIONS
from nflows_mongeampere.conftest import SHAPES, close, definition, differentiate, ridge
from nflows_mongeampere.dynamics import (
    DirectDynamics,
    ReducedDynamics,
    _ConvolutionProduct,
    _gram_product,
)
from nflows_mongeampere.integration import Integrator


def direct(potential, inputs, context):
    return DirectDynamics(potential._gradient_and_laplacian, inputs, context, potential)


def reduced(potential, inputs, context):
    offset = torch.zeros(len(potential.weight), len(inputs), dtype=inputs.dtype)
    if potential.bias is not None:
        offset = offset + potential.bias[:, None]
    if context is not None:
        offset = offset + potential.context_weight @ context.T
    return ReducedDynamics(
        inputs,
        potential.weight,
        offset,
        potential.amplitude,
        potential.time_weight,
        ACTIVATIONS[potential.activation],
    )


def solve(coordinates, potential, inputs, context, solver="rk4", start=0.0, stop=1.0, steps=4):
    dynamics = coordinates(potential, inputs, context)
    return dynamics.outputs(Integrator(solver, steps).solve(dynamics, (start, stop), 1.0)[-1])


def with_gradients(coordinates, potential, inputs, context, solver="rk4", **interval):
    """Outputs, logabsdet and the gradient of a mixture of both to all that they depend on."""
    leaves = [inputs, *([] if context is None else [context]), *potential.parameters()]
    outputs, logabsdet = solve(coordinates, potential, inputs, context, solver, **interval)
    loss = outputs.square().sum() + logabsdet.sin().sum()
    return outputs, logabsdet, *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["softplus", "logcosh"])
@pytest.mark.parametrize("coordinates", [direct, reduced])
@pytest.mark.parametrize("options", [{}, {"time_dependent": True, "context_features": 2}], ids=str)
def test_equations_of_motion(shape, activation, coordinates, options):
    """d(outputs)/dt is the gradient and d(logabsdet)/dt the Laplacian, wherever the state is."""
    x = torch.randn(4, *shape, dtype=torch.float64)
    context = torch.randn(4, 2, dtype=torch.float64) if options else None
    potential = ridge(x[0].numel(), 5, activation=activation, **options)
    dynamics = coordinates(potential, x, context)
    assert dynamics.outputs(dynamics.state)[1].tolist() == [0.0] * 4
    close(dynamics.outputs(dynamics.state)[0].detach(), x, 1e-14)

    state = dynamics.state + torch.randn_like(dynamics.state)
    gradient, laplacian = differentiate(
        definition(potential, context), dynamics.outputs(state)[0].detach(), 0.7
    )
    velocity = torch.func.jvp(dynamics.outputs, (state,), (dynamics(0.7, state),))[1]
    close(velocity[0].detach(), gradient)
    close(velocity[1].detach(), laplacian)


@pytest.mark.parametrize("options", [{}, {"time_dependent": True, "context_features": 2}], ids=str)
@pytest.mark.parametrize("coordinates", [direct, reduced])
def test_parameters_carry_every_gradient(coordinates, options):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    context = torch.randn(4, 2, dtype=torch.float64, requires_grad=True) if options else None
    potential = ridge(3, 5, **options)
    dynamics = coordinates(potential, x, context)
    # no costs, where none were asked for
    assert dynamics.state.shape == ((4, 3 + 1) if coordinates is direct else (5 + 1, 4))

    state = torch.randn_like(dynamics.state)
    rate = dynamics(0.7, state).sin().sum()
    leaves = [*potential.parameters(), *([] if context is None else [context])]
    expected = torch.autograd.grad(rate, leaves, retain_graph=True)
    through = torch.autograd.grad(rate, dynamics.parameters, retain_graph=True)
    for ours, theirs in zip(
        torch.autograd.grad(dynamics.parameters, leaves, through), expected, strict=True
    ):
        assert theirs.abs().max() > 1e-6
        close(ours, theirs, 1e-12)


@pytest.mark.parametrize("options", [{}, {"time_dependent": True, "context_features": 2}], ids=str)
def test_rate_of_the_laplacian(options):
    """With its sign, which the roughness, a square, does not show."""
    x, velocity = torch.randn(2, 4, 3, dtype=torch.float64)
    context = torch.randn(4, 2, dtype=torch.float64) if options else None
    potential = ridge(3, 5, **options)
    value, eps = definition(potential, context), 1e-4
    before, after = (differentiate(value, x + e * velocity, 0.7 + e)[1] for e in (-eps, eps))
    with torch.device("meta"):  # a default that must not matter
        rate = direct(potential, x, context)._laplacian_rate(x, 0.7, velocity)
    close(rate.detach(), (after - before) / (2 * eps), 1e-6)


@pytest.mark.parametrize(("shape", "hidden"), [((3,), 16), ((2, 1, 3), 4)], ids=str)
@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4"])
@pytest.mark.parametrize("options", [{}, {"time_dependent": True, "context_features": 2}], ids=str)
@pytest.mark.parametrize("activation", ["softplus", "logcosh"])
def test_coordinates_agree(shape, hidden, solver, options, activation):
    x = torch.randn(4, *shape, dtype=torch.float64, requires_grad=True)
    context = torch.randn(4, 2, dtype=torch.float64, requires_grad=True) if options else None
    potential = ridge(x[0].numel(), hidden, activation=activation, **options)
    for start, stop in ((0.0, 1.0), (1.0, 0.0)):
        pairs = zip(
            with_gradients(reduced, potential, x, context, solver, start=start, stop=stop),
            with_gradients(direct, potential, x, context, solver, start=start, stop=stop),
            strict=True,
        )
        for ours, theirs in pairs:
            close(ours, theirs)


@pytest.mark.parametrize("activation", ["softplus", "logcosh"])
@pytest.mark.parametrize("hidden", [255, 256, 300])
def test_coordinates_agree_in_float32(hidden, activation):
    """On both sides of the size from which the product is a convolution."""
    potential = ridge(200, hidden, activation=activation, scale=2.0).float()
    x = torch.randn(6, 200, requires_grad=True)
    exact = with_gradients(direct, potential.double(), x.double().detach().requires_grad_(), None)
    potential.float()
    for coordinates in (reduced, direct):
        for ours, truth in zip(with_gradients(coordinates, potential, x, None), exact, strict=True):
            assert (ours.double() - truth).norm() < 1e-5 * truth.norm()


class Solution(nn.Module):
    def __init__(self, coordinates, potential):
        super().__init__()
        self.coordinates, self.potential = coordinates, potential

    def forward(self, x, context):
        return solve(self.coordinates, self.potential, x, context, steps=2)


@pytest.mark.parametrize("coordinates", [direct, reduced])
def test_second_derivatives(coordinates):
    module = Solution(coordinates, ridge(2, 3, time_dependent=True, context_features=1))
    names = [name for name, _ in module.named_parameters()]
    leaves = [torch.randn(2, 2, dtype=torch.float64), torch.randn(2, 1, dtype=torch.float64)]
    leaves += [p.detach().clone() for p in module.parameters()]

    def solution(x, context, *parameters):
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, values, (x, context))

    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(solution, leaves)
    assert torch.autograd.gradgradcheck(solution, leaves)


class TestConvolutionProduct:
    A = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    s = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    @staticmethod
    def product(A, s):
        return _ConvolutionProduct.apply(A + A.T, s)

    def test_value(self):
        close(self.product(self.A, self.s), (self.A + self.A.T) @ self.s, 1e-14)

    def test_derivatives(self):
        arguments = self.A.clone().requires_grad_(), self.s.clone().requires_grad_()
        assert torch.autograd.gradcheck(self.product, arguments)
        assert torch.autograd.gradgradcheck(self.product, arguments)

    @pytest.mark.parametrize("leaf", [0, 1])
    def test_gradient_of_one_argument(self, leaf):
        arguments = [self.A + self.A.T, self.s]
        arguments[leaf] = arguments[leaf].clone().requires_grad_()
        cotangent = torch.randn(5, 3, dtype=torch.float64)
        (ours,) = torch.autograd.grad(
            _ConvolutionProduct.apply(*arguments), arguments[leaf], cotangent
        )
        (theirs,) = torch.autograd.grad(arguments[0] @ arguments[1], arguments[leaf], cotangent)
        close(ours, theirs, 1e-14)

    @pytest.mark.parametrize("needs", [(True, False), (False, True)])
    def test_no_product_in_vain(self, needs):
        ctx = SimpleNamespace(saved_tensors=(self.A, self.s), needs_input_grad=needs)
        grads = _ConvolutionProduct.backward(ctx, self.s)
        assert tuple(grad is not None for grad in grads) == needs

    @pytest.mark.parametrize("in_dims", [(0, 0), (None, 0), (0, None), (1, 1)], ids=str)
    def test_vmap(self, in_dims):
        def batched(tensor, dim):
            return tensor if dim is None else torch.stack([tensor, 2 * tensor.flip(0)], dim=dim)

        arguments = [batched(v, d) for v, d in zip((self.A, self.s), in_dims, strict=True)]
        for function in (self.product, torch.func.grad(lambda *a: self.product(*a).sin().sum())):
            ours = torch.func.vmap(function, in_dims)(*arguments)
            rows = [
                [
                    v if d is None else v.select(d, i)
                    for v, d in zip(arguments, in_dims, strict=True)
                ]
                for i in range(2)
            ]
            close(ours, torch.stack([function(*row) for row in rows]), 1e-13)

    @pytest.mark.parametrize("hidden", [8, 255, 256, 300])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_gram_product(self, hidden, dtype):
        W = torch.randn(hidden, 20, dtype=dtype) / hidden**0.5
        gram = (W @ W.T).requires_grad_()
        s = torch.randn(hidden, 3, dtype=dtype, requires_grad=True)
        product = _gram_product(gram, s)
        name = product.grad_fn.name()
        by_convolution = dtype == torch.float32 and hidden >= 256
        assert ("ConvolutionProduct" in name) == by_convolution
        tolerance = 1e-6 if dtype == torch.float32 else 1e-14
        close(product.double(), gram.double() @ s.double(), tolerance)
