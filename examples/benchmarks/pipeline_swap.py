"""The guide's pipeline with coupling layers, and with a Monge-Ampère flow in their place.

    python examples/benchmarks/pipeline_swap.py --out runs/swap [--seeds 4]

Three dimensions, 10,000 points of a helix, 300 steps of Adam in batches of 256, `LULinear` in front
of both, as in docs/guide/pipeline.md. Each takes the learning rate of the same list at which it is
best on validation points of a seed that is not among the others. Figures are test NLLs in nats,
those of the Monge-Ampère flow at four times its solver's steps, and the time of a training step.
Writes results.json.
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.nn.nets import ResidualNet
from nflows.transforms import AffineCouplingTransform, CompositeTransform, LULinear, Transform
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from nflows_mongeampere import MongeAmpereTransform, RidgePotential, refined
from nflows_mongeampere.examples.runs import write_results

RATES = (2e-3, 5e-3, 1e-2, 2e-2, 3e-2)
STEPS, BATCH, TUNING_SEED = 300, 256, 100
console = Console()


def helix(count: int) -> Tensor:
    """Points about a curve."""
    angle = 6 * torch.pi * (torch.rand(count) - 0.5)
    points = torch.stack([angle.cos(), angle.sin(), angle / 4], dim=1)
    return points + 0.1 * torch.randn(count, 3)


def coupling() -> list[Transform]:
    """RealNVP's layers."""
    return [
        AffineCouplingTransform([n % 2, 1 - n % 2, n % 2], lambda i, o: ResidualNet(i, o, 64))
        for n in range(6)
    ]


def ridges() -> list[Transform]:
    """One Monge-Ampère flow."""
    return [MongeAmpereTransform(RidgePotential(3, 128))]


LAYERS: dict[str, Callable[[], list[Transform]]] = {"RealNVP": coupling, "Monge-Ampère": ridges}


def train(layers: Callable[[], list[Transform]], rate: float, seed: int) -> dict[str, float]:
    """One training, with NLLs on validation and test points and the CPU seconds of a step."""
    torch.manual_seed(seed)
    data, test, validation = helix(10_000), helix(2_000), helix(2_000)
    flow = Flow(CompositeTransform([LULinear(3), *layers()]), StandardNormal([3]))
    optimizer = torch.optim.Adam(flow.parameters(), lr=rate)
    start = time.process_time()
    for _ in range(STEPS):
        loss = -flow.log_prob(data[torch.randint(len(data), (BATCH,))]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = (time.process_time() - start) / STEPS
    flow.eval()
    with torch.no_grad(), refined(flow, 4):
        nll, judged = (-flow.log_prob(points).mean().item() for points in (test, validation))
    return {
        "nll": nll,
        "validation": judged if math.isfinite(judged) else math.inf,
        "seconds": seconds,
        "parameters": sum(p.numel() for p in flow.parameters()),
    }


def main(
    out: Annotated[Path, typer.Option(help="Folder for results.json.")] = Path("runs/swap"),
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each.")] = 4,
) -> None:
    """Compare the two."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    tuned = {
        (name, rate): train(layers, rate, TUNING_SEED)["validation"]
        for name, layers in track([*LAYERS.items()], "learning rates", console=console)
        for rate in RATES
    }
    rates = {name: min(RATES, key=lambda rate: tuned[name, rate]) for name in LAYERS}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in LAYERS}
    for seed in track(range(seeds), "seeds", console=console):
        for name, layers in LAYERS.items():  # in turns, so that both see the same machine
            runs[name].append(train(layers, rates[name], seed))
    write_results(out, rates=rates, runs=runs)
    titles = ["", "parameters", "learning rate", "test NLL, each seed", "time of a step"]
    shown = Table(*titles, title="Helix, test NLL in nats")
    unit = statistics.median(run["seconds"] for run in runs["RealNVP"])
    for name, found in runs.items():
        step = statistics.median(run["seconds"] for run in found) / unit
        nlls = ", ".join(f"{run['nll']:.2f}" for run in found)
        size = f"{found[0]['parameters']:,.0f}"
        shown.add_row(name, size, f"{rates[name]:g}", nlls, f"{step:.2f}")
    console.print(shown)


if __name__ == "__main__":
    typer.run(main)
