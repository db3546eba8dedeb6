"""The two-dimensional Ising model as a density of continuous fields, with its exact free energy."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from nflows_mongeampere import validation
from nflows_mongeampere.targets.lattice import Lattice, chain_adjacency

# T_c of the infinite lattice, in units of the coupling
CRITICAL_TEMPERATURE = 2 / math.log(1 + math.sqrt(2))

# the smallest eigenvalue of K + αI, as published
SMALLEST_EIGENVALUE = 0.1


class Ising(Lattice):
    r"""The Ising model on a square lattice, in the continuous variables that make its spins free.

    The energy of spins :math:`s_i = \pm 1` over the temperature is :math:`-\frac12 s^T K s` with
    :math:`K = A / T` and A the adjacency matrix. A Gaussian integral over fields x takes the spins
    apart, and the sum over them leaves the density

    .. math:: \ln \pi(x) = -\tfrac12 x^T (K + \alpha I)^{-1} x + \sum_i \ln \cosh x_i,
              \qquad p(s_i = 1 \mid x) = \frac{1}{1 + e^{-2 x_i}},

    where :math:`\alpha = 0.1 - \lambda_{min}(K)` makes the Gaussian one. Its normalisation is that
    of the spins, which is known:

    .. math:: Z = \int \pi(x) dx
              = 2^{-N} e^{\alpha N / 2} \sqrt{(2 \pi)^N \det(K + \alpha I)} \sum_s e^{s^T K s / 2}.

    References: Zhang, E and Wang, `arXiv:1809.10188 <https://arxiv.org/abs/1809.10188>`_, eq. 12;
    Kaufman, Phys. Rev. 76, 1232 (1949).

    Args:
        length: L, the sites along one side. A periodic lattice of L = 2 has two bonds between
            neighbours.
        temperature: T, in units of the coupling; the critical one of the infinite lattice, unless
            given.
        boundary: ``"periodic"`` or ``"open"``.

    Attributes:
        sites: L².
        free_energy: the exact :math:`-\ln Z` for each site.

    Example:
        >>> target = Ising(4)
        >>> round(target.free_energy, 8)
        -2.33604573
        >>> target.log_prob(torch.zeros(3, 16))
        tensor([0., 0., 0.])
    """

    def __init__(
        self,
        length: int,
        temperature: float = CRITICAL_TEMPERATURE,
        boundary: str = "periodic",
    ) -> None:
        super().__init__(length, boundary)
        self.temperature = validation.positive("temperature", temperature)
        # the lattice is the product of two chains, and so are its eigenvectors
        values, vectors = torch.linalg.eigh(chain_adjacency(self.length, boundary))
        coupling = (values[:, None] + values) / self.temperature
        if not bool(torch.isfinite(coupling).all()):
            raise ValueError(
                f"temperature: got {temperature}, at which the coupling 1/T is infinite; use a "
                "higher one"
            )
        self.alpha = SMALLEST_EIGENVALUE - coupling.min().item()
        self.register_buffer("_vectors", vectors, persistent=False)
        self.register_buffer("_eigenvalues", coupling + self.alpha, persistent=False)

    def log_prob(self, x: Tensor) -> Tensor:
        r""":math:`\ln \pi(x)`, not normalised, shape (B,), of fields x of shape (B, L²)."""
        field = self.field(x)
        vectors = self._vectors.to(field)
        modes: Tensor = vectors.T @ field @ vectors
        gaussian = -0.5 * (modes.square() / self._eigenvalues.to(field)).flatten(1).sum(1)
        # ln cosh x = |x| + ln(1 + e^(-2|x|)) - ln 2
        size = field.abs()
        logcosh = size + F.softplus(-2 * size) - math.log(2)
        return self.vanishing(gaussian + logcosh.flatten(1).sum(1))

    @property
    def free_energy(self) -> float:
        r"""The exact :math:`-\ln Z` for each site."""
        spins = _periodic_log_partition if self.boundary == "periodic" else _open_log_partition
        log_z = spins(self.length, 1 / self.temperature) / self.sites
        volume = 0.5 * (math.log(2 * math.pi) + float(self._eigenvalues.log().mean()))
        free_energy: float = -(log_z + self.alpha / 2 + volume - math.log(2))
        return free_energy

    def sample_spins(self, x: Tensor) -> Tensor:
        """Spins of ±1, drawn given the fields, shape (B, L, L)."""
        field = self.field(x)
        return 2 * torch.bernoulli(torch.sigmoid(2 * field)) - 1

    def energy(self, x: Tensor) -> Tensor:
        r"""Energy for each site, given the fields, shape (B,).

        .. math:: E = -\frac1N \sum_{\langle ij \rangle} \tanh x_i \tanh x_j

        Its mean over x is that of the spins' energy, with less variance than from drawn spins.
        """
        return -self.neighbour_products(self.field(x).tanh()) / self.sites

    def magnetisation(self, x: Tensor) -> Tensor:
        r"""The mean spin given the field, :math:`\frac1N \sum_i \tanh x_i`, shape (B,)."""
        return self.field(x).tanh().flatten(1).mean(1)

    def structure_factor(self, x: Tensor) -> Tensor:
        r"""The power of the spins in each Fourier mode, shape (B, L, L).

        .. math:: S(k) = \frac1N \sum_{ij} e^{i k (r_i - r_j)} \langle s_i s_j \mid x \rangle
                  = 1 + \frac1N \Big( \Big|\sum_i e^{i k r_i} \tanh x_i\Big|^2
                  - \sum_i \tanh^2 x_i \Big),

        since spins are independent given the field. Mode (p, q) has
        :math:`k = 2 \pi (p, q) / L`.
        """
        mean = self.field(x).tanh()
        power: Tensor = torch.fft.fft2(mean).abs().square()
        return 1 + (power - mean.square().sum((1, 2), keepdim=True)) / self.sites

    def extra_repr(self) -> str:
        return f"length={self.length}, temperature={self.temperature}, boundary={self.boundary!r}"


def _periodic_log_partition(length: int, coupling: float) -> float:
    r"""The logarithm of the sum over the spins of a periodic lattice, by Kaufman's formula.

    .. math:: \sum_s e^{s^T K s / 2} = \tfrac12 (2 \sinh 2 \kappa)^{N / 2} \Big[
        \prod_r 2 \cosh \tfrac{L \gamma_{2r + 1}}{2} + \prod_r 2 \sinh \tfrac{L \gamma_{2r+1}}{2} +
        \prod_r 2 \cosh \tfrac{L \gamma_{2r}}{2} + \prod_r 2 \sinh \tfrac{L \gamma_{2r}}{2} \Big]

    with :math:`\cosh \gamma_r = \cosh 2 \kappa \coth 2 \kappa - \cos(\pi r / L)` and, of either
    sign, :math:`\gamma_0 = 2 \kappa + \ln \tanh \kappa`.
    """
    # ln sinh 2κ and coth 2κ without overflow
    decay = math.exp(-4 * coupling)
    log_sinh = 2 * coupling + math.log1p(-decay) - math.log(2)
    gammas = []
    for r in range(2 * length):
        # cosh γ - 1 = sinh 2κ + 1 / sinh 2κ - 2 + 2 sin²(π r / 2L); γ ~ |ln sinh 2κ| far from T_c
        size = min(abs(log_sinh), 300.0)
        excess = 2 * math.cosh(size) - 2 + 2 * math.sin(math.pi * r / (2 * length)) ** 2
        gamma = math.log1p(excess + math.sqrt(excess * (excess + 2)))
        gammas.append(gamma + abs(log_sinh) - size)
    gammas[0] = 2 * coupling + math.log(math.tanh(coupling))
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
    prefactor = length**2 / 2 * (math.log(2) + log_sinh) - math.log(2)
    return prefactor + largest + math.log(total)


def _open_log_partition(length: int, coupling: float) -> float:
    """The logarithm of the sum over the spins of an open lattice, site by site.

    The weights of all spins of the last row are carried from row to row; a row has :math:`2^L`.
    """
    if length > 20:
        raise ValueError(
            f"length: got {length}; the exact free energy of an open lattice is summed over 2^L "
            "rows, expected L <= 20"
        )
    rows = torch.arange(2**length)
    spins = 2.0 * (rows[:, None] >> torch.arange(length) & 1) - 1
    within = coupling * (spins[:, :-1] * spins[:, 1:]).sum(1).double()
    bond = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64).mul(coupling).exp()
    weights, log_scale = torch.ones(2**length, dtype=torch.float64), 0.0
    for row in range(length):
        if row > 0:
            for site in range(length):
                pairs = weights.view(-1, 2, 2**site)
                weights = torch.einsum("st,atb->asb", bond, pairs).reshape(-1)
        weights = weights * (within - within.max()).exp()
        scale = weights.max()
        weights, log_scale = weights / scale, log_scale + scale.log().item() + within.max().item()
    return log_scale + weights.sum().log().item()
