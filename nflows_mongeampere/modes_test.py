import itertools
import math

import pytest
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from torch.distributions import MultivariateNormal

from nflows_mongeampere.groups import Group, axis_exchanges, point_group, reflections, translations
from nflows_mongeampere.modes import LatticeModes


@pytest.mark.parametrize("boundary", ["periodic", "open"])
@pytest.mark.parametrize("sides", [(4, 4), (3, 3), (2, 5), (5,), (2, 2, 3)])
def test_inverse_determinant_and_symmetries(sides, boundary):
    modes = LatticeModes(torch.randn(sides, dtype=torch.float64), mean=0.3, boundary=boundary)
    x = torch.randn(2, math.prod(sides), dtype=torch.float64)
    noise, logabsdet = modes(x)
    back, inverse_logabsdet = modes.inverse(noise)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_logabsdet, -logabsdet)
    jacobian = torch.autograd.functional.jacobian(lambda row: modes(row[None])[0][0], x[0])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], logabsdet[0])
    flow = Flow(modes, StandardNormal([math.prod(sides)]))
    groups = [translations(sides), point_group(sides)]
    if boundary == "open":
        groups = [reflections(sides, range(len(sides))), axis_exchanges(sides)]
    for image in [image for group in groups for image in group.act(x)]:
        torch.testing.assert_close(flow.log_prob(image), flow.log_prob(x))


@pytest.mark.parametrize("sides", [(4,), (3, 4)])
def test_opposite_modes_keep_one_scale_without_any_symmetry(sides):
    features = math.prod(sides)
    modes = LatticeModes(torch.randn(sides).double(), group=Group([range(features)]))
    jacobian = torch.autograd.functional.jacobian(
        lambda row: modes(row[None])[0][0], torch.zeros(features).double()
    )
    expected = modes(torch.zeros(1, features).double())[1][0]
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], expected)


def test_the_density_is_the_gaussian_of_its_spectrum():
    """A circulant covariance, of which the scales are half the log-spectrum."""
    average = point_group((3, 3)).act(torch.randn(1, 9, dtype=torch.float64)).mean(0)
    variances = average.exp().view(3, 3)
    row = torch.fft.ifft2(variances).real  # of the first site with all others
    sites = itertools.product(range(3), range(3))
    covariance = torch.stack([row.roll(site, (0, 1)).flatten() for site in sites])
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    outputs, logabsdet = LatticeModes(variances.log() / 2)(x)
    assert outputs.shape == x.shape
    found = logabsdet - (outputs.square().sum((1, 2)) + 9 * math.log(2 * math.pi)) / 2
    expected = MultivariateNormal(torch.zeros(9).double(), covariance).log_prob(x.flatten(1))
    torch.testing.assert_close(found, expected)


def test_waves_that_change_their_sign_keep_their_scale():
    turned = torch.arange(16).view(4, 4).T.flatten()
    group = Group([(range(16), [1] * 16), (turned.tolist(), [-1] * 16)])
    scale = torch.randn(4, 4)
    found = LatticeModes(scale, group=group, boundary="open").log_scale
    torch.testing.assert_close(found, (scale + scale.T) / 2)


def test_scales_and_mean_move_with_the_context():
    """Each row is stretched by the transform of its own context."""
    modes = LatticeModes(torch.randn(3, 4).double(), mean=0.3, context_features=2)
    torch.nn.init.normal_(modes.context_mean)
    modes.context_weight = torch.randn(2, 3, 4).double()
    x, context = torch.randn(5, 12).double(), torch.randn(5, 2).double()
    outputs, logabsdet = modes(x, context)
    for i, c in enumerate(context):
        log_scale = modes.log_scale + torch.tensordot(c, modes.context_weight, 1)
        fixed = LatticeModes(log_scale, mean=(modes.mean + c @ modes.context_mean).item())
        torch.testing.assert_close((outputs[i : i + 1], logabsdet[i : i + 1]), fixed(x[i : i + 1]))
    torch.testing.assert_close(modes.inverse(outputs, context), (x, -logabsdet))
    with pytest.raises(
        ValueError, match=r"^context: got None, expected a tensor of shape \(B, 2\)"
    ):
        modes(x)


def test_mistakes_name_the_argument():
    with pytest.raises(TypeError, match=r"^log_scale: got a tensor of shape \(\), torch.float32"):
        LatticeModes(torch.zeros(()))
    with pytest.raises(TypeError, match=r"^log_scale: got a tensor of shape \(4, 4\), torch.int64"):
        LatticeModes(torch.zeros(4, 4).long())
