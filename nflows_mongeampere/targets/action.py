"""The density of any action of a field on a lattice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from normflows.distributions import Target
from torch import Tensor

from nflows_mongeampere import validation
from nflows_mongeampere.groups import BOUNDARIES, lattice_shape

PROBES = 4


class LatticeAction(Target):
    r"""The unnormalised density :math:`\pi(\phi) = e^{-S(\phi)}` of an action of your own.

    Args:
        shape: of the lattice, in any number of dimensions.
        action: S, a function or module that maps fields of shape (B, \*shape) to their actions,
            shape (B,), real and in nats, with operations of torch. It is tried on a few standard
            normal fields.
        parameter: the value of a parameter, such as a coupling, that the action takes as its second
            argument, a tensor of shape (B, 1, ..., 1) beside fields; or None where it takes none.
            A context gives each field a value of its own.
        boundary: ``"periodic"``, where translations leave the action alone, or ``"open"``, where
            they do but for the borders.

    Attributes:
        sites: the number of sites.

    Raises:
        TypeError: if ``action`` cannot be called, or ``shape`` is no shape.
        ValueError: if the action of a field is NaN, infinite or not real, or has another shape.

    Example:
        >>> import torch
        >>> from nflows_mongeampere.targets import LatticeAction
        >>> def sextic(phi):
        ...     bonds = sum((phi.roll(1, d) - phi).square() for d in (1, 2))
        ...     return (bonds + phi.square() / 2 + phi**6).sum((1, 2))
        >>> LatticeAction((4, 4), sextic).log_prob(torch.ones(2, 16))
        tensor([-24., -24.])
    """

    def __init__(
        self,
        shape: Sequence[int],
        action: Callable[..., Tensor],
        parameter: float | None = None,
        *,
        boundary: str = "periodic",
    ) -> None:
        super().__init__()
        self.shape = lattice_shape("shape", shape)
        self.boundary = validation.choice("boundary", boundary, BOUNDARIES)
        self.sites = math.prod(self.shape)
        expected = "a function from fields of shape (B, *shape) to actions of shape (B,)"
        validation.kind("action", action, callable(action), expected)
        self.action = action
        self.parameter = None if parameter is None else validation.number("parameter", parameter)
        generator = torch.Generator().manual_seed(0)
        log_prob = self.log_prob(torch.randn(PROBES, self.sites, generator=generator))
        if not bool(log_prob.isfinite().all()):
            raise ValueError(
                "action: infinite for a standard normal field, expected a finite number; let walls "
                "rise steadily, or change the units of the field"
            )

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r""":math:`-S(\phi)`, shape (B,).

        Args:
            x: fields of D sites, in any shape (B, ...).
            context: the parameter for each of them, shape (B, 1), or None for its value here.

        Raises:
            ValueError: if the action is NaN, not bounded below, or not real, or has another shape.
        """
        validation.batch("x", x, None)
        if x.shape[1:].numel() != self.sites:
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, expected (B, {self.sites}), a number for each "
                f"site of {self.shape}"
            )
        fields, given = x.reshape(-1, *self.shape), []
        if self.parameter is not None:
            value = fields.new_full((len(x), 1), self.parameter) if context is None else context
            given = [value.view(-1, *[1] * len(self.shape))]
        action = validation.returned(
            "action",
            self.action,
            self.action(fields, *given),
            x.shape[:1],
            "the action of each field, a real number",
        )
        log_prob = -action.to(x.dtype)
        if not bool((log_prob.detach() < math.inf).all()):
            raise ValueError(
                "action: got NaN or minus infinity for a field of finite numbers, expected the "
                "action of any field to be a number"
            )
        return log_prob

    def resized(self, shape: Sequence[int]) -> LatticeAction:
        """The same action on a lattice of another shape."""
        return LatticeAction(shape, self.action, self.parameter, boundary=self.boundary)

    def extra_repr(self) -> str:
        name = getattr(self.action, "__name__", type(self.action).__name__)
        return f"shape={self.shape}, action={name}"
