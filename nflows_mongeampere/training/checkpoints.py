"""Checkpoints of a training: written atomically, found in folders that were moved, checked."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint

from nflows_mongeampere.atomic import write
from nflows_mongeampere.training.objectives import Objective


class Checkpoint(ModelCheckpoint):
    """Keeps one checkpoint in a folder, also where that has been moved since.

    Args:
        folder: of the checkpoint.
        name: of the checkpoint, without ``.ckpt``.
        monitor: the metric of which the lowest is kept, or None for the last.
    """

    def __init__(self, folder: Path, name: str, monitor: str | None = None) -> None:
        super().__init__(
            folder,
            filename=name,
            monitor=monitor,
            enable_version_counter=False,
            save_on_train_epoch_end=True,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        moved = {key: here(state_dict[key]) for key in state_dict if key.endswith("_path")}
        kept = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(
            {**state_dict, **moved, "best_k_models": kept, "dirpath": self.dirpath}
        )


class AtomicFiles(TorchCheckpointIO):
    """Writes checkpoints atomically, in any folder."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        if "://" in str(path):  # a store of fsspec, which has its own ways
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = BytesIO()
        torch.save(checkpoint, content)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write(path, content.getvalue())


def restore(objective: Objective, path: str | Path) -> None:
    """Give a flow the weights and the solver steps of a checkpoint.

    Raises:
        ValueError: if there is no such checkpoint, or it is damaged or of another flow.
    """
    path = Path(path)
    if not fits(path, objective):
        raise ValueError(f"path: there is no checkpoint {path}; train the flow first")
    checkpoint = read(path)
    objective.load_state_dict(checkpoint["state_dict"])
    objective.take_steps(checkpoint)


def fits(path: Path, objective: Objective) -> bool:
    """Whether there is a checkpoint, which has to be one of ``objective``."""
    if not path.exists():
        return False
    found = {k: tuple(v.shape) for k, v in read(path)["state_dict"].items() if _is_tensor(v)}
    wanted = {k: tuple(v.shape) for k, v in objective.state_dict().items() if _is_tensor(v)}
    for key in [*wanted, *found]:
        if found.get(key) != wanted.get(key):
            raise ValueError(
                f"path: {path} is the checkpoint of another flow: {key} has shape "
                f"{found.get(key)}, expected {wanted.get(key)}; use another folder"
            )
    return True


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU."""
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


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
