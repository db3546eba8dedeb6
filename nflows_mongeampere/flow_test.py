import pytest
import torch
from nflows.distributions import StandardNormal

from nflows_mongeampere import MongeAmpereFlow, MongeAmpereTransform


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("conditional", [False, True])
def test_a_flow_samples_in_its_own_dtype(dtype, conditional):
    flow = MongeAmpereFlow(2, 4, context_features=3 if conditional else None).to(dtype)
    torch.nn.init.normal_(flow.transform.potential.amplitude)
    context = torch.randn(5, 3, dtype=dtype) if conditional else None
    for samples in (flow.sample(7, context), flow.sample_and_log_prob(7, context)[0]):
        assert samples.shape == ((5, 7, 2) if conditional else (7, 2))
        assert samples.dtype == dtype


@pytest.mark.parametrize("context", [None, torch.zeros(3, 1)])
def test_the_noise_is_that_of_nflows(context):
    flow = MongeAmpereFlow(2, 4)
    torch.manual_seed(1)
    noise, log_prob = flow._distribution.sample_and_log_prob(4, context)
    torch.manual_seed(1)
    expected, expected_log_prob = StandardNormal([2]).sample_and_log_prob(4, context)
    assert torch.equal(noise, expected)
    assert torch.equal(log_prob, expected_log_prob)


def test_a_flow_has_its_transform():
    flow = MongeAmpereFlow(2, 4, steps=3)
    assert isinstance(flow.transform, MongeAmpereTransform)
    assert flow.transform is flow._transform
    flow.transform.steps = 5
    assert "steps=5" in repr(flow)
