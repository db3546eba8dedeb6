"""How a training that has diverged is noticed, and what is said."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

import pytorch_lightning as lightning
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from nflows_mongeampere import validation
from nflows_mongeampere.models import transports
from nflows_mongeampere.training.layers import finite


class DivergenceError(RuntimeError):
    """A training has diverged; the message says where, what is kept, and what to try."""


ADVICE = (
    "try a lower learning rate, stronger gradient clipping, more solver steps, or a penalty on the "
    "costs of transport"
)


def diverged(
    trainer: lightning.Trainer, module: lightning.LightningModule, what: str, culprit: str = ""
) -> DivergenceError:
    """The error to raise.

    Args:
        trainer: of the training, whose checkpoints are named.
        module: what was trained; its ``first_advice`` comes before ours.
        what: has happened.
        culprit: the layer that made NaN or infinite numbers, if one was found.
    """
    checkpoints = sorted(
        (c for c in trainer.checkpoint_callbacks if getattr(c, "best_model_path", "")),
        key=lambda checkpoint: getattr(checkpoint, "monitor", None) is None,
    )
    kept = "no checkpoint was written"
    if checkpoints:
        kept = f"{getattr(checkpoints[0], 'best_model_path')} is kept"  # noqa: B009
    first = getattr(module, "first_advice", "")
    if culprit:
        what = f"{what}; the first layer that gives NaN or infinite values is {culprit}"
        first = "Look at what that layer is given: a single row or a constant column has no scale"
    advice = f"{first}; then {ADVICE}" if first else ADVICE.capitalize()
    return DivergenceError(
        f"training diverged at step {trainer.global_step}: {what}; {kept}. {advice}"
    )


def mean_loss(trainer: lightning.Trainer, outputs: Any) -> float:
    """The loss of a batch, the same in every process.

    Lightning gives its callbacks what it differentiates: the loss over the batches accumulated.
    """
    return _mean(trainer, outputs["loss"]) * trainer.accumulate_grad_batches


def _mean(trainer: lightning.Trainer, loss: Tensor) -> float:
    """The mean over processes, so that all of them stop if one must."""
    return float(trainer.strategy.reduce(loss.detach(), reduce_op="mean"))


class DivergenceGuard(Callback):
    """Stops a training whose loss is NaN or infinite, or has risen far above the best so far.

    A loss that is NaN or infinite moves no parameter. Checkpoints are written at the ends of
    validation intervals alone, which a diverged training does not reach: the last one is good. When
    the solver's steps change, the losses before are forgotten: they were those of another solver.

    Args:
        deviations: by how many median absolute deviations of the best 20 losses in a row the median
            of the last 20 may exceed theirs.
        rise: which rise is no explosion however still the losses are, in nats for each entry of
            an event, which the objective counts.
    """

    def __init__(self, deviations: float = 10.0, rise: float = 0.1) -> None:
        self.deviations = validation.positive("deviations", deviations)
        self.rise = validation.positive("rise", rise)
        self._recent: deque[float] = deque(maxlen=20)
        self._best, self._spread = math.inf, 0.0
        self._steps: list[int] = []
        self._batch: Any = None

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._batch = batch

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: Tensor
    ) -> None:
        if not math.isfinite(mean := _mean(trainer, loss)):
            what = f"the loss is NaN or infinite ({mean})"
            if not finite(self._batch):
                what += ", as the batch has such entries"
            raise diverged(trainer, pl_module, what, getattr(pl_module, "culprit", ""))

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        loss = mean_loss(trainer, outputs)
        steps = [transport.steps for transport in transports(pl_module)]
        if steps != self._steps:
            self._recent.clear()
            self._best, self._steps = math.inf, steps
        self._recent.append(loss)
        if len(self._recent) < 20:
            return
        median = statistics.median(self._recent)
        if median < self._best:
            self._best = median
            self._spread = statistics.median(abs(loss - median) for loss in self._recent)
        allowed = max(self.deviations * self._spread, self.rise * getattr(pl_module, "entries", 1))
        if median > self._best + allowed:
            what = f"the loss has risen from {self._best:.6g} to {median:.6g} nats"
            raise diverged(trainer, pl_module, what)

    def state_dict(self) -> dict[str, Any]:
        return {
            "recent": list(self._recent),
            "best": self._best,
            "spread": self._spread,
            "steps": self._steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._recent.extend(state_dict["recent"])
        self._best, self._spread = state_dict["best"], state_dict["spread"]
        self._steps = state_dict["steps"]
