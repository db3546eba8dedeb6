"""The Ising model over a range of temperatures, by one flow that is trained once.

    python examples/ising_temperatures.py --length 8 --between 1.6 3.6 --minutes 5 --out runs/range

The temperature is the context of the flow: scales of Fourier modes and amplitudes of the potentials
are polynomials in it. At each temperature samples are weighed towards the exact density, so that
free energy, energy and specific heat come with error bars, beside the exact ones. An interrupted
run is taken up by the same command.
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import torch
import typer
from matplotlib.axes import Axes

from ising_monte_carlo import reference
from nflows_mongeampere.examples.pictures import save_figure
from nflows_mongeampere.examples.runs import one_line_errors, open_folder, write_results
from nflows_mongeampere.examples.weighing import drawn, settled
from nflows_mongeampere.lattices import LatticeFlow, train
from nflows_mongeampere.targets import CRITICAL_TEMPERATURE, Ising
from nflows_mongeampere.targets.spins import spin_observables
from nflows_mongeampere.training import DivergenceError
from nflows_mongeampere.variational import Estimate

STEP = 1e-3  # of 1/T, in the differences that give the exact energy and specific heat


@dataclass(frozen=True)
class Point:
    """One temperature; everything for each site, estimates with standard errors.

    Attributes:
        free_energy: of the spins, over T; ``free_energy_double_steps`` at twice the solver's
            steps, from the same noise.
        ess: the effective sample size as a part of the samples.
        gap: of the variational free energy above the exact one.
        magnetisation_monte_carlo: by cluster Monte Carlo.
        solver_steps: of each Monge-Ampère transform.
    """

    temperature: float
    ess: float
    gap: float
    free_energy: Estimate
    free_energy_double_steps: float
    free_energy_exact: float
    energy: Estimate
    energy_exact: float
    specific_heat: Estimate
    specific_heat_exact: float
    magnetisation: Estimate
    magnetisation_monte_carlo: Estimate
    solver_steps: int


def exact(length: int, temperature: float) -> tuple[float, float, float]:
    r"""Free energy over T, energy and specific heat, for each site.

    .. math:: e = \frac{d (\beta f)}{d \beta}, \qquad c = -\beta^2 \frac{d^2 (\beta f)}{d \beta^2}

    by central differences of Kaufman's formula.
    """
    beta = 1 / temperature
    low, middle, high = (
        Ising(length, 1 / (beta * (1 + shift))).spin_free_energy for shift in (-STEP, 0.0, STEP)
    )
    width = beta * STEP
    return middle, (high - low) / (2 * width), -(beta**2) * (high - 2 * middle + low) / width**2


def judge(flow: LatticeFlow, temperature: float, count: int, seed: int) -> Point:
    """What the samples at one temperature tell."""
    length = flow.shape[0]
    target, context = Ising(length, temperature), torch.tensor([[temperature]])
    torch.manual_seed(seed)
    found = settled(flow, target, count, lambda few: few.corrected_free_energy, context)
    samples, finer = (
        drawn(flow, target, count, seed, factor, context)
        for factor in (found.factor, 2 * found.factor)
    )
    spins = spin_observables(target, samples)
    known = exact(length, temperature)
    return Point(
        temperature=temperature,
        ess=samples.effective_sample_size,
        gap=samples.free_energy.value / target.sites - target.free_energy,
        free_energy=spins.free_energy,
        free_energy_double_steps=finer.corrected_free_energy.value / target.sites - target.shift,
        free_energy_exact=known[0],
        energy=spins.energy,
        energy_exact=known[1],
        specific_heat=spins.specific_heat,
        specific_heat_exact=known[2],
        magnetisation=spins.magnetisation,
        magnetisation_monte_carlo=reference(target, sweeps=2000, seed=seed).magnetisation,
        solver_steps=found.factor * flow.pieces[0].steps,
    )


def draw(points: list[Point], length: int, path: Path) -> None:
    """Every quantity against the temperature, beside what it should be."""
    low, high = points[0].temperature, points[-1].temperature
    fine = torch.linspace(low, high, 200).tolist()
    curves = list(zip(*(exact(length, t) for t in fine), strict=True))
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
    temperatures = [point.temperature for point in points]
    panels = ("free_energy", "energy", "specific_heat", "magnetisation")
    titles = ("free energy / T", "energy", "specific heat", "|magnetisation|")

    def bars(axis: Axes, name: str, **style: Any) -> None:
        values, errors = zip(*(getattr(point, name) for point in points), strict=True)
        axis.errorbar(temperatures, values, errors, **style)

    for axis, curve in zip(axes, curves, strict=False):
        axis.plot(fine, curve, color="grey", label="exact")
    known = {"fmt": "s", "mfc": "none", "color": "grey", "label": "cluster Monte Carlo"}
    bars(axes[3], "magnetisation_monte_carlo", **known)
    for axis, name, title in zip(axes, panels, titles, strict=True):
        bars(axis, name, fmt=".", label="one flow, by weights")
        axis.axvline(CRITICAL_TEMPERATURE, color="grey", linestyle=":", linewidth=1)
        axis.set(xlabel="temperature", title=f"{title}, per site")
    axes[0].legend(frameon=False)
    axes[3].legend(frameon=False)
    save_figure(figure, path)


def run(config: dict[str, Any], out: Path, overwrite: bool) -> list[Point]:
    """Train one flow and weigh it at every temperature."""
    low, high = config["between"]
    target = Ising(config["length"], (low + high) / 2)
    open_folder(out, config, overwrite)
    torch.manual_seed(config["seed"])
    settings = {"between": (low, high), "degree": config["degree"]}
    flow = LatticeFlow.towards(target, pieces=config["pieces"], **settings)
    budget = {name: config[name] for name in ("minutes", "steps", "seed")}
    history = train(flow, target, out, name=f"L = {target.length}", **budget)
    temperatures = torch.linspace(low, high, config["count"]).tolist()
    seeds = range(config["seed"], config["seed"] + len(temperatures))
    points = [
        judge(flow, t, config["samples"], seed) for t, seed in zip(temperatures, seeds, strict=True)
    ]
    draw(points, target.length, out / "curves.png")
    figures = {
        "parameters": sum(p.numel() for p in flow.parameters()),
        "steps": int(history.rows[-1]["step"]),
        "minutes": history.rows[-1]["minutes"],
        "points": [asdict(point) for point in points],
    }
    write_results(out, **figures)
    return points


def main(
    length: Annotated[int, typer.Option(min=2, help="L, the sites along one side.")] = 8,
    between: Annotated[
        tuple[float, float], typer.Option(help="The lowest and the highest temperature.")
    ] = (1.6, 3.6),
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/ising-range"),
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Training time; 5 if --steps is left out.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps, for a reproducible end.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and noise.")] = 0,
    samples: Annotated[int, typer.Option(min=100, help="Drawn at each temperature.")] = 4000,
    count: Annotated[int, typer.Option(min=2, help="Temperatures to weigh the flow at.")] = 13,
    degree: Annotated[int, typer.Option(min=1, help="Of the polynomials in T.")] = 6,
    pieces: Annotated[int, typer.Option(min=1, help="Monge-Ampère flows in a row.")] = 6,
    overwrite: Annotated[bool, typer.Option(help="Begin anew in a folder with a run.")] = False,
) -> None:
    """Train one flow for a range of temperatures and draw what it knows of each."""
    config = {
        "length": length,
        "between": list(between),
        "minutes": minutes if minutes or steps else 5.0,
        "steps": steps,
        "seed": seed,
        "samples": samples,
        "count": count,
        "degree": degree,
        "pieces": pieces,
    }
    with one_line_errors(ValueError, OSError, DivergenceError):
        points = run(config, out, overwrite)
    typer.echo(json.dumps([asdict(point) for point in points], indent=2))


if __name__ == "__main__":
    typer.run(main)
