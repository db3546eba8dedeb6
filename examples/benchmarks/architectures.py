"""Flows of five libraries on the same data, for the same training time each.

    python examples/benchmarks/architectures.py --out runs/rates --data-dir DIR --tune
    python examples/benchmarks/architectures.py --out runs/architectures --data-dir DIR
    python examples/benchmarks/architectures.py --out DIR --data moons --flow ridge --flow maf

Each cell (a data set, a flow, a seed) is trained and measured in a process of its own, on one
thread, and leaves a file when it is done: the same command takes up a run that was interrupted, and
more cells can be added to a folder. All times are seconds of the processor, so that a cell does not
depend on what else the machine does, and several commands may run side by side. The validation set
chooses the checkpoint, the test set is read once. A flow that fails in some way leaves a file that
says so.

With ``--tune`` every flow is trained once at each of four learning rates, and at a fifth where the
best is at an end of these; those of the lowest validation losses go to ``learning_rates.csv``,
which the comparison reads.

The flows are in ``flows.py``, the data in ``densities.py`` and ``tables.py``, training and
measuring in ``comparison_cells.py``, learning rates in ``comparison_rates.py``, the page in
``comparison_report.py`` and ``comparison_pictures.py``.
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from comparison_cells import KINDS, TOY, Cell, read_figures, run_cells
from comparison_rates import CHOSEN, read_rates, trials, trials_beyond, write_rates
from comparison_report import report
from densities import DATA
from flows import FLOWS
from nflows_mongeampere.examples.runs import one_line_errors, open_folder
from tables import TABLES

console = Console()


def choose(option: str, names: list[str] | None, known: Iterable[str]) -> list[str]:
    """The names that were asked for, all if none."""
    for name in names or ():
        if name not in known:
            raise ValueError(f"{option}: got {name!r}, expected some of {', '.join(known)}")
    return list(dict.fromkeys(names or known))


def plan(
    sizes: dict[str, int],
    flows: list[str],
    seconds: float | None,
    seeds: int | None,
    rate: float | None,
    rates: Path,
) -> list[Cell]:
    """The cells of the comparison; none where a flow is too slow for the data by its nature."""
    known = read_rates(rates)
    cells = []
    for name, features in sizes.items():
        kind = KINDS.get(name, TOY)
        for seed in range(seeds or kind.seeds):
            for flow in flows:
                if not FLOWS[flow].fits(features):
                    continue
                if rate is None and (name, flow) not in known:
                    raise ValueError(
                        f"--flow: no learning rate was chosen for {flow} on {name}; choose one "
                        f"with --tune --data {name} --flow {flow}, or give --learning-rate"
                    )
                chosen = rate or known[name, flow]
                cells.append(Cell(name, flow, seed, seconds or kind.seconds, chosen))
    return cells


def plan_trials(sizes: dict[str, int], flows: list[str], seconds: float | None) -> list[Cell]:
    """The cells by which learning rates are chosen."""
    return [
        cell
        for name, features in sizes.items()
        for flow in flows
        if FLOWS[flow].fits(features)
        for cell in trials(name, flow, seconds or KINDS.get(name, TOY).seconds)
    ]


def main(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/architectures"),
    data: Annotated[
        list[str] | None,
        typer.Option(help=f"Some of {', '.join(DATA)}; toys and images if left out."),
    ] = None,
    flow: Annotated[
        list[str] | None, typer.Option(help=f"Some of {', '.join(FLOWS)}; all if left out.")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            help="Of training, CPU seconds of one thread; left out, 6 for toys, 20 for digits, 60 "
            "for MNIST, 300 for tables.",
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="For each flow; 2, and 1 for MNIST, if left out.")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="MNIST's IDX files, downloaded if left out; the archive of the tables."),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=1e-6, help="Instead of those chosen by validation.")
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Choose learning rates instead of comparing.")
    ] = False,
    rates: Annotated[
        Path, typer.Option(help="The learning rates chosen by validation, a CSV file.")
    ] = CHOSEN,
    overwrite: Annotated[bool, typer.Option(help="Begin anew in a folder with a run.")] = False,
) -> None:
    """Compare flows: a table, its figures and pictures."""
    with one_line_errors(ValueError, OSError, ImportError):
        chosen = choose("--data", data, DATA) if data else [n for n in DATA if n not in TABLES]
        flows = choose("--flow", flow, FLOWS)
        # so that what is missing is told before hours of work
        sizes = {name: DATA[name](data_dir).features for name in chosen}
        for name in flows:
            FLOWS[name].make(max(2, FLOWS[name].least))
        if tune:
            cells = plan_trials(sizes, flows, seconds)
        else:
            cells = plan(sizes, flows, seconds, seeds, learning_rate, rates)
        settings = {"seconds": seconds, "learning_rate": learning_rate, "tune": tune}
        open_folder(out, settings, overwrite)
    if overwrite:
        shutil.rmtree(out / "cells", ignore_errors=True)
    (out / "cells").mkdir(exist_ok=True)
    places = out.resolve(), data_dir and data_dir.resolve(), console
    run_cells(cells, *places)
    if tune:
        run_cells(trials_beyond(read_figures(out)), *places)
        for failure in write_rates(read_figures(out), rates):
            console.print(failure)
        console.print(f"wrote {rates}")
    else:
        report(out, data_dir)
        console.print(f"wrote {out / 'architectures.md'} and {out / 'architectures'}")


if __name__ == "__main__":
    typer.run(main)
