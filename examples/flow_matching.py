"""Likelihood against flow matching: the same flow, the same data, the same CPU seconds.

    python examples/flow_matching.py --out runs/flow_matching [--seconds 20] [--seeds 3]

A Monge-Ampère flow with a potential that moves in time learns two moons from 4,000 points by
maximum likelihood, by flow matching with independent and with optimal-transport pairs, and by flow
matching for a third of the time followed by likelihood. Seconds are of one thread's CPU, from the
cost of a step, which is measured first. Reported is the test NLL at so many solver steps that it
stands still. Writes results.json and flow_matching.png.
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

import math
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import torch
import typer
from rich.console import Console
from rich.table import Table
from sklearn.datasets import make_moons
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from nflows_mongeampere import MongeAmpereFlow, refined
from nflows_mongeampere.convergence import converged
from nflows_mongeampere.examples.pictures import save_figure
from nflows_mongeampere.examples.runs import write_results
from nflows_mongeampere.training import (
    DivergenceError,
    EndlessBatches,
    FlowMatching,
    MaximumLikelihood,
    Objective,
    SolverGuard,
    endless,
    fit,
)

BATCH, INTERVAL = 256, 50
RATE = 1e-2
# objectives and the parts of the time that they get, one after the other
Plan = tuple[tuple[str, float], ...]
PLANS: dict[str, Plan] = {
    "likelihood": (("likelihood", 1.0),),
    "flow matching": (("independent", 1.0),),
    "flow matching, OT pairs": (("optimal_transport", 1.0),),
    "OT flow matching, then likelihood": (("optimal_transport", 1 / 3), ("likelihood", 2 / 3)),
}
console = Console()


def moons(count: int, seed: int) -> Tensor:
    """Two interleaved half circles, centred and scaled to unit variance."""
    points, _ = make_moons(count, noise=0.05, random_state=seed)
    x = torch.tensor(points, dtype=torch.float32)
    return (x - torch.tensor([0.5, 0.25])) / torch.tensor([0.87, 0.5])


def make(kind: str, flow: MongeAmpereFlow, steps: int, seed: int) -> Objective:
    """The objective of this name."""
    keywords: dict[str, Any] = {"learning_rate": RATE, "steps": steps, "seed": seed}
    if kind == "likelihood":
        return MaximumLikelihood(flow, **keywords)
    return FlowMatching(flow, pairs=kind, **keywords)


def cost(kind: str, flow: MongeAmpereFlow, data: Tensor) -> float:
    """CPU seconds of one step of the optimiser."""
    objective = make(kind, flow, 1, 0)
    seconds = []
    for _ in range(12):
        start = time.process_time()
        objective.losses(data[torch.randint(len(data), (BATCH,))]).mean().backward()
        seconds.append(time.process_time() - start)
    flow.zero_grad()
    return statistics.median(seconds[2:])


def train(plan: Plan, seconds: float, seed: int, data: Tensor, aside: Tensor) -> MongeAmpereFlow:
    """A flow that has been trained for so long."""
    torch.manual_seed(seed)
    flow = MongeAmpereFlow(2, 128, time_dependent=True, steps=6)
    for kind, part in plan:
        steps = max(10, int(part * seconds / cost(kind, flow, data)))
        console.print(f"  {kind}: {steps} steps")
        batches = endless(EndlessBatches(data, BATCH, seed), min(INTERVAL, steps))
        with tempfile.TemporaryDirectory() as folder:
            try:
                fit(
                    make(kind, flow, steps, seed),
                    batches,
                    DataLoader(TensorDataset(aside), batch_size=len(aside)),
                    folder,
                    name=kind,
                    callbacks=[SolverGuard(0.01)] if kind == "likelihood" else [],
                )
            except DivergenceError as error:
                console.print(f"  {error}")
    return flow


def nll_of(flow: MongeAmpereFlow, test: Tensor) -> Tensor:
    """The mean negative log-density."""
    return -flow.log_prob(test).mean()


def draw(
    flows: dict[str, MongeAmpereFlow], data: Tensor, nll: dict[str, float], path: Path
) -> None:
    """The data, and the density of each flow."""
    figure, axes = plt.subplots(1, 1 + len(flows), figsize=(13, 3.4))
    ends = (-2.6, 2.6)
    axes[0].plot(*data[:2000].T, ".", ms=1.5, color="black")
    axes[0].set_title("data", fontsize=9)
    grid = torch.linspace(*ends, 161)
    points = torch.cartesian_prod(grid, grid)
    for axis, (name, flow) in zip(axes[1:], flows.items(), strict=True):
        with torch.no_grad(), refined(flow, 2):
            density = flow.log_prob(points).exp().view(161, 161).T
        axis.imshow(density, origin="lower", extent=(*ends, *ends), cmap="magma", vmin=0, vmax=0.8)
        axis.set_title(f"{name}\ntest NLL {nll[name]:.3f}", fontsize=9)
    for axis in axes:
        axis.set(xlim=ends, ylim=ends, xticks=[], yticks=[], aspect="equal")
    figure.subplots_adjust(0.005, 0.01, 0.995, 0.84, wspace=0.03)
    save_figure(figure, path)


def main(
    out: Annotated[Path, typer.Option(help="Folder for what is written.")] = Path(
        "runs/flow_matching"
    ),
    seconds: Annotated[float, typer.Option(min=0.1, help="Of CPU, for each flow.")] = 20.0,
    seeds: Annotated[int, typer.Option(min=1, help="Flows of each plan.")] = 3,
) -> None:
    """Compare likelihood and flow matching."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    data, aside, test = moons(4000, 0), moons(500, 1), moons(5000, 2)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in PLANS}
    for seed in range(seeds):
        flows = {}
        for name, plan in PLANS.items():
            console.print(f"{name}, seed {seed}")
            flow = flows[name] = train(plan, seconds, seed, data, aside)
            found = converged(flow, partial(nll_of, flow, test), 1e-3)
            results[name].append(
                {
                    "nll": float(found.figure),
                    "solver_error": found.change,
                    "solver_steps": found.factor * flow.transform.steps,
                }
            )
            write_results(
                out,
                results=results,
            )
        if seed == 0:
            nll = {name: runs[0]["nll"] for name, runs in results.items()}
            draw(flows, data, nll, out / "flow_matching.png")
    shown = Table("trained by", "test NLL", title=f"Two moons, {seconds:g} CPU seconds")
    for name, runs in results.items():
        scores = [run["nll"] for run in runs]
        error = statistics.stdev(scores) / math.sqrt(seeds) if seeds > 1 else math.nan
        shown.add_row(
            name,
            f"{statistics.mean(scores):.3f} ± {error:.3f}"
            if seeds > 1
            else f"{statistics.mean(scores):.3f}",
        )
    console.print(shown)


if __name__ == "__main__":
    typer.run(main)
