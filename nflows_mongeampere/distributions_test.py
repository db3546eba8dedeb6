"""The torch.distributions face against nflows and against autograd."""

import pytest
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, PointwiseAffineTransform
from torch import nn
from torch.distributions import Independent, Normal, TransformedDistribution

from nflows_mongeampere import MongeAmpereTransform, RidgePotential
from nflows_mongeampere.distributions import FlowTransform


def transform(context_features: int | None = None) -> CompositeTransform:
    """A flow far from the identity, behind a transform of nflows."""
    torch.manual_seed(0)
    potential = RidgePotential(2, 8, context_features=context_features).double()
    for parameter in potential.parameters():
        nn.init.normal_(parameter)
    shift = PointwiseAffineTransform(torch.tensor([1.0, -2.0]), 0.5).double()
    return CompositeTransform([shift, MongeAmpereTransform(potential, steps=8)])


def base(*shape: int) -> Independent:
    zeros = torch.zeros(*shape, 2, dtype=torch.float64)
    return Independent(Normal(zeros, zeros + 1), 1)


def test_density_and_samples_are_those_of_the_nflows_flow():
    inner = transform()
    flow = Flow(inner, StandardNormal([2]))
    view = TransformedDistribution(base(), [FlowTransform(inner, (2,))])
    x = torch.randn(3, 4, 2, dtype=torch.float64)
    expected = flow.log_prob(x.view(-1, 2)).view(3, 4)
    torch.testing.assert_close(view.log_prob(x), expected)
    assert view.event_shape == (2,)
    assert view.batch_shape == ()
    torch.manual_seed(1)
    samples = view.rsample((5,))
    torch.manual_seed(1)
    noise = base().rsample((5,))
    torch.testing.assert_close(samples, inner.inverse(noise)[0])


def test_the_determinant_is_that_of_the_jacobian():
    view = FlowTransform(transform(), [2])
    z = torch.randn(2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(view, z)
    x = view(z)
    expected = torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(view.log_abs_det_jacobian(z, x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(view.inv.log_abs_det_jacobian(x, z), -expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(view.inv(x), z, rtol=1e-4, atol=1e-4)


def test_a_pair_that_was_not_the_last_is_solved_again():
    view = FlowTransform(transform(), (2,))
    first, second = torch.randn(2, 3, 2, dtype=torch.float64)
    image = view(first)
    expected = view.log_abs_det_jacobian(first, image)
    view(second)
    torch.testing.assert_close(view.log_abs_det_jacobian(first, image), expected)


def test_log_prob_takes_one_solve():
    inner = transform()
    calls = []
    inner.register_forward_hook(lambda *_: calls.append("forward"))
    inverse = inner.inverse
    inner.inverse = lambda *arguments: calls.append("inverse") or inverse(*arguments)
    view = TransformedDistribution(base(), [FlowTransform(inner, (2,))])
    view.log_prob(torch.randn(3, 2, dtype=torch.float64))
    assert calls == ["forward"]
    calls.clear()
    kept = TransformedDistribution(base(), [FlowTransform(inner, (2,), cache_size=1)])
    kept.log_prob(kept.rsample((3,)))
    assert calls == ["inverse"]


def test_a_context_for_all_or_one_for_each_of_a_batch():
    inner = transform(context_features=3)
    flow = Flow(inner, StandardNormal([2]))
    contexts = torch.randn(4, 3, dtype=torch.float64)
    view = FlowTransform(inner, (2,)).condition(contexts)
    x = torch.randn(5, 4, 2, dtype=torch.float64)
    log_prob = TransformedDistribution(base(4), [view]).log_prob(x)
    for row, context in enumerate(contexts):
        expected = flow.log_prob(x[:, row], context.expand(5, 3))
        torch.testing.assert_close(log_prob[:, row], expected)
        alone = TransformedDistribution(base(), [FlowTransform(inner, (2,), context)])
        torch.testing.assert_close(alone.log_prob(x[:, row]), expected)


def test_gradients_reach_the_flow():
    inner = transform()
    view = TransformedDistribution(base(), [FlowTransform(inner, (2,))])
    view.log_prob(view.rsample((3,))).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in inner.parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((nn.Linear(2, 2), (2,)), TypeError, "transform: got Linear"),
        ((transform(), 2), TypeError, "event_shape: got 2"),
        ((transform(), "2"), TypeError, "event_shape: got '2'"),
        ((transform(), ()), ValueError, r"event_shape: got \(\)"),
        ((transform(), (0,)), ValueError, "event_shape: got 0"),
        ((transform(), (2,), 3.0), TypeError, "context: got float"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        FlowTransform(*arguments)


def test_events_of_another_shape():
    view = FlowTransform(transform(), (2,))
    with pytest.raises(ValueError, match=r"x: got shape \(4, 3\), expected \(\.\.\., 2\)"):
        view(torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"y: got shape \(3,\)"):
        view.inv(torch.randn(3))
