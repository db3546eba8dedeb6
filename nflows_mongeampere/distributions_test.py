"""The transform of torch.distributions against nflows, and against what PyTorch promises of one."""

import copy
import gc
import pickle

import pytest
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, PointwiseAffineTransform
from torch import Tensor, nn
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    Distribution,
    Independent,
    Normal,
    TransformedDistribution,
)

from nflows_mongeampere import AutogradPotential, MongeAmpereTransform, RidgePotential, refined
from nflows_mongeampere.distributions import FlowTransform


def transform(context_features: int | None = None, **settings: object) -> CompositeTransform:
    """A flow far from the identity, behind a transform of nflows."""
    torch.manual_seed(0)
    potential = RidgePotential(2, 8, context_features=context_features).double()
    for parameter in potential.parameters():
        nn.init.normal_(parameter)
    shift = PointwiseAffineTransform(torch.tensor([1.0, -2.0]), 0.5).double()
    return CompositeTransform([shift, MongeAmpereTransform(potential, **{"steps": 8, **settings})])


def amplitude(inner: CompositeTransform) -> nn.Parameter:
    return inner._transforms[1].potential.amplitude


def base(*shape: int, validate_args: bool | None = None) -> Independent:
    zeros = torch.zeros(*shape, 2, dtype=torch.float64)
    normal = Normal(zeros, zeros + 1, validate_args=validate_args)
    return Independent(normal, 1, validate_args=validate_args)


def density(inner: CompositeTransform, **keywords: object) -> TransformedDistribution:
    return TransformedDistribution(base(), [FlowTransform(inner, (2,), **keywords)])


def noise(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def solves(monkeypatch):
    """The directions of the solves since."""
    calls = []

    def count(name):
        original = getattr(CompositeTransform, name)

        def counted(*arguments):
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(CompositeTransform, name, counted)

    count("forward")
    count("inverse")
    return calls


def test_density_and_samples_are_those_of_the_nflows_flow():
    inner = transform()
    flow = Flow(inner, StandardNormal([2]))
    view = density(inner)
    x = noise(3, 4, 2)
    expected = flow.log_prob(x.view(-1, 2)).view(3, 4)
    torch.testing.assert_close(view.log_prob(x), expected)
    assert view.event_shape == (2,)
    assert view.batch_shape == ()
    torch.manual_seed(1)
    samples = view.rsample((5,))
    torch.manual_seed(1)
    torch.testing.assert_close(samples, inner.inverse(base().rsample((5,)))[0])


def test_it_registers_what_it_holds():
    inner = transform(context_features=3)
    view = FlowTransform(inner, (2,), noise(3))
    for module in (view, view.inv):
        assert list(module.parameters()) == list(inner.parameters())
        assert set(module.state_dict()) == {f"transform.{name}" for name in inner.state_dict()}
    assert {view: 1}[view] == 1
    assert view == view.inv.inv
    assert view != FlowTransform(inner, (2,))
    view.float()
    assert view.context.dtype == view.inv.context.dtype == amplitude(inner).dtype == torch.float32
    view.inv.double()
    assert view.context.dtype == amplitude(inner).dtype == torch.float64
    learned = FlowTransform(inner, (2,), nn.Parameter(noise(3)))
    assert learned.context in set(learned.parameters())
    assert "context" in learned.inv.state_dict()


def test_the_inverse_is_another_such_transform():
    inner = transform(context_features=3)
    contexts = noise(4, 3)
    view, x = FlowTransform(inner, (2,), contexts[0]), noise(4, 2)
    inverse = view.inv.condition(contexts).with_cache()
    assert inverse.with_cache() is inverse
    z, logabsdet = inner(x, contexts)
    torch.testing.assert_close(inverse(x), z)
    torch.testing.assert_close(inverse.log_abs_det_jacobian(x, z), logabsdet)
    torch.testing.assert_close(inverse.inv(z), x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        ComposeTransform([view, AffineTransform(0.0, 2.0)]).inv(2 * x), view.inv(x)
    )


def test_without_a_cache_nothing_is_kept(solves):
    inner = transform()
    view, z = FlowTransform(inner, (2,)), noise(3, 2)
    with torch.no_grad():
        x = view(z)
    assert view.log_abs_det_jacobian(z, x).requires_grad
    amplitude(inner).data.zero_()  # which no version counter tells
    expected = torch.full((3,), -2 * torch.tensor(0.5).log().item(), dtype=torch.float64)
    torch.testing.assert_close(view.log_abs_det_jacobian(z, x), expected)
    solves.clear()
    log_prob = density(inner).log_prob(x)
    assert solves == ["forward", "forward"]
    # both from the data: a graph that may be followed as often as log_prob is called
    log_prob.sum().backward()
    density(inner).log_prob(x).sum().backward()


def test_with_a_cache_one_solve_serves_noise_and_determinant(solves):
    view = density(transform(), cache_size=1)
    x = noise(3, 2)
    expected = density(transform()).log_prob(x)
    solves.clear()
    torch.testing.assert_close(view.log_prob(x), expected)
    assert solves == ["forward"]
    view.log_prob(view.rsample((3,)))
    assert solves == ["forward", "inverse"]


def step(inner: CompositeTransform, x: Tensor, z: Tensor) -> None:
    with torch.no_grad():
        amplitude(inner).mul_(2)


def replace(inner: CompositeTransform, x: Tensor, z: Tensor) -> None:
    inner._transforms[1].potential.amplitude = nn.Parameter(2 * amplitude(inner).detach())


def move(inner: CompositeTransform, x: Tensor, z: Tensor) -> None:
    x.add_(1)


def coarsen(inner: CompositeTransform, x: Tensor, z: Tensor) -> None:
    flow = inner._transforms[1]
    flow.integrator = MongeAmpereTransform(flow.potential, steps=1).integrator


def backward(inner: CompositeTransform, x: Tensor, z: Tensor) -> None:
    z.sum().backward()
    inner.zero_grad()


def differentiate(inner: CompositeTransform, x: Tensor, z: Tensor) -> None:
    x.requires_grad_()


@pytest.mark.parametrize("change", [step, replace, move, coarsen, backward, differentiate])
def test_a_cache_ends_with_what_it_depends_on(change):
    inner, x = transform(), noise(3, 2)
    view = density(inner, cache_size=1)
    change(inner, x, view.transforms[0].inv(x))
    log_prob = view.log_prob(x)
    torch.testing.assert_close(log_prob, density(inner).log_prob(x))
    log_prob.sum().backward()
    assert amplitude(inner).grad.isfinite().all()
    assert (x.grad is not None) == x.requires_grad


def test_a_cached_density_is_refined():
    inner, x = transform(steps=2), noise(3, 2)
    view = density(inner, cache_size=1)
    coarse = view.log_prob(x)
    with refined(inner):
        fine = view.log_prob(x)
    assert not torch.equal(coarse, fine)


@pytest.mark.parametrize("cache_size", [0, 1])
def test_the_density_of_a_sample_has_its_whole_gradient(cache_size):
    """At x of ``sample``, where PyTorch's own cache would hold the noise constant."""
    inner = transform()
    view = density(inner, cache_size=cache_size)
    x = view.sample((3,))
    got = torch.autograd.grad(view.log_prob(x).sum(), amplitude(inner))[0]
    flow = Flow(inner, StandardNormal([2]))
    torch.testing.assert_close(
        got, torch.autograd.grad(flow.log_prob(x).sum(), amplitude(inner))[0]
    )


def test_the_density_of_a_sample_after_a_backward_pass():
    inner = transform()
    view = density(inner, cache_size=1)
    x = view.rsample((3,))
    gradients = []
    for _ in range(2):
        inner.zero_grad()
        view.log_prob(x).sum().backward()
        gradients.append(amplitude(inner).grad)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_the_determinant_has_a_gradient_in_noise_without_one():
    view, x = FlowTransform(transform(), (2,)), noise(3, 2)
    with torch.no_grad():
        z = view.inv(x)
    z.requires_grad_()
    expected = torch.autograd.grad(view.transform.inverse(z)[1].sum(), z)[0]
    got = torch.autograd.grad(view.log_abs_det_jacobian(z, x).sum(), z)[0]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("cache_size", [0, 1])
@pytest.mark.parametrize("inverse", [False, True])
def test_copies_work_after_use_as_before(cache_size, inverse):
    view = FlowTransform(transform(), (2,), cache_size=cache_size)
    used, x = TransformedDistribution(base(), [view.inv if inverse else view]), noise(3, 2)
    expected = used.log_prob(x)
    pickled = pickle.dumps(used)
    for copied in (copy.deepcopy(used), copy.copy(used), pickle.loads(pickled)):
        assert torch.equal(copied.log_prob(x), expected)
    assert torch.equal(copy.copy(view)(x), view(x))
    alone = copy.deepcopy(view)
    step(alone.transform, x, x)
    assert not torch.equal(alone.log_abs_det_jacobian(x, alone(x)), expected)
    assert torch.equal(used.log_prob(x), expected)


def test_graphs_are_freed():
    view = FlowTransform(transform(), (2,), cache_size=1)
    view(noise(3, 2))  # a flow keeps the slopes of its last solve
    view.clear_cache()
    gc.collect()
    before = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
    for _ in range(5):
        view.log_abs_det_jacobian(x := noise(3, 2), view(x))
    view.clear_cache()
    del x
    gc.collect()
    assert sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()) == before


@pytest.mark.parametrize(
    ("batch", "contexts"),
    [((), (5,)), ((5,), ()), ((4, 1), (5,)), ((5,), (4, 1)), ((5,), (5,)), ((1,), (4, 5))],
)
def test_batch_shapes_broadcast_as_those_of_torch(batch, contexts):
    inner, context = transform(context_features=3), noise(*contexts, 3)
    view = TransformedDistribution(base(*batch), [FlowTransform(inner, (2,)).condition(context)])
    scale = torch.ones(*contexts, 2, dtype=torch.float64)
    torchs = TransformedDistribution(base(*batch), [AffineTransform(0 * scale, scale, event_dim=1)])
    assert view.batch_shape == torchs.batch_shape
    assert view.event_shape == torchs.event_shape
    assert view.expand((3, 4, 5)).rsample().shape == (3, 4, 5, 2)
    for shape in ((), (7,)):
        assert view.sample(shape).shape == torchs.sample(shape).shape
        assert view.rsample(shape).shape == torchs.sample(shape).shape
    for shape in ((), (5,), (4, 5), (7, *view.batch_shape)):
        x = noise(*shape, 2)
        log_prob = view.log_prob(x)
        assert log_prob.shape == torchs.log_prob(x).shape
        rows, each = (t.expand(*log_prob.shape, -1) for t in (x, context))
        flow = Flow(inner, StandardNormal([2]))
        expected = flow.log_prob(rows.reshape(-1, 2), each.reshape(-1, 3))
        torch.testing.assert_close(log_prob.flatten(), expected)


def test_contexts_draw_noise_of_their_own():
    inner, contexts = transform(context_features=3, steps=32), noise(5, 3)
    view = TransformedDistribution(base(), [FlowTransform(inner, (2,), contexts)])
    torch.manual_seed(1)
    x = view.sample()
    torch.manual_seed(1)
    torch.testing.assert_close(inner(x, contexts)[0], base(5).sample(), rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def _validated():
    """As PyTorch has it; zuko, once imported, switches it off for all."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(True)
    yield
    Distribution.set_default_validate_args(before)


@pytest.fixture
def unvalidated(_validated):
    Distribution.set_default_validate_args(False)


BAD = [float("nan"), float("inf"), -float("inf"), 1e3]  # the last is where the solve diverges


class Quartic(nn.Module):
    """A potential whose gradient grows until it overflows."""

    def __init__(self) -> None:
        super().__init__()
        self.amplitude = nn.Parameter(torch.tensor([0.01, 0.02], dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return (self.amplitude * x**4 + context * x).sum(-1)


def steep(**settings: object) -> CompositeTransform:
    potential = AutogradPotential(Quartic())
    return CompositeTransform([MongeAmpereTransform(potential, **{"time": 0.5, **settings})])


def contexts(*shape: int) -> Tensor:
    return noise(*shape, 2).flip(0)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("inverse", [False, True])
def test_a_row_that_is_not_finite_is_nan_and_leaves_the_others_alone(bad, inverse, solves):
    view = FlowTransform(steep(), (2,), contexts(4))
    view = view.inv if inverse else view
    x = noise(4, 2)
    spoilt = x.clone()
    spoilt[1, 0] = bad
    images, logabsdet = view.call_and_ladj(spoilt)
    assert len(solves) == 1
    assert images[1].isnan().all()
    assert logabsdet[1].isnan()
    rest = [0, 2, 3]
    assert torch.equal(images[rest], view(x)[rest])
    assert torch.equal(logabsdet[rest], view.call_and_ladj(x)[1][rest])


@pytest.mark.parametrize("bad", BAD)
def test_validation_decides_between_nan_and_an_error(bad):
    inner, x = steep(), noise(3, 2)
    x[1, 1] = bad
    with pytest.raises(ValueError, match="found invalid values"):
        density(inner, context=contexts(3)).log_prob(x)
    view = FlowTransform(inner, (2,), contexts(3))
    off = TransformedDistribution(base(3, validate_args=False), [view], validate_args=False)
    assert off.log_prob(x).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("bad", BAD)
def test_validation_is_off_where_pytorch_switches_it_off(bad, unvalidated):
    view, x = density(steep(), context=contexts(3)), noise(3, 2)
    expected = view.log_prob(x)
    x[1, 1] = bad
    log_prob = view.log_prob(x)
    assert log_prob.isnan().tolist() == [False, True, False]
    assert torch.equal(log_prob[[0, 2]], expected[[0, 2]])


def test_a_row_of_context_that_is_not_finite(unvalidated):
    inner, x = steep(), noise(4, 2)
    expected = density(inner, context=contexts(4)).log_prob(x)
    spoilt = contexts(4)
    spoilt[2, 1] = torch.nan
    log_prob = density(inner, context=spoilt).log_prob(x)
    assert log_prob.isnan().tolist() == [False, False, True, False]
    assert torch.equal(log_prob[[0, 1, 3]], expected[[0, 1, 3]])


def test_a_row_that_an_adaptive_solver_cannot_follow(unvalidated):
    view = density(steep(solver="dopri5", max_steps=20), context=contexts(5))
    x = noise(5, 2)
    expected = view.log_prob(x)
    x[3] = 1e9
    x.requires_grad_()
    log_prob = view.log_prob(x)
    assert log_prob.isnan().tolist() == [False, False, False, True, False]
    rest = [0, 1, 2, 4]
    torch.testing.assert_close(log_prob[rest], expected[rest], rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(log_prob.sum(), x)
    assert gradient[rest].isfinite().all()
    assert density(view.transforms[0].transform, context=contexts(1)).log_prob(x[3]).requires_grad


@pytest.mark.parametrize("spoilt", ["x", "context"])
def test_rows_that_are_not_finite_leave_gradients_alone(spoilt, unvalidated):
    inner = transform(context_features=3)
    rows = {"x": noise(3, 2), "context": noise(3, 3)}
    flow = Flow(inner, StandardNormal([2]))
    log_prob = flow.log_prob(rows["x"][:2], rows["context"][:2])
    expected = torch.autograd.grad(log_prob.sum(), amplitude(inner))[0]
    rows[spoilt][2] = torch.nan
    log_prob = density(inner, context=rows["context"]).log_prob(rows["x"])[:2]
    torch.testing.assert_close(torch.autograd.grad(log_prob.sum(), amplitude(inner))[0], expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((nn.Linear(2, 2), (2,)), TypeError, "transform: got Linear"),
        ((transform(), 2), TypeError, "event_shape: got 2"),
        ((transform(), "2"), TypeError, "event_shape: got '2'"),
        ((transform(), ()), TypeError, r"event_shape: got \(\)"),
        ((transform(), (0,)), ValueError, "event_shape: got 0"),
        ((transform(), (2,), 3.0), TypeError, "context: got 3.0"),
        ((transform(), (2,), None, 2), ValueError, "cache_size"),
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
    with pytest.raises(ValueError, match=r"x: got shape \(3,\)"):
        TransformedDistribution(Normal(torch.zeros(3), 1.0), [view])
