"""What a training minimises, for nflows flows and normflows models alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as lightning
import torch
from normflows.flows import HamiltonianMonteCarlo, MetropolisHastings
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from nflows_mongeampere import validation
from nflows_mongeampere.integration import IntegrationError
from nflows_mongeampere.training.batches import mix
from nflows_mongeampere.training.divergence import DivergenceError
from nflows_mongeampere.transport import refined, transport_costs, transports
from nflows_mongeampere.variational import sample_and_log_prob, target_log_prob

# rows of each validation batch on which the solver's error is measured
WATCHED_ROWS = 20

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Objective(lightning.LightningModule):
    """A loss in nats, its optimiser, and the budget of steps or minutes over which it is minimised.

    The learning rate rises linearly for some steps and then falls to zero, as a cosine of the part
    of the budget that is spent. What is random in a step depends on the seed and the number of the
    step alone.

    Args:
        flow: what is trained: a flow of nflows or a model of normflows.
        learning_rate: of Adam, at its highest.
        optimizer: makes another optimiser from the flow; its learning rates are the highest ones.
        steps: the budget in steps of the optimiser.
        minutes: the budget in wall-clock time, validation included; where both are given, the
            training ends with the first to be spent.
        warmup_steps: over which the learning rate rises, within the first tenth of the budget.
        anneal: whether the learning rate falls; else it stays.
        kinetic, roughness: weights of penalties on the mean costs of transport, which keep a flow
            easy to integrate; see :func:`~nflows_mongeampere.transport_costs`.
        seed: of everything that is random in a step.

    Attributes:
        flow: what is trained.
        progress: the part of the budget that is spent, from 0 to 1.
        batches: how many were trained on; more than steps where gradients are accumulated.
        entries: of one event, as the last loss saw it: the scale of its noise.
    """

    def __init__(
        self,
        flow: nn.Module,
        *,
        learning_rate: float = 1e-3,
        optimizer: MakeOptimizer | None = None,
        steps: int | None = None,
        minutes: float | None = None,
        warmup_steps: int = 50,
        anneal: bool = True,
        kinetic: float = 0.0,
        roughness: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(flow, nn.Module) or not hasattr(flow, "log_prob"):
            raise TypeError(
                f"flow: got {type(flow).__name__}, expected a flow of nflows or a model of "
                "normflows: a module with log_prob"
            )
        if steps is None and minutes is None:
            raise ValueError("steps: got neither steps nor minutes, expected a budget for training")
        self.flow = flow
        self.learning_rate = validation.positive("learning_rate", learning_rate)
        self.steps = None if steps is None else validation.integer("steps", steps)
        self.minutes = None if minutes is None else validation.positive("minutes", minutes)
        self.warmup_steps = validation.integer("warmup_steps", warmup_steps, minimum=0)
        self.anneal = validation.boolean("anneal", anneal)
        self.kinetic = validation.number("kinetic", kinetic, minimum=0)
        self.roughness = validation.number("roughness", roughness, minimum=0)
        for name in ("kinetic", "roughness"):
            if getattr(self, name) > 0 and not transports(flow):
                raise ValueError(
                    f"{name}: got {getattr(self, name):g} for a {type(flow).__name__} without a "
                    "Monge-Ampère flow, whose paths it would weigh; leave it 0"
                )
        self.seed = validation.integer("seed", seed, minimum=0)
        self.entries = 1
        self._make_optimizer = optimizer
        self.begin()

    def begin(self) -> None:
        """Nothing of the budget is spent."""
        self.progress, self.batches = 0.0, 0
        self._seconds_before, self._start = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall-clock time of the training so far, interrupted runs included."""
        return self._seconds_before + time.monotonic() - self._start

    def loss(self, batch: Any) -> Tensor:
        """The mean loss of a batch, in nats."""
        raise NotImplementedError

    def training_step(self, batch: Any, index: int) -> Tensor:
        torch.manual_seed(mix(self.seed, self.batches, self.global_rank))
        self.batches += 1
        try:
            return self._penalised_loss(batch)
        except IntegrationError as error:
            raise DivergenceError(self.trainer, str(error)) from error

    def _penalised_loss(self, batch: Any) -> Tensor:
        if self.kinetic == self.roughness == 0:
            return self.loss(batch)
        with transport_costs(self.flow) as costs:
            loss = self.loss(batch)
        kinetic, roughness = costs.kinetic.mean(), costs.roughness.mean()
        return loss + self.kinetic * kinetic + self.roughness * roughness

    @torch.no_grad()
    def validation_step(self, batch: Any, index: int) -> None:
        """Log the loss at twice the solver's steps, and by how much these change it."""
        try:
            with refined(self.flow):
                loss = self._seeded_loss(batch, index)
            self.log("validation", loss, batch_size=_rows(batch), sync_dist=True)
            if transports(self.flow):
                few = _first(batch, WATCHED_ROWS)
                with refined(self.flow):
                    fine = self._seeded_loss(few, index)
                error = self._seeded_loss(few, index) - fine
                self.log("solver_error", error, batch_size=_rows(few), sync_dist=True)
        except IntegrationError as error:
            raise DivergenceError(self.trainer, str(error)) from error

    def _seeded_loss(self, batch: Any, index: int) -> Tensor:
        """The loss of a validation batch, with the same random numbers each time."""
        torch.manual_seed(mix(self.seed, -1 - index))
        return self.loss(batch)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimiser, and the schedule that the budget sets."""
        if self._make_optimizer is not None:
            optimizer = self._make_optimizer(self.flow)
        else:
            trained = [p for p in self.flow.parameters() if p.requires_grad]
            optimizer = torch.optim.Adam(trained, lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _rate(self, step: int) -> float:
        """The learning rate as a part of the highest one."""
        rate = min(1.0, max((step + 1) / (self.warmup_steps + 1), 10 * self.progress))
        return rate * 0.5 * (1 + math.cos(math.pi * self.progress)) if self.anneal else rate

    def on_train_start(self) -> None:
        self._start = time.monotonic()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take stock, before the learning rate of the next step is set."""
        # all processes go by the clock of the first
        seconds = self.trainer.strategy.broadcast(self.seconds) if self.minutes else 0.0
        self.progress = min(1.0, self.spent(self.global_step + 1, seconds))

    def spent(self, steps: int, seconds: float) -> float:
        """The part of the budget that so many steps in so many seconds spend."""
        by_steps = steps / self.steps if self.steps else 0.0
        by_clock = seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(by_steps, by_clock)

    def on_train_batch_end(self, outputs: object, batch: Any, index: int) -> None:
        if self.progress >= 1:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["budget"] = {
            "seconds": self.seconds,
            "progress": self.progress,
            "batches": self.batches,
        }
        checkpoint["solver_steps"] = [transport.steps for transport in transports(self.flow)]

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        self._seconds_before = checkpoint["budget"]["seconds"]
        self.progress = checkpoint["budget"]["progress"]
        self.batches = checkpoint["budget"]["batches"]
        self.take_steps(checkpoint)

    def take_steps(self, checkpoint: Mapping[str, Any]) -> None:
        """Take up the solver's steps of a checkpoint."""
        for transport, steps in zip(transports(self.flow), checkpoint["solver_steps"], strict=True):
            transport.steps = steps


class MaximumLikelihood(Objective):
    r"""Fits a density to data: minimises :math:`-\langle \ln p(x; c) \rangle` over batches.

    A batch is a tensor, shape (B, ...), or a pair of tensors, data and context. The keywords are
    those of :class:`Objective`.

    Example:
        >>> from nflows_mongeampere import MongeAmpereFlow
        >>> objective = MaximumLikelihood(MongeAmpereFlow(2, 16), steps=100)
        >>> objective.loss(torch.randn(8, 2)).shape
        torch.Size([])
    """

    def loss(self, batch: Any) -> Tensor:
        rows = batch if isinstance(batch, (list, tuple)) else [batch]
        flow: Any = self.flow
        loss: Tensor = -flow.log_prob(*rows).mean()
        self.entries = rows[0][0].numel()
        return loss


class ReverseKL(Objective):
    r"""Fits a flow to an unnormalised target: the variational free energy.

    .. math:: F = \langle \ln q(x) - \ln \pi(x) \rangle_{x \sim q} \ge -\ln Z,
              \qquad Z = \int \pi(x) dx.

    A model of normflows that has a target ``p`` brings :math:`\pi` along; a flow of nflows is given
    one. Batches are ignored: they only count the steps. The keywords are those of
    :class:`Objective`.

    Args:
        flow: a flow of nflows or a model of normflows.
        target: a module or function with ``log_prob``, as normflows' targets have it.
        num_samples: rows drawn from the flow in each step, in each process.
        path_gradient: whether the gradient leaves out the score, :math:`\partial_\theta \ln q(x)`
            at fixed :math:`x`, whose mean is zero. What is left, the gradient along the path of
            the samples, has no noise where :math:`q` is the target, and does not see whether the
            solver keeps :math:`q` normalised; it takes the inverse of the flow as well, about
            twice the time. The flow's ``log_prob`` has to be the density of its samples, which
            stochastic layers break. Roeder, Wu and Duvenaud, `arXiv:1703.09194
            <https://arxiv.org/abs/1703.09194>`_.
    """

    def __init__(
        self,
        flow: nn.Module,
        target: Any = None,
        *,
        num_samples: int = 64,
        path_gradient: bool = False,
        **keywords: Any,
    ) -> None:
        super().__init__(flow, **keywords)
        target = getattr(flow, "p", None) if target is None else target
        if not hasattr(target, "log_prob"):
            raise TypeError(
                f"target: got {type(target).__name__}, expected an object with log_prob, given "
                "here or as the target p of the normflows model"
            )
        learnt = {id(p) for p in flow.parameters() if p.requires_grad}
        if isinstance(target, nn.Module) and any(id(p) in learnt for p in target.parameters()):
            raise ValueError(
                f"target: {type(target).__name__}, the target p of the model, has parameters that "
                "would be trained with the flow; call requires_grad_(False) on it"
            )
        self.target = target
        self.num_samples = validation.integer("num_samples", num_samples)
        self.path_gradient = validation.boolean("path_gradient", path_gradient)
        for layer in flow.modules() if self.path_gradient else ():
            if isinstance(layer, (MetropolisHastings, HamiltonianMonteCarlo)):
                raise ValueError(
                    f"path_gradient: got True for a flow with a {type(layer).__name__} layer, "
                    "whose log_prob is not the density of given samples; leave it False"
                )

    def loss(self, batch: Any) -> Tensor:
        x, log_q = sample_and_log_prob(self.flow, self.num_samples)
        if self.path_gradient and bool(x.isfinite().all()):
            flow: Any = self.flow
            with _held(flow):
                log_q = flow.log_prob(x)
        loss: Tensor = (log_q - target_log_prob(self.target, x)).mean()
        self.entries = x[0].numel()
        return loss


@contextmanager
def _held(flow: nn.Module) -> Iterator[None]:
    """The flow is a given density within: it does not learn, and its costs are not recorded."""
    trained = [parameter for parameter in flow.parameters() if parameter.requires_grad]
    recorders = [(transport, transport._costs) for transport in transports(flow)]
    for parameter in trained:
        parameter.requires_grad_(False)
    for transport, _ in recorders:
        transport._costs = None
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for transport, costs in recorders:
            transport._costs = costs


def _rows(batch: Any) -> int:
    return len(batch[0] if isinstance(batch, (list, tuple)) else batch)


def _first(batch: Any, rows: int) -> Any:
    if isinstance(batch, (list, tuple)):
        return [part[:rows] for part in batch]
    return batch[:rows]
