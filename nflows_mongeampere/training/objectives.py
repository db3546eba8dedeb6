"""What a training minimises, for nflows flows and normflows models alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

import pytorch_lightning as lightning
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from nflows_mongeampere import validation
from nflows_mongeampere.costs import unrecorded
from nflows_mongeampere.integration import IntegrationError
from nflows_mongeampere.models import refined, transport_costs, transports
from nflows_mongeampere.training.batches import mix
from nflows_mongeampere.training.divergence import diverged
from nflows_mongeampere.training.layers import finite, first_not_finite
from nflows_mongeampere.training.scores import sample_with_score
from nflows_mongeampere.variational import (
    conditional,
    require_density,
    rows_for,
    sample_and_log_prob,
    stochastic_layers,
    target_log_prob,
)

# rows of each validation batch on which the solver's error is measured
WATCHED_ROWS = 20

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
Result = TypeVar("Result")


class Objective(lightning.LightningModule):
    """A loss in nats, its optimiser, and the budget of steps or minutes over which it is minimised.

    The learning rate rises linearly for some steps and then falls to zero, as a cosine of the part
    of the budget that is spent. What is random in a step depends on the seed and the number of the
    step alone.

    An objective implements :meth:`losses`, or :meth:`loss` where its loss is no mean over rows.
    Lightning's loggers and callbacks get ``train_loss``, the mean over a validation interval of
    what is minimised, penalties included; ``val_loss`` and ``test_loss``, without penalties and at
    twice the solver's steps; and ``solver_error``, the loss at the flow's steps less the one at
    twice as many.

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
        first_advice: what to look at first where a training diverges.
        culprit: where the last loss was NaN or infinite, the layer that made it so.
        clock: gives the seconds that ``minutes`` are of; ``time.process_time`` in a subclass makes
            them minutes of the processor.
    """

    first_advice = ""
    clock: Callable[[], float] = staticmethod(time.monotonic)

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
        fits = isinstance(flow, nn.Module) and hasattr(flow, "log_prob")
        expected = "a flow of nflows or a model of normflows: a module with log_prob"
        validation.kind("flow", flow, fits, expected)
        if steps is None and minutes is None:
            raise ValueError("steps: got neither steps nor minutes, expected a budget for training")
        self.flow = flow
        self.learning_rate = validation.positive("learning_rate", learning_rate)
        self.steps = validation.optional_integer("steps", steps)
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
        self.entries, self.culprit = 1, ""
        self._make_optimizer = optimizer
        self.begin()

    def begin(self) -> None:
        """Nothing of the budget is spent."""
        self.progress, self.batches = 0.0, 0
        self._seconds_before, self._start = 0.0, self.clock()

    @property
    def seconds(self) -> float:
        """Time of the training so far by its clock, interrupted runs included."""
        return self._seconds_before + self.clock() - self._start

    def losses(self, batch: Any) -> Tensor:
        """The loss of each row of a batch, in nats, shape (B,)."""
        raise NotImplementedError(f"{type(self).__name__} implements neither losses nor loss")

    def loss(self, batch: Any) -> Tensor:
        """The mean loss of a batch, in nats."""
        return self.losses(batch).mean()

    def training_step(self, batch: Any, index: int) -> Tensor:
        seed = mix(self.seed, self.batches, self.global_rank)
        self.batches += 1
        loss = self._evaluated(batch, lambda: self._seeded(seed, self._penalised_loss, batch))
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        return loss

    def _penalised_loss(self, batch: Any) -> Tensor:
        if self.kinetic == self.roughness == 0:
            return self.loss(batch)
        with transport_costs(self.flow) as costs:
            loss = self.loss(batch)
        kinetic, roughness = costs.kinetic.mean(), costs.roughness.mean()
        return loss + self.kinetic * kinetic + self.roughness * roughness

    def _evaluated(self, batch: Any, evaluate: Callable[[], Result]) -> Result:
        """What ``evaluate`` gives; if that is NaN or infinite, or fails, the fault is found."""
        try:
            result = evaluate()
        except (IntegrationError, ValueError) as error:
            culprit = first_not_finite(self.flow, evaluate) if finite(batch) else ""
            if not culprit and isinstance(error, ValueError):
                raise
            what = "a layer failed" if culprit else str(error)
            raise diverged(self.trainer, self, what, culprit) from error
        if not finite(result):  # the guard stops the training, in every process
            self.culprit = first_not_finite(self.flow, evaluate)
        return result

    @torch.no_grad()
    def validation_step(self, batch: Any, index: int) -> None:
        """Log the loss at twice the solver's steps, and by how much these change it."""
        self._log_judgement("val_loss", batch, index)

    @torch.no_grad()
    def test_step(self, batch: Any, index: int) -> None:
        """Log the loss and the solver's error, as in a validation."""
        self._log_judgement("test_loss", batch, index)

    def _log_judgement(self, name: str, batch: Any, index: int) -> None:
        seed = mix(self.seed, -1 - index)  # the same each time
        losses, errors = self._evaluated(batch, lambda: self.judge(batch, seed))
        self.log(name, losses.mean(), batch_size=_rows(batch), sync_dist=True)
        if errors is not None:
            self.log("solver_error", errors.mean(), batch_size=len(errors), sync_dist=True)

    @torch.no_grad()
    def judge(self, batch: Any, seed: int) -> tuple[Tensor, Tensor | None]:
        """The losses of a batch at twice the solver's steps, and the solver's errors of some.

        One solve at twice the steps, and one of the :meth:`watched` rows at the flow's.

        Args:
            batch: of a validation.
            seed: of everything that is random, the same in both solves.

        Returns:
            Losses, shape (B,), and those at the flow's steps less those at twice, shape (W,), or
            None for a flow without a solver.
        """
        with refined(self.flow):
            fine = self._seeded(seed, self._row_losses, batch)
        if not transports(self.flow):
            return fine, None
        coarse = self._seeded(seed, self._row_losses, self.watched(batch))
        return fine, coarse - fine[: len(coarse)]

    def watched(self, batch: Any) -> Any:
        """The part of a validation batch whose loss is evaluated at the flow's steps as well.

        Its first rows, or all of it where fewer would draw other noise.
        """
        if self._gives_mean or any(stochastic_layers(self.flow)):
            return batch
        return _first(batch, WATCHED_ROWS)

    def _row_losses(self, batch: Any) -> Tensor:
        """The loss of each row, or their mean for all of them, where there is no more."""
        return self.loss(batch)[None] if self._gives_mean else self.losses(batch)

    def _seeded(self, seed: int, evaluate: Callable[[Any], Result], batch: Any) -> Result:
        tensors = chain(self.flow.parameters(), self.flow.buffers())
        if all(tensor.device.type == "cpu" for tensor in tensors):
            # for accelerators that nothing uses, torch.manual_seed keeps a stack trace each time
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)
        return evaluate(batch)

    @property
    def _gives_mean(self) -> bool:
        return type(self).loss is not Objective.loss

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
        self._start = self.clock()

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
    those of :class:`Objective`. Lightning's ``trainer.predict`` gives the log-density of each row.

    Example:
        >>> from nflows_mongeampere import MongeAmpereFlow
        >>> objective = MaximumLikelihood(MongeAmpereFlow(2, 16), steps=100)
        >>> objective.loss(torch.randn(8, 2)).shape
        torch.Size([])
    """

    first_advice = (
        "Look at the data first: standardise the columns, and take the logarithm of heavy tails or "
        "cut outliers off"
    )

    def losses(self, batch: Any) -> Tensor:
        losses = -self.predict_step(batch, 0)
        self.entries = _part(batch, 0)[0].numel()
        return losses

    def predict_step(self, batch: Any, index: int) -> Tensor:
        """The log-density of each row, shape (B,)."""
        flow: Any = self.flow
        log_prob: Tensor = flow.log_prob(*(batch if isinstance(batch, (list, tuple)) else [batch]))
        return log_prob


class ReverseKL(Objective):
    r"""Fits a flow to an unnormalised target: the variational free energy.

    .. math:: F = \langle \ln q(x) - \ln \pi(x) \rangle_{x \sim q} \ge -\ln Z,
              \qquad Z = \int \pi(x) dx.

    A model of normflows that has a target ``p`` brings :math:`\pi` along; a flow of nflows is given
    one. Where flow and target are conditional, the target by a parameter ``context`` of its
    ``log_prob``, a batch is a batch of contexts (the last tensor, if it has several), over which F
    is averaged; else batches only count the steps. The keywords are those of :class:`Objective`.

    The ``solver_error`` is that of F with the same noise, at the flow's steps and at twice as many:
    one solve each.

    Lightning's ``trainer.predict`` gives, for each batch, samples with their log-density.

    Args:
        flow: a flow of nflows or a model of normflows.
        target: a module or function with ``log_prob``, as normflows' targets have it.
        num_samples: rows drawn from the flow in each step, in each process. With contexts nflows
            draws so many for each; normflows draws one for each context, repeated until they are
            ``num_samples``.
        path_gradient: whether the gradient leaves out the score, :math:`\partial_\theta \ln q(x)`
            at fixed :math:`x`, whose mean is zero. What is left, the gradient along the path of
            the samples, has no noise where :math:`q` is the target, and does not see whether the
            solver keeps :math:`q` normalised. The slope of :math:`\ln q` is carried along the path
            (:func:`~nflows_mongeampere.training.scores.sample_with_score`); where a layer cannot
            carry it, it takes the inverse of the flow as well, about twice the time. The flow's
            ``log_prob`` has to be the density of its samples, which stochastic layers and random
            Laplacians break. Roeder, Wu and Duvenaud,
            `arXiv:1703.09194 <https://arxiv.org/abs/1703.09194>`_.

    Raises:
        TypeError: if there is no target.
        ValueError: if the target would be trained, or the flow has no path gradient.
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
        expected = "an object with log_prob, given here or as the target p of the normflows model"
        validation.kind("target", target, hasattr(target, "log_prob"), expected)
        learnt = {id(p) for p in flow.parameters() if p.requires_grad}
        if isinstance(target, nn.Module) and any(id(p) in learnt for p in target.parameters()):
            raise ValueError(
                f"target: {type(target).__name__}, the target p of the model, has parameters that "
                "would be trained with the flow; call requires_grad_(False) on it"
            )
        self.target = target
        self.num_samples = validation.integer("num_samples", num_samples)
        self.path_gradient = validation.boolean("path_gradient", path_gradient)
        if self.path_gradient:
            require_density("flow", flow, of_given_points=True)
        self._conditional = conditional(flow, target)

    def losses(self, batch: Any) -> Tensor:
        if self.path_gradient and torch.is_grad_enabled():
            return self._path_losses(batch)
        x, log_q = self._draw(batch)
        self.entries = x[0].numel()
        return log_q - target_log_prob(self.target, x, self._context(batch))

    def _path_losses(self, batch: Any) -> Tensor:
        """The losses, with the gradient along the path of the samples alone."""
        scored = sample_with_score(self.flow, self.num_samples, self._context(batch))
        if scored is None:
            x, log_q = self._draw(batch)
            if finite(x):
                with _held(self.flow):
                    log_q = self._log_prob(x, batch)
        else:
            x = scored.x
            along = (scored.score * x).flatten(1).sum(1)
            log_q = scored.log_prob + along - along.detach()
        self.entries = x[0].numel()
        return log_q - target_log_prob(self.target, x, self._context(batch))

    def watched(self, batch: Any) -> Any:
        return batch

    def predict_step(self, batch: Any, index: int) -> tuple[Tensor, Tensor]:
        """Samples, shape (N, ...), and their log-density, shape (N,); for each context its own."""
        return self._seeded(mix(self.seed, index, self.global_rank, 1), self._draw, batch)

    def _context(self, batch: Any) -> Tensor | None:
        return _part(batch, -1) if self._conditional else None

    def _draw(self, batch: Any) -> tuple[Tensor, Tensor]:
        return sample_and_log_prob(self.flow, self.num_samples, self._context(batch))

    def _log_prob(self, x: Tensor, batch: Any, few: slice = slice(None)) -> Tensor:
        """The log-density of samples that were drawn for a batch, or of a few of them."""
        flow, context = self.flow, self._context(batch)
        given = [] if context is None else [rows_for(context, len(x))[few]]
        log_q: Tensor = flow.log_prob(x[few], *given)  # type: ignore[operator]
        return log_q


@contextmanager
def _held(flow: nn.Module) -> Iterator[None]:
    """The flow is a given density within: it does not learn, and its costs are not recorded."""
    trained = [parameter for parameter in flow.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with unrecorded():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _part(batch: Any, number: int) -> Any:
    return batch[number] if isinstance(batch, (list, tuple)) else batch


def _rows(batch: Any) -> int:
    return len(_part(batch, 0))


def _first(batch: Any, rows: int) -> Any:
    if isinstance(batch, (list, tuple)):
        return [part[:rows] for part in batch]
    return batch[:rows]
