import copy

import torch
from pytorch_optimizer import SOAP
from torch import nn

from nflows_mongeampere.training import FullMatrixSOAP


def tensors():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4))]


def loss(vector):
    """A valley across all entries, which noise shakes."""
    matrix = torch.linspace(0.1, 1, 100, device="cpu").sin().view(10, 10)
    return (matrix @ vector).square().sum() + 0.1 * torch.randn(10) @ vector


def descend(parts, optimizer, steps):
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(torch.cat([part.flatten() for part in parts])).backward()
        optimizer.step()
    return torch.cat([part.detach().flatten() for part in parts])


def test_the_tensors_of_a_group_move_as_one_vector():
    parts = tensors()
    vector = nn.Parameter(torch.cat([part.detach().flatten() for part in parts]))
    whole = SOAP(
        [vector],
        lr=0.05,
        betas=(0.9, 0.95),
        weight_decay=0,
        precondition_frequency=10,
        precondition_1d=True,
    )
    expected = descend([vector], whole, 35)
    found = descend(parts, FullMatrixSOAP([{"params": parts}], lr=0.05), 35)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found[:6], tensors()[0].flatten(), atol=0.1)


def test_it_goes_on_from_its_state():
    parts = tensors()
    optimizer = FullMatrixSOAP([{"params": parts}], lr=0.05)
    descend(parts, optimizer, 20)
    state, values = copy.deepcopy(optimizer.state_dict()), [part.detach().clone() for part in parts]
    expected = descend(parts, optimizer, 20)
    again = [nn.Parameter(value) for value in values]
    resumed = FullMatrixSOAP([{"params": again}], lr=0.7)
    resumed.load_state_dict(state)
    assert torch.equal(descend(again, resumed, 20), expected)


def test_each_group_by_itself_and_only_what_is_trained():
    first, second, fixed = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = FullMatrixSOAP(
        [{"params": [first, fixed.requires_grad_(False)]}, {"params": [second], "lr": 0.0}], lr=0.1
    )
    for _ in range(3):
        optimizer.zero_grad()
        first.square().sum().backward()  # the second has no gradient
        optimizer.step()
    assert (first < 1).all()
    assert (fixed == 1).all()
    assert (second == 1).all()
