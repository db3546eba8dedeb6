import pytest
import torch

from nflows_mongeampere.groups import Group, point_group, sign_flip, translations
from nflows_mongeampere.invariants import Invariants

square = translations((3, 3)) * point_group((3, 3))
turns = Group.generated_by([([1, 2, 3, 0], [1, -1, 1, -1])])
swaps = Group.generated_by([([1, 0, 2, 3], [-1, -1, 1, -1])])  # the last entry has to be zero


@pytest.mark.parametrize("group", [point_group((4, 4)), turns, square])
def test_the_nearest_invariant_field_is_the_average_over_the_group(group):
    invariants = Invariants(group)
    fields = torch.randn(3, group.features, dtype=torch.float64)
    nearest = invariants(invariants.right_inverse(fields))
    torch.testing.assert_close(nearest, group.act(fields).mean(0))


@pytest.mark.parametrize(
    ("group", "shape", "count"), [(point_group((4, 6)), (4, 6), 3 * 4), (swaps, (2, 2), 2)]
)
def test_the_basis_is_orthonormal_and_complete(group, shape, count):
    invariants = Invariants(group, shape)
    basis = invariants(torch.eye(invariants.coordinates, dtype=torch.float64))
    assert basis.shape == (count, *shape)
    gram = basis.flatten(1) @ basis.flatten(1).T
    torch.testing.assert_close(gram, torch.eye(count, dtype=torch.float64))
    averages = group.act(torch.eye(group.features, dtype=torch.float64)).mean(0)
    assert int(torch.linalg.matrix_rank(averages)) == count


def test_mistakes_name_the_argument():
    with pytest.raises(TypeError, match=r"^group: got list"):
        Invariants([[0, 1], [1, 0]])
    with pytest.raises(ValueError, match=r"^group: .* leaves no field alone but zero"):
        Invariants(sign_flip(9))
    with pytest.raises(ValueError, match=r"^shape: got \(2, 4\), expected one of 9 entries"):
        Invariants(square, (2, 4))
    with pytest.raises(ValueError, match=r"^fields: got a tensor of shape \(2, 8\).* \(9,\)"):
        Invariants(square).right_inverse(torch.ones(2, 8))
