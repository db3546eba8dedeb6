"""The scalar φ⁴ theory on a square lattice."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nflows_mongeampere import validation
from nflows_mongeampere.targets.lattice import Lattice


class Phi4(Lattice):
    r"""The scalar field theory with a quartic coupling, on a periodic square lattice.

    .. math:: \ln \pi(\phi) = -\sum_x \Big[ \sum_\mu \big(\phi_{x + \mu} - \phi_x\big)^2
              + m^2 \phi_x^2 + \lambda \phi_x^4 \Big]

    in the convention of Albergo, Kanwar and Shanahan, `arXiv:1904.12072
    <https://arxiv.org/abs/1904.12072>`_, eq. 15. For :math:`\lambda > 0` the mass may be imaginary,
    :math:`m^2 < 0`, where the symmetry :math:`\phi \to -\phi` breaks.

    Args:
        length: L, the sites along one side.
        mass_squared: :math:`m^2`.
        coupling: :math:`\lambda \ge 0`; the free field, 0, needs :math:`m^2 > 0`.

    Attributes:
        sites: L².

    Example:
        >>> import torch
        >>> Phi4(4, mass_squared=-4.0, coupling=8.0).log_prob(torch.ones(2, 16))
        tensor([-64., -64.])
    """

    def __init__(self, length: int, mass_squared: float, coupling: float) -> None:
        super().__init__(length, "periodic")
        self.mass_squared = validation.number("mass_squared", mass_squared)
        self.coupling = validation.number("coupling", coupling)
        if self.coupling < 0 or (self.coupling == 0 and self.mass_squared <= 0):
            raise ValueError(
                f"coupling: got {coupling} with mass_squared={mass_squared}, whose density cannot "
                "be normalised; use coupling > 0, or 0 with mass_squared > 0"
            )

    def log_prob(self, x: Tensor) -> Tensor:
        r""":math:`\ln \pi(\phi)`, not normalised, shape (B,), of fields of shape (B, L²)."""
        field = self.field(x)
        square = field.square()
        # the sum of (a - b)² over the bonds, of which each site has four halves
        gradient = 4 * square.flatten(1).sum(1) - 2 * self.neighbour_products(field)
        local = self.mass_squared * square + self.coupling * square.square()
        return self.vanishing(-gradient - local.flatten(1).sum(1))

    def resized(self, shape: Sequence[int]) -> Phi4:
        """The same action on a lattice of another length, shape (L, L)."""
        return Phi4(self.side(shape), self.mass_squared, self.coupling)

    def extra_repr(self) -> str:
        return f"length={self.length}, mass_squared={self.mass_squared}, coupling={self.coupling}"
