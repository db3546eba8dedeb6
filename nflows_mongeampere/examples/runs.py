"""Runs of the examples: their folders, which an interrupted run takes up again, and results."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer

from nflows_mongeampere.files import write


def open_folder(out: Path, config: dict[str, Any], overwrite: bool) -> None:
    """Prepare the folder of a run, new or interrupted; refuse to touch any other."""
    description = out / "config.json"
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file, expected a folder")
    if out.is_dir() and any(out.iterdir()):
        found = json.loads(description.read_text()) if description.is_file() else None
        if overwrite and found is not None:
            for path in (*out.rglob("*.ckpt"), out / "results.json"):
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
    write_json(description, config)


def write_json(path: Path, value: object) -> None:
    """Write a file atomically."""
    write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def command() -> str:
    """The command of this program as it was given, but for ``--out`` and ``--data-dir``."""
    program, *given = sys.argv
    parts = Path(program).resolve().parts
    begin = max((i for i, part in enumerate(parts) if part == "examples"), default=-1)
    words, rest = ["python", "/".join(parts[begin:])], iter(given)
    for word in rest:
        name, _, value = word.partition("=")
        if name in ("--out", "--data-dir"):
            if not value:
                next(rest, None)
        elif name != "--overwrite":
            words.append(word)
    return shlex.join(words)


def write_results(folder: Path, **figures: Any) -> None:
    """Write results.json: the command, what it ran on, and the figures."""
    machine = {"threads": torch.get_num_threads(), "cpu_count": os.cpu_count()}
    write_json(folder / "results.json", {"command": command(), **machine, **figures})


def fast_bfloat16() -> bool:
    """Whether the machine has instructions for bfloat16; without, it is many times slower."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch does not say
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("amx_bf16", "avx512_bf16"))


@contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Show errors that the user can mend in one line, and end with code 2."""
    try:
        yield
    except kinds as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


def read_results(folder: Path) -> dict[str, Any]:
    """The results of a finished run."""
    path = folder / "results.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no results.json: let its run end first")
    results: dict[str, Any] = json.loads(path.read_text())
    return results


def collect(
    runs: list[Path], out: Path, order: Callable[[dict[str, Any]], Any], name: str
) -> list[tuple[Path, dict[str, Any]]]:
    """Finished runs in order, with their results and metrics copied into a folder.

    Args:
        runs: their folders.
        out: where the copies go.
        order: what to sort results by.
        name: of the copies, a format string that is filled with the results.
    """
    found = [(folder, read_results(folder)) for folder in runs]
    found.sort(key=lambda run: order(run[1]))
    out.mkdir(parents=True, exist_ok=True)
    for folder, results in found:
        copy = name.format(**results)
        write_json(out / f"{copy}.json", results)
        write(out / f"{copy}.csv", (folder / "metrics.csv").read_text())
    return found


def resident_memory() -> float:
    """The resident memory of this process, in MB; NaN where the system does not tell."""
    status = Path("/proc/self/status")
    return _kilobytes(status, "VmRSS") / 1000 if status.exists() else math.nan


def peak_memory() -> float:
    """The largest resident memory of this process so far, in MB; NaN where unknown."""
    status = Path("/proc/self/status")
    return _kilobytes(status, "VmHWM") / 1000 if status.exists() else math.nan


def _kilobytes(status: Path, key: str) -> float:
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(f"{key}:"))
    return float(line.split()[1])
