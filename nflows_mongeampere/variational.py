r"""Importance-sampling estimates for an unnormalised density :math:`\pi`, with error bars.

A flow :math:`q` that was trained towards :math:`\pi` is an approximation, but its samples carry
weights :math:`w = \pi(x) / q(x)` that correct it: every estimate here but the variational one
converges to the exact value of :math:`\pi`, provided the flow covers the target's support. The
effective sample size tells how many samples count, and Pareto's :math:`\hat k` whether the error
bars hold.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nflows_mongeampere import validation
from nflows_mongeampere.accuracy import AccuracyWarning
from nflows_mongeampere.pareto import largest_shape, tail_shape
from nflows_mongeampere.potentials import AutogradPotential


class Estimate(NamedTuple):
    """A mean with its standard error, which is infinite where the samples do not tell it."""

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
        r"""The variational free energy :math:`-\langle \ln w \rangle \ge -\ln Z`, in nats.

        Infinite, with an infinite error, where a sample lies outside the target's support.
        """
        return _mean(-self.log_weights)

    @property
    def corrected_free_energy(self) -> Estimate:
        r"""The exact :math:`-\ln Z` as estimated by :math:`-\ln \langle w \rangle`, in nats.

        Its error is that of the mean of the weights, to first order. It is infinite, with an
        infinite error, where no sample lies in the target's support.

        Warns:
            AccuracyWarning: where the error bar cannot be trusted; see :attr:`pareto_k`.
        """
        if not self._any_weight:
            return Estimate(math.inf, math.inf)
        self._check_tail()
        largest = self.log_weights.max()
        mean = _mean((self.log_weights - largest).exp())
        return Estimate(-(largest.item() + math.log(mean.value)), mean.error / mean.value)

    @property
    def effective_sample_size(self) -> float:
        r"""The part :math:`\langle w \rangle^2 / \langle w^2 \rangle` of N that counts.

        Between 1/N and 1, or 0 where no sample lies in the target's support.
        """
        if not self._any_weight:
            return 0.0
        return (1 / (len(self) * self._shares.square().sum())).item()

    @cached_property
    def pareto_k(self) -> float:
        r"""The shape :math:`\hat k` of the tail of the weights, the diagnostic of PSIS.

        Weights have a variance, and error bars a meaning, for k < 1/2; up to
        :math:`\min(1 - 1/\log_{10} N, 0.7)` they still hold in practice. Above, the largest weights
        that were drawn are not the largest there are: values and error bars that depend on the
        weights are warned of. The effective sample size cannot tell, for it is computed from the
        weights that were drawn. No diagnostic sees a mode of the target that no sample found.
        Vehtari et al., `arXiv:1507.02646 <https://arxiv.org/abs/1507.02646>`_.
        """
        return tail_shape(self.log_weights)

    def mean(self, values: Tensor) -> Estimate:
        r"""The mean of an observable under the target, :math:`\sum w f / \sum w`.

        Args:
            values: of the observable on each sample, shape (N,).

        Raises:
            ValueError: if ``values`` has another shape, or no sample lies in the target's support.

        Warns:
            AccuracyWarning: where the error bar cannot be trusted; see :attr:`pareto_k`.
        """
        if not isinstance(values, Tensor) or values.shape != self.log_weights.shape:
            raise ValueError(
                f"values: got {validation.describe(values)}, expected a tensor of shape "
                f"({len(self)},): the observable on each sample"
            )
        if not self._any_weight:
            raise ValueError(
                f"log_weights: none of the {len(self)} samples lies in the target's support, so "
                "that the mean is 0 / 0; train the flow to cover it, or draw more"
            )
        self._check_tail()
        share = self._shares
        # what an observable is outside the support is of no weight, and may be NaN
        values = torch.where(share > 0, values.detach().to(share), 0.0)
        mean = share @ values
        error = (share * (values - mean)).square().sum().sqrt()
        return Estimate(mean.item(), error.item() if len(self) > 1 else math.inf)

    def chain(self, chains: int = 1) -> Chain:
        r"""Independence Metropolis-Hastings chains whose proposals are these samples.

        A chain at :math:`x` goes on to the next sample :math:`y` with probability
        :math:`\min(1, w(y) / w(x))`, or stays; its stationary distribution is the target.

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
        proposals = torch.arange(chains * length).view(length, chains)
        log_weights, visited = self.log_weights.cpu(), [proposals[0]]
        for proposal in proposals[1:]:
            ratio = (log_weights[proposal] - log_weights[visited[-1]]).exp()
            accepted = torch.rand(chains, dtype=ratio.dtype) <= ratio  # never where it is NaN
            visited.append(torch.where(accepted, proposal, visited[-1]))
        return Chain(torch.stack(visited))

    @property
    def _any_weight(self) -> bool:
        return bool(self.log_weights.max() > -math.inf)

    @property
    def _shares(self) -> Tensor:
        """The weights, normalised to a sum of one."""
        return self.log_weights.softmax(0)

    def _check_tail(self) -> None:
        limit = largest_shape(len(self))
        if self.pareto_k > limit:
            counting = self.effective_sample_size * len(self)
            warnings.warn(
                f"the error bar cannot be trusted: a few weights decide (Pareto k = "
                f"{self.pareto_k:.2g}, at most {limit:.2g} for {len(self)} samples, of which "
                f"{counting:.1f} count); train the flow longer, check its solver's steps, or draw "
                "more samples",
                AccuracyWarning,
                stacklevel=3,
            )


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
        """The mean of an observable along the chains, its error from the autocorrelation time.

        The error is infinite where the chains have accepted nothing: they tell of the flow alone.
        """
        path = self._path(values)
        independent = path.numel() / self.autocorrelation_time(values)
        moved = independent > 1 and self.acceptance > 0
        error = float(path.std()) / math.sqrt(independent) if moved else math.inf
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


@torch.no_grad()
def weigh(
    flow: nn.Module,
    target: Any,
    num_samples: int,
    batch_size: int = 500,
    *,
    context: Tensor | None = None,
) -> WeightedSamples:
    r"""Draw samples from a flow and weigh them towards a target.

    Where a Laplacian is a random estimate, the exact one is taken, with a warning: the exponential
    of an unbiased log-density is biased.

    Args:
        flow: a flow of nflows or a model of normflows.
        target: an object with ``log_prob``, as normflows' targets have it.
        num_samples: N.
        batch_size: how many are drawn at once.
        context: what flow and target are conditioned on: one row, shape (1, ...), for all samples,
            or a row for each, shape (N, ...). It goes to ``target.log_prob(x, context=...)`` too.
            Rows of their own make the variational free energy the mean over contexts, and the other
            estimates those of one joint density of x and the rows.

    Returns:
        The samples with their weights.

    Raises:
        TypeError: if ``flow`` is no flow, or ``target`` has no ``log_prob``.
        ValueError: if the log-density of either is NaN, or if the target does not give one for each
            sample.
    """
    fits = isinstance(flow, nn.Module) and hasattr(flow, "sample")
    validation.kind("flow", flow, fits, "a flow of nflows or a model of normflows")
    validation.kind("target", target, hasattr(target, "log_prob"), "an object with log_prob")
    num_samples = validation.integer("num_samples", num_samples)
    batch_size = validation.integer("batch_size", batch_size)
    if context is not None and len(context) not in (1, num_samples):
        raise ValueError(
            f"context: got {len(context)} rows for {num_samples} samples, expected one row for all "
            "samples or one for each; weigh several contexts one by one"
        )
    points, log_weights = [], []
    for first in range(0, num_samples, batch_size):
        count = min(batch_size, num_samples - first)
        rows = context
        if context is not None and len(context) > 1:
            rows, count = context[first : first + count], 1
        with exact_laplacians(flow), exact_laplacians(target):
            x, log_q = sample_and_log_prob(flow, count, rows)
            log_p = target_log_prob(target, x, rows)
        for name, log_density in (("flow", log_q), ("target", log_p)):
            if bool(log_density.isnan().any()):
                raise ValueError(f"{name}: the log-density is NaN on samples of the flow")
        points.append(x)
        log_weights.append((log_p.double() - log_q.double()).cpu())
    weights = torch.cat(log_weights)
    if not bool((weights < math.inf).all()):
        raise ValueError("target: the log-density of flow or target is infinite where they sample")
    return WeightedSamples(torch.cat(points), weights)


def sample_and_log_prob(
    flow: Any, num_samples: int, context: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Samples with their log-density, shapes (N, ...) and (N,), from either library.

    nflows draws ``num_samples`` for each row of context. normflows draws one for each row: where
    there are fewer rows than ``num_samples``, each is repeated until they are enough. Samples of
    one row stand together in both; see :func:`rows_for`.
    """
    if hasattr(flow, "sample_and_log_prob"):  # nflows
        x, log_q = flow.sample_and_log_prob(num_samples, context)
        return (x, log_q) if context is None else (x.flatten(0, 1), log_q.flatten())
    if context is None:
        x, log_q = flow.sample(num_samples)
    else:
        count = len(context) * math.ceil(num_samples / len(context))
        x, log_q = flow.sample(count, rows_for(context, count))
    return x, log_q


def rows_for(context: Tensor, count: int) -> Tensor:
    """The row of context of each of so many samples, as :func:`sample_and_log_prob` orders them."""
    return context.repeat_interleave(count // len(context), 0)


def target_log_prob(target: Any, x: Tensor, context: Tensor | None = None) -> Tensor:
    """The unnormalised log-density of a target in nats, shape (N,), at points of shape (N, ...).

    Args:
        target: an object with ``log_prob``.
        x: the points.
        context: for a conditional target, as it was given to :func:`sample_and_log_prob`.

    Raises:
        ValueError: if the target gives anything but one number for each point.
    """
    given = {} if context is None else {"context": rows_for(context, len(x))}
    log_p = target.log_prob(x, **given)
    meaning = "one log-density for each sample; torch.distributions.Independent sums over entries"
    return validation.returned("target", target, log_p, x.shape[:1], meaning)


def conditional(flow: nn.Module, target: Any) -> bool:
    """Whether flow and target are given a context.

    A target is where its ``log_prob`` has a parameter of that name. Where that is optional, a layer
    of the flow has to take one as well: nflows gives ``context`` to all, and most ignore it.
    """
    parameter = inspect.signature(target.log_prob).parameters.get("context")
    if parameter is None or parameter.default is inspect.Parameter.empty:
        return parameter is not None
    return any(
        "context" in name.rpartition(".")[2]  # the layers of nflows' networks that take it
        or getattr(layer, "context_features", None) is not None
        or (
            isinstance(layer, AutogradPotential)
            and "context" in inspect.signature(layer.module.forward).parameters
        )
        for name, layer in flow.named_modules()
    )


def require_density(name: str, flow: Any, *, of_given_points: bool = False) -> None:
    """Raise unless the log-density of a flow is exact, so that its exponential means something.

    An unbiased estimate of a log-density makes an unbiased loss, but weights, acceptances and
    gradients along the path are no longer unbiased.

    Args:
        name: what the user calls ``flow``.
        flow: a flow or a target; what is no module passes.
        of_given_points: whether its ``log_prob`` has to be the density that it samples from, which
            the stochastic layers of normflows break.

    Raises:
        ValueError: naming the layer, and the remedy.
    """
    if not isinstance(flow, nn.Module):
        return
    for place, layer in stochastic_layers(flow):
        raise ValueError(
            f"{name}: the Laplacian of {place or name} ({type(layer).__name__}) is a random "
            "estimate, whose log-density would give biased weights and path gradients; build it "
            "with laplacian='exact'"
        )
    for place, layer in flow.named_modules() if of_given_points else ():
        if _samples_by_markov_chain(layer):
            raise ValueError(
                f"path_gradient: got True for a flow with a {type(layer).__name__} layer, {place}, "
                "whose log_prob is not the density of given samples; leave it False"
            )


@contextmanager
def exact_laplacians(model: Any) -> Iterator[None]:
    """Within it the potentials of a model have their exact Laplacian, with a warning."""
    changed = [*stochastic_layers(model)] if isinstance(model, nn.Module) else []
    before = [potential.laplacian_method for _, potential in changed]
    for place, potential in changed:
        potential.laplacian_method = "exact"
        warnings.warn(
            f"the Laplacian of {place} is a random estimate, whose weights would be biased; the "
            "exact one is taken here. Build the potential with laplacian='exact' to be rid of this",
            UserWarning,
            stacklevel=4,
        )
    try:
        yield
    finally:
        for (_, potential), method in zip(changed, before, strict=True):
            potential.laplacian_method = method


def stochastic_layers(flow: nn.Module) -> Iterator[tuple[str, AutogradPotential]]:
    """The potentials in a flow whose Laplacian is a random estimate, with their places."""
    for place, layer in flow.named_modules():
        if isinstance(layer, AutogradPotential) and layer.stochastic:
            yield place, layer


def _samples_by_markov_chain(layer: nn.Module) -> bool:
    from normflows.flows import HamiltonianMonteCarlo, MetropolisHastings

    return isinstance(layer, (MetropolisHastings, HamiltonianMonteCarlo))


def _mean(values: Tensor) -> Estimate:
    error = (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.inf
    return Estimate(values.mean().item(), math.inf if math.isnan(error) else error)
