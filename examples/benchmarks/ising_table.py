"""The table and the learning curves of finished Ising runs, side by side.

python examples/benchmarks/ising_table.py runs/ising-8 runs/ising-16 --out docs/results/ising
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

import csv
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import typer

from nflows_mongeampere.examples.pictures import save_figure
from nflows_mongeampere.examples.runs import collect, one_line_errors
from nflows_mongeampere.files import write

PUBLISHED = 0.0219  # above the exact free energy per site at L = 16, arXiv:1809.10188
PICTURES = ("samples.png", "path.png", "structure.png")

HEADINGS = (
    *("L", "parameters", "minutes", "steps", "free energy", "exact", "gap", "at twice the steps"),
    *("ESS", "corrected", "acceptance", "command"),
)


def line(results: dict[str, Any]) -> str:
    """One row of the table, free energies in nats for each site."""
    cells = [
        f"{results['length']}",
        f"{results['parameters']:,}",
        f"{results['minutes']:.0f}",
        f"{results['steps']:,}",
        f"{results['free_energy']:.6f} ± {results['free_energy_se']:.6f}",
        f"{results['exact']:.6f}",
        f"{results['gap']:.6f}",
        f"{results['free_energy_double_steps'] - results['exact']:.6f}",
        f"{100 * results['ess']:.2g} %",
        f"{results['free_energy_corrected']:.6f} ± {results['free_energy_corrected_se']:.6f}",
        f"{100 * results['acceptance']:.2g} %",
        f"`{results['command']}`",
    ]
    return f"| {' | '.join(cells)} |".replace("-2.", "−2.")


def read_curve(folder: Path, results: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Minutes of a run, and how far its validation lies above the exact free energy, per site."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    sites = results["length"] ** 2
    gaps = [float(row["validation"]) / sites - results["exact"] for row in rows]
    return [float(row["minutes"]) for row in rows], gaps


def draw_curves(runs: list[tuple[Path, dict[str, Any]]], path: Path) -> None:
    """The gap to the exact free energy against time, a colour for each lattice."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    lengths: list[int] = []
    for folder, results in runs:
        first = results["length"] not in lengths
        if first:
            lengths.append(results["length"])
        label, alpha = (f"L = {lengths[-1]}", 1.0) if first else (None, 0.5)
        color = f"C{len(lengths) - 1}"
        axes.plot(*read_curve(folder, results), color=color, alpha=alpha, label=label)
    axes.axhline(PUBLISHED, color="grey", linestyle=":", linewidth=0.8)
    axes.text(
        0.01,
        PUBLISHED,
        "L = 16, published",
        fontsize=8,
        va="bottom",
        transform=axes.get_yaxis_transform(),
    )
    axes.set(
        xlabel="minutes of training",
        ylabel="free energy above the exact one, per site (nats)",
        xscale="log",
        yscale="log",
    )
    axes.legend(frameon=False)
    save_figure(figure, path)


def main(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    out: Annotated[Path, typer.Option(help="Folder for figures and metrics.")],
) -> None:
    """Collect finished runs: a table, their curves, and the pictures of the largest lattice."""
    name = "{length}-{minutes:.0f}min-seed{seed}"
    with one_line_errors(ValueError):
        found = collect(runs, out, lambda r: (r["length"], -round(r["minutes"]), r["seed"]), name)
    for picture in PICTURES:
        write(out / picture, (found[-1][0] / picture).read_bytes())
    draw_curves(found, out / "learning.png")
    typer.echo(f"| {' | '.join(HEADINGS)} |\n{'|---' * len(HEADINGS)}|")
    for _, results in found:
        typer.echo(line(results))


if __name__ == "__main__":
    typer.run(main)
