"""The folders of runs that may be interrupted, and taken up again by the same command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nflows_mongeampere.files import write


def open_folder(out: Path, config: dict[str, Any], overwrite: bool) -> None:
    """Prepare the folder of a run, new or interrupted; refuse to touch any other."""
    description = out / "config.json"
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file, expected a folder")
    if out.is_dir() and any(out.iterdir()):
        found = json.loads(description.read_text()) if description.is_file() else None
        if overwrite and found is not None:
            for path in (out / "last.ckpt", out / "best.ckpt", out / "results.json"):
                path.unlink(missing_ok=True)
        elif found is None:
            raise ValueError(f"--out: {out} holds other files; name an empty or a new folder")
        elif found != config:
            raise ValueError(
                f"--out: {out} holds a run with {found}, not {config}; name another folder or add "
                "--overwrite"
            )
        elif (out / "results.json").exists():
            raise ValueError(
                f"--out: {out} holds this run, finished; name another folder or add --overwrite"
            )
    out.mkdir(parents=True, exist_ok=True)
    write(description, json.dumps(config, indent=2) + "\n")
