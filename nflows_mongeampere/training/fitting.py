"""A training from its first step, or from where it was interrupted, to its best checkpoint."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_only
from tqdm.auto import tqdm

from nflows_mongeampere.files import write
from nflows_mongeampere.training.batches import Chapters
from nflows_mongeampere.training.callbacks import BudgetBar, History
from nflows_mongeampere.training.divergence import DivergenceGuard
from nflows_mongeampere.training.objectives import Objective


def fit(
    objective: Objective,
    batches: Iterable[Any],
    validation_batches: Iterable[Any],
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
        batches: a loader whose epochs are the pieces of work between two checkpoints; see
            :func:`~nflows_mongeampere.training.endless`.
        validation_batches: a loader, read at the end of each epoch; the lowest loss on it is the
            best.
        folder: for ``last.ckpt``, ``best.ckpt`` and ``metrics.csv``, written whole.
        name: what stands before the progress bar.
        callbacks: further callbacks of Lightning.
        **trainer: keywords of ``lightning.Trainer``.

    Returns:
        The history of the training.

    Raises:
        DivergenceError: if the loss is no number or explodes; the checkpoints stay.
        ValueError: if a checkpoint in ``folder`` does not fit the objective.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    history = History(folder / "metrics.csv")
    best = _Best(
        folder,
        filename="best",
        monitor="validation",
        save_last=True,
        enable_version_counter=False,
        save_on_train_epoch_end=True,
    )
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
        "plugins": [_WholeFiles()],
        **trainer,
    }
    last = folder / "last.ckpt"
    earlier = _read(last) if _fits(last, objective) else None
    objective.begin()
    if earlier is not None:
        steps, budget = earlier["global_step"], earlier["budget"]
        if objective.spent(steps, budget["seconds"]) >= 1:
            _tell(
                f"{name}: {folder} holds a finished training of {steps} steps, which is read; "
                "a new one needs a new folder"
            )
            history.load_state_dict(earlier["callbacks"][history.state_key])
            restore(objective, folder / "best.ckpt")
            return history
        _tell(f"{name}: goes on from step {steps} in {folder}")
        sampler = getattr(batches, "sampler", None)
        if isinstance(sampler, Chapters):
            sampler.resume(budget["batches"])
    with _quiet():
        engine = lightning.Trainer(
            callbacks=[DivergenceGuard(), BudgetBar(name), *callbacks, history, best],
            **settings,
        )
        engine.fit(
            objective,
            batches,
            validation_batches,
            ckpt_path=None if earlier is None else str(last),
        )
        # where time runs out within an epoch, Lightning keeps no checkpoint of its steps
        engine.save_checkpoint(last)
    restore(objective, folder / "best.ckpt")
    return history


def restore(objective: Objective, path: str | Path) -> None:
    """Give a flow the weights and the solver steps of a checkpoint.

    Raises:
        ValueError: if there is no such checkpoint, or it is damaged or of another flow.
    """
    path = Path(path)
    if not _fits(path, objective):
        raise ValueError(f"path: there is no checkpoint {path}; train the flow first")
    checkpoint = _read(path)
    objective.load_state_dict(checkpoint["state_dict"])
    objective.take_steps(checkpoint)


class _Best(ModelCheckpoint):
    """Keeps the best weights, also where their folder has been moved since."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        moved = {key: here(state_dict[key]) for key in state_dict if key.endswith("_path")}
        kept = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(
            {**state_dict, **moved, "best_k_models": kept, "dirpath": self.dirpath}
        )


class _WholeFiles(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, on any file system."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        content = BytesIO()
        torch.save(checkpoint, content)
        write(path, content.getvalue())


@rank_zero_only
def _tell(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def _fits(path: Path, objective: Objective) -> bool:
    """Whether there is a checkpoint, which has to be one of ``objective``."""
    if not path.exists():
        return False
    found = {k: tuple(v.shape) for k, v in _read(path)["state_dict"].items() if _is_tensor(v)}
    wanted = {k: tuple(v.shape) for k, v in objective.state_dict().items() if _is_tensor(v)}
    for key in [*wanted, *found]:
        if found.get(key) != wanted.get(key):
            raise ValueError(
                f"path: {path} is the checkpoint of another flow: {key} has shape "
                f"{found.get(key)}, expected {wanted.get(key)}; use another folder"
            )
    return True


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _read(path: Path) -> dict[str, Any]:
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"state_dict", "budget", "solver_steps"} - set(checkpoint)
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except Exception as error:  # whatever a damaged archive makes of the reader
        raise ValueError(
            f"path: {path} is damaged or no checkpoint of a training ({error}); remove it to start "
            "anew"
        ) from error
    return checkpoint


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
