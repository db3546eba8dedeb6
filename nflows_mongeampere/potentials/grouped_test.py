"""Grouped potentials: the deep potential that they are, in x and in reduced coordinates."""

from __future__ import annotations

import pytest
import torch

from nflows_mongeampere import DeepPotential, GroupedPotential, MongeAmpereTransform
from nflows_mongeampere.conftest import ALL, close, grouped
from nflows_mongeampere.potentials.grouped import GroupedDynamics


def test_parameters_are_those_of_the_documentation():
    potential = GroupedPotential(3, 8, 4, context_features=2, time_dependent=True, modes=4)
    assert {name: tuple(p.shape) for name, p in potential.named_parameters()} == {
        "weight": (11, 3),
        "bias": (11,),
        "hidden_weight": (2, 4, 4),
        "hidden_bias": (8,),
        "amplitude": (19, 4),
        "time_weight": (11,),
        "context_weight": (11, 2),
    }


def test_a_new_flow_is_the_identity_and_can_learn():
    transform = MongeAmpereTransform(GroupedPotential(30, 8, 4).double(), steps=2)
    x = torch.randn(9, 30, dtype=torch.float64)
    z, logabsdet = transform(x)
    close(z, x, 0)
    close(logabsdet, torch.zeros(9, dtype=torch.float64), 0)
    (z.square().sum() - logabsdet.sum()).backward()
    assert transform.potential.amplitude.grad.all()


def test_it_is_a_deep_potential_whose_second_layer_has_blocks():
    potential = grouped(5, 6, 3, 2, time_dependent=True, modes=2)
    dense = DeepPotential(5, 6, time_dependent=True, modes=2).double()
    a, q, c = potential.amplitude.split([6, 2, 6])
    rows, offsets = potential.weight[6:], potential.bias[6:]
    torch.nn.init.zeros_(q[:, 1:])
    torch.nn.init.zeros_(potential.time_weight[6:])
    with torch.no_grad():
        dense.load_state_dict(
            {
                "weight": potential.weight[:6],
                "bias": potential.bias[:6],
                "time_weight": potential.time_weight[:6],
                "hidden_weights.0": torch.block_diag(*potential.hidden_weight),
                "hidden_biases.0": potential.hidden_bias,
                "amplitude": torch.cat([a, c]),
                "quadratic": rows.T @ (q[:, :1] * rows),
                "drift": (q[:, 0] * offsets) @ rows,
            }
        )
    x = torch.randn(4, 5, dtype=torch.float64)
    for ours, theirs in zip(
        MongeAmpereTransform(potential)(x), MongeAmpereTransform(dense)(x), strict=True
    ):
        close(ours, theirs, 1e-13)


@pytest.mark.parametrize("activation", ["softplus", "logcosh"])
@pytest.mark.parametrize("options", [{}, {**ALL, "modes": 3}], ids=["plain", "all"])
@pytest.mark.parametrize("size", [1, 3])
def test_both_coordinates_and_the_gradient_by_hand_agree_with_autograd(size, options, activation):
    potential = grouped(10, 3, size, 2, activation=activation, **options)
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    context = torch.randn(4, 2, dtype=torch.float64) if options else None
    leaves, found = [x, *potential.parameters()], []

    def note(points, logabsdet):
        loss = points.sin().sum() + logabsdet.square().sum()
        found.append((points, logabsdet, *torch.autograd.grad(loss, leaves)))

    for reduced in (False, True):
        motion = GroupedDynamics(potential, x, context, reduced)
        y = motion.state
        for step in range(3):
            y = y + motion.rate(step / 3, y) / 3
        note(motion.points(y), motion.logabsdet(y))
    note(*MongeAmpereTransform(potential, solver="euler", steps=3).inverse(x, context))
    for others in found[1:]:
        for ours, theirs in zip(others, found[0], strict=True):
            close(ours, theirs, 1e-12)


def test_few_ridges_in_many_features_move_in_reduced_coordinates():
    potential = grouped(100, 16, 4)
    x = torch.randn(200, 100, dtype=torch.float64)
    assert len(potential.dynamics(x, None, 16).state) == 18
    assert len(potential.dynamics(x, None, 1).state) == 101


def test_initialize_writes_the_ridges_alone():
    potential = grouped(3, 4, 2)
    before = {name: p.clone() for name, p in potential.named_parameters()}
    data = torch.randn(50, 3, dtype=torch.float64) * torch.tensor([1.0, 2.0, 5.0])
    potential.initialize(data, sharpness=2.0)
    close(potential.weight[:3], torch.diag(2 / data.std(0)), 1e-12)
    bends = -potential.bias[:3] * data.std(0) / 2
    assert all((bends[i] - data[:, i]).abs().min() < 1e-12 for i in range(3))
    for name, parameter in potential.named_parameters():
        kept = slice(4, None) if name in ("weight", "bias") else slice(None)
        assert torch.equal(parameter[kept], before[name][kept])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"features": 0}, ValueError),
        ({"hidden_features": 2.0}, TypeError),
        ({"group_size": 4}, ValueError),
        ({"group_size": 0}, ValueError),
        ({"rank": -1}, ValueError),
        ({"context_features": 0}, ValueError),
        ({"modes": 2}, ValueError),
        ({"activation": "relu"}, ValueError),
    ],
    ids=str,
)
def test_mistakes_name_the_argument(arguments, error):
    name = next(iter(arguments))
    with pytest.raises(error, match=rf"^{name}: got .* expected"):
        GroupedPotential(**{"features": 2, "hidden_features": 6, "group_size": 3} | arguments)
