"""Fields that a finite group leaves alone, as a parametrization of what is learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nflows_mongeampere import validation
from nflows_mongeampere.groups import Group, lattice_shape


class Invariants(nn.Module):
    r"""The fields that a group leaves alone, by their coordinates in an orthonormal basis.

    .. math:: x_i = \frac{s_i}{\sqrt{|o_i|}} \, c_{o_i}

    with one coordinate c for each orbit :math:`o` of entries, and signs :math:`s_i = \pm 1` of the
    entries within one. Orbits in which an element of the group turns an entry into its negative
    have none: there x is zero.

    Registered as a parametrization, it keeps a parameter symmetric while it is learned, and as
    small as it can be: kernels that a part of a group leaves alone make a potential with the
    symmetries of that part, at no further cost.

    Args:
        group: the group, which acts on the D entries of a field.
        shape: of a field, with D entries in C order; (D,) unless given.

    Attributes:
        coordinates: the number O of coordinates of a field.

    Raises:
        TypeError, ValueError: for arguments that do not fit, or a group that leaves no field alone
            but zero.

    Example:
        >>> import torch
        >>> from torch.nn.utils.parametrize import register_parametrization
        >>> from nflows_mongeampere import RidgePotential
        >>> from nflows_mongeampere.groups import point_group
        >>> from nflows_mongeampere.invariants import Invariants
        >>> ridges = RidgePotential(16, 2, activation="logcosh", bias=False)
        >>> _ = register_parametrization(ridges, "weight", Invariants(point_group((4, 4))))
        >>> ridges.weight.shape, ridges.parametrizations.weight.original.shape
        (torch.Size([2, 16]), torch.Size([2, 6]))
    """

    def __init__(self, group: Group, shape: Sequence[int] | None = None) -> None:
        super().__init__()
        validation.kind("group", group, isinstance(group, Group), "a Group")
        self.group = group
        self.shape = (group.features,) if shape is None else lattice_shape("shape", shape)
        if torch.Size(self.shape).numel() != group.features:
            raise ValueError(
                f"shape: got {self.shape}, expected one of {group.features} entries, on which the "
                "group acts"
            )
        # follow from the group, and stay on the CPU where models are built without numbers
        first = group.permutations.amin(0)
        meets = group.permutations == first
        sign = (group.signs * meets).sum(0) / meets.sum(0).double()  # 0 where both signs occur
        alive = sign != 0
        if not bool(alive.any()):
            raise ValueError(
                f"group: {group} leaves no field alone but zero, expected one that does"
            )
        _, orbit, sizes = first[alive].unique(return_inverse=True, return_counts=True)
        self.coordinates = len(sizes)
        self.orbit = torch.zeros_like(first).masked_scatter(alive, orbit)
        self.scale = sign / sizes[self.orbit].double().sqrt()

    def forward(self, coordinates: Tensor) -> Tensor:
        """The fields of some coordinates of shape (..., O), shape (..., *shape)."""
        fields = coordinates[..., self.orbit.to(coordinates.device)] * self.scale.to(coordinates)
        shaped: Tensor = fields.unflatten(-1, self.shape)
        return shaped

    def right_inverse(self, fields: Tensor) -> Tensor:
        """The coordinates of the nearest invariant fields, which are the averages over the group.

        Args:
            fields: shape (..., *shape).

        Returns:
            Coordinates, shape (..., O).

        Raises:
            ValueError: if fields have another shape.
        """
        if fields.shape[-len(self.shape) :] != self.shape:
            raise ValueError(
                f"fields: got {validation.describe(fields)}, expected fields of shape {self.shape}"
            )
        rows = fields.flatten(-len(self.shape)) * self.scale.to(fields)
        total = rows.new_zeros(*rows.shape[:-1], self.coordinates)
        coordinates: Tensor = total.index_add(-1, self.orbit.to(fields.device), rows)
        return coordinates
