import pytest
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from torch import nn

from nflows_mongeampere import (
    AutogradPotential,
    ConvolutionalPotential,
    Group,
    MongeAmpereTransform,
    RidgePotential,
    SymmetrizedPotential,
    files,
)
from nflows_mongeampere.conftest import Network, close, differentiate, ridge, ridge_value
from nflows_mongeampere.groups import point_group, reflections, sign_flip, translations
from nflows_mongeampere.potentials import symmetrized

SQUARE = translations((4, 4)) * point_group((4, 4))
GROUPS = {
    "translations": translations((4, 4)),
    "square": SQUARE,
    "all": SQUARE * sign_flip(16),
    "chain": translations((16,)) * point_group((16,)),
    "rectangle": translations((2, 8)) * point_group((2, 8)) * sign_flip(16),
    "cube": translations((2, 2, 4)),
    "reflection": reflections((1, 4, 4)),
    "user": Group([range(16), [*range(15, -1, -1)]]),
    "signs": Group.generated_by([([1, 2, 0, *range(3, 16)], [-1, 1, 1] + [1] * 13)]),
}


@pytest.fixture(params=["product", "fourier"])
def way(request, monkeypatch):
    """How ridges are moved over a lattice."""
    monkeypatch.setattr(symmetrized, "FOURIER_SITES", 1 if request.param == "fourier" else 10**9)
    return request.param


def make(kind):
    if kind == "even":
        return ridge(16, 3, activation="logcosh", bias=False)
    if kind == "softplus":
        return ridge(16, 3)
    if kind == "everything":
        return ridge(16, 3, time_dependent=True, context_features=2)
    if kind == "images":
        potential = ConvolutionalPotential((1, 4, 4), 2, kernel_size=3).double()
        nn.init.normal_(potential.amplitude)
        return potential
    return AutogradPotential(Network(16).double())


def arguments(potential, rows=3):
    x = torch.randn(rows, 16, dtype=torch.float64)
    context = None
    if potential.context_features is not None:
        context = torch.randn(rows, potential.context_features, dtype=torch.float64)
    return x, 0.3, context


def average(potential, group, x, t, context):
    """The definition, element by element."""
    values = []
    for permutation, sign in zip(group.permutations, group.signs, strict=True):
        image = x[:, permutation] * sign
        if isinstance(potential, RidgePotential):
            values.append(ridge_value(potential, image, t, context))
        else:
            values.append(potential(image, t, context))
    return torch.stack(values).mean(0)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", ["even", "softplus", "everything", "network", "images"])
def test_is_the_average_over_the_group(kind, group, way):
    potential = make(kind)
    symmetric = SymmetrizedPotential(potential, GROUPS[group])
    x, t, context = arguments(potential)
    close(symmetric(x, t, context), average(potential, GROUPS[group], x, t, context))
    if len(GROUPS[group]) > 64:
        return
    gradient, laplacian = differentiate(
        lambda point, time: average(
            potential,
            GROUPS[group],
            point,
            time,
            None if context is None else context,
        ),
        x,
        t,
    )
    close(symmetric.gradient(x, t, context), gradient)
    close(symmetric.laplacian(x, t, context), laplacian)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", ["even", "softplus", "everything", "network", "images"])
def test_symmetry_to_rounding(kind, group, way):
    potential, group = make(kind), GROUPS[group]
    symmetric = SymmetrizedPotential(potential, group)
    flow = Flow(MongeAmpereTransform(symmetric, steps=3), StandardNormal([16])).double()
    x, t, context = arguments(potential, 2)
    some = torch.randint(len(group), (5,))
    for permutation, sign in zip(group.permutations[some], group.signs[some], strict=True):
        image = x[:, permutation] * sign
        close(symmetric(image, t, context), symmetric(x, t, context), 1e-12)
        close(
            symmetric.gradient(image, t, context),
            symmetric.gradient(x, t, context)[:, permutation] * sign,
            1e-12,
        )
        close(flow.log_prob(image, context), flow.log_prob(x, context), 1e-12)


@pytest.mark.parametrize("sensitivity", ["recompute", "adjoint"])
@pytest.mark.parametrize("kind", ["softplus", "everything"])
def test_sensitivities_agree(kind, sensitivity, way):
    potential = SymmetrizedPotential(make(kind), GROUPS["square"])
    x, _, context = arguments(potential)
    gradients = []
    for method in ("autograd", sensitivity):
        transform = MongeAmpereTransform(potential, steps=8, sensitivity=method)
        outputs, logabsdet = transform(x, context)
        loss = (outputs.square().sum() + logabsdet.sum()) / 10
        gradients.append(torch.autograd.grad(loss, list(potential.parameters())))
    for gradient, expected in zip(*gradients, strict=True):
        close(gradient, expected, 1e-12 if sensitivity == "recompute" else 1e-2)


def test_fourier_space_is_chosen_by_the_size_of_the_lattice():
    small = SymmetrizedPotential(RidgePotential(16, 2), translations((4, 4)))
    large = SymmetrizedPotential(RidgePotential(1024, 2), translations((32, 32)))
    assert small._lattice is None
    assert large._lattice == (32, 32)
    # a group that is not known to hold the translations
    assert SymmetrizedPotential(RidgePotential(1024, 2), sign_flip(1024))._lattice is None


def test_events_keep_their_shape():
    symmetric = SymmetrizedPotential(ridge(16, 2), reflections((1, 4, 4), (-2, -1)))
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    assert symmetric.gradient(x).shape == x.shape
    close(symmetric.gradient(x.flip(-1)), symmetric.gradient(x).flip(-1), 1e-12)
    outputs, _ = MongeAmpereTransform(symmetric)(x)
    flipped, _ = MongeAmpereTransform(symmetric)(x.flip(-2))
    close(flipped, outputs.flip(-2), 1e-12)


def test_estimates_of_the_laplacian_keep_the_gradient_symmetric():
    torch.manual_seed(1)
    network = AutogradPotential(Network(16).double(), laplacian="hutchinson")
    estimate = SymmetrizedPotential(network, GROUPS["translations"])
    exact = SymmetrizedPotential(AutogradPotential(network.module), GROUPS["translations"])
    x = torch.randn(2, 16, dtype=torch.float64)
    close(estimate.gradient(x), exact.gradient(x), 1e-12)
    draws = torch.stack([estimate.laplacian(x).detach() for _ in range(300)])
    error = (draws.mean(0) - exact.laplacian(x)).abs() / (draws.std(0) / 300**0.5)
    assert (error < 4).all()
    # one probe for each solve: the map back is the inverse
    transform = MongeAmpereTransform(estimate, steps=20)
    close(transform.inverse(transform(x)[0])[0], x, 1e-6)


def test_saves_and_loads(tmp_path, way):
    symmetric = SymmetrizedPotential(ridge(16, 3), GROUPS["all"])
    transform = MongeAmpereTransform(symmetric, steps=3)
    files.save(transform, tmp_path / "flow")
    loaded = files.load(tmp_path / "flow")
    x = torch.randn(3, 16, dtype=torch.float64)
    assert torch.equal(loaded(x)[0], transform(x)[0])
    assert loaded.potential.group.lattice == (4, 4)
    assert set(symmetric.state_dict()) == {
        f"potential.{k}" for k in symmetric.potential.state_dict()
    }


@pytest.mark.parametrize(
    ("potential", "group", "error", "message"),
    [
        (nn.Linear(2, 2), [[0, 1]], TypeError, "potential: got Linear, expected a Potential"),
        (RidgePotential(3, 2), [[0, 1]], ValueError, "group: got one that acts on 2 entries, exp"),
        (RidgePotential(2, 2), [[1, 0]], ValueError, "not closed"),
        (RidgePotential(2, 2), None, TypeError, "group: got None"),
    ],
)
def test_errors_name_the_argument(potential, group, error, message):
    with pytest.raises(error, match=message):
        SymmetrizedPotential(potential, group)


def test_bad_batches_are_refused():
    symmetric = SymmetrizedPotential(RidgePotential(4, 2, context_features=1), translations((2, 2)))
    with pytest.raises(ValueError, match="x: got 3 features"):
        symmetric(torch.zeros(2, 3), context=torch.zeros(2, 1))
    with pytest.raises(ValueError, match="context: got None"):
        symmetric(torch.zeros(2, 4))
