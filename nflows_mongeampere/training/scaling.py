"""Whether data come in a scale that a flow can learn from."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from nflows_mongeampere.training.layers import observed
from nflows_mongeampere.training.objectives import MaximumLikelihood
from nflows_mongeampere.transport import Transport

# A flow of 64 ridges in two dimensions, trained for 1,000 steps at 1e-2 on a normal column: within
# 0.2 nats for standard deviations from 0.03 to 10 and means up to 10; for a standard deviation of
# 0.01 0.4 nats too high; for one of 30, or a mean of 30, the solver's error is of several nats.
LARGEST, SMALLEST = 20.0, 0.02
# of which the standard deviation of a column is taken, at least
FEWEST_ROWS = 20


class ScaleCheck(Callback):
    """Warns, once, where the first batch reaches a Monge-Ampère flow in an unlike scale.

    A new flow is the identity, and its steps are meant for paths of length one. What counts is what
    reaches it: layers in front, an ActNorm or a linear one, may have scaled the data.
    """

    def __init__(self) -> None:
        self._watch, self._looked = ExitStack(), False

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        first = trainer.global_step == batch_idx == 0 and trainer.is_global_zero
        if first and isinstance(pl_module, MaximumLikelihood):
            self._watch.enter_context(observed(pl_module.flow, self._look))

    def on_train_batch_end(self, *_: Any) -> None:
        self._watch.close()

    def on_exception(self, *_: Any) -> None:
        self._watch.close()

    def _look(self, place: str, layer: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
        if isinstance(layer, Transport) and not self._looked:
            self._looked = True
            warn_of_scale(inputs[0])


def warn_of_scale(data: Tensor) -> None:
    """Warn where columns of ``data``, shape (B, ...), are far from mean 0 and deviation 1."""
    if len(data) < FEWEST_ROWS:
        return
    columns = data.detach().flatten(1).double()
    mean, deviation = columns.mean(0), columns.std(0)
    badness = torch.maximum(torch.maximum(mean.abs(), deviation) / LARGEST, SMALLEST / deviation)
    bad = int((badness > 1).sum())
    if bad:
        worst = int(badness.argmax())
        warnings.warn(
            f"data: {bad} of {len(badness)} columns reach the Monge-Ampère flow far from mean 0 "
            f"and standard deviation 1; worst is column {worst} with mean {mean[worst]:.3g} and "
            f"standard deviation {deviation[worst]:.3g} in the first batch; standardise the "
            "columns, and take the logarithm of heavy tails or cut outliers off",
            UserWarning,
            stacklevel=2,
        )
