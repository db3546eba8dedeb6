"""All flows within a model, and their steps for a while."""

import contextlib

import pytest
import torch
from nflows.transforms import CompositeTransform
from torch import nn

from nflows_mongeampere import MongeAmpereFlow, MongeAmpereTransform, RidgePotential, refined
from nflows_mongeampere.models import transports
from nflows_mongeampere.normflows import MongeAmpere


def test_transports_of_either_adapter():
    first, second = MongeAmpereTransform(RidgePotential(2, 3)), MongeAmpere(RidgePotential(2, 3))
    model = nn.ModuleList([nn.Linear(2, 2), CompositeTransform([first]), second])
    assert transports(model) == [first, second]


@pytest.mark.parametrize("fails", [False, True])
def test_refined_for_a_while(fails):
    flow = MongeAmpereFlow(2, 4, steps=3, solver="euler").double()
    nn.init.normal_(flow.transform.potential.amplitude)
    x = torch.randn(5, 2, dtype=torch.float64)
    before = flow.log_prob(x)
    with contextlib.suppress(KeyError), refined(flow, 4):
        settings = flow.transform.integrator
        assert (settings.steps, settings.atol, settings.rtol) == (12, 1e-6 / 16, 1e-5 / 16)
        with refined(flow):
            assert flow.transform.steps == 24
        finer = flow.log_prob(x)
        if fails:
            raise KeyError
    assert torch.equal(flow.log_prob(x), before)
    flow.transform.steps = 12
    assert torch.equal(flow.log_prob(x), finer)


def test_mistakes_name_the_argument():
    with pytest.raises(TypeError, match=r"^model: got list"):
        transports([])
    with pytest.raises(ValueError, match=r"^factor: got 0"):
        refined(MongeAmpereFlow(2, 4), 0).__enter__()
