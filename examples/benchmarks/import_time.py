"""What importing the package costs beside what it is built on, in fresh processes.

    python examples/benchmarks/import_time.py --rounds 20

Processes are timed whole, in turns, and ratios are taken within a round.
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from benchmark_report import Section
from paired_timing import Item, interleave

IMPORTS = {
    "foundation": "import torch, nflows, torchdyn.numerics",
    "package": "import nflows_mongeampere",
    "package, MongeAmpereFlow": "from nflows_mongeampere import MongeAmpereFlow",
    "foundation, nflows.flows": "import nflows.flows, torchdyn.numerics",
}
console = Console()


def run(code: str) -> None:
    """A fresh process of Python."""
    subprocess.run([sys.executable, "-c", code], check=True)


def bar(processes: Sequence[Item]) -> Iterator[Item]:
    """A progress bar."""
    yield from track(processes, description="processes", console=console, transient=True)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Processes of each kind.")] = 20,
) -> None:
    """Time imports in turns and print their ratios."""
    calls = {name: partial(run, code) for name, code in IMPORTS.items()}
    timings = interleave(calls, rounds=rounds, track=bar)
    rows = [
        [name, f"{timings.median(name):.2f}", str(timings.ratio(name, "foundation"))]
        for name in IMPORTS
    ]
    notes = [
        f"Median and (smallest-largest) over {rounds} interleaved rounds of fresh processes.",
        f"The foundation: {IMPORTS['foundation']}. nflows.flows, which every Flow of nflows "
        "needs, loads Matplotlib.",
    ]
    Section("imports", "Import", ["", "seconds", "times foundation"], rows, notes).show(console)


if __name__ == "__main__":
    typer.run(main)
