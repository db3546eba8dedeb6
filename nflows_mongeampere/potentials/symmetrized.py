"""Potentials that are invariant under a finite group, exactly."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from nflows_mongeampere import validation
from nflows_mongeampere.dynamics import Dynamics, Time
from nflows_mongeampere.groups import Group
from nflows_mongeampere.potentials.base import ClosedFormPotential, Potential


class SymmetrizedPotential(ClosedFormPotential):
    r"""The average of a potential over a finite group.

    .. math:: \bar u(x, t; c) = \frac{1}{|G|} \sum_{g \in G} u(g x, t; c)

    is invariant, :math:`\bar u(g x) = \bar u(x)`; its gradient turns with x,
    :math:`\nabla \bar u(g x) = g \nabla \bar u(x)`; and a flow from a base of the same symmetry,
    such as a standard normal, has a density that is invariant to rounding, in every call.

    The average of a :class:`RidgePotential` is a ridge potential whose rows are the orbits of its
    rows, in closed form. Where the group holds the translations of a lattice the orbits are
    moved by a convolution, through fast Fourier transforms where that is faster. The images of
    other potentials are evaluated one by one, as one batch of :math:`|G| B` rows.

    In a new flow scale the learning rate of a ridge potential's amplitude by up to :math:`|G|`,
    by which the average divides it.

    Args:
        potential: what is averaged; all it learns stays in it.
        group: a :class:`~nflows_mongeampere.groups.Group`, or the elements of one: each a
            permutation, or a pair of a permutation and signs.

    Attributes:
        potential: what is averaged.
        group: over what.

    Raises:
        TypeError: if ``potential`` is no potential, or ``group`` no sequence of elements.
        ValueError: if an element is no signed permutation of the entries of an event, or the set
            is not closed.

    Example:
        >>> import torch
        >>> from nflows_mongeampere import RidgePotential
        >>> from nflows_mongeampere.groups import translations
        >>> potential = SymmetrizedPotential(RidgePotential(16, 3), translations((4, 4)))
        >>> _ = torch.nn.init.normal_(potential.potential.amplitude)
        >>> x = torch.randn(2, 16)
        >>> shifted = x.view(2, 4, 4).roll(1, 2).flatten(1)
        >>> torch.allclose(potential(shifted), potential(x))
        True
    """

    def __init__(self, potential: Potential, group: Group | Iterable[Any]) -> None:
        super().__init__()
        expected = "a Potential, such as RidgePotential or AutogradPotential"
        validation.kind("potential", potential, isinstance(potential, Potential), expected)
        group = group if isinstance(group, Group) else Group(group)
        if potential.features not in (None, group.features):
            raise ValueError(
                f"group: got one that acts on {group.features} entries, expected "
                f"{potential.features}, as the potential takes"
            )
        self.potential = potential
        self.group = group
        self.features = group.features
        self.context_features = potential.context_features
        self.time_dependent = potential.time_dependent
        self._average = potential.averaged(group)

    @property
    def by_hand(self) -> bool:
        return self._average.by_hand

    @property
    def stochastic(self) -> bool:
        """Whether the potential that is averaged is."""
        return self.potential.stochastic

    def dynamics(
        self, inputs: Tensor, context: Tensor | None, evaluations: int, costs: bool = False
    ) -> Dynamics:
        return self._average.dynamics(inputs, context, evaluations, costs)

    def _accept_context(
        self, name: str, x: Tensor, context: Tensor | None, like: Tensor | None
    ) -> Tensor | None:
        return self.potential._accept_context(name, x, context, like)

    def _value(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        return self._average.value(x, t, context)
