import pytest
import torch

from nflows_mongeampere.averages import Average
from nflows_mongeampere.groups import point_group, sign_flip, translations

square = translations((3, 3)) * point_group((3, 3))


def test_the_average_is_invariant_and_leaves_invariant_fields_alone():
    average = Average(point_group((4, 4)))
    fields = torch.randn(3, 16, dtype=torch.float64)
    mean = average(fields)
    for image in point_group((4, 4)).act(mean):
        torch.testing.assert_close(image, mean)
    torch.testing.assert_close(average(mean), mean)
    assert not torch.allclose(mean, fields)


def test_known_averages():
    field = torch.arange(9.0).view(3, 3)
    torch.testing.assert_close(Average(square)(field), torch.full((3, 3), 4.0))
    torch.testing.assert_close(Average(square * sign_flip(9))(field), torch.zeros(3, 3))


def test_mistakes_name_the_argument():
    with pytest.raises(TypeError, match=r"^group: got list"):
        Average([[0, 1], [1, 0]])
    with pytest.raises(ValueError, match=r"^fields: got a tensor of shape \(2, 8\).* 9 entries"):
        Average(square)(torch.ones(2, 8))
