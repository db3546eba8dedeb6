"""What penalties on the costs of transport do to the steps that a flow needs.

A Monge-Ampère flow learns two thin moons by maximum likelihood, with penalties on the kinetic
energy and the roughness of its paths. For each pair of weights the experiment reports the test NLL,
from a solution so fine that it no longer changes, and the fewest steps that give every log-density
of the test set to a thousandth of a nat.

    python examples/regularisation.py --out runs/regularisation --iterations 800 --seeds 3
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import make_moons
from torch import Tensor

from nflows_mongeampere import MongeAmpereFlow, transport_costs
from nflows_mongeampere.examples.runs import write_json

# weights of kinetic energy and of roughness
PENALTIES = ((0.0, 0.0), (0.0, 1e-4), (0.0, 1e-3), (0.0, 1e-2), (1e-2, 0.0), (1e-2, 1e-3))
SHARPNESS = 6.0  # of the ridges at the start: the moons are thin
TOLERANCE = 1e-3
FINE_STEPS = 64
console = Console()


def moons(count: int, seed: int) -> Tensor:
    """Two interleaved half circles, centred and scaled to unit variance."""
    points, _ = make_moons(count, noise=0.05, random_state=seed)
    x = torch.tensor(points, dtype=torch.float32)
    return (x - torch.tensor([0.5, 0.25])) / torch.tensor([0.87, 0.5])


def train(penalty: tuple[float, float], iterations: int, seed: int) -> MongeAmpereFlow:
    """A flow that has seen as many batches as any other."""
    torch.manual_seed(seed)
    flow = MongeAmpereFlow(2, 128, time_dependent=True, time=1.0, steps=8)
    with torch.no_grad():
        flow._transform.potential.weight.mul_(SHARPNESS)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    data = moons(20_000, seed)
    kinetic, roughness = penalty
    label = f"penalties {kinetic:g} and {roughness:g}, seed {seed}"
    for _ in track(range(iterations), description=label, console=console, transient=True):
        batch = data[torch.randint(len(data), (256,))]
        with transport_costs(flow) as costs:
            nll = -flow.log_prob(batch).mean()
        loss = nll + kinetic * costs.kinetic.mean() + roughness * costs.roughness.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    return flow


@torch.no_grad()
def judge(flow: MongeAmpereFlow, test: Tensor) -> dict[str, float]:
    """The NLL of the exact solution, the steps that reach it, and the costs of the paths."""
    transform = flow.transform
    transform.steps = FINE_STEPS
    with transport_costs(flow) as costs:
        nll = -flow.log_prob(test).mean().item()
    transform.steps = 2 * FINE_STEPS
    finer = -flow.log_prob(test).mean().item()
    return {
        "nll": nll,
        "nll_double_steps": finer,
        "kinetic": costs.kinetic.mean().item(),
        "roughness": costs.roughness.mean().item(),
        "steps": transform.choose_steps(test, TOLERANCE).steps,
    }


def spread(values: list[float], digits: int) -> str:
    """Mean and range."""
    return (
        f"{statistics.mean(values):.{digits}f} "
        f"({min(values):.{digits}f} to {max(values):.{digits}f})"
    )


def main(
    out: Annotated[Path, typer.Option(help="Folder for results.json.")] = Path(
        "runs/regularisation"
    ),
    iterations: Annotated[int, typer.Option(min=1, help="Batches of 256 for each flow.")] = 800,
    seeds: Annotated[int, typer.Option(min=1, help="Flows for each penalty.")] = 3,
) -> None:
    """Train flows with several penalties and count the steps that they need."""
    test = moons(2000, seed=1000)
    table = Table(title=f"Two moons, {iterations} batches, {seeds} seeds: mean (range)")
    for column in (
        "kinetic",
        "roughness",
        "test NLL (nats)",
        f"steps to {TOLERANCE} nats",
        "∫|∇u|²",
        "∫(dΔu/dt)²",
    ):
        table.add_column(column, justify="right")
    results = []
    out.mkdir(parents=True, exist_ok=True)
    for penalty in PENALTIES:
        runs = []
        for seed in range(seeds):
            runs.append(judge(train(penalty, iterations, seed), test))
            weights = {"kinetic_penalty": penalty[0], "roughness_penalty": penalty[1]}
            results.append({**weights, "seed": seed, **runs[-1]})
            write_json(out / "results.json", results)
            console.print(
                f"penalties {penalty[0]:g} and {penalty[1]:g}, seed {seed}: NLL "
                f"{runs[-1]['nll']:.4f}, {runs[-1]['steps']} steps"
            )
        table.add_row(
            *(f"{weight:g}" for weight in penalty),
            *(
                spread([run[key] for run in runs], digits)
                for key, digits in (("nll", 3), ("steps", 1), ("kinetic", 2), ("roughness", 1))
            ),
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
