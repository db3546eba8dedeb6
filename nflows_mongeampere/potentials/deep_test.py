"""Deep potentials: parameters, starts, and the ridge that one layer is."""

import pytest
import torch

from nflows_mongeampere import DeepPotential, MongeAmpereTransform, RidgePotential
from nflows_mongeampere.conftest import close, deep


def test_parameters_are_those_of_the_documentation():
    potential = DeepPotential(3, [7, 5], context_features=2, time_dependent=True, modes=4)
    shapes = {name: tuple(p.shape) for name, p in potential.named_parameters()}
    assert shapes == {
        "weight": (7, 3),
        "bias": (7,),
        "amplitude": (12, 4),
        "hidden_weights.0": (5, 7),
        "hidden_biases.0": (5,),
        "quadratic": (3, 3),
        "drift": (3,),
        "time_weight": (7,),
        "context_weight": (7, 2),
    }
    assert DeepPotential(3, 6).hidden_features == [6, 6]


def test_a_new_flow_is_the_identity_and_can_learn():
    transform = MongeAmpereTransform(DeepPotential(3, [8, 4, 4]).double(), steps=2)
    x = torch.randn(5, 3, dtype=torch.float64)
    z, logabsdet = transform(x)
    close(z, x, 0)
    close(logabsdet, torch.zeros(5, dtype=torch.float64), 0)
    (z.square().sum() - logabsdet.sum()).backward()
    potential = transform.potential
    assert all(potential.amplitude.grad.split([8, 4, 4])[i].any() for i in range(3))
    assert potential.quadratic.grad.any()
    assert potential.drift.grad.any()


def test_a_quadratic_part_of_low_rank_has_fewer_numbers_and_can_learn():
    potential = DeepPotential(30, 4, rank=2).double()
    assert potential.quadratic.shape == (2, 30)
    assert potential.stiffness.shape == (2,)
    x = torch.randn(5, 30, dtype=torch.float64)
    z, logabsdet = MongeAmpereTransform(potential, steps=2)(x)
    close(z, x, 0)
    (z.square().sum() - logabsdet.sum()).backward()
    assert potential.stiffness.grad.all()


def test_one_layer_is_a_ridge_potential():
    potential = deep(3, [6], activation="softplus", time_dependent=True, context_features=2)
    ridge = RidgePotential(3, 6, time_dependent=True, context_features=2).double()
    ridge.load_state_dict(
        {
            "amplitude": potential.amplitude[:, 0],
            **{name: getattr(potential, name) for name in ("weight", "bias")},
            **{name: getattr(potential, name) for name in ("time_weight", "context_weight")},
        }
    )
    torch.nn.init.zeros_(potential.quadratic)
    torch.nn.init.zeros_(potential.drift)
    x, context = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    close(potential(x, 0.7, context), ridge(x, 0.7, context), 1e-14)
    close(potential.gradient(x, 0.7, context), ridge.gradient(x, 0.7, context), 1e-14)
    close(potential.laplacian(x, 0.7, context), ridge.laplacian(x, 0.7, context), 1e-14)


def test_the_quadratic_part_is_a_linear_map():
    """dx/dt = Sx + o is solved by an exponential."""
    potential = deep(3, 2)
    torch.nn.init.zeros_(potential.amplitude)
    x = torch.randn(4, 3, dtype=torch.float64)
    transform = MongeAmpereTransform(potential, steps=60)
    y, logabsdet = transform.inverse(x)
    symmetric = (potential.quadratic + potential.quadratic.T) / 2
    augmented = torch.zeros(4, 4, dtype=torch.float64)
    augmented[:3, :3], augmented[:3, 3] = symmetric, potential.drift
    flow = torch.linalg.matrix_exp(augmented)
    close(y, x @ flow[:3, :3].T + flow[:3, 3], 1e-7)
    close(logabsdet, symmetric.trace().expand(4), 1e-10)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"features": 0}, ValueError),
        ({"hidden_features": []}, ValueError),
        ({"hidden_features": [4, -1]}, ValueError),
        ({"hidden_features": 2.0}, TypeError),
        ({"rank": 0}, ValueError),
        ({"context_features": 0}, ValueError),
        ({"modes": 0}, ValueError),
        ({"modes": 2}, ValueError),
        ({"activation": "relu"}, ValueError),
    ],
    ids=str,
)
def test_mistakes_name_the_argument(arguments, error):
    name = next(iter(arguments))
    with pytest.raises(error, match=rf"^{name}: got .* expected"):
        DeepPotential(**{"features": 2, "hidden_features": 3} | arguments)
