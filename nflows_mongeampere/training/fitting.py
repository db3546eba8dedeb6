"""A training from its first step, or from where it was interrupted, to its best checkpoint."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_only
from tqdm.auto import tqdm

from nflows_mongeampere.training.batches import ValidationIntervals
from nflows_mongeampere.training.callbacks import BudgetBar, History
from nflows_mongeampere.training.checkpoints import AtomicFiles, Checkpoint, fits, read, restore
from nflows_mongeampere.training.divergence import DivergenceGuard
from nflows_mongeampere.training.objectives import Objective
from nflows_mongeampere.training.scaling import ScaleCheck


def fit(
    objective: Objective,
    batches: Iterable[Any],
    validation_batches: Iterable[Any] | None,
    folder: str | Path,
    *,
    name: str = "training",
    callbacks: Iterable[Callback] = (),
    **trainer: Any,
) -> History:
    """Train until the budget is spent, and leave the flow with the best weights found.

    Where ``folder`` holds the checkpoint of an interrupted training, that one is taken up, with its
    optimiser, schedule, clock and place in the data; it ends with the numbers of an uninterrupted
    one, to the last bit where the budget is in steps. Where the budget of that one is spent, its
    weights are read, whatever the batches now are: a new training needs a new folder.

    Lightning is the engine: it uses a GPU where there is one, and takes several processes, mixed
    precision, gradient clipping or loggers as keywords.

    Args:
        objective: the loss, with its flow and its budget.
        batches: a loader whose epochs are the validation intervals; see
            :func:`~nflows_mongeampere.training.endless`.
        validation_batches: a loader, read at the end of each interval; the lowest loss on it is the
            best. With None, or where no validation takes place, the flow keeps its last weights.
        folder: for ``last.ckpt``, ``best.ckpt`` and ``metrics.csv``, written atomically.
        name: what stands before the progress bar.
        callbacks: further callbacks of Lightning; a ``DivergenceGuard`` or ``BudgetBar`` of your
            own takes the place of ours.
        **trainer: keywords of ``lightning.Trainer``.

    Returns:
        The history of the training.

    Raises:
        DivergenceError: if the loss is NaN, infinite or explodes; the checkpoints stay.
        ValueError: if a checkpoint in ``folder`` does not fit the objective.

    Warns:
        UserWarning: where the data of a :class:`~nflows_mongeampere.training.MaximumLikelihood`
            reach a Monge-Ampère flow in an unlike scale.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    history = History(folder / "metrics.csv")
    best, last = Checkpoint(folder, "best", "val_loss"), Checkpoint(folder, "last")
    path = folder / "last.ckpt"
    earlier = read(path) if fits(path, objective) else None
    objective.begin()
    if earlier is not None:
        steps, budget = earlier["global_step"], earlier["budget"]
        if objective.spent(steps, budget["seconds"]) >= 1:
            _tell(
                f"{name}: {folder} holds a finished training of {steps} steps, which is read; "
                "a new one needs a new folder"
            )
            history.load_state_dict(earlier["callbacks"][history.state_key])
            best.load_state_dict(earlier["callbacks"][best.state_key])
            restore(objective, best.best_model_path or path)
            return history
        _tell(f"{name}: goes on from step {steps} in {folder}")
        sampler = getattr(batches, "sampler", None)
        if isinstance(sampler, ValidationIntervals):
            sampler.resume(budget["batches"])
    settings = {
        "accelerator": "auto",
        "devices": 1,
        "max_epochs": -1,
        "gradient_clip_val": 10.0,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,  # EndlessBatches deals out its own
        "plugins": [AtomicFiles()],
        **trainer,
    }
    validates = _has_batches(validation_batches, settings.get("limit_val_batches"))
    if not validates:
        _tell(
            f"{name}: no validation_batches, so that the flow will keep its last weights, and no "
            "SolverGuard can look at its solver"
        )
    callbacks = list(callbacks)
    given = {type(callback) for callback in callbacks}
    guards = [DivergenceGuard(), ScaleCheck(), BudgetBar(name)]
    callbacks = [*(guard for guard in guards if type(guard) not in given), *callbacks]
    with _quiet():
        engine = lightning.Trainer(callbacks=[*callbacks, history, best, last], **settings)
        engine.fit(
            objective, batches, validation_batches, ckpt_path=None if earlier is None else str(path)
        )
        if not validates:
            best.best_model_path = ""  # of an earlier part of this training, if any
        if not settings.get("fast_dev_run"):
            # where time runs out within an interval, Lightning keeps no checkpoint of its steps
            engine.save_checkpoint(path)
    if best.best_model_path:
        restore(objective, best.best_model_path)
    elif validates:
        _tell(f"{name}: no weights were validated, so that the flow keeps its last ones")
    return history


def _has_batches(loader: Any, limit: Any) -> bool:
    """Whether Lightning will find anything to validate on."""
    try:
        return loader is not None and limit != 0 and len(loader) > 0
    except TypeError:  # of unknown length
        return True


@rank_zero_only
def _tell(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning tells of its hardware and of choices made here on purpose; errors remain."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
            yield
    finally:
        logger.setLevel(level)
