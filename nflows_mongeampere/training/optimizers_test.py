import copy

import pytest
import torch
from pytorch_optimizer import SOAP
from torch import nn

from nflows_mongeampere import MongeAmpereFlow
from nflows_mongeampere.training import (
    EndlessBatches,
    FullMatrixSOAP,
    MaximumLikelihood,
    endless,
    fit,
)


def tensors():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4))]


def loss(vector):
    """A valley across all entries, which noise shakes."""
    matrix = torch.linspace(0.1, 1, 100).sin().view(10, 10)
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
    found = descend(parts, FullMatrixSOAP(parts, lr=0.05), 35)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found[:6], tensors()[0].flatten(), atol=0.1)


def test_it_goes_on_from_its_state():
    parts = tensors()
    optimizer = FullMatrixSOAP(parts, lr=0.05)
    descend(parts, optimizer, 20)
    state, values = copy.deepcopy(optimizer.state_dict()), [part.detach().clone() for part in parts]
    expected = descend(parts, optimizer, 20)
    again = [nn.Parameter(value) for value in values]
    resumed = FullMatrixSOAP(again, lr=0.7)
    resumed.load_state_dict(state)
    assert torch.equal(descend(again, resumed, 20), expected)


def test_each_group_by_itself_and_only_what_has_a_gradient():
    first, second, unused, fixed = (nn.Parameter(torch.ones(2)) for _ in range(4))
    fixed.requires_grad_(False)
    groups = [{"params": [unused, first, fixed]}, {"params": [second], "lr": 1e-3}]
    optimizer = FullMatrixSOAP([*groups, {"params": [fixed.clone()]}], lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        (first.square().sum() + second.square().sum()).backward()
        optimizer.step()
    assert (unused == 1).all()
    assert (fixed == 1).all()
    assert (first < 0.5).all()
    assert ((second > 0.9) & (second < 1)).all()
    assert len({p.untyped_storage().data_ptr() for p in (first, second, unused, fixed)}) == 4
    unused.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"^params: 4 entries of a group .* expected the 2 of"):
        optimizer.step()


class Watched(FullMatrixSOAP):
    """Remembers the norm of the gradient of each step."""

    def step(self, closure=None):
        loss = super().step(closure)
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        self.norms = [*getattr(self, "norms", []), float(nn.utils.get_total_norm(gradients))]
        return loss


@pytest.mark.parametrize("clip", [None, 0.1])
def test_lightning_clips_its_gradients(tmp_path, clip):
    torch.manual_seed(0)
    flow = MongeAmpereFlow(2, 4, steps=1)
    optimizer = Watched(flow.parameters(), lr=0.01)
    objective = MaximumLikelihood(flow, optimizer=lambda _: optimizer, steps=8)
    loader = endless(EndlessBatches(3 * torch.randn(64, 2), 16), 2)
    fit(objective, loader, None, tmp_path, gradient_clip_val=clip)
    assert (max(optimizer.norms) < 0.1001) == (clip is not None)
