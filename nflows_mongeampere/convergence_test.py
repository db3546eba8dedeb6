import itertools
import math

import pytest
import torch
from torch import nn

from nflows_mongeampere import AccuracyWarning, MongeAmpereFlow, refined
from nflows_mongeampere.convergence import converged


@pytest.fixture
def flow():
    flow = MongeAmpereFlow(2, 16, steps=1)
    nn.init.normal_(flow.transform.potential.amplitude)
    return flow.double()


x = torch.linspace(-2, 2, 20, dtype=torch.float64).view(10, 2)


def loss(flow):
    return -flow.log_prob(x).mean()


def test_the_figure_is_the_first_that_stands_still(flow):
    found = converged(flow, lambda: loss(flow), 1e-4)
    figures = []
    for factor in (1, 2, 4, 8, 16, 32, 64):
        with refined(flow, factor), torch.no_grad():
            figures.append(loss(flow))
    changes = [float((b - a).abs()) for a, b in itertools.pairwise(figures)]
    number = next(i for i, change in enumerate(changes) if change <= 1e-4)
    assert number > 0
    assert found.factor == 2**number
    assert found.change == changes[number]
    assert found.figure == figures[number]
    assert not found.figure.requires_grad
    assert flow.transform.steps == 1


def test_the_change_is_the_largest_of_a_tensor(flow):
    found = converged(flow, lambda: flow.log_prob(x), 1e-4)
    with refined(flow, 2 * found.factor), torch.no_grad():
        assert found.change == (flow.log_prob(x) - found.figure).abs().max()
    assert found.factor >= converged(flow, lambda: loss(flow), 1e-4).factor


def test_every_evaluation_sees_the_same_noise(flow):
    """Of 10 samples the mean would change by about 0.3 from draw to draw."""
    torch.manual_seed(3)
    found = converged(flow, lambda: flow.sample(10).mean().item(), 1e-5)
    assert found.change <= 1e-5
    after = torch.randn(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.randn(1))


@pytest.mark.parametrize("broken", [False, True])
def test_a_figure_that_does_not_stand_still_is_warned_of(flow, broken):
    def figure():
        return math.nan if broken else loss(flow)

    with pytest.warns(AccuracyWarning, match="still changes by .* from 2 to 4 times the steps"):
        found = converged(flow, figure, 1e-9, doublings=2)
    assert found.factor == 2
    assert not found.change <= 1e-9


def test_mistakes_name_the_argument(flow):
    with pytest.raises(ValueError, match=r"^model: got Linear, in which no Monge-Ampère flow"):
        converged(nn.Linear(2, 2), lambda: 0.0, 1e-3)
    with pytest.raises(ValueError, match=r"^tolerance: got 0"):
        converged(flow, lambda: loss(flow), 0)
    with pytest.raises(ValueError, match=r"^doublings: got 0"):
        converged(flow, lambda: loss(flow), 1e-3, doublings=0)
