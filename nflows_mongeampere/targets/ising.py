"""The two-dimensional Ising model as a density of continuous fields, with its exact free energy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nflows_mongeampere import validation
from nflows_mongeampere.targets.lattice import Lattice, chain_adjacency

# T_c of the infinite lattice, in units of the coupling
CRITICAL_TEMPERATURE = 2 / math.log(1 + math.sqrt(2))
"""Of the square lattice with J = 1, Onsager's."""

# the smallest eigenvalue of K + αI, as published
SMALLEST_EIGENVALUE = 0.1

# The widest lattices whose spins are summed with a matrix of 2^L rows, and row by row.
WIDEST_PERIODIC, WIDEST_OPEN = 12, 20


class Ising(Lattice):
    r"""The Ising model on a square lattice, in the continuous variables that make its spins free.

    Spins :math:`s_i = \pm 1` with couplings :math:`J_1, J_2` along the two axes, in a field H, have
    the energy

    .. math:: E(s) = -\sum_{\langle ij \rangle} J_{ij} s_i s_j - H \sum_i s_i,
              \qquad -\frac{E}{T} = \tfrac12 s^T K s + h \sum_i s_i,

    :math:`K = J / T`, :math:`h = H / T`. The Hubbard-Stratonovich transformation, a Gaussian
    integral over fields x, decouples the spins, and the sum over them leaves the density

    .. math:: \ln \pi(x) = -\tfrac12 x^T (K + \alpha I)^{-1} x + \sum_i \ln \cosh(x_i + h),
              \qquad \langle s_i \mid x \rangle = \tanh(x_i + h),

    where :math:`\alpha = 0.1 - \lambda_{min}(K)` makes the Gaussian one. Its normalisation is that
    of the spins,

    .. math:: Z = \int \pi(x) dx
              = 2^{-N} e^{\alpha N / 2} \sqrt{(2 \pi)^N \det(K + \alpha I)} \; Z_s,
              \qquad Z_s = \sum_s e^{-E(s) / T},

    which is known: for periodic lattices without a field by Kaufman's formula, of either sign of
    the couplings where L is even, else by a transfer matrix for L up to 12; for open ones row by
    row for L up to 20.

    References: Zhang, E and Wang, `arXiv:1809.10188 <https://arxiv.org/abs/1809.10188>`_, eq. 12;
    Kaufman, Phys. Rev. 76, 1232 (1949).

    Args:
        length: L, the sites along one side. A periodic lattice of L = 2 has two bonds between
            neighbours.
        temperature: T, in the units of the couplings; the critical one of the infinite lattice with
            couplings of one, unless given.
        boundary: ``"periodic"`` or ``"open"``.
        couplings: :math:`J_1, J_2` of the bonds along the first and the second axis; negative ones
            make an antiferromagnet.
        field: H.

    Attributes:
        sites: N = L².
        free_energy: the exact :math:`-\ln Z` for each site.
        spin_free_energy: the exact :math:`-\ln Z_s` for each site.

    Example:
        >>> target = Ising(4)
        >>> round(target.free_energy, 8), round(target.spin_free_energy, 8)
        (-2.33604573, -0.97011972)
        >>> target.log_prob(torch.zeros(3, 16))
        tensor([0., 0., 0.])
    """

    def __init__(
        self,
        length: int,
        temperature: float = CRITICAL_TEMPERATURE,
        boundary: str = "periodic",
        *,
        couplings: Sequence[float] = (1.0, 1.0),
        field: float = 0.0,
    ) -> None:
        super().__init__(length, boundary)
        self.temperature = validation.positive("temperature", temperature)
        fits = isinstance(couplings, Sequence) and not isinstance(couplings, str)
        expected = "two numbers, of the bonds along the first and the second axis"
        validation.kind("couplings", couplings, fits and len(couplings) == 2, expected)
        first, second = (validation.number(f"couplings[{i}]", J) for i, J in enumerate(couplings))
        self.couplings = first, second
        self.magnetic_field = validation.number("field", field)
        # the lattice is the product of two chains, and so are its eigenvectors
        values, vectors = torch.linalg.eigh(chain_adjacency(self.length, boundary))
        coupling = (first * values[:, None] + second * values) / self.temperature
        self.h = self.magnetic_field / self.temperature
        if not bool(torch.isfinite(coupling).all()) or not math.isfinite(self.h):
            raise ValueError(
                f"temperature: got {temperature}, at which the coupling 1/T is infinite; use a "
                "higher one"
            )
        self.alpha = SMALLEST_EIGENVALUE - coupling.min().item()
        self.register_buffer("_vectors", vectors, persistent=False)
        self.register_buffer("_eigenvalues", coupling + self.alpha, persistent=False)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r""":math:`\ln \pi(x)`, not normalised, shape (B,).

        Args:
            x: fields, shape (B, L²).
            context: a temperature for each of them, shape (B, 1), or None for that of the model.
        """
        field, eigenvalues = self.field(x), self._eigenvalues
        h: float | Tensor = self.h
        if context is not None:
            ratio = self.temperature / context.view(-1, 1, 1)
            eigenvalues = SMALLEST_EIGENVALUE + ratio * (eigenvalues - SMALLEST_EIGENVALUE)
            h = ratio * h
        vectors = self._vectors.to(field)
        modes: Tensor = vectors.T @ field @ vectors
        gaussian = -0.5 * (modes.square() / eigenvalues.to(field)).flatten(1).sum(1)
        # ln cosh x = |x| + ln(1 + e^(-2|x|)) - ln 2
        size = (field + h).abs()
        logcosh = size + F.softplus(-2 * size) - math.log(2)
        return self.vanishing(gaussian + logcosh.flatten(1).sum(1))

    @property
    def free_energy(self) -> float:
        r"""The exact :math:`-\ln Z` for each site."""
        return self.spin_free_energy + self.shift

    @property
    def shift(self) -> float:
        r"""How far the free energy of the field lies above that of the spins, for each site.

        .. math:: \frac{\ln Z_s - \ln Z}{N} = \ln 2 - \frac{\alpha}{2} - \tfrac12 \ln 2 \pi
                  - \frac{1}{2N} \ln \det(K + \alpha I)
        """
        volume = 0.5 * (math.log(2 * math.pi) + float(self._eigenvalues.log().mean()))
        shift: float = math.log(2) - self.alpha / 2 - volume
        return shift

    @property
    def spin_free_energy(self) -> float:
        r"""The exact :math:`-\ln Z_s` for each site: the free energy of the spins, over T."""
        first, second = (J / self.temperature for J in self.couplings)
        if self.boundary == "open":
            log_z = _open_log_partition(self.length, first, second, self.h)
        elif self.h == 0 and (min(first, second) >= 0 or self.length % 2 == 0):
            # every second row turned, or column, changes the sign of the bonds between them
            log_z = _periodic_log_partition(self.length, abs(first), abs(second))
        else:
            log_z = _transfer_log_partition(self.length, first, second, self.h)
        return -log_z / self.sites

    def bonds(self) -> tuple[Tensor, Tensor]:
        """The couplings of two sites of a line along the first and the second axis, (L, L) each."""
        chain = chain_adjacency(self.length, self.boundary)
        return self.couplings[0] * chain, self.couplings[1] * chain

    def mean_spins(self, x: Tensor) -> Tensor:
        r"""The mean of each spin given the field, :math:`\tanh(x_i + h)`, shape (B, L, L)."""
        return (self.field(x) + self.h).tanh()

    def sample_spins(self, x: Tensor) -> Tensor:
        """Spins of ±1, drawn given the fields, shape (B, L, L)."""
        return 2 * torch.bernoulli(torch.sigmoid(2 * (self.field(x) + self.h))) - 1

    def energy(self, x: Tensor) -> Tensor:
        r"""Energy for each site, given the fields, shape (B,).

        .. math:: \frac{E}{N} = -\frac1N \sum_{\langle ij \rangle} J_{ij} m_i m_j
                  - \frac{H}{N} \sum_i m_i, \qquad m_i = \tanh(x_i + h)

        Its mean over x is that of the spins' energy, with less variance than from drawn spins.
        """
        return self.spin_energy(self.mean_spins(x))

    def spin_energy(self, spins: Tensor) -> Tensor:
        """Energy for each site of spins of shape (B, L, L), or of the means of free ones: (B,)."""
        bonds = self.neighbour_products(spins, self.couplings)
        return -(bonds + self.magnetic_field * spins.flatten(1).sum(1)) / self.sites

    def magnetisation(self, x: Tensor) -> Tensor:
        r"""The mean spin given the field, :math:`\frac1N \sum_i \tanh(x_i + h)`, shape (B,)."""
        return self.mean_spins(x).flatten(1).mean(1)

    def structure_factor(self, x: Tensor) -> Tensor:
        r"""The power of the spins in each Fourier mode, shape (B, L, L).

        .. math:: S(k) = \frac1N \sum_{ij} e^{i k (r_i - r_j)} \langle s_i s_j \mid x \rangle
                  = 1 + \frac1N \Big( \Big|\sum_i e^{i k r_i} m_i\Big|^2 - \sum_i m_i^2 \Big),
                  \qquad m_i = \tanh(x_i + h),

        since spins are independent given the field. Mode (p, q) has
        :math:`k = 2 \pi (p, q) / L`.
        """
        mean = self.mean_spins(x)
        power: Tensor = torch.fft.fft2(mean).abs().square()
        return 1 + (power - mean.square().sum((1, 2), keepdim=True)) / self.sites

    def resized(self, shape: Sequence[int]) -> Ising:
        """The same model on a lattice of another length, shape (L, L)."""
        field, couplings = self.magnetic_field, self.couplings
        side = self.side(shape)
        return Ising(side, self.temperature, self.boundary, couplings=couplings, field=field)

    def extra_repr(self) -> str:
        return (
            f"length={self.length}, temperature={self.temperature}, boundary={self.boundary!r}, "
            f"couplings={self.couplings}, field={self.magnetic_field}"
        )


def _periodic_log_partition(length: int, first: float, second: float) -> float:
    r"""The logarithm of the sum over the spins of a periodic lattice, by Kaufman's formula.

    With couplings over temperature :math:`\kappa_1, \kappa_2 > 0` and
    :math:`\kappa_1^* = -\tfrac12 \ln \tanh \kappa_1`,

    .. math:: Z_s = \tfrac12 (2 \sinh 2 \kappa_1)^{N / 2} \Big[
        \prod_r 2 \cosh \tfrac{L \gamma_{2r + 1}}{2} + \prod_r 2 \sinh \tfrac{L \gamma_{2r+1}}{2} +
        \prod_r 2 \cosh \tfrac{L \gamma_{2r}}{2} + \prod_r 2 \sinh \tfrac{L \gamma_{2r}}{2} \Big],

    .. math:: \cosh \gamma_r = \cosh 2 \kappa_1^* \cosh 2 \kappa_2
              - \sinh 2 \kappa_1^* \sinh 2 \kappa_2 \cos \tfrac{\pi r}{L}, \qquad
              \gamma_0 = 2 (\kappa_2 - \kappa_1^*) \text{ of either sign.}
    """
    if first == 0 or second == 0:
        return length * _chain_log_partition(length, max(first, second))
    dual = -0.5 * (math.log1p(-math.exp(-2 * first)) - math.log1p(math.exp(-2 * first)))
    gammas = [2 * (second - dual)]
    for r in range(1, 2 * length):
        # cosh γ - 1 = 2 sinh²(κ1* - κ2) + 2 sin²(π r / 2L) sinh 2κ2 / sinh 2κ1, by logarithms
        parts = [
            math.log(2)
            + _log_sinh(2 * second)
            - _log_sinh(2 * first)
            + 2 * math.log(math.sin(math.pi * r / (2 * length)))
        ]
        if dual != second:
            parts.append(math.log(2) + 2 * _log_sinh(abs(dual - second)))
        largest = max(parts)
        log_excess = largest + math.log(sum(math.exp(part - largest) for part in parts))
        if log_excess > 40:
            gammas.append(log_excess + math.log(2))
        else:
            excess = math.exp(log_excess)
            gammas.append(math.log1p(excess + math.sqrt(excess * (excess + 2))))
    terms = []
    for parity in (1, 0):
        halves = [length * gamma / 2 for gamma in gammas[parity::2]]
        sizes = [abs(half) for half in halves]
        terms.append((1.0, sum(size + math.log1p(math.exp(-2 * size)) for size in sizes)))
        if all(size > 0 for size in sizes):
            sign = math.prod(math.copysign(1.0, half) for half in halves)
            terms.append((sign, sum(s + math.log(-math.expm1(-2 * s)) for s in sizes)))
    largest = max(log for _, log in terms)
    total = sum(sign * math.exp(log - largest) for sign, log in terms)
    prefactor = length**2 / 2 * (math.log(2) + _log_sinh(2 * first)) - math.log(2)
    return prefactor + largest + math.log(total)


def _log_sinh(x: float) -> float:
    """The logarithm of sinh x for x > 0, without overflow."""
    return x + math.log(-math.expm1(-2 * x)) - math.log(2)


def _chain_log_partition(length: int, coupling: float) -> float:
    """The logarithm of the sum over a ring of spins."""
    log_cosh = coupling + math.log1p(math.exp(-2 * coupling)) - math.log(2)
    return length * (log_cosh + math.log(2)) + math.log1p(math.tanh(coupling) ** length)


def _rows(length: int, coupling: float, field: float, periodic: bool) -> Tensor:
    """The logarithm of the weight of each state of a row by itself, shape (2^L,), float64."""
    states = torch.arange(2**length)
    spins = 2.0 * (states[:, None] >> torch.arange(length) & 1).double() - 1
    bonds = spins * spins.roll(-1, 1) if periodic else spins[:, :-1] * spins[:, 1:]
    return coupling * bonds.sum(1) + field * spins.sum(1)


def _bond(coupling: float) -> Tensor:
    """The weights of two spins of neighbouring rows, over the largest of them, (2, 2)."""
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    return (coupling * signs - abs(coupling)).exp()


def _transfer_log_partition(length: int, first: float, second: float, field: float) -> float:
    """The logarithm of the sum over the spins of a periodic lattice, by its transfer matrix.

    The trace of the L-th power of a symmetric matrix of 2^L rows, from its eigenvalues.
    """
    if length > WIDEST_PERIODIC:
        raise ValueError(
            f"length: got {length}; the exact free energy of a periodic lattice with a field, or "
            "with an odd side and a negative coupling, is a matrix of 2^L rows, expected L <= "
            f"{WIDEST_PERIODIC}"
        )
    row = _rows(length, second, field, periodic=True)
    largest = row.max()
    half = ((row - largest) / 2).exp()
    between = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(length):
        between = torch.kron(between, _bond(first))
    values = torch.linalg.eigvalsh(half[:, None] * between * half)
    top = values.abs().max()
    trace = (values / top).pow(length).sum()
    log_row = largest + length * abs(first) + top.log()
    return float(length * log_row + trace.log())


def _open_log_partition(length: int, first: float, second: float, field: float = 0.0) -> float:
    """The logarithm of the sum over the spins of an open lattice, site by site.

    The weights of all spins of the last row are carried from row to row; a row has :math:`2^L`.
    """
    if length > WIDEST_OPEN:
        raise ValueError(
            f"length: got {length}; the exact free energy of an open lattice is summed over 2^L "
            f"rows, expected L <= {WIDEST_OPEN}"
        )
    within = _rows(length, second, field, periodic=False)
    bond = _bond(first)
    weights, log_scale = torch.ones(2**length, dtype=torch.float64), 0.0
    for row in range(length):
        if row > 0:
            log_scale += length * abs(first)
            for site in range(length):
                pairs = weights.view(-1, 2, 2**site)
                weights = torch.einsum("st,atb->asb", bond, pairs).reshape(-1)
        weights = weights * (within - within.max()).exp()
        scale = weights.max()
        weights, log_scale = weights / scale, log_scale + scale.log().item() + within.max().item()
    return log_scale + weights.sum().log().item()
