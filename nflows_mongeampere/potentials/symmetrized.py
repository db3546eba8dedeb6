"""Potentials that are invariant under a finite group, exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nflows_mongeampere.activations import ACTIVATIONS, Activation
from nflows_mongeampere.dynamics import DirectDynamics, Dynamics, Field
from nflows_mongeampere.groups import Group
from nflows_mongeampere.potentials.base import Potential, Time
from nflows_mongeampere.potentials.ridge import RidgePotential

# Sites of the smallest lattice whose ridges are moved in Fourier space; below it one product with
# all rows of the orbits is faster (examples/benchmarks/symmetry.py).
FOURIER_SITES = 256


class SymmetrizedPotential(Potential):
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
        >>> from nflows_mongeampere import RidgePotential
        >>> from nflows_mongeampere.groups import translations
        >>> potential = SymmetrizedPotential(RidgePotential(16, 3), translations((4, 4)))
        >>> _ = torch.nn.init.normal_(potential.potential.amplitude)
        >>> x = torch.randn(2, 16)
        >>> shifted = x.view(2, 4, 4).roll(1, 2).flatten(1)
        >>> torch.allclose(potential(shifted), potential(x))
        True
    """

    _permutations: Tensor
    _signs: Tensor

    def __init__(self, potential: Potential, group: Group | Iterable[Any]) -> None:
        super().__init__()
        if not isinstance(potential, Potential):
            raise TypeError(
                f"potential: got {type(potential).__name__}, expected a Potential, such as "
                "RidgePotential or AutogradPotential"
            )
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
        self._lattice: tuple[int, ...] | None = None
        if isinstance(potential, RidgePotential) and group.features >= FOURIER_SITES:
            self._lattice = group.lattice
        chosen = self._distinct(group)
        self.register_buffer("_permutations", group.permutations[chosen], persistent=False)
        self.register_buffer("_signs", group.signs[chosen].to(torch.int8), persistent=False)

    def _distinct(self, group: Group) -> Tensor:
        """Which elements give different terms, all equally often; shape (n,)."""
        chosen = torch.ones(len(group), dtype=torch.bool)
        if self._lattice is not None:
            # g = q τ with a translation τ and one q that keeps the first site
            chosen &= group.permutations[:, 0] == 0
        if isinstance(self.potential, RidgePotential) and self.potential.even and group.odd:
            chosen &= group.signs[:, 0] == 1  # u(-g x) = u(g x)
        return chosen

    def dynamics(
        self, inputs: Tensor, context: Tensor | None, evaluations: int, costs: bool = False
    ) -> Dynamics:
        if not isinstance(self.potential, RidgePotential):
            return super().dynamics(inputs, context, evaluations, costs)
        orbits = self._orbits(self.potential, inputs, context)
        return DirectDynamics(
            orbits.gradient_and_laplacian, inputs, context, self, costs, orbits.parameters
        )

    def _check_context(
        self, name: str, x: Tensor, context: Tensor | None, like: Tensor | None
    ) -> None:
        self.potential._check_context(name, x, context, like)

    def _value(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        if isinstance(self.potential, RidgePotential):
            return self._orbits(self.potential, x, context).value(x, t)
        values = self.potential._value(*self._images(x, t, context))
        return values.view(-1, len(x)).mean(0)

    def _gradient(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        if isinstance(self.potential, RidgePotential):
            return self._gradient_and_laplacian(x, t, context)[0]
        return self._average(self.potential._gradient(*self._images(x, t, context)), x)

    def _laplacian(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        if isinstance(self.potential, RidgePotential):
            return self._gradient_and_laplacian(x, t, context)[1]
        laplacians = self.potential._laplacian(*self._images(x, t, context))
        return laplacians.view(-1, len(x)).mean(0)

    def _gradient_and_laplacian(
        self, x: Tensor, t: Time | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self._field(x)(x, t, context)

    def _field(self, inputs: Tensor) -> Field:
        if isinstance(self.potential, RidgePotential):
            ridge = self.potential
            return lambda x, t, context: self._orbits(ridge, x, context).gradient_and_laplacian(
                x, t, context
            )
        field = self.potential._field(self._images(inputs, None, None)[0])

        def average(x: Tensor, t: Time | None, context: Tensor | None) -> tuple[Tensor, Tensor]:
            gradients, laplacians = field(*self._images(x, t, context))
            return self._average(gradients, x), laplacians.view(-1, len(x)).mean(0)

        return average

    def _images(
        self, x: Tensor, t: Time | None, context: Tensor | None
    ) -> tuple[Tensor, Time | None, Tensor | None]:
        """The images of a batch under the group, as one batch of |G| B rows."""
        n = len(self._permutations)
        images = x.flatten(1)[:, self._permutations].movedim(0, 1) * self._signs[:, None].to(x)
        if isinstance(t, Tensor) and t.dim() == 1:
            t = t.repeat(n)
        context = None if context is None else context.repeat(n, *[1] * (context.dim() - 1))
        return images.reshape(-1, *x.shape[1:]), t, context

    def _average(self, gradients: Tensor, x: Tensor) -> Tensor:
        """The mean of g⁻¹ ∇u(g x), from the gradients at the images."""
        n, features = self._permutations.shape
        signed = gradients.reshape(n, len(x), features) * self._signs[:, None].to(x)
        back = self._permutations.argsort(dim=1)[:, None].expand(-1, len(x), -1)
        return signed.gather(2, back).mean(0).view_as(x)

    def _orbits(self, ridge: RidgePotential, x: Tensor, context: Tensor | None) -> _Orbits:
        signs = self._signs[:, None].to(x)
        rows = (ridge.weight[:, self._permutations].movedim(0, 1) * signs).contiguous()
        terms = len(rows) * math.prod(self._lattice or ())
        return _Orbits(
            rows=rows,
            amplitude=ridge.amplitude / terms,
            curvature=ridge.amplitude * ridge.weight.square().sum(1) / terms,
            offset=ridge._offset(x, context),
            time_weight=ridge.time_weight,
            lattice=self._lattice,
            activation=ACTIVATIONS[ridge.activation],
        )

    def extra_repr(self) -> str:
        return f"group={self.group}"


@dataclass
class _Orbits:
    r"""The ridges of an averaged potential, of shape (B, n, H, S).

    Row h of the potential is turned by n elements of the group and moved to S places.

    Attributes:
        rows: the turned rows, shape (n, H, D).
        amplitude: of each ridge, shape (H,).
        curvature: amplitude times squared length of the rows, shape (H,).
        offset: Vc + b, shape (B, H) or (1, H).
        time_weight: shape (H,), or None.
        lattice: over which the rows are moved, or None where S = 1.
        activation: of the ridges.
    """

    rows: Tensor
    amplitude: Tensor
    curvature: Tensor
    offset: Tensor
    time_weight: Tensor | None
    lattice: tuple[int, ...] | None
    activation: Activation

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors that the field depends on."""
        tensors = (self.rows, self.amplitude, self.curvature, self.offset)
        return tensors if self.time_weight is None else (*tensors, self.time_weight)

    def value(self, x: Tensor, t: Time | None) -> Tensor:
        ridges = self.activation.value(self._preactivation(x, t))
        return ridges.sum((1, 3)) @ self.amplitude

    def gradient_and_laplacian(
        self, x: Tensor, t: Time | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        p = self.activation.first(self._preactivation(x, t))
        gradient = self._gather(self.amplitude[:, None] * p)
        laplacian = self.activation.second(p).sum((1, 3)) @ self.curvature
        return gradient.reshape(x.shape), laplacian

    def _preactivation(self, x: Tensor, t: Time | None) -> Tensor:
        offset = self.offset
        if self.time_weight is not None:
            time = torch.as_tensor(t, dtype=x.dtype, device=x.device).reshape(-1, 1)
            offset = offset + time * self.time_weight
        return self._project(x.flatten(1)) + offset[:, None, :, None]

    def _project(self, x: Tensor) -> Tensor:
        """The product of every row with the points, shape (B, n, H, S)."""
        images, hidden, features = self.rows.shape
        if self.lattice is None:
            return (x @ self.rows.view(-1, features).T).view(-1, images, hidden, 1)
        spectrum = self._transform(x)[:, None, None] * self._transform(self.rows).conj()
        return self._back(spectrum)

    def _gather(self, push: Tensor) -> Tensor:
        """The sum of every row times its push, shape (B, D)."""
        if self.lattice is None:
            return push.flatten(1) @ self.rows.flatten(0, 1)
        spectrum = (self._transform(push) * self._transform(self.rows)).sum((1, 2))
        return self._back(spectrum)

    def _transform(self, field: Tensor) -> Tensor:
        """Fourier coefficients of fields on the lattice: (..., D) to (..., L, ..., L / 2 + 1)."""
        assert self.lattice is not None
        dimensions = tuple(range(-len(self.lattice), 0))
        fields = field.reshape(*field.shape[:-1], *self.lattice)
        spectrum: Tensor = torch.fft.rfftn(fields, dim=dimensions)
        return spectrum

    def _back(self, spectrum: Tensor) -> Tensor:
        assert self.lattice is not None
        dimensions = tuple(range(-len(self.lattice), 0))
        field: Tensor = torch.fft.irfftn(spectrum, s=self.lattice, dim=dimensions)
        return field.flatten(-len(self.lattice))
