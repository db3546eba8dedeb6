import itertools

import pytest
import torch

from nflows_mongeampere import Group, groups
from nflows_mongeampere.groups import point_group, reflections, sign_flip, translations


def elements(group):
    return {
        tuple((sign * (place + 1)).tolist())
        for place, sign in zip(group.permutations, group.signs, strict=True)
    }


def images(group, array):
    """The images of an array under a group, as a set of tuples."""
    return {tuple(image[0].tolist()) for image in group.act(array.reshape(1, -1))}


@pytest.mark.parametrize("shape", [(3,), (2, 3), (4, 4), (2, 3, 2)])
def test_translations_are_rolls(shape):
    array = torch.randn(shape)
    dimensions = tuple(range(len(shape)))
    rolled = {
        tuple(array.roll(shift, dimensions).flatten().tolist())
        for shift in itertools.product(*(range(size) for size in shape))
    }
    group = translations(shape)
    assert images(group, array) == rolled
    assert len(group) == array.numel()
    assert group.lattice == shape


def test_the_point_group_of_the_square_is_its_eight_symmetries():
    array = torch.randn(5, 5)
    # the first site stays: rotate and reflect about it, on the periodic lattice
    expected = set()
    for turns in range(4):
        for mirror in (False, True):
            turned = array.roll((2, 2), (0, 1)).rot90(turns)
            turned = turned.flip(0) if mirror else turned
            expected.add(tuple(turned.roll((-2, -2), (0, 1)).flatten().tolist()))
    assert images(point_group((5, 5)), array) == expected
    assert len(point_group((3, 4))) == 4
    assert len(point_group((3, 3, 3))) == 48


def test_reflections_of_an_image():
    array = torch.randn(2, 3, 4)
    flips = [array, array.flip(2), array.flip(1), array.flip(1, 2)]
    expected = {tuple(flip.flatten().tolist()) for flip in flips}
    assert images(reflections((2, 3, 4), (-2, -1)), array) == expected
    assert images(reflections((2, 3, 4)), array) == {
        tuple(flip.flatten().tolist()) for flip in flips[:2]
    }


def test_the_flip_of_the_sign():
    assert elements(sign_flip(2)) == {(1, 2), (-1, -2)}
    assert sign_flip(3).odd
    assert not translations((3,)).odd


def test_products_hold_both_groups():
    lattice = translations((4, 4)) * point_group((4, 4)) * sign_flip(16)
    assert len(lattice) == 16 * 8 * 2
    assert lattice.lattice == (4, 4)
    assert lattice.odd
    for group in (translations((4, 4)), point_group((4, 4)), sign_flip(16)):
        assert elements(group) <= elements(lattice)


def test_a_group_is_generated_by_its_elements():
    # signed permutations of two entries: the eight symmetries of the square
    square = Group.generated_by([([1, 0], [1, 1]), ([0, 1], [-1, 1])])
    assert elements(square) == {
        (a * s, b * r) for a, b in [(1, 2), (2, 1)] for s in (1, -1) for r in (1, -1)
    }
    again = Group(
        [(p.tolist(), s.tolist()) for p, s in zip(square.permutations, square.signs, strict=True)]
    )
    assert elements(again) == elements(square)
    assert elements(Group.generated_by(square.generators)) == elements(square)


def test_action_is_the_documented_one():
    group = Group.generated_by([([1, 2, 0], [1, -1, 1])])
    x = torch.tensor([[10.0, 20.0, 30.0]])
    i = group.permutations.tolist().index([1, 2, 0])
    permutation, sign = group.permutations[i], group.signs[i]
    expected = [sign[k] * x[0, permutation[k]] for k in range(3)]
    assert group.act(x)[i, 0].tolist() == [float(e) for e in expected]


@pytest.mark.parametrize(
    ("elements", "error", "message"),
    [
        ([[0, 1, 2], [1, 2, 0]], ValueError, "group: got 2 elements, .* not closed; add"),
        ([[1, 0]], ValueError, "group: got 1 elements, .* not closed"),
        ([([0, 1], [1, 1]), ([1, 0], [-1, 1])], ValueError, "not closed"),
        ([[0, 0]], ValueError, r"group\[0\]: got \[0, 0\], expected a permutation of 0 ... 1"),
        ([[0, 1], [1, 2]], ValueError, r"group\[1\]: got \[1, 2\]"),
        (
            [[0, 1], [0, 2, 1]],
            ValueError,
            r"group\[1\]: got a permutation of 3 entries",
        ),
        ([([0, 1], [1, 2])], ValueError, r"group\[0\]: got signs \[1, 2\]"),
        ([[0.0, 1.0]], TypeError, r"group\[0\]: got torch.float32"),
        ([([0, 1], [1])], TypeError, r"group\[0\]: got"),
        ([], ValueError, "group: got no elements"),
        (7, TypeError, "group: got 7"),
    ],
)
def test_errors_name_the_element(elements, error, message):
    with pytest.raises(error, match=message):
        Group(elements)


def test_factories_name_what_is_wrong():
    with pytest.raises(TypeError, match="shape: got 4"):
        translations(4)
    with pytest.raises(ValueError, match=r"shape.*: got 0"):
        point_group((4, 0))
    with pytest.raises(ValueError, match="dimensions: got 3, but the shape has 3"):
        reflections((1, 2, 2), (3,))
    with pytest.raises(TypeError, match="dimensions: got 1"):
        reflections((1, 2, 2), 1)
    with pytest.raises(ValueError, match="features: got 0"):
        sign_flip(0)
    with pytest.raises(ValueError, match="group: got a product of groups that act on 4 and 9"):
        translations((2, 2)) * translations((3, 3))
    with pytest.raises(TypeError):
        translations((2, 2)) * 2
    with pytest.raises(ValueError, match=r"lattice: got \(2, 2\), but the translations"):
        Group.generated_by(sign_flip(4).generators, lattice=(2, 2))
    with pytest.raises(ValueError, match=r"lattice: got \(5,\)"):
        Group.generated_by(sign_flip(4).generators, lattice=(5,))


def test_groups_too_large_to_average_over(monkeypatch):
    monkeypatch.setattr(groups, "LARGEST", 100)
    swap, cycle = [1, 0, *range(2, 12)], [*range(1, 12), 0]
    with pytest.raises(ValueError, match="more than 100 elements"):
        Group.generated_by([swap, cycle])


def test_groups_that_are_built_on_the_meta_device_are_on_the_cpu():
    with torch.device("meta"):
        found = [
            translations((4,)) * point_group((4,)), reflections((1, 2, 2)), sign_flip(4),
            Group([[0, 1], [1, 0]]), Group.generated_by([[1, 2, 0]]),
        ]  # fmt: skip
        assert found[2].odd
    for group in found:
        tensors = group.permutations, group.signs, group.generators
        assert {t.device.type for t in tensors} == {"cpu"}
    with torch.device("meta"):
        images = found[0].act(torch.ones(2, 4))
    assert images.shape == (8, 2, 4)
    assert images.is_meta
    assert torch.equal(found[0].act(torch.ones(2, 4)), torch.ones(8, 2, 4))


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_acting_back_undoes_acting(shape):
    group = translations(shape) * point_group(shape) * sign_flip(6)
    x = torch.randn(3, 6)
    assert torch.equal(group.act_back(group.act(x)), x.expand(len(group), 3, 6))


def test_arguments_build_it_again():
    group = translations((2, 3)) * sign_flip(6)
    again = Group.generated_by(**group.arguments())
    assert elements(again) == elements(group)
    assert again.lattice == (2, 3)
