"""Averages over groups against their definition, in orbits, in Fourier space and by images."""

from unittest import mock

import pytest
import torch
from torch import nn

from nflows_mongeampere import (
    AutogradPotential,
    Group,
    MongeAmpereTransform,
    RidgePotential,
    SymmetrizedPotential,
)
from nflows_mongeampere.conftest import (
    ALL,
    Network,
    close,
    convolutional,
    definition,
    differentiate,
    every_pair,
    ridge,
)
from nflows_mongeampere.groups import point_group, reflections, sign_flip, translations
from nflows_mongeampere.potentials import orbits
from nflows_mongeampere.potentials.orbits import ImageAverage, LatticeDynamics, RidgeOrbits

GROUPS = {
    "chain": translations((12,)) * point_group((12,)),
    "rectangle": translations((2, 6)) * point_group((2, 6)) * sign_flip(12),
    "cube": translations((2, 3, 2)),
    "reflection": reflections((1, 3, 4)),
    "user": Group([range(12), [*range(11, -1, -1)]]),
    "signs": Group.generated_by([([1, 2, 0, *range(3, 12)], [-1, 1, 1] + [1] * 9)]),
}
KINDS = {
    "even": lambda: ridge(12, 3, activation="logcosh", bias=False),
    "everything": lambda: ridge(12, 4, **ALL),
    "one": lambda: ridge(12, 1),
    "images": lambda: convolutional((1, 3, 4)),
    "network": lambda: AutogradPotential(Network(12).double()),
}


@pytest.fixture
def way(request):
    """How ridges are moved over a lattice."""
    with mock.patch.object(orbits, "FOURIER_SITES", 1 if request.param == "fourier" else 10**9):
        yield request.param


every_average = pytest.mark.parametrize(
    ("kind", "group", "way"), every_pair(KINDS, GROUPS, ["product", "fourier"]), indirect=["way"]
)


@every_average
def test_is_the_average_over_the_group(kind, group, way):
    potential = SymmetrizedPotential(KINDS[kind](), GROUPS[group])
    x = torch.randn(2, 12, dtype=torch.float64)
    context = torch.randn(2, 2, dtype=torch.float64) if kind == "everything" else None
    value = definition(potential, context)
    gradient, laplacian = differentiate(value, x, 0.3)
    close(potential(x, 0.3, context), value(x, 0.3))
    close(potential.gradient(x, 0.3, context), gradient)
    close(potential.laplacian(x, 0.3, context), laplacian)


@every_average
def test_flows_are_symmetric_to_rounding(kind, group, way):
    group = GROUPS[group]
    transform = MongeAmpereTransform(SymmetrizedPotential(KINDS[kind](), group), steps=2)
    x = torch.randn(2, 12, dtype=torch.float64)
    context = torch.randn(2, 2, dtype=torch.float64) if kind == "everything" else None
    with torch.no_grad():
        z, logabsdet = transform(x, context)
        for i in torch.randint(len(group), (3,)):
            permutation, sign = group.permutations[i], group.signs[i]
            turned, same = transform(x[:, permutation] * sign, context)
            close(turned, z[:, permutation] * sign, 1e-12)
            close(same, logabsdet, 1e-12)


def test_the_way_is_chosen_by_the_size_of_the_lattice():
    def way(potential, group):
        average = SymmetrizedPotential(potential, group)._average
        x = torch.zeros(1, len(group.permutations[0]))
        return type(average), type(average.dynamics(x, None, 4, False)) is LatticeDynamics

    assert way(RidgePotential(16, 2), translations((4, 4))) == (RidgeOrbits, False)
    assert way(RidgePotential(1024, 2), translations((32, 32))) == (RidgeOrbits, True)
    # a group that is not known to hold the translations
    assert way(RidgePotential(1024, 2), sign_flip(1024)) == (RidgeOrbits, False)
    network = AutogradPotential(Network(4))
    assert way(network, translations((2, 2))) == (ImageAverage, False)


def test_half_of_the_images_are_enough_where_the_potential_is_even():
    group = translations((4,)) * sign_flip(4)
    x = torch.zeros(1, 4, dtype=torch.float64)
    rows = [
        SymmetrizedPotential(potential, group).dynamics(x, None, 1).tensors.rows.shape[1]
        for potential in (ridge(4, 3), ridge(4, 3, activation="logcosh", bias=False))
    ]
    assert rows == [3 * 8, 3 * 4]


def test_events_keep_their_shape():
    symmetric = SymmetrizedPotential(ridge(16, 2), reflections((1, 4, 4), (-2, -1)))
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    outputs, _ = MongeAmpereTransform(symmetric)(x)
    assert outputs.shape == x.shape
    close(MongeAmpereTransform(symmetric)(x.flip(-2))[0], outputs.flip(-2), 1e-12)


def test_estimates_of_the_laplacian_keep_the_gradient_symmetric():
    network = AutogradPotential(Network(12).double(), laplacian="hutchinson")
    estimate = SymmetrizedPotential(network, GROUPS["cube"])
    exact = SymmetrizedPotential(AutogradPotential(network.module), GROUPS["cube"])
    assert estimate.stochastic
    assert not exact.stochastic
    x = torch.randn(2, 12, dtype=torch.float64)
    close(estimate.gradient(x), exact.gradient(x), 1e-12)
    draws = torch.stack([estimate.laplacian(x).detach() for _ in range(300)])
    error = (draws.mean(0) - exact.laplacian(x)).abs() / (draws.std(0) / 300**0.5)
    assert (error < 4).all()
    # one probe for each solve: the map back is the inverse
    transform = MongeAmpereTransform(estimate, steps=20)
    close(transform.inverse(transform(x)[0])[0], x, 1e-6)


def test_the_state_is_that_of_the_potential():
    potential = ridge(12, 2)
    state = SymmetrizedPotential(potential, GROUPS["cube"]).state_dict()
    assert set(state) == {f"potential.{name}" for name in potential.state_dict()}


@pytest.mark.parametrize(
    ("potential", "group", "error", "message"),
    [
        (nn.Linear(2, 2), [[0, 1]], TypeError, "potential: got Linear, expected a Potential"),
        (RidgePotential(3, 2), [[0, 1]], ValueError, "group: got one that acts on 2 entries, exp"),
        (RidgePotential(2, 2), [[1, 0]], ValueError, "group: got .* not closed"),
        (RidgePotential(2, 2), None, TypeError, "group: got None"),
    ],
)
def test_mistakes_name_the_argument(potential, group, error, message):
    with pytest.raises(error, match=f"^{message}"):
        SymmetrizedPotential(potential, group)
