"""Nested sampling with nessai: a Monge-Ampère flow proposes the live points.

nessai learns the density of its live points with a flow of nflows and draws new ones from it; those
that the flow makes too likely or whose likelihood is too small it rejects, so that a flow whose
log-densities are right changes what an evidence costs, not its value. nessai brings a copy of
nflows under another name. With ``GLASFLOW_USE_NFLOWS=True`` in the environment, set below, it uses
nflows itself and takes any transform of it. The function ``monge_ampere`` makes such a flow; it
runs beside nessai's default, a RealNVP.

The likelihood is Rosenbrock's, a narrow curved valley, under a uniform prior:

    ln L(x, y) = -(1 - x)² - 100 (y - x²)²,    -5 < x, y < 5.

    python examples/nested_sampling.py --live 1000 --seeds 3 --out runs/nested
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

import math
import os
import statistics
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from nflows.distributions import StandardNormal
from nflows.transforms import CompositeTransform
from rich.console import Console
from rich.table import Table
from scipy.integrate import quad
from scipy.special import erf

from nflows_mongeampere import MongeAmpereTransform, RidgePotential
from nflows_mongeampere.examples.runs import write_results

os.environ["GLASFLOW_USE_NFLOWS"] = "True"  # read once, by the imports below
warnings.filterwarnings("ignore", module="nessai|nflows")

from nessai.flows.base import NFlow  # noqa: E402
from nessai.flowsampler import FlowSampler  # noqa: E402
from nessai.model import Model  # noqa: E402

BOUND = 5.0  # of the prior, in both dimensions
console = Console()


class Rosenbrock(Model):
    """Prior and likelihood in the form of nessai, which gives points as structured arrays."""

    def __init__(self) -> None:
        self.names = ["x", "y"]
        self.bounds = {name: [-BOUND, BOUND] for name in self.names}

    def log_prior(self, points: Any) -> Any:
        with np.errstate(divide="ignore"):
            return np.log(self.in_bounds(points), dtype=float) - 2 * math.log(2 * BOUND)

    def log_likelihood(self, points: Any) -> Any:
        x, y = points["x"], points["y"]
        return -((1 - x) ** 2) - 100 * (y - x**2) ** 2


def exact_log_evidence() -> float:
    """The logarithm of the integral over y, by the error function, and over x, by quadrature."""

    def over_y(x: float) -> float:
        valley: float = erf(10 * (BOUND - x * x)) + erf(10 * (BOUND + x * x))
        return math.exp(-((1 - x) ** 2)) * math.sqrt(math.pi) / 20 * valley

    edge = math.sqrt(BOUND)  # where the valley leaves the square
    integral = quad(over_y, -BOUND, BOUND, points=[-edge, edge, 1.0], epsabs=1e-12)[0]
    return math.log(integral / (2 * BOUND) ** 2)


def monge_ampere(features: int, neurons: int, blocks: int, layers: int, **_: Any) -> NFlow:
    """What nessai calls to build its flow.

    Args:
        features: D, of the points.
        neurons: ridges of each potential.
        blocks: potentials, one after the other.
        layers: of a neural network, which ridges have not.
    """
    flows = [
        MongeAmpereTransform(RidgePotential(features, neurons), steps=4) for _ in range(blocks)
    ]
    return NFlow(CompositeTransform(flows), StandardNormal([features]))


# Arguments of nessai's sampler; the RealNVP is what it takes where nothing is said.
FLOWS: dict[str, dict[str, Any]] = {
    "Monge-Ampère": {
        "flow_config": {"flow": monge_ampere, "n_neurons": 32, "n_blocks": 2},
        "training_config": {"lr": 1e-2},
    },
    "RealNVP, nessai's default": {},
}


@dataclass(frozen=True)
class Run:
    """One nested sampling.

    Attributes:
        flow: the name of the flow.
        seed: of points, weights and batches.
        log_evidence: ln Z.
        error: nessai's estimate of its standard error.
        calls: of the likelihood, for each point.
        cpu_seconds: of everything, on one thread.
        p_value: of nessai's test that new points fall evenly among the old ones.
    """

    flow: str
    seed: int
    log_evidence: float
    error: float
    calls: int
    cpu_seconds: float
    p_value: float


def sample(flow: str, live: int, seed: int) -> Run:
    """Nested sampling with nessai's other settings as they are."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        sampler = FlowSampler(
            Rosenbrock(),
            output=folder,
            nlive=live,
            seed=seed,
            resume=False,
            plot=False,
            pytorch_threads=torch.get_num_threads(),
            signal_handling=False,
            **FLOWS[flow],
        )
        sampler.run(plot=False, save=False)
    state = sampler.ns
    return Run(
        flow=flow,
        seed=seed,
        log_evidence=float(state.log_evidence),
        error=float(state.log_evidence_error),
        calls=int(state.total_likelihood_evaluations),
        cpu_seconds=time.process_time() - start,
        p_value=float(state.final_p_value),
    )


def table(runs: list[Run], exact: float, title: str) -> Table:
    """Means over the seeds; the error is nessai's, of one run."""
    result = Table(title=title)
    for column in ("flow", "ln Z", "error", "likelihoods", "CPU seconds", "p-values"):
        result.add_column(column, justify="left" if column == "flow" else "right")
    for flow in FLOWS:
        rows = [run for run in runs if run.flow == flow]
        result.add_row(
            flow,
            f"{statistics.mean(r.log_evidence for r in rows):.3f}",
            f"{statistics.mean(r.error for r in rows):.3f}",
            f"{statistics.mean(r.calls for r in rows):,.0f}",
            f"{statistics.mean(r.cpu_seconds for r in rows):.1f}",
            ", ".join(f"{r.p_value:.2f}" for r in rows),
        )
    result.add_row("exact", f"{exact:.3f}", "", "", "", "")
    return result


def main(
    out: Annotated[Path, typer.Option(help="Folder for results.json.")] = Path("runs/nested"),
    live: Annotated[int, typer.Option(min=50, help="Live points.")] = 1000,
    seeds: Annotated[int, typer.Option(min=1, help="Runs with each flow.")] = 3,
) -> None:
    """The evidence of Rosenbrock's likelihood, with two flows, beside the exact one."""
    out.mkdir(parents=True, exist_ok=True)
    exact = exact_log_evidence()
    runs = []
    for seed in range(seeds):
        for flow in FLOWS:
            runs.append(sample(flow, live, seed))
            done = runs[-1]
            console.print(
                f"{flow}, seed {seed}: ln Z = {done.log_evidence:.3f} ± {done.error:.3f}, "
                f"{done.calls:,} likelihoods, {done.cpu_seconds:.1f} s of CPU"
            )
    write_results(
        out,
        exact=exact,
        runs=[asdict(run) for run in runs],
    )
    console.print(table(runs, exact, f"Rosenbrock, {live} live points, {seeds} seeds"))
    console.print(f"numbers: {out / 'results.json'}")


if __name__ == "__main__":
    typer.run(main)
