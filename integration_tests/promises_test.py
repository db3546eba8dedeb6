"""What every flow promises, for every pair of potential, activation, solver, ..., and face."""

import io
import itertools

import pytest
import torch

import nflows_mongeampere
from cases import (
    CASES,
    COMBINATIONS,
    FACES,
    FEW_CASES,
    POTENTIALS,
    ROUND_TRIP,
    SENSITIVITIES,
    Case,
    Model,
)
from nflows_mongeampere.conftest import covering
from nflows_mongeampere.potentials.ridges import ReducedDynamics, RidgeDynamics

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_few_cases = pytest.mark.parametrize("case", FEW_CASES, ids=str)
every_face = pytest.mark.parametrize("face", FACES)


def test_few_cases_show_every_pair():
    def pairs(rows):
        return {pair for row in rows for pair in itertools.combinations(enumerate(row), 2)}

    chosen = covering(COMBINATIONS)
    assert pairs(chosen) == pairs(COMBINATIONS)
    assert len(chosen) < len(COMBINATIONS) / 5


@torch.no_grad()
def both_ways(model, x, context):
    torch.manual_seed(3)  # the same Hutchinson probe there and back
    y, logabsdet = model.to_data(x, context)
    torch.manual_seed(3)
    z, logabsdet_back = model.to_noise(y, context)
    return y, logabsdet, z, logabsdet_back


@every_case
def test_round_trip(case):
    x, context = case.batch()
    y, logabsdet, z, logabsdet_back = both_ways(Model(case), x, context)
    assert y.shape == z.shape == x.shape
    assert logabsdet.shape == logabsdet_back.shape == x.shape[:1]
    assert {v.dtype for v in (y, z, logabsdet, logabsdet_back)} == {torch.float64}
    bound = ROUND_TRIP[case.solver]
    assert (z - x).norm() <= bound * (y - x).norm() > 0
    assert (logabsdet + logabsdet_back).norm() <= bound * logabsdet.norm() > 0


def gradient_bound(case):
    """Rounding for the gradient of the discrete solution, solver error for continuous adjoints."""
    if case.solver == "ieuler":
        return {"adjoint": 0.5, "interpolated_adjoint": 0.2}.get(case.sensitivity, 1e-3)
    if "adjoint" in case.sensitivity:
        return {"euler": 0.3, "midpoint": 0.03}.get(case.solver, 0.01)
    return 1e-4 if case.solver in ("dopri5", "tsit5") else 1e-6


def reloaded(model, case):
    """A flow with other weights that has loaded the state, in evaluation mode."""
    buffer = io.BytesIO()
    torch.save(model.density.state_dict(), buffer)
    buffer.seek(0)
    restored = Model(case, seed=5)
    restored.density.load_state_dict(torch.load(buffer))
    restored.density.eval()
    return restored


@every_case
def test_log_prob(case):
    """Saved, restored and evaluated it is the same; gradients reach every parameter."""
    model = Model(case)
    x, context = case.batch()
    parameters = dict(model.density.named_parameters())
    log_prob = model.log_prob(x, context)
    with torch.no_grad():
        assert torch.equal(reloaded(model, case).log_prob(x, context), log_prob)
    gradients = torch.autograd.grad(log_prob.sum(), list(parameters.values()))
    for name, gradient in zip(parameters, gradients, strict=True):
        assert gradient.abs().max() > 1e-3, name

    generator = torch.Generator().manual_seed(4)
    directions = [torch.randn(g.shape, generator=generator, dtype=g.dtype) for g in gradients]
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))

    @torch.no_grad()
    def shifted(size):
        for parameter, direction in zip(parameters.values(), directions, strict=True):
            parameter.add_(size * direction)
        return model.log_prob(x, context).sum()

    difference = (shifted(1e-4) - shifted(-2e-4)) / 2e-4
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert (slope - difference).abs() <= gradient_bound(case) * norm


@every_few_cases
def test_repr_names_the_choices(case):
    model = Model(case)
    text = repr(model.density)
    for word in (type(model.potential).__name__, repr(case.solver), repr(case.sensitivity)):
        assert word in text


@every_face
@pytest.mark.parametrize("sensitivity", [s for s in SENSITIVITIES if "adjoint" in s])
def test_leapfrog_has_no_adjoint(sensitivity, face):
    with pytest.raises(ValueError, match=r"sensitivity.*recompute"):
        Model(Case("reduced", solver="alf", sensitivity=sensitivity), face)


@pytest.mark.parametrize("name", [n for n in POTENTIALS if n.startswith(("reduced", "direct"))])
@pytest.mark.parametrize("solver", ROUND_TRIP)
def test_both_coordinates_are_walked(name, solver):
    case = Case(name, solver=solver)
    model = Model(case)
    dynamics = model.potential.dynamics(*case.batch(), model.transport.integrator.evaluations)
    assert type(dynamics) is (ReducedDynamics if name.startswith("reduced") else RidgeDynamics)


def test_every_public_name_is_there_and_listed():
    """MongeAmpereFlow is imported where it is first used."""
    namespace = {}
    exec("from nflows_mongeampere import *", namespace)
    assert set(nflows_mongeampere.__all__) <= namespace.keys()
    assert set(nflows_mongeampere.__all__) <= set(dir(nflows_mongeampere))
    assert nflows_mongeampere.MongeAmpereFlow is namespace["MongeAmpereFlow"]
    with pytest.raises(AttributeError, match="no attribute 'MongeampereFlow'"):
        _ = nflows_mongeampere.MongeampereFlow
