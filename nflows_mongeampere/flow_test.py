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


@pytest.mark.parametrize("conditional", [False, True])
def test_a_flow_built_without_numbers(conditional):
    options = {"context_features": 3} if conditional else {}
    reference = MongeAmpereFlow(2, 4, steps=3, **options)
    torch.nn.init.normal_(reference.transform.potential.amplitude)
    context = torch.randn(5, 3) if conditional else None
    for assign in (True, False):
        with torch.device("meta"):
            flow = MongeAmpereFlow(2, 4, **options)
        if not assign:
            flow.to_empty(device="cpu")
        flow.load_state_dict(reference.state_dict(), assign=assign)
        torch.manual_seed(1)
        samples, log_prob = flow.sample_and_log_prob(7, context)
        torch.manual_seed(1)
        expected, expected_log_prob = reference.sample_and_log_prob(7, context)
        assert torch.equal(samples, expected)
        assert torch.equal(log_prob, expected_log_prob)


@pytest.mark.parametrize("size", [None, 1, 2, 5, 9])
def test_samples_in_batches(size):
    flow = MongeAmpereFlow(2, 4, context_features=1)
    assert flow.sample(5, torch.ones(3, 1), size).shape == (3, 5, 2)
    assert MongeAmpereFlow(2, 4).sample(5, batch_size=size).shape == (5, 2)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"embedding_net": "net"}, TypeError),
        ({"distribution": torch.distributions.Normal(0.0, 1.0)}, TypeError),
        ({"distribution": StandardNormal([3])}, ValueError),
    ],
    ids=["embedding_net", "distribution", "shape"],
)
def test_mistakes_name_the_argument(options, error):
    with pytest.raises(error, match=rf"^{next(iter(options))}: got "):
        MongeAmpereFlow(2, 4, **options)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda flow: flow.log_prob(torch.ones(3, 3), torch.ones(3, 1)), ValueError, "inputs"),
        (lambda flow: flow.log_prob(torch.ones(3, 2)), ValueError, "context"),
        (lambda flow: flow.sample(0), ValueError, "num_samples"),
        (lambda flow: flow.sample(3, torch.ones(2, 1), 0), ValueError, "batch_size"),
        (lambda flow: flow.transform_to_noise(None), TypeError, "inputs"),
    ],
)
def test_calls_name_the_argument(call, error, name):
    with pytest.raises(error, match=rf"^{name}: got "):
        call(MongeAmpereFlow(2, 4, context_features=1))
