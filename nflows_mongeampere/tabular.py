"""What a density of a table is made of: marginals, a linear layer, a base of several bumps."""

from __future__ import annotations

import math

import torch
from nflows.distributions import Distribution
from nflows.transforms import LULinear, Transform
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_mongeampere import validation
from nflows_mongeampere.configured import Configured


class Bounded(Configured, Transform):
    r"""Columns with ends, on the real line: logits, logarithms, or as they are.

    .. math:: y = \ln\frac{x - a}{b - x}, \qquad y = \ln(x - a), \qquad y = -\ln(b - x), \qquad
              y = x

    for a column with both ends, a lower one, an upper one, or none; rows are columns of the table.
    Nothing is ever drawn outside the ends.

    Args:
        lower: a for each of the D columns, minus infinity where there is none.
        upper: b for each of the D columns, infinity where there is none.

    Raises:
        ValueError: if an upper end is not above its lower one, or the two differ in length.

    Example:
        >>> import math, torch
        >>> log = Bounded([0.0], [math.inf])
        >>> log(torch.tensor([[math.e]], dtype=torch.float64))[0]
        tensor([[1.]], dtype=torch.float64)
    """

    lower: Tensor
    upper: Tensor

    def __init__(self, lower: list[float], upper: list[float]) -> None:
        super().__init__()
        low, high = (torch.as_tensor(ends, dtype=torch.float64) for ends in (lower, upper))
        if low.dim() != 1 or low.shape != high.shape or not bool((low < high).all()):
            raise ValueError(
                f"upper: got {upper!r} with lower {lower!r}, expected as many numbers, each above "
                "its lower end"
            )
        self.register_buffer("lower", low)
        self.register_buffer("upper", high)

    def arguments(self) -> dict[str, list[float]]:
        """The ends as numbers."""
        return {"lower": self.lower.tolist(), "upper": self.upper.tolist()}

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""The columns on the real line, and :math:`\ln|dy/dx|`, shape (B,)."""
        above, below = self._masks()
        rise = torch.where(above, inputs - self.lower, 1.0).log()
        fall = torch.where(below, self.upper - inputs, 1.0).log()
        outputs = torch.where(above | below, rise - fall, inputs)
        width = torch.where(above & below, self.upper - self.lower, 1.0).log()
        return outputs, (width - rise - fall).sum(1)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""The columns between their ends, and :math:`\ln|dx/dy|`, shape (B,)."""
        above, below = self._masks()
        low = torch.where(above, self.lower, 0.0)
        high = torch.where(below, self.upper, 0.0)
        outputs = torch.where(above, low + inputs.exp(), inputs)
        outputs = torch.where(below, high - (-inputs).exp(), outputs)
        outputs = torch.where(above & below, low + (high - low) * inputs.sigmoid(), outputs)
        both = (
            F.logsigmoid(inputs)
            + F.logsigmoid(-inputs)
            + torch.where(above & below, high - low, 1.0).log()
        )
        slope = torch.where(above, inputs, torch.where(below, -inputs, 0.0))
        return outputs, torch.where(above & below, both, slope).sum(1)

    def _masks(self) -> tuple[Tensor, Tensor]:
        return self.lower.isfinite(), self.upper.isfinite()


class SinhArcsinh(Configured, Transform):
    r"""Skewness and heavy tails, column by column, in closed form.

    .. math:: z = \sinh(\delta\, \operatorname{arcsinh}(y) - \epsilon), \qquad
              y = (x - \mu) / \sigma

    makes a normal variable of one with the skewness :math:`\epsilon` and tails that are heavier
    where :math:`\delta < 1`. Jones and Pewsey, *Sinh-arcsinh distributions*,
    `doi:10.1093/biomet/asp053 <https://doi.org/10.1093/biomet/asp053>`_.

    Args:
        features: D, the number of columns.

    Attributes:
        location: :math:`\mu`, shape (D,).
        log_scale: :math:`\ln \sigma`.
        skewness: :math:`\epsilon`.
        log_tail: :math:`\ln \delta`.

    Example:
        >>> import torch
        >>> marginals = SinhArcsinh(2)  # at its start the identity
        >>> marginals(torch.ones(1, 2))[0]
        tensor([[1., 1.]], grad_fn=<SinhBackward0>)
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = validation.integer("features", features)
        self.location = nn.Parameter(torch.zeros(features))
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.skewness = nn.Parameter(torch.zeros(features))
        self.log_tail = nn.Parameter(torch.zeros(features))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Columns that are closer to normal, and :math:`\ln|dz/dx|`, shape (B,)."""
        y = (inputs - self.location) * (-self.log_scale).exp()
        h = self.log_tail.exp() * y.asinh() - self.skewness
        return h.sinh(), self._log_slope(y, h)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""The way back, and :math:`\ln|dx/dz|`, shape (B,)."""
        h = inputs.asinh()
        y = ((h + self.skewness) * (-self.log_tail).exp()).sinh()
        return self.location + self.log_scale.exp() * y, -self._log_slope(y, h)

    def _log_slope(self, y: Tensor, h: Tensor) -> Tensor:
        # ln cosh h without overflow
        log_cosh = h.abs() + F.softplus(-2 * h.abs()) - math.log(2)
        constant = self.log_tail - self.log_scale
        return (log_cosh - 0.5 * torch.log1p(y.square()) + constant).sum(1)


class NormalMixture(Configured, Distribution):
    r"""A mixture of normals, :math:`p(x) = \sum_k w_k N(x; \mu_k, \Sigma_k)`, as a base.

    Args:
        features: D.
        components: K.

    Attributes:
        logits: :math:`\ln w` up to a constant, shape (K,).
        means: :math:`\mu`, shape (K, D).
        factors: upper triangular :math:`P_k` with :math:`\Sigma_k^{-1} = P_k P_k^T`, shape
            (K, D, D).

    Example:
        >>> import torch
        >>> NormalMixture(2, 3).log_prob(torch.zeros(1, 2))  # as a normal, at its start
        tensor([-1.8379], grad_fn=<LogsumexpBackward0>)
    """

    def __init__(self, features: int, components: int) -> None:
        super().__init__()
        self.features = validation.integer("features", features)
        self.components = validation.integer("components", components)
        self.logits = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(torch.zeros(components, features))
        self.factors = nn.Parameter(torch.eye(features).repeat(components, 1, 1))

    def _log_prob(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        factors = self.factors.triu()
        y = torch.einsum("bd,kde->kbe", inputs, factors)
        y = y - torch.einsum("kd,kde->ke", self.means, factors)[:, None]
        slope = factors.diagonal(dim1=1, dim2=2).abs().log().sum(1)
        constant = self.logits.log_softmax(0) + slope - 0.5 * self.features * math.log(2 * math.pi)
        return torch.logsumexp(constant[:, None] - 0.5 * y.square().sum(2), dim=0)

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        chosen = torch.multinomial(self.logits.softmax(0), num_samples, replacement=True)
        noise = torch.randn(num_samples, 1, self.features).to(self.means)
        # y P = noise
        y = torch.linalg.solve_triangular(
            self.factors.triu()[chosen], noise, upper=True, left=False
        )
        rows: Tensor = self.means[chosen] + y[:, 0]
        return rows


def whitening(mean: Tensor, covariance: Tensor) -> LULinear:
    r"""A linear transform of nflows, set to :math:`\Sigma^{-1/2} (y - \mu)` (ZCA).

    Args:
        mean: :math:`\mu`, shape (D,).
        covariance: :math:`\Sigma`, shape (D, D), positive definite.
    """
    linear = LULinear(len(mean))
    values, vectors = torch.linalg.eigh(covariance.double())
    matrix = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    factor = torch.linalg.cholesky(matrix)
    scale = factor.diagonal()
    lower, upper = factor / scale, scale[:, None] * factor.T
    with torch.no_grad():
        linear.lower_entries.copy_(lower[linear.lower_indices])
        linear.upper_entries.copy_(upper[linear.upper_indices])
        linear.unconstrained_upper_diag.copy_((upper.diagonal() - linear.eps).expm1().log())
        linear.bias.copy_(-matrix @ mean.double())
    return linear


class Table(Configured, nn.Module):
    r"""The density of the rows of a table, in its units: the mean of those of a few flows.

    .. math:: p(x) = \frac{1}{M} \sum_m p_m(x)

    Args:
        flows: of nflows, M of them, over rows of the table in double precision.
        integers: for each column whether its values are integers.
        lower, upper: the ends of the columns, infinite where there are none.
        description: whatever belongs to the density, as JSON.
    """

    def __init__(
        self,
        flows: list[nn.Module],
        integers: list[bool],
        lower: list[float],
        upper: list[float],
        description: str = "{}",
    ) -> None:
        super().__init__()
        self.flows = nn.ModuleList(flows)
        self.integers, self.lower, self.upper = integers, lower, upper
        self.description = description

    def log_prob(self, rows: Tensor) -> Tensor:
        """The log-density of rows, shape (N,); minus infinity beyond the ends."""
        lower, upper = rows.new_tensor(self.lower), rows.new_tensor(self.upper)
        inside = ((rows >= lower) & (rows <= upper)).all(1)
        log_prob = rows.new_full((len(rows),), -math.inf)
        if bool(inside.any()):
            members = [flow.log_prob(rows[inside]) for flow in self.flows]  # type: ignore[operator]
            log_prob[inside] = torch.stack(members).logsumexp(0) - math.log(len(members))
        return log_prob

    def sample(self, num_samples: int, batch_size: int) -> Tensor:
        """Rows, shape (N, D), with integers where there are any, and within the ends."""
        member = torch.randint(len(self.flows), (num_samples,))
        rows = torch.empty(num_samples, len(self.integers), dtype=torch.float64)
        for number, flow in enumerate(self.flows):
            for places in (member == number).nonzero()[:, 0].split(batch_size):
                if len(places) > 0:
                    rows[places] = flow.sample(len(places))  # type: ignore[operator]
        rows = torch.where(torch.tensor(self.integers), rows.round(), rows)
        return rows.clamp(rows.new_tensor(self.lower), rows.new_tensor(self.upper))
