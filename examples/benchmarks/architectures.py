"""Flows of four libraries on the same data, for the same training time each, over several seeds.

    python examples/benchmarks/architectures.py --out runs/architectures --data-dir DIR
    python examples/benchmarks/architectures.py --out DIR --data moons --flow ridge --flow maf

Each cell (a data set, a flow, a seed) is trained and measured in a process of its own, and leaves a
file when it is done: the same command takes up a run that was interrupted, and more cells can be
added to a folder. The validation set chooses the checkpoint, the test set is read once. A flow that
fails in some way leaves a file that says so.

The flows are in ``flows.py``, the data in ``densities.py``, training and measuring in
``comparison_cells.py``, the page in ``comparison_report.py`` and ``comparison_pictures.py``.
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from comparison_cells import KINDS, TOY, Cell, run_cells
from comparison_report import report
from densities import DATA
from flows import FLOWS
from nflows_mongeampere.examples.runs import one_line_errors, open_folder

console = Console()


def choose(option: str, names: list[str] | None, known: Iterable[str]) -> list[str]:
    """The names that were asked for, all if none."""
    for name in names or ():
        if name not in known:
            raise ValueError(f"{option}: got {name!r}, expected some of {', '.join(known)}")
    return list(dict.fromkeys(names or known))


def plan(
    data: list[str], flows: list[str], seconds: float | None, seeds: int | None, rate: float | None
) -> list[Cell]:
    """The cells of the comparison; none where a flow is too slow for the data by its nature."""
    cells = []
    for name in data:
        kind = KINDS.get(name, TOY)
        width = {"digits": 64, "mnist": 784}.get(name, 2)
        for seed in range(seeds or kind.seeds):
            for flow in flows:
                if width in FLOWS[flow].widths:
                    cells.append(Cell(name, flow, seed, seconds or kind.seconds, rate))
    return cells


def main(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/architectures"),
    data: Annotated[
        list[str] | None, typer.Option(help=f"Some of {', '.join(DATA)}; all if left out.")
    ] = None,
    flow: Annotated[
        list[str] | None, typer.Option(help=f"Some of {', '.join(FLOWS)}; all if left out.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.1, help="Of training; 6 for toys, 20 and 60 for images.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="For each flow; 2 for toys and digits, 1 for MNIST.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="MNIST's IDX files; left out, they are downloaded.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=1e-6, help="Instead of each flow's own.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Begin anew in a folder with a run.")] = False,
) -> None:
    """Compare flows: a table, its figures and pictures."""
    with one_line_errors(ValueError, OSError, ImportError):
        chosen = choose("--data", data, DATA)
        flows = choose("--flow", flow, FLOWS)
        for name in chosen:  # so that what is missing is told before hours of work
            DATA[name](data_dir)
        for name in flows:
            FLOWS[name].make(2)
        open_folder(out, {"seconds": seconds, "learning_rate": learning_rate}, overwrite)
    if overwrite:
        shutil.rmtree(out / "cells", ignore_errors=True)
    (out / "cells").mkdir(exist_ok=True)
    cells = plan(chosen, flows, seconds, seeds, learning_rate)
    waiting = [cell for cell in cells if not cell.path(out, ".json").exists()]
    console.print(f"{len(cells)} cells, {len(cells) - len(waiting)} of them done before")
    run_cells(waiting, out.resolve(), data_dir and data_dir.resolve(), console)
    report(out, data_dir)
    console.print(f"wrote {out / 'architectures.md'} and {out / 'architectures'}")


if __name__ == "__main__":
    typer.run(main)
