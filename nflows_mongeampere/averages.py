"""The average over a group, for parameters that share a symmetry."""

from __future__ import annotations

from torch import Tensor, nn

from nflows_mongeampere import validation
from nflows_mongeampere.groups import Group


class Average(nn.Module):
    r"""The mean of a field over its images under a group, the nearest field that is symmetric.

    .. math:: (A x)_i = \frac{1}{|G|} \sum_{(\pi, s) \in G} s_i \, x_{\pi_i}

    Registered as a parametrization, it keeps a parameter symmetric while it is learned: a kernel
    that a part of a group leaves alone makes a potential with the symmetries of that part, at no
    further cost.

    Args:
        group: the group, which acts on the D entries of a field.

    Raises:
        TypeError: if ``group`` is no group.

    Example:
        >>> import torch
        >>> from torch.nn.utils.parametrize import register_parametrization
        >>> from nflows_mongeampere import RidgePotential
        >>> from nflows_mongeampere.averages import Average
        >>> from nflows_mongeampere.groups import sign_flip, point_group
        >>> Average(point_group((3,)))(torch.tensor([1.0, 2.0, 4.0]))
        tensor([1., 3., 3.])
        >>> ridges = RidgePotential(16, 2, activation="logcosh", bias=False)
        >>> _ = register_parametrization(ridges, "weight", Average(point_group((4, 4))))
    """

    def __init__(self, group: Group) -> None:
        super().__init__()
        validation.kind("group", group, isinstance(group, Group), "a Group")
        self.group = group

    def forward(self, fields: Tensor) -> Tensor:
        """The average of each field.

        Args:
            fields: of D entries each, in any shape that holds a multiple of D entries, such as
                (B, D), or (L, L) for one field of D = L² entries.

        Returns:
            The averages, in the shape of ``fields``.

        Raises:
            ValueError: if the number of entries is no multiple of D.
        """
        if fields.numel() % self.group.features:
            raise ValueError(
                f"fields: got {validation.describe(fields)}, expected fields of "
                f"{self.group.features} entries, on which the group acts"
            )
        rows = fields.reshape(-1, self.group.features)
        return self.group.act(rows).mean(0).view_as(fields)

    def right_inverse(self, fields: Tensor) -> Tensor:
        """What is kept where a parameter is set: the value itself, symmetric or not."""
        return fields
