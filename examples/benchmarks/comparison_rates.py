"""Learning rates, chosen by validation for every flow on every data set alike.

Rows of ``learning_rates.csv`` without losses are rates of version 0.1, chosen on moons and digits.
"""

from __future__ import annotations

import csv
import math
from io import StringIO
from pathlib import Path

from comparison_cells import Cell, Figures
from densities import DATA
from flows import FLOWS
from nflows_mongeampere.files import write

RATES = (1e-3, 3e-3, 1e-2, 3e-2)  # tried for every flow
BEYOND = {1e-3: 3e-4, 3e-2: 1e-1}  # tried where the best is at an end
CHOSEN = Path(__file__).with_name("learning_rates.csv")
SEED = 1000  # of the trials, unlike those of the comparison
COLUMNS = (
    "data",
    "flow",
    "learning_rate",
    "seconds",
    *(f"{rate:g}" for rate in sorted({*RATES, *BEYOND.values()})),
)


def trials(data: str, flow: str, seconds: float) -> list[Cell]:
    """A short training with each of the rates."""
    return [Cell(data, flow, SEED, seconds, rate, trial=True) for rate in RATES]


def read_rates(path: Path) -> dict[tuple[str, str], float]:
    """The learning rate that was chosen for each data set and flow."""
    return {key: float(row["learning_rate"]) for key, row in _rows(path).items()}


def trials_beyond(figures: list[Figures]) -> list[Cell]:
    """A training at one more rate for those whose best is at an end of the list."""
    return [
        Cell(data, flow, SEED, found[best].seconds, BEYOND[best], trial=True)
        for (data, flow), found in _tried(figures).items()
        if (best := _best(found)) in BEYOND
    ]


def write_rates(figures: list[Figures], path: Path) -> list[str]:
    """Write the rates of the lowest validation losses, beside those chosen before.

    Returns:
        The data sets and flows without any, and why.
    """
    rows, failures = _rows(path), []
    for (data, flow), found in _tried(figures).items():
        best = _best(found)
        if best is None:
            failures.append(f"{data}, {flow}: {found[RATES[0]].failure}")
            continue
        rows[data, flow] = {
            "data": data,
            "flow": flow,
            "learning_rate": f"{best:g}",
            "seconds": f"{found[best].seconds:g}",
            **{f"{rate:g}": f"{each.validation:.4f}" for rate, each in found.items()},
        }
    text = StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    order = {name: number for number, name in enumerate([*DATA, *FLOWS])}
    known = [key for key in rows if set(key) <= set(order)]
    writer.writerows(rows[key] for key in sorted(known, key=lambda key: [order[n] for n in key]))
    write(path, text.getvalue())
    return failures


def _tried(figures: list[Figures]) -> dict[tuple[str, str], dict[float, Figures]]:
    """The trials of each data set and flow, by their rates, where all of the list were tried."""
    tried: dict[tuple[str, str], dict[float, Figures]] = {}
    for each in figures:
        tried.setdefault((each.data, each.flow), {})[each.learning_rate] = each
    return {key: found for key, found in tried.items() if set(RATES) <= set(found)}


def _best(found: dict[float, Figures]) -> float | None:
    """The rate of the lowest loss; one at which the training diverged only if all others did."""
    good = [rate for rate in found if math.isfinite(found[rate].validation)]
    good = [rate for rate in good if not found[rate].failure] or good
    return min(good, key=lambda rate: found[rate].validation, default=None)


def _rows(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    if not path.exists():
        return {}
    return {(row["data"], row["flow"]): row for row in csv.DictReader(StringIO(path.read_text()))}
