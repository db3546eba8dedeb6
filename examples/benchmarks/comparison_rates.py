"""Learning rates, chosen by validation for every flow on every data set alike."""

from __future__ import annotations

import csv
import math
from io import StringIO
from pathlib import Path

from comparison_cells import Cell, Figures
from densities import DATA
from flows import FLOWS
from nflows_mongeampere.files import write

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
CHOSEN = Path(__file__).with_name("learning_rates.csv")
SEED = 1000  # of the trials, unlike those of the comparison
COLUMNS = ("data", "flow", "learning_rate", "seconds", *(f"{rate:g}" for rate in RATES))


def trials(data: str, flow: str, seconds: float) -> list[Cell]:
    """A short training with each of the rates."""
    return [Cell(data, flow, SEED, seconds, rate, trial=True) for rate in RATES]


def read_rates(path: Path) -> dict[tuple[str, str], float]:
    """The learning rate that was chosen for each data set and flow."""
    return {key: float(row["learning_rate"]) for key, row in _rows(path).items()}


def choose_rates(figures: list[Figures], path: Path) -> list[str]:
    """Write the rates of the lowest validation losses, beside those chosen before.

    Trainings that diverged are not chosen, unless all did. A data set and flow is chosen for when
    all its rates were tried.

    Returns:
        What is to be told: flows without a loss, and rates at the ends of the list.
    """
    rows, notes = _rows(path), []
    tried: dict[tuple[str, str], dict[float, Figures]] = {}
    for each in figures:
        tried.setdefault((each.data, each.flow), {})[each.learning_rate] = each
    for (data, flow), found in tried.items():
        if not set(RATES) <= set(found):
            continue
        losses = {rate: found[rate].validation for rate in RATES}
        sound = [rate for rate in RATES if math.isfinite(losses[rate])]
        sound = [rate for rate in sound if not found[rate].failure] or sound
        if not sound:
            notes.append(f"{data}, {flow}: {found[RATES[0]].failure}")
            continue
        best = min(sound, key=losses.__getitem__)
        if best in (RATES[0], RATES[-1]):
            notes.append(f"{data}, {flow}: the best rate, {best:g}, is at an end of those tried")
        rows[data, flow] = {
            "data": data,
            "flow": flow,
            "learning_rate": f"{best:g}",
            "seconds": f"{found[best].seconds:g}",
            **{f"{rate:g}": f"{losses[rate]:.4f}" for rate in RATES},
        }
    text = StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    names = {name: number for number, name in enumerate([*DATA, *FLOWS])}
    last = len(names)
    writer.writerows(rows[key] for key in sorted(rows, key=lambda k: [names.get(n, last) for n in k]))
    write(path, text.getvalue())
    return notes


def _rows(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    if not path.exists():
        return {}
    return {(row["data"], row["flow"]): row for row in csv.DictReader(StringIO(path.read_text()))}
