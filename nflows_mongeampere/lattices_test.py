"""Flows on lattices: symmetries, the best Gaussian, training, files."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from nflows_mongeampere import files, refined
from nflows_mongeampere.groups import (
    Group,
    axis_exchanges,
    point_group,
    reflections,
    sign_flip,
    translations,
)
from nflows_mongeampere.lattices import (
    LatticeAction,
    LatticeFlow,
    best_gaussian,
    symmetries,
    train,
    weigh,
)
from nflows_mongeampere.targets import Ising, Phi4


def bonds(phi: Tensor, weights: tuple[float, ...]) -> Tensor:
    sums = [w * (phi.roll(1, d) - phi).square() for d, w in enumerate(weights, 1)]
    return torch.stack(sums).sum(0).flatten(1).sum(1)


def free(phi: Tensor, weights: tuple[float, ...] = (1.0, 1.0)) -> Tensor:
    return bonds(phi, weights) + phi.square().flatten(1).sum(1)


def turned(phi: Tensor) -> Tensor:
    """Bonds of a knight's move, which turn with the square and have no mirror."""
    moves = ((1, 2), (-2, 1))
    return free(phi) + sum((phi * phi.roll(m, (1, 2))).sum((1, 2)) for m in moves)


def skewed(phi: Tensor) -> Tensor:
    """Neighbours to the left are not those to the right."""
    return free(phi) + (phi.pow(4) + 0.5 * phi.pow(3) * phi.roll(1, 1)).sum((1, 2))


def randomised(flow: LatticeFlow) -> LatticeFlow:
    """In float64, with kernels, amplitudes and scales that are drawn at random."""
    for name, parameter in flow.double().named_parameters():
        if name.endswith(("amplitude", "original", "weight")):
            torch.nn.init.normal_(parameter, std=0.3)
    return flow.eval()


@pytest.mark.parametrize("shape", [(4, 4), (2, 3), (2, 2, 2)])
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("boundary", ["periodic", "open"])
def test_the_density_has_the_symmetries_of_the_lattice(shape, even, boundary):
    flow = randomised(LatticeFlow(shape, pieces=2, even=even, boundary=boundary))
    sites = math.prod(shape)
    x = torch.randn(3, sites, dtype=torch.float64)
    expected = flow.log_prob(x)
    if boundary == "periodic":
        everything = translations(shape) * point_group(shape)
    else:
        everything = reflections(shape, range(len(shape))) * axis_exchanges(shape)
    for image in (everything * sign_flip(sites) if even else everything).act(x):
        torch.testing.assert_close(flow.log_prob(image), expected, rtol=1e-10, atol=1e-10)
    assert even == torch.allclose(flow.log_prob(-x), expected)


@pytest.mark.parametrize(
    ("shape", "action", "even", "order"),
    [
        ((4, 4), free, True, 8),
        ((3, 4), free, True, 4),
        ((4, 4), lambda phi: free(phi, (1.0, 0.5)), True, 4),
        ((3, 3, 3), lambda phi: free(phi, (1.0, 1.0, 0.5)), True, 16),
        ((4, 4), lambda phi: free(phi) + (phi - 0.5).pow(4).sum((1, 2)), False, 8),
        # a bond along the diagonal: turned by half a turn, or mirrored at a diagonal
        (
            (4, 4),
            lambda phi: free(phi) + (phi * phi.roll((1, 1), (1, 2))).sum((1, 2)),
            True,
            4,
        ),
        ((5, 5), turned, True, 4),
        ((4, 4), skewed, True, 2),
        # as weak as matters near a critical point
        ((16, 16), lambda phi: free(phi) + 1e-3 * phi.sum((1, 2)), False, 8),
        ((16, 16), lambda phi: free(phi, (1.0, 1.001)), True, 4),
        # by a table that takes no other precision
        (
            (4, 4),
            lambda phi: free(phi) + (phi.flatten(1) @ torch.eye(16)).pow(4).sum(1),
            True,
            8,
        ),
    ],
    ids=[
        *("square", "rectangle", "anisotropic", "layers", "odd", "diagonal"),
        *("turned", "skewed", "weakly odd", "weakly anisotropic", "in float32 alone"),
    ],
)
def test_the_symmetries_of_an_action_are_found(shape, action, even, order):
    target = LatticeAction(shape, action)
    found = symmetries(target)
    assert (found.even, len(found.group)) == (even, order)
    x = torch.randn(2, target.sites)
    for image in found.group.act(x):
        torch.testing.assert_close(target.log_prob(image), target.log_prob(x))
    flow = LatticeFlow.towards(target, pieces=1)
    assert len(flow.group) == order
    assert (flow.modes.mean is None) == even


def test_an_action_that_translations_change_is_refused():
    def pinned(phi: Tensor) -> Tensor:
        return free(phi) + phi[:, 0, 0].square()

    with pytest.raises(ValueError, match=r"^target: its log-density changes when fields move"):
        LatticeFlow.towards(LatticeAction((4, 4), pinned))


def test_the_best_gaussian_of_a_free_field_is_its_own():
    """Its modes have the precisions 2 (4 - 2 cos p - 2 cos q) + 2, and it needs no training."""
    target = LatticeAction((5, 6), lambda phi: free(phi - 0.7))
    log_scale, mean = best_gaussian(target)
    p, q = (2 * math.pi * torch.arange(n) / n for n in (5, 6))
    precision = 2 * (4 - 2 * p.cos()[:, None] - 2 * q.cos()) + 2
    torch.testing.assert_close(log_scale, -precision.log() / 2, rtol=0, atol=0.15)
    assert mean == pytest.approx(0.7, abs=0.02)
    samples = weigh(LatticeFlow.towards(target), target, 4000)
    exact = -0.5 * float((2 * math.pi / precision).log().sum())
    estimate = samples.corrected_free_energy
    assert estimate.value == pytest.approx(exact, abs=4 * estimate.error)
    assert samples.effective_sample_size > 0.9


def test_the_best_gaussian_of_the_ising_model():
    """Its variances solve 1 / s_k = 1 / λ_k - <sech² x>, x normal with their mean as variance."""
    target = Ising(8, 3.0)
    wave = (2 * math.pi * torch.arange(8, dtype=torch.float64) / 8).cos()
    widths = 2 * (wave[:, None] + wave) / target.temperature + target.alpha
    nodes, weights = np.polynomial.hermite_e.hermegauss(150)

    def variances(curvature: float) -> Tensor:
        return (1 / widths - curvature).reciprocal()

    def excess(curvature: float) -> float:
        x = float(variances(curvature).mean()) ** 0.5 * nodes
        return float(weights @ np.cosh(x) ** -2.0 / weights.sum()) - curvature

    expected = 0.5 * variances(brentq(excess, 0, 0.999 / float(widths.max()))).log().float()
    log_scale, mean = best_gaussian(target)
    assert mean == 0.0
    torch.testing.assert_close(log_scale, expected, rtol=0, atol=0.25)
    assert float((log_scale - expected).mean()) == pytest.approx(0.0, abs=0.02)


def test_a_flow_learns_on_smaller_lattices_first(tmp_path):
    """And takes that over: the same steps are worth more than without."""
    target, found = Phi4(12, -4.0, 5.276), {}
    for smaller_first in (True, False):
        torch.manual_seed(0)
        flow = LatticeFlow.towards(target, pieces=2)
        folder = tmp_path / str(smaller_first)
        history = train(flow, target, folder, steps=30, smaller_first=smaller_first)
        assert history.rows[-1]["step"] == 30
        assert not flow.training
        torch.manual_seed(1)
        found[smaller_first] = weigh(flow, target, 500).free_energy
        assert (folder / "6x6" / "last.ckpt").exists() == smaller_first
    assert found[True].value < found[False].value - 1
    again = LatticeFlow.towards(target, pieces=2)
    train(again, target, tmp_path / "True", steps=30)  # read, not trained
    torch.manual_seed(1)
    assert weigh(again, target, 500).free_energy == found[True]


def test_what_a_smaller_lattice_has_learnt_is_the_same_potential():
    """A field that repeats meets the same kernels."""
    small, large = randomised(LatticeFlow((6, 6))), LatticeFlow((12, 12)).double().eval()
    for piece in small.pieces:
        potential = piece.potential
        kernel = potential.symmetric_weight.detach().view(-1, 6, 6)
        kernel[:, 3], kernel[:, :, 3] = 0, 0  # halfway round, where left and right meet
        potential.weight.data = potential.invariants.right_inverse(kernel.flatten(1))
        piece.steps = 3
    large.adopt(small, torch.zeros(1, 6, 6, dtype=torch.float64))
    x = torch.randn(2, 6, 6, dtype=torch.float64)
    for mine, other in zip(large.pieces, small.pieces, strict=True):
        tiled = mine.potential(x.repeat(1, 2, 2).flatten(1))
        torch.testing.assert_close(tiled, 4 * other.potential(x.flatten(1)))
        assert mine.steps == 3  # an optimiser that met fewer would begin by living off them


@pytest.mark.parametrize("even", [True, False])
def test_a_flow_in_a_file(tmp_path, even):
    flow = randomised(LatticeFlow((3, 4), pieces=2, kernels=3, even=even, steps=2))
    files.save(flow, tmp_path / "flow.safetensors")
    loaded = files.load(tmp_path / "flow.safetensors")
    assert isinstance(loaded, LatticeFlow)
    assert loaded.arguments().keys() == flow.arguments().keys()
    x = torch.randn(2, 12, dtype=torch.float64)
    torch.testing.assert_close(loaded.log_prob(x), flow.log_prob(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda phi: phi.square().sum(), r"^action: function returned a tensor of shape \(\)"),
        (lambda phi: phi.square().sum(1), r"returned a tensor of shape \(4, 4\)"),
        (lambda phi: phi.cfloat().sum((1, 2)), "torch.complex64, on cpu, expected floating-point"),
        (lambda phi: phi.sqrt().sum((1, 2)), "^action: got NaN or minus infinity"),
        (lambda phi: -torch.inf * phi.square().sum((1, 2)), "^action: got NaN or minus infinity"),
        (lambda phi: torch.inf * phi.square().sum((1, 2)), "^action: infinite for a standard"),
        (lambda phi: 1.0, r"^action: function returned 1\.0"),
    ],
    ids=["one", "rows", "complex", "nan", "unbounded", "infinite", "float"],
)
def test_an_action_that_is_no_real_finite_number_for_each_field_is_named(action, message):
    with pytest.raises(ValueError, match=message):
        LatticeAction((4, 4), action)


def test_other_mistakes_name_the_argument():
    with pytest.raises(TypeError, match=r"^action: got \d"):
        LatticeAction((4, 4), 3)
    with pytest.raises(TypeError, match=r"^shape: got 4"):
        LatticeAction(4, free)
    with pytest.raises(ValueError, match=r"^x: got shape \(2, 9\), expected \(B, 16\)"):
        LatticeAction((4, 4), free).log_prob(torch.zeros(2, 9))
    with pytest.raises(TypeError, match=r"^target: got function without log_prob"):
        LatticeFlow.towards(free)
    with pytest.raises(ValueError, match=r"^group: got one that acts on 9 entries, expected 16"):
        LatticeFlow((4, 4), group=point_group((3, 3)))
    with pytest.raises(TypeError, match=r"^group: got '"):
        LatticeFlow((4, 4), group="square")
    with pytest.raises(ValueError, match=r"^pieces: got 0"):
        LatticeFlow((4, 4), pieces=0)
    with pytest.raises(ValueError, match=r"^between: got \(3.0, 2.0\), expected the lower"):
        LatticeFlow((4, 4), between=(3.0, 2.0))
    with pytest.raises(TypeError, match=r"^between: got 3"):
        LatticeFlow((4, 4), between=3)
    with pytest.raises(ValueError, match=r"^target: no Gaussian|^action: got NaN or minus"):
        LatticeFlow.towards(LatticeAction((2, 2), lambda phi: -phi.pow(4).sum((1, 2))))
    assert isinstance(LatticeFlow((2, 2)).group, Group)


def test_an_action_of_one_shape_alone(tmp_path):
    table = torch.ones(12, 12)
    target = LatticeAction((12, 12), lambda phi: free(phi) + (table * phi.pow(4)).sum((1, 2)))
    flow = LatticeFlow.towards(target, pieces=1)
    with pytest.raises(ValueError, match=r"^target: .*\(6, 6\).*smaller_first=False"):
        train(flow, target, tmp_path / "small", steps=1)
    train(flow, target, tmp_path / "whole", steps=1, smaller_first=False)


def trained(target: LatticeAction, folder, steps: int):
    torch.manual_seed(0)
    flow = LatticeFlow.towards(target, pieces=4)
    train(flow, target, folder, steps=steps)
    return weigh(flow, target, 2000)


@pytest.mark.parametrize("couplings", [(1.0, 1.0), (1.0, 0.5)])
def test_an_open_lattice(tmp_path, couplings):
    """Exact within errors, with the symmetries that it has; a larger one starts from it."""
    target = Ising(4, 3.0, "open", couplings=couplings)
    found = symmetries(target)
    assert found.even
    assert len(found.group) == (8 if couplings[0] == couplings[1] else 4)
    samples = trained(target, tmp_path, 60)
    free_energy = samples.corrected_free_energy
    assert abs(free_energy.value - 16 * target.free_energy) < 4 * free_energy.error
    assert free_energy.error < 0.05
    assert samples.effective_sample_size > 0.5


def test_open_kernels_on_a_larger_lattice_are_the_same_where_they_fit():
    small, large = (LatticeFlow((side, side), boundary="open").double() for side in (4, 8))
    randomised(small)
    large.adopt(small, torch.zeros(1, 4, 4, dtype=torch.float64))
    field = torch.randn(2, 4, 4, dtype=torch.float64)
    padded = torch.nn.functional.pad(field, (2, 2, 2, 2))
    for mine, other in zip(large.pieces, small.pieces, strict=True):
        inside = mine.potential.gradient(padded.flatten(1)).view(2, 8, 8)[:, 2:6, 2:6]
        assert not torch.allclose(inside, torch.zeros(()).double())
        kernels = other.potential.symmetric_weight.view(-1, 8, 8)
        torch.testing.assert_close(
            mine.potential.symmetric_weight.view(-1, 16, 16)[:, :4, :4], kernels[:, :4, :4]
        )


def test_corrections_follow_the_half_waves_of_an_open_lattice():
    small, large = (LatticeFlow((side,), boundary="open") for side in (4, 9))
    waves = {side: (torch.arange(side) + 1.0) / (side + 1) for side in (4, 9)}
    large.adopt(small, waves[4][None])
    torch.testing.assert_close(large.scales[0], waves[9].clamp(1 / 5, 4 / 5))


def test_a_sextic_action_against_quadrature(tmp_path):
    """Over four sites; not even, so that the flow needs a mean."""

    def sextic(phi: Tensor) -> Tensor:
        return free(phi) + (phi.pow(6) - phi.square() + phi / 2).sum((1, 2))

    target = LatticeAction((2, 2), sextic)
    samples = trained(target, tmp_path, 60)
    grid = torch.linspace(-2, 2, 25, dtype=torch.float64)
    x = torch.cartesian_prod(grid, grid, grid, grid)
    log_prob = target.log_prob(x)
    exact = -(float(log_prob.logsumexp(0)) - 4 * math.log(6))
    found = samples.corrected_free_energy
    assert abs(found.value - exact) < 4 * found.error
    assert found.error < 0.02
    mean = samples.mean(samples.x.mean(1))
    assert abs(mean.value - float(log_prob.softmax(0) @ x.mean(1))) < 4 * mean.error


def test_the_xy_model_against_quadrature(tmp_path):
    """As a field of two components, whose angles are free given the field."""
    beta, length = 0.4, 2
    coupling = torch.tensor([[4.0, 0.0], [0.0, -4.0]]) * beta
    alpha = 0.1 - coupling.min()
    width = coupling + alpha

    def action(x: Tensor) -> Tensor:
        modes = torch.fft.fft2(x).abs().square() / length**2
        size = (x.square().sum(1) + 1e-12).sqrt()
        log_bessel = size + torch.special.i0e(size).log()
        return (modes / width).sum((1, 2, 3)) / 2 - log_bessel.sum((1, 2))

    samples = trained(LatticeAction((2, length, length), action), tmp_path, 60)
    found = samples.corrected_free_energy
    shift = float(alpha * length**2 / 2 + width.log().sum())
    angles = 2 * math.pi * torch.arange(32, dtype=torch.float64) / 32
    a, b, c = torch.cartesian_prod(angles, angles, angles).T  # the first is zero
    bonds = a.cos() + b.cos() + (a - c).cos() + (b - c).cos()
    exact = (
        -float((2 * beta * bonds).logsumexp(0)) - 3 * math.log(angles[1]) - math.log(2 * math.pi)
    )
    assert abs(found.value + shift - exact) < 4 * found.error
    assert found.error < 0.01


def test_one_flow_for_a_range_of_temperatures(tmp_path):
    """Exact where it is weighed, at temperatures that it was not fitted to."""
    target, between = Ising(4), (2.0, 3.5)
    torch.manual_seed(0)
    flow = LatticeFlow.towards(target, pieces=3, between=between, degree=3)
    start = flow.scales
    for node in flow.parameter.nodes:  # a polynomial through the best Gaussians
        polynomials = torch.cat([torch.ones(1, 1), flow.parameter(torch.tensor([[node]]))], 1)
        expected, _ = best_gaussian(Ising(4, node))
        torch.testing.assert_close(
            torch.tensordot(polynomials, start, 1)[0], expected, rtol=0, atol=3e-4
        )
    train(flow, target, tmp_path, steps=150)
    for temperature in (2.1, 2.7, 3.4):
        exact = Ising(4, temperature).free_energy * 16
        samples = weigh(flow, target, 2000, context=torch.tensor([[temperature]]))
        found = samples.corrected_free_energy
        assert abs(found.value - exact) < 4 * found.error
        assert samples.effective_sample_size > 0.4
        assert 0 < samples.free_energy.value - exact < 0.5
    with pytest.raises(
        ValueError, match=r"^context: got values from 2 to 5, expected them between"
    ):
        flow.log_prob(torch.zeros(2, 16), context=torch.tensor([[2.0], [5.0]]))


def test_a_range_that_breaks_a_symmetry_at_one_end(tmp_path):
    """An action is even only where its parameter is zero, and the flow has a mean that moves."""

    def tilted(phi: Tensor, field: Tensor) -> Tensor:
        return free(phi) + (field * phi).sum((1, 2))

    target = LatticeAction((4, 4), tilted, parameter=0.0)
    assert symmetries(target).even
    flow = LatticeFlow.towards(target, pieces=1, between=(-1.0, 2.0), degree=2)
    fields = torch.tensor([[-1.0], [0.5], [2.0]])
    x = flow.sample(4000, context=fields)
    torch.testing.assert_close(x.mean((1, 2)), -fields[:, 0] / 2, rtol=0, atol=0.03)
    files.save(flow, tmp_path / "flow.safetensors")
    loaded = files.load(tmp_path / "flow.safetensors")
    assert loaded.arguments().keys() == flow.arguments().keys()
    expected = flow.log_prob(x[:, 0], context=fields)
    torch.testing.assert_close(loaded.log_prob(x[:, 0], context=fields), expected)
    torch.testing.assert_close(  # the flow is the Gaussian, which is the density
        expected - target.log_prob(x[:, 0], context=fields),
        -free_log_partition(fields),
        rtol=0,
        atol=0.3,
    )


def free_log_partition(fields: Tensor) -> Tensor:
    """Of 16 sites with bonds and a mass, in a field."""
    wave = (2 * math.pi * torch.arange(4) / 4).cos()
    precision = 2 * (4 - 2 * wave[:, None] - 2 * wave) + 2
    return 0.5 * (2 * math.pi / precision).log().sum() + 16 * fields[:, 0].square() / 4


def test_a_trained_flow_takes_enough_steps(tmp_path):
    """Its weights are right to a fraction of their error bars."""
    target = Ising(4)
    torch.manual_seed(0)
    flow = LatticeFlow.towards(target, pieces=3)
    train(flow, target, tmp_path, steps=150)
    values = []
    for factor in (1, 4):
        torch.manual_seed(1)
        with refined(flow, factor):
            values.append(weigh(flow, target, 500).free_energy.value)
    assert abs(values[0] - values[1]) < 4e-3
