r"""What the samples of a flow tell about an unnormalised density :math:`\pi`, with error bars.

A flow :math:`q` that was trained towards :math:`\pi` is an approximation, but its samples carry
weights :math:`w = \pi(x) / q(x)` that correct it: every estimate here but the variational one
converges to the exact value of :math:`\pi`, however good the flow. How fast, the effective sample
size tells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from normflows.flows import MetropolisHastings
from torch import Tensor, nn

from nflows_mongeampere import validation


class Estimate(NamedTuple):
    """A mean with its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.6g} ± {self.error:.2g}"


@dataclass(frozen=True)
class WeightedSamples:
    r"""Samples of a flow with their weights towards a target.

    Attributes:
        x: the samples, shape (N, ...).
        log_weights: :math:`\ln w = \ln \pi(x) - \ln q(x)` in nats, float64, shape (N,).
    """

    x: Tensor
    log_weights: Tensor

    def __len__(self) -> int:
        return len(self.log_weights)

    @property
    def free_energy(self) -> Estimate:
        r"""The variational free energy :math:`-\langle \ln w \rangle \ge -\ln Z`, in nats."""
        return _mean(-self.log_weights)

    @property
    def corrected_free_energy(self) -> Estimate:
        r"""The exact :math:`-\ln Z` as estimated by :math:`-\ln \langle w \rangle`, in nats.

        Its error is that of the mean of the weights, to first order; it is only to be trusted
        where the effective sample size is many samples.
        """
        weights = (self.log_weights - self.log_weights.max()).exp()
        mean = _mean(weights)
        value = -(self.log_weights.max().item() + math.log(mean.value))
        return Estimate(value, mean.error / mean.value)

    @property
    def effective_sample_size(self) -> float:
        r"""The part :math:`\langle w \rangle^2 / \langle w^2 \rangle` of N, between 1/N and 1."""
        share = self._shares
        return (1 / (len(self) * share.square().sum())).item()

    def mean(self, values: Tensor) -> Estimate:
        r"""The mean of an observable under the target, :math:`\sum w f / \sum w`.

        Args:
            values: of the observable on each sample, shape (N,).
        """
        values = self._observable(values)
        mean = self._shares @ values
        error = (self._shares * (values - mean)).square().sum().sqrt()
        return Estimate(mean.item(), error.item())

    def chain(self, chains: int = 1) -> Chain:
        r"""Independence Metropolis-Hastings chains whose proposals are these samples.

        A chain at :math:`x` goes on to the next sample :math:`y` with probability
        :math:`\min(1, w(y) / w(x))`, or stays; its stationary distribution is the target. The
        steps are normflows' ``MetropolisHastings``, which moves the numbers of the samples.

        Args:
            chains: how many run side by side, each with its part of the samples.
        """
        chains = validation.integer("chains", chains)
        length = len(self) // chains
        if length < 2:
            raise ValueError(
                f"chains: got {chains}, expected at most {len(self) // 2}, so that each has two "
                f"of the {len(self)} samples"
            )
        # numbers are kept as float64, in whose precision normflows then draws
        proposals = torch.arange(chains * length).double().view(length, chains, 1)
        step = MetropolisHastings(_Weights(self.log_weights), _Next(proposals), steps=1)
        visited = [proposals[0]]
        for _ in range(length - 1):
            visited.append(step(visited[-1])[0])
        return Chain(torch.stack(visited)[:, :, 0].long())

    @property
    def _shares(self) -> Tensor:
        """The weights, normalised to a sum of one."""
        return self.log_weights.softmax(0)

    def _observable(self, values: Tensor) -> Tensor:
        if not isinstance(values, Tensor) or values.shape != self.log_weights.shape:
            raise ValueError(
                f"values: got {validation.describe(values)}, expected a tensor of shape "
                f"({len(self)},): the observable on each sample"
            )
        return values.detach().to(self.log_weights)


@dataclass(frozen=True)
class Chain:
    """Markov chains over the samples of a flow.

    Attributes:
        numbers: which sample each chain visits at each step, shape (steps, chains).
    """

    numbers: Tensor

    @property
    def acceptance(self) -> float:
        """The part of the proposals that were accepted."""
        return (self.numbers[1:] != self.numbers[:-1]).double().mean().item()

    def autocorrelation_time(self, values: Tensor) -> float:
        r"""The integrated autocorrelation time of an observable, in steps.

        .. math:: \tau = 1 + 2 \sum_{t=1}^{M} \rho(t)

        up to the first window :math:`M \ge 5 \tau` (Sokal); N steps are worth :math:`N / \tau`
        independent samples.

        Args:
            values: of the observable on each *sample* (not each step), shape (N,).
        """
        path = self._path(values)
        steps = len(path)
        centred = path - path.mean()
        spectrum = torch.fft.rfft(centred, n=2 * steps, dim=0).abs().square()
        covariance = torch.fft.irfft(spectrum, dim=0)[:steps].mean(1) / steps
        if float(covariance[0]) <= 0:
            return float(steps)  # a chain that never moved, or an observable that never changed
        times = 2 * (covariance / covariance[0]).cumsum(0) - 1
        windows = torch.arange(steps)
        enough = (windows >= 5 * times).nonzero()
        window = int(enough[0]) if len(enough) else steps - 1
        return max(1.0, float(times[window]))

    def mean(self, values: Tensor) -> Estimate:
        """The mean of an observable along the chains, its error from the autocorrelation time."""
        path = self._path(values)
        independent = path.numel() / self.autocorrelation_time(values)
        error = math.inf if independent <= 1 else float(path.std()) / math.sqrt(independent)
        return Estimate(path.mean().item(), error)

    def _path(self, values: Tensor) -> Tensor:
        """The observable at each step of each chain, on the CPU."""
        count = int(self.numbers.max()) + 1
        if not isinstance(values, Tensor) or values.dim() != 1 or len(values) < count:
            raise ValueError(
                f"values: got {validation.describe(values)}, expected a tensor of shape (N,) with "
                f"N >= {count}: the observable on each sample"
            )
        return values.detach().double().cpu()[self.numbers]


def sample_and_log_prob(flow: Any, num_samples: int) -> tuple[Tensor, Tensor]:
    """Samples with their log-density, shapes (N, ...) and (N,), from either library."""
    pair = flow.sample_and_log_prob if hasattr(flow, "sample_and_log_prob") else flow.sample
    x, log_q = pair(num_samples)
    return x, log_q


def target_log_prob(target: Any, x: Tensor) -> Tensor:
    """The unnormalised log-density of a target in nats, shape (N,), at points of shape (N, ...).

    Raises:
        ValueError: if the target gives anything but one number for each point.
    """
    what = "one log-density for each sample; torch.distributions.Independent sums over entries"
    return validation.returned("target", target, target.log_prob(x), x.shape[:1], what)


@torch.no_grad()
def weigh(flow: nn.Module, target: Any, num_samples: int, batch_size: int = 500) -> WeightedSamples:
    """Draw samples from a flow and weigh them towards a target.

    Args:
        flow: a flow of nflows or a model of normflows.
        target: an object with ``log_prob``, as normflows' targets have it.
        num_samples: N.
        batch_size: how many are drawn at once.

    Returns:
        The samples with their weights.

    Raises:
        TypeError: if ``flow`` is no flow, or ``target`` has no ``log_prob``.
        ValueError: if the target does not give one log-density for each sample, or a weight is no
            number.
    """
    if not hasattr(flow, "sample"):
        raise TypeError(
            f"flow: got {type(flow).__name__}, expected a flow of nflows or a model of normflows"
        )
    if not hasattr(target, "log_prob"):
        raise TypeError(f"target: got {type(target).__name__}, expected an object with log_prob")
    num_samples = validation.integer("num_samples", num_samples)
    batch_size = validation.integer("batch_size", batch_size)
    points, log_weights = [], []
    for first in range(0, num_samples, batch_size):
        x, log_q = sample_and_log_prob(flow, min(batch_size, num_samples - first))
        points.append(x)
        log_weights.append((target_log_prob(target, x).double() - log_q.double()).cpu())
    weights = torch.cat(log_weights)
    if bool(weights.isnan().any()) or bool((weights == math.inf).any()):
        raise ValueError("target: the log-density of the flow or of the target is no number")
    return WeightedSamples(torch.cat(points), weights)


class _Weights(nn.Module):
    """The target of a chain over the numbers of samples."""

    def __init__(self, log_weights: Tensor) -> None:
        super().__init__()
        self.log_weights = log_weights

    def log_prob(self, state: Tensor) -> Tensor:
        return self.log_weights[state[:, 0].long()]


class _Next(nn.Module):
    """Proposes the next sample of each chain; the weights hold the density of the proposals."""

    def __init__(self, proposals: Tensor) -> None:
        super().__init__()
        self.rest = iter(proposals[1:])

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return next(self.rest), state.new_zeros(len(state))


def _mean(values: Tensor) -> Estimate:
    return Estimate(values.mean().item(), (values.std() / math.sqrt(len(values))).item())
