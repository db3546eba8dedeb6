"""Callbacks of a training: a guard of its solver, its history, and a progress bar."""

from __future__ import annotations

import csv
import math
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
from pytorch_lightning.callbacks import Callback
from tqdm.auto import tqdm

from nflows_mongeampere import validation
from nflows_mongeampere.atomic import write
from nflows_mongeampere.models import transports
from nflows_mongeampere.training.divergence import diverged
from nflows_mongeampere.training.objectives import Objective
from nflows_mongeampere.transport import Transport


class SolverGuard(Callback):
    r"""Takes more steps when training exploits the solver's error, and fewer when it does not.

    An optimiser finds whatever error lowers the loss. After each validation the loss that is
    trained is compared, on some rows, with the one at twice the steps: the ``solver_error`` that
    the objective logs. Where they differ by more than the tolerance, the training goes on with half
    as many steps again. Where, after several validations in a row,
    one step fewer would still leave a third of the tolerance, by the order of the solver,
    :math:`e_{n - 1} = e_n (n / (n - 1))^p`, it goes on with one fewer, but never with fewer than at
    the start.

    Args:
        tolerance: the largest error of the mean loss, in nats.
        most: the largest number of steps; where more were needed, the training stops.
        patience: validations in a row after which a step may be taken back.

    Attributes:
        calm: validations in a row in which a step could have been taken back.
        fewest: the steps of each Monge-Ampère flow at the start of the training.
    """

    def __init__(self, tolerance: float, most: int = 64, patience: int = 3) -> None:
        self.tolerance = validation.positive("tolerance", tolerance)
        self.most = validation.integer("most", most)
        self.patience = validation.integer("patience", patience)
        self.calm = 0
        self.fewest: list[int] = []

    def on_fit_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self.fewest = self.fewest or [transport.steps for transport in transports(pl_module)]

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        error = abs(float(trainer.callback_metrics.get("solver_error", 0.0)))
        flows = transports(pl_module)
        if error > self.tolerance:
            self.calm = 0
            for transport in flows:
                transport.steps = self._more(trainer, pl_module, transport.steps, error)
            return
        spare = all(error * _growth(transport) <= self.tolerance / 3 for transport in flows)
        self.calm = self.calm + 1 if spare else 0
        if self.calm >= self.patience:
            self.calm = 0
            for transport, fewest in zip(flows, self.fewest, strict=True):
                transport.steps = max(fewest, transport.steps - 1)

    def _more(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        steps: int,
        error: float,
    ) -> int:
        more = math.ceil(1.5 * steps)
        if more > self.most:
            raise diverged(
                trainer,
                pl_module,
                f"the solver's error is {error:.2g} nats at {steps} steps, above the tolerance of "
                f"{self.tolerance:g}, and more than {self.most} are not allowed",
            )
        return more

    def state_dict(self) -> dict[str, Any]:
        return {"calm": self.calm, "fewest": self.fewest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calm, self.fewest = state_dict["calm"], list(state_dict["fewest"])


def _growth(transport: Transport) -> float:
    """By how much the error of a flow grows with one step fewer."""
    steps = transport.steps
    return 1.0 if steps == 1 else (steps / (steps - 1)) ** transport.integrator.order


COLUMNS = (
    "step",
    "minutes",
    "train",
    "validation",
    "solver_error",
    "learning_rate",
    "solver_steps",
)


class History(Callback):
    """A table of the training, a line for each validation interval, in a CSV file.

    The lines are part of the checkpoints, so that an interrupted training ends with the same file
    as any other. The file is written atomically.

    Args:
        path: of the file.

    Attributes:
        rows: the lines: ``step``, ``minutes``, ``train`` (the mean loss since the last line),
            ``validation`` and ``solver_error`` where there was a validation, ``learning_rate``,
            ``solver_steps`` of the flow that takes the most.

    Example:
        >>> History("metrics.csv")  # with the last line, once there is one
        History('metrics.csv', 0 intervals)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.rows: list[dict[str, float]] = []
        self._judged: dict[str, float] = {}

    def __repr__(self) -> str:
        last = "".join(f", {name}={value:.4g}" for name, value in (self.rows or [{}])[-1].items())
        return f"History({str(self.path)!r}, {len(self.rows)} intervals{last})"

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        names = {"validation": "val_loss", "solver_error": "solver_error"}
        metrics = trainer.callback_metrics
        self._judged = {key: float(metrics[m]) for key, m in names.items() if m in metrics}

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        assert isinstance(pl_module, Objective)
        row: dict[str, float] = {
            "step": trainer.global_step,
            "minutes": round(pl_module.seconds / 60, 3),
            "train": float(trainer.callback_metrics["train_loss"]),
            **self._judged,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "solver_steps": max((t.steps for t in transports(pl_module)), default=0),
        }
        self.rows.append(row)
        self._judged = {}
        if trainer.is_global_zero:
            text = StringIO()
            columns = [name for name in COLUMNS if any(name in row for row in self.rows)]
            table = csv.DictWriter(text, columns, lineterminator="\n")
            table.writeheader()
            table.writerows(self.rows)
            write(self.path, text.getvalue())

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])


class BudgetBar(Callback):
    """A progress bar over the budget of a training, with its validation loss.

    Args:
        name: what stands before the bar.
    """

    def __init__(self, name: str = "training") -> None:
        self.name = name
        self._bar: Any = None

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        assert isinstance(pl_module, Objective)
        self._bar = tqdm(
            total=100.0,
            initial=100 * pl_module.progress,
            desc=self.name,
            disable=not trainer.is_global_zero,
            mininterval=0.5 if sys.stderr.isatty() else 30,  # seconds; a log needs fewer lines
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, Objective)
        if "val_loss" in trainer.callback_metrics:
            self._bar.set_postfix_str(
                f"validation {trainer.callback_metrics['val_loss']:.2f} nats", refresh=False
            )
        self._bar.update(100 * pl_module.progress - self._bar.n)

    def teardown(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        if self._bar is not None:
            self._bar.close()
