"""From a table to anomaly scores and samples, with pictures.

    python examples/table.py --out runs/table

Makes a table of orders with columns of unlike kinds: an amount with a heavy tail, a weight in
grams, a number of items, a discount between 0 and 1. Fits its density, beside a Gaussian mixture
and a kernel density of scikit-learn. Then it looks for wrong orders among new ones: their columns
are those of true orders, but each of another one, so that no column alone gives them away. Writes
orders.csv, model.safetensors, results.json, anomalies.png (precision and recall) and corner.png.
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

import time
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from sklearn.metrics import average_precision_score, precision_recall_curve
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nflows_mongeampere.examples.pictures import save_figure
from nflows_mongeampere.examples.runs import write_results
from nflows_mongeampere.files import write
from nflows_mongeampere.sklearn import MongeAmpereDensity

Array = NDArray[np.float64]

COLUMNS = ("amount", "grams", "items", "discount")
WRONG = 0.03  # the part of the new orders
console = Console()


def orders(count: int, seed: int) -> Array:
    """Orders of two kinds of customers."""
    rng = np.random.default_rng(seed)
    dealer = rng.random(count) < 0.3
    items = 1 + rng.poisson(np.where(dealer, 12, 2))
    price = rng.lognormal(np.where(dealer, 2.0, 3.0), 0.5)
    discount = np.where(dealer, rng.beta(8, 20, count), rng.beta(0.8, 12, count))
    amount = items * price * (1 - discount)
    grams = items * rng.gamma(8, 60, count) + 150
    return np.stack([amount, grams, items, discount], axis=1)


def with_wrong_ones(table: Array, seed: int) -> tuple[Array, NDArray[np.bool_]]:
    """The same orders, some of which have each column from another order."""
    rng = np.random.default_rng(seed)
    wrong = rng.random(len(table)) < WRONG
    mixed = table.copy()
    mixed[wrong] = np.stack([rng.choice(column, wrong.sum()) for column in table.T], axis=1)
    return mixed, wrong


def fit_all(train: Array) -> dict[str, Any]:
    """Our density, and two of scikit-learn with what they have to choose chosen."""
    mixtures = [
        make_pipeline(StandardScaler(), GaussianMixture(k, random_state=0)).fit(train)
        for k in range(1, 16)
    ]
    scaled = StandardScaler().fit_transform(train)
    kernel = make_pipeline(
        StandardScaler(),
        GridSearchCV(KernelDensity(), {"bandwidth": np.geomspace(0.03, 1, 12)}, cv=3),
    )
    return {
        "MongeAmpereDensity": MongeAmpereDensity(
            bounds={"x0": (0, None), "x1": (0, None), "x3": (0, 1)}, random_state=0
        ).fit(train),
        "GaussianMixture, BIC": min(mixtures, key=lambda m: m[-1].bic(scaled)),
        "KernelDensity, CV": kernel.fit(train),
    }


def log_density(model: Any, train: Array, rows: Array) -> Array:
    """Log-densities in the units of the table."""
    if isinstance(model, MongeAmpereDensity):
        return model.score_samples(rows)
    inner = getattr(model[-1], "best_estimator_", model[-1])
    scaled: Array = inner.score_samples(model[0].transform(rows))
    return scaled - float(np.log(model[0].scale_).sum())


def draw_precision(scores: dict[str, Array], wrong: NDArray[np.bool_], path: Path) -> None:
    """Precision and recall of the orders with the lowest densities."""
    figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for (name, score), style in zip(scores.items(), ("-", "--", ":"), strict=True):
        precision, recall, _ = precision_recall_curve(wrong, -score)
        average = average_precision_score(wrong, -score)
        axes.plot(recall, precision, style, label=f"{name}: {average:.2f}")
    axes.axhline(wrong.mean(), color="grey", lw=0.8, label=f"chance: {wrong.mean():.2f}")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(title="average precision", frameon=False, fontsize=8)
    save_figure(figure, path)


def draw_corner(table: Array, samples: Array, path: Path) -> None:
    """Columns against each other, rows of the table beside samples."""
    size = len(COLUMNS)
    figure, axes = plt.subplots(size, size, figsize=(8, 8), layout="constrained")
    groups = {"table": (table, "tab:blue"), "samples": (samples, "tab:orange")}
    logarithmic = (True, True, False, False)
    for i, j in np.ndindex(size, size):
        place = axes[i, j]
        if j > i:
            place.axis("off")
            continue
        for name, (rows, colour) in groups.items():
            if i == j:
                low, high = np.quantile(table[:, i], [0.001, 0.999])
                bins = np.linspace(low, high, 41)
                if logarithmic[i]:
                    bins = np.geomspace(low, high, 41)
                if COLUMNS[i] == "items":
                    bins = np.arange(0.5, high + 1)
                place.hist(
                    rows[:, i], bins, density=True, histtype="step", color=colour, label=name
                )
                place.set_yticks([])
            else:
                place.plot(rows[:, j], rows[:, i], ".", ms=1.5, alpha=0.4, color=colour)
                place.set_ylim(*np.quantile(table[:, i], [0, 1]))
                place.set_yscale("log" if logarithmic[i] else "linear")
        place.set_xscale("log" if logarithmic[j] else "linear")
        place.set_xlim(*np.quantile(table[:, j], [0, 1]))
        if i == size - 1:
            place.set_xlabel(COLUMNS[j])
        if j == 0 and i > 0:
            place.set_ylabel(COLUMNS[i])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", frameon=False)
    save_figure(figure, path)


def main(
    out: Annotated[Path, typer.Option(help="Folder for what is written.")] = Path("runs/table"),
    rows: Annotated[int, typer.Option(min=100, help="Orders to learn from.")] = 1500,
) -> None:
    """Fit the density of a table, score new rows, draw samples."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    train = orders(rows, seed=0)
    lines = [",".join(COLUMNS), *(",".join(f"{v:.6g}" for v in row) for row in train)]
    write(out / "orders.csv", "\n".join(lines) + "\n")
    start = time.process_time()
    models = fit_all(train)
    test = orders(4000, seed=1)
    mixed, wrong = with_wrong_ones(test, seed=2)
    scores = {name: log_density(model, train, mixed) for name, model in models.items()}
    found = {}
    for name, model in models.items():
        held_out = log_density(model, train, test)
        found[name] = {
            "log_likelihood": float(held_out.mean()),
            "standard_error": float(held_out.std() / len(held_out) ** 0.5),
            "average_precision": float(average_precision_score(wrong, -scores[name])),
        }
        console.print(
            f"{name}: log-likelihood of new rows {found[name]['log_likelihood']:.3f} ± "
            f"{found[name]['standard_error']:.3f}, average precision "
            f"{found[name]['average_precision']:.3f}"
        )
    ours = models["MongeAmpereDensity"]
    ours.save(out / "model.safetensors")
    draw_precision(scores, wrong, out / "anomalies.png")
    draw_corner(train, ours.sample(rows), out / "corner.png")
    write_results(
        out,
        models=found,
        solver_error=ours.solver_error_,
        cpu_seconds=round(time.process_time() - start, 1),
    )
    console.print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
