"""Finite groups that act on the entries of an event by signed permutations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from nflows_mongeampere import validation
from nflows_mongeampere.configured import Configured

# Elements of the largest group that is built, and entries of all of them.
LARGEST, LARGEST_TABLE = 2**17, 2**26

P = ParamSpec("P")
R = TypeVar("R")

BOUNDARIES = ("periodic", "open")  # of lattices


def _on_cpu(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` with its tables on the CPU, also where models are built on the meta device."""

    @wraps(function)
    def call(*arguments: P.args, **keywords: P.kwargs) -> R:
        with torch.device("cpu"):
            return function(*arguments, **keywords)

    return call


class Elements:
    """Signed permutations of the entries of an event.

    They are no part of a module's state: they lie on the CPU, and a copy on each device where they
    have acted.

    Attributes:
        permutations: shape (n, D).
        signs: of ±1, shape (n, D).
    """

    permutations: Tensor
    signs: Tensor

    def __init__(self, permutations: Tensor, signs: Tensor) -> None:
        self.permutations, self.signs = permutations, signs

    def __len__(self) -> int:
        return len(self.permutations)

    @property
    def features(self) -> int:
        """D, the number of entries of an event."""
        return self.permutations.shape[1]

    def act(self, x: Tensor) -> Tensor:
        """Every image of a batch, shape (n, B, D), of events of shape (B, D)."""
        permutations, signs = self._on(x.device)
        return x[:, permutations].movedim(0, 1) * signs[:, None].to(x.dtype)

    def act_back(self, images: Tensor) -> Tensor:
        """The inverse of each element on its image, both of shape (n, B, D)."""
        permutations, signs = self._on(images.device)
        back = permutations.argsort(dim=1)[:, None].expand(-1, images.shape[1], -1)
        return (images * signs[:, None].to(images.dtype)).gather(2, back)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device == self.permutations.device:
            return self.permutations, self.signs
        copies = self.__dict__.setdefault("_copies", {})
        if device not in copies:
            copies[device] = self.permutations.to(device), self.signs.to(device)
        tables: tuple[Tensor, Tensor] = copies[device]
        return tables


class Group(Configured, Elements):
    r"""A finite group whose elements permute the entries of an event and change their signs.

    An element :math:`g = (\pi, s)` acts by

    .. math:: (g x)_i = s_i \, x_{\pi_i}, \qquad i = 0 \ldots D - 1,

    on events of any shape with D entries, taken in C order. Every element is an orthogonal map: a
    standard normal base distribution has all of these symmetries.

    The product ``G * H`` is the smallest group that holds both, such as all translations, rotations
    and reflections of a lattice: ``translations((8, 8)) * point_group((8, 8))``.

    Args:
        elements: each a permutation :math:`\pi` of 0 ... D - 1, or a pair of a permutation and
            signs :math:`s` of ±1. They have to be a group: products and inverses of elements are
            elements.

    Attributes:
        permutations: :math:`\pi` of each element, shape (n, D).
        signs: :math:`s` of each element, shape (n, D).
        generators: elements that generate the group, shape (m, 2, D): :math:`\pi` and :math:`s`.
        lattice: the shape of the lattice whose translations the group is known to hold, or None.

    Raises:
        TypeError: if the elements are no sequences of integers.
        ValueError: if one is no signed permutation, or the set is not closed.

    Example:
        >>> swap = Group([[0, 1], [1, 0]])
        >>> len(swap), len(swap * sign_flip(2))
        (2, 4)
        >>> swap.act(torch.tensor([[3.0, 4.0]]))[:, 0]
        tensor([[3., 4.],
                [4., 3.]])
    """

    generators: Tensor
    lattice: tuple[int, ...] | None

    @_on_cpu
    def __init__(self, elements: Iterable[Any]) -> None:
        given = _read(elements, "group")
        self._generate(given, len(given), None)
        missing = set(map(_key, _stack(self))) - set(map(_key, given))
        if missing:
            raise ValueError(
                f"group: got {len(set(map(_key, given)))} elements, whose products give at least "
                f"{len(self)}: the set is not closed; add the products and inverses of its "
                "elements, or generate it with Group.generated_by"
            )

    @classmethod
    @_on_cpu
    def generated_by(cls, generators: Iterable[Any], lattice: Sequence[int] | None = None) -> Group:
        """The smallest group that holds some elements.

        Args:
            generators: at least one, in the form that the class takes.
            lattice: the shape of the lattice whose translations are among the elements, where they
                are: averages over them can be taken in Fourier space.
        """
        group = cls.__new__(cls)
        shape = None if lattice is None else lattice_shape("lattice", lattice)
        group._generate(_read(generators, "generators"), LARGEST, shape)
        if shape is not None and not _holds_translations(group, shape):
            raise ValueError(
                f"lattice: got {shape}, but the translations of this lattice are not all in the "
                "group that the generators give"
            )
        return group

    @property
    def odd(self) -> bool:
        """Whether x → -x is an element."""
        here = self.permutations == torch.arange(self.features, device="cpu")
        return bool((here & (self.signs == -1)).all(1).any())

    def arguments(self) -> dict[str, Any]:
        """The arguments with which :meth:`generated_by` builds this group again."""
        return {"generators": self.generators.tolist(), "lattice": self.lattice}

    def some(self, chosen: Tensor) -> Elements:
        """Those of the elements that a mask of shape (n,) chooses."""
        return Elements(self.permutations[chosen], self.signs[chosen])

    @_on_cpu
    def __mul__(self, other: Group) -> Group:
        if not isinstance(other, Group):
            return NotImplemented
        if other.features != self.features:
            raise ValueError(
                f"group: got a product of groups that act on {self.features} and "
                f"{other.features} entries, expected the same number"
            )
        product = Group.__new__(Group)
        generators = torch.cat([self.generators, other.generators])
        product._generate(generators, LARGEST, self.lattice or other.lattice)
        return product

    def __repr__(self) -> str:
        lattice = "" if self.lattice is None else f", with the translations of {self.lattice}"
        return f"Group({len(self)} elements on {self.features} entries{lattice})"

    def _generate(self, generators: Tensor, largest: int, lattice: tuple[int, ...] | None) -> None:
        """All products of the generators, breadth first; stops beyond ``largest`` elements."""
        features = generators.shape[-1]
        most = min(LARGEST, LARGEST_TABLE // features)
        largest = min(largest, most)
        identity = torch.stack([torch.arange(features), torch.ones(features, dtype=torch.long)])
        found, known, needed = [identity[None]], {_key(identity)}, []
        for generator in generators:
            if _key(generator) in known:
                continue
            needed.append(generator)
            # the products of all elements so far with the new generator, and on until none is new
            frontier = torch.cat(found)
            while len(frontier) and len(known) <= largest:
                products = torch.cat([_compose(frontier, g) for g in needed])
                fresh = []
                for i, key in enumerate(map(_key, products)):
                    if key not in known:
                        known.add(key)
                        fresh.append(i)
                frontier = products[fresh]
                found.append(frontier)
        elements = torch.cat(found)
        if len(elements) > most:
            raise ValueError(
                f"group: the elements generate a group of more than {most} elements, too many to "
                "average over; use fewer generators or a smaller lattice"
            )
        self.permutations, self.signs = elements[:, 0], elements[:, 1]
        self.generators = torch.stack(needed) if needed else identity[None]
        self.lattice = lattice


@_on_cpu
def translations(shape: Sequence[int]) -> Group:
    """The translations of a periodic lattice.

    Args:
        shape: of the lattice, in any number of dimensions; it is the shape of an event.

    Example:
        >>> translations((8, 8))
        Group(64 elements on 64 entries, with the translations of (8, 8))
    """
    sizes = lattice_shape("shape", shape)
    sites = torch.arange(math.prod(sizes)).reshape(sizes)
    shifts = [sites.roll(1, dimension).flatten() for dimension in range(len(sizes))]
    return Group.generated_by(shifts, lattice=sizes)


def mirrored(sites: Tensor, dimensions: Iterable[int]) -> Tensor:
    """A periodic array reversed along dimensions, its first entry where it was."""
    for dimension in dimensions:
        sites = sites.flip(dimension).roll(1, dimension)
    return sites


@_on_cpu
def point_group(shape: Sequence[int]) -> Group:
    """The rotations and reflections of a periodic lattice that keep its first site.

    In two dimensions these are the eight of the square, or the four of a rectangle.

    Args:
        shape: of the lattice, as for :func:`translations`.
    """
    sizes = lattice_shape("shape", shape)
    sites = torch.arange(math.prod(sizes)).reshape(sizes)
    moves = [mirrored(sites, [d]) for d in range(len(sizes))]
    moves += [sites.transpose(d, d + 1) for d in range(len(sizes) - 1) if sizes[d] == sizes[d + 1]]
    return Group.generated_by(move.flatten() for move in moves)


@_on_cpu
def axis_exchanges(shape: Sequence[int]) -> Group:
    """The exchanges of sides of the same length of an array.

    Args:
        shape: of an event, in any number of dimensions.
    """
    sizes = lattice_shape("shape", shape)
    entries = torch.arange(math.prod(sizes)).reshape(sizes)
    pairs = itertools.combinations(range(len(sizes)), 2)
    moves = [entries.transpose(d, e) for d, e in pairs if sizes[d] == sizes[e]]
    return Group.generated_by(move.flatten() for move in (entries, *moves))


@_on_cpu
def reflections(shape: Sequence[int], dimensions: Sequence[int] = (-1,)) -> Group:
    """Reflections of an image, or of any array.

    Args:
        shape: of an event, such as (C, H, W).
        dimensions: which are reversed, each by itself: ``(-1,)`` exchanges left and right,
            ``(-2, -1)`` also top and bottom.
    """
    sizes = lattice_shape("shape", shape)
    entries = torch.arange(math.prod(sizes)).reshape(sizes)
    fits = isinstance(dimensions, Sequence) and not isinstance(dimensions, str)
    expected = "a sequence of integers"
    validation.kind("dimensions", dimensions, fits and len(dimensions) > 0, expected)
    for dimension in dimensions:
        place = validation.integer("dimensions", dimension, minimum=-len(sizes))
        if place >= len(sizes):
            raise ValueError(f"dimensions: got {place}, but the shape has {len(sizes)} dimensions")
    return Group.generated_by(entries.flip(d).flatten() for d in dimensions)


@_on_cpu
def sign_flip(features: int) -> Group:
    """The group of the identity and of x → -x.

    Args:
        features: D, the number of entries of an event.
    """
    features = validation.integer("features", features)
    return Group.generated_by([(torch.arange(features), -torch.ones(features, dtype=torch.long))])


def lattice_shape(name: str, value: object) -> tuple[int, ...]:
    """Return ``value`` as a tuple if it is the shape of a lattice."""
    fits = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    validation.kind(name, value, fits, "a sequence of integers >= 1")
    return validation.shape(name, value)


def _read(elements: Iterable[Any], name: str) -> Tensor:
    """Elements as the user gives them, as a tensor of shape (n, 2, D)."""
    try:
        parts = list(elements)
    except TypeError as error:
        raise TypeError(
            f"{name}: got {elements!r}, expected a Group or a sequence of permutations, or of "
            "pairs of a permutation and signs"
        ) from error
    if not parts:
        raise ValueError(f"{name}: got no elements, expected at least the identity")
    read = [_element(f"{name}[{i}]", part) for i, part in enumerate(parts)]
    for i, element in enumerate(read):
        if element.shape != read[0].shape:
            raise ValueError(
                f"{name}[{i}]: got a permutation of {element.shape[1]} entries, expected "
                f"{read[0].shape[1]}, as {name}[0] has"
            )
    return torch.stack(read)


def _element(name: str, value: Any) -> Tensor:
    """One element as a tensor of shape (2, D)."""
    try:
        pair = torch.as_tensor(
            value if isinstance(value, Tensor) else [torch.as_tensor(v).tolist() for v in value]
        ).cpu()
    except (TypeError, ValueError, RuntimeError) as error:  # from tensors without data, too
        raise TypeError(
            f"{name}: got {value!r}, expected a permutation, or a pair of a permutation and signs"
        ) from error
    if pair.is_floating_point() or pair.is_complex() or pair.dtype == torch.bool:
        raise TypeError(f"{name}: got {pair.dtype} entries, expected integers")
    if pair.dim() == 1:
        pair = torch.stack([pair, torch.ones_like(pair)])
    if pair.dim() != 2 or len(pair) != 2 or pair.shape[1] == 0:
        raise ValueError(
            f"{name}: got shape {tuple(pair.shape)}, expected a permutation, (D,), or a pair of a "
            "permutation and signs, (2, D)"
        )
    pair = pair.long()
    permutation, signs = pair
    if not torch.equal(permutation.sort().values, torch.arange(len(permutation))):
        raise ValueError(
            f"{name}: got {_short(permutation)}, expected a permutation of 0 ... "
            f"{len(permutation) - 1}: each once"
        )
    if not bool((signs.abs() == 1).all()):
        raise ValueError(f"{name}: got signs {_short(signs)}, expected +1 and -1 alone")
    return pair


def _compose(first: Tensor, then: Tensor) -> Tensor:
    """The elements that act as each of ``first`` after ``then``, shape (n, 2, D)."""
    # (g h x)_i = s_i (h x)_{π_i} = s_i s'_{π_i} x_{π'_{π_i}}
    permutations, signs = first[:, 0], first[:, 1]
    return torch.stack([then[0][permutations], signs * then[1][permutations]], dim=1)


def _holds_translations(group: Group, shape: tuple[int, ...]) -> bool:
    if math.prod(shape) != group.features:
        return False
    known = set(map(_key, _stack(group)))
    sites = torch.arange(group.features).reshape(shape)
    ones = torch.ones(group.features, dtype=torch.long)
    return all(
        _key(torch.stack([sites.roll(1, d).flatten(), ones])) in known for d in range(len(shape))
    )


def _stack(group: Group) -> Tensor:
    return torch.stack([group.permutations, group.signs], dim=1)


def _key(element: Tensor) -> bytes:
    """Something to look an element up by: its image of (1, 2, ..., D)."""
    permutation, signs = element
    key: bytes = (signs * (permutation + 1)).int().numpy().tobytes()
    return key


def _short(values: Tensor) -> str:
    listed = values[:8].tolist()
    return f"[{', '.join(map(str, listed))}{', ...' if len(values) > 8 else ''}]"
