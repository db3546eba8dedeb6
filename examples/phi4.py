"""The φ⁴ theory on a square lattice, by a flow, beside hybrid Monte Carlo.

    python examples/phi4.py --length 8 --out runs/phi4 --minutes 5 --seed 0

The action is that of arXiv:1904.12072 and arXiv:2207.00283 with m² = -4; the coupling, unless
given, is the one at which the correlation length is about a quarter of the lattice. An interrupted
run is taken up by the same command.
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from nflows_mongeampere.examples.hybrid_monte_carlo import HybridMonteCarlo, flip_clusters
from nflows_mongeampere.examples.runs import command, one_line_errors, open_folder, write_json
from nflows_mongeampere.examples.weighing import drawn, settled
from nflows_mongeampere.lattices import LatticeFlow, train
from nflows_mongeampere.models import transports
from nflows_mongeampere.targets import Phi4
from nflows_mongeampere.training import DivergenceError, History
from nflows_mongeampere.variational import Estimate, WeightedSamples
from phi4_pictures import draw_learning, draw_samples, draw_two_point

MASS_SQUARED = -4.0
# λ at which the correlation length is about L / 4, arXiv:2207.00283
COUPLINGS = {
    6: 6.975,
    8: 6.008,
    10: 5.55,
    12: 5.276,
    14: 5.113,
    20: 4.807,
    32: 4.572,
    64: 4.398,
}
SAMPLES = 10_000  # drawn from a trained flow for its figures


@dataclass(frozen=True)
class Results:
    """What a run ends with; free energies in nats for each site, errors are standard errors.

    Attributes:
        coupling: λ, ``lambda`` in the file.
        parameters: how many are trained.
        minutes: of training on this lattice, validation included.
        steps: of the optimiser, on this lattice.
        free_energy: the variational one.
        free_energy_corrected: by the weights of the samples.
        free_energy_double_steps, free_energy_corrected_double_steps, ess_double_steps: the same at
            twice the solver's steps, from the same noise.
        ess: the effective sample size as a part of the samples.
        pareto_k: the tail of the weights; error bars hold up to 0.7.
        samples: how many were drawn for all this.
        acceptance: of an independence Metropolis chain.
        autocorrelation_time: of |φ| in that chain, in steps.
        magnetisation: the mean of |φ|, φ the mean of a field, by the weights, at twice the solver's
            steps too, and by hybrid Monte Carlo.
        susceptibility: of N φ², likewise: the two-point function, summed over all distances.
        two_point: of φ(x) φ(x + r) for r = 0 ... L / 2 along an axis, likewise.
        solver_steps: of each Monge-Ampère transform.
    """

    length: int
    mass_squared: float
    coupling: float
    seed: int
    parameters: int
    minutes: float
    steps: int
    free_energy: float
    free_energy_se: float
    free_energy_double_steps: float
    free_energy_corrected: float
    free_energy_corrected_se: float
    free_energy_corrected_double_steps: float
    ess: float
    ess_double_steps: float
    pareto_k: float
    samples: int
    acceptance: float
    autocorrelation_time: float
    magnetisation: Estimate
    magnetisation_double_steps: float
    magnetisation_monte_carlo: Estimate
    susceptibility: Estimate
    susceptibility_double_steps: float
    susceptibility_monte_carlo: Estimate
    two_point: list[Estimate]
    two_point_double_steps: list[float]
    two_point_monte_carlo: list[Estimate]
    solver_steps: list[int]
    command: str


def observables(x: Tensor, length: int) -> Tensor:
    """|φ|, N φ², and the two-point function along the axes for r = 0 ... L / 2, (B, L / 2 + 3)."""
    field = x.view(-1, length, length)
    mean = x.mean(1)
    two_point = [
        (field * (field.roll(-r, 1) + field.roll(-r, 2))).mean((1, 2)) / 2
        for r in range(length // 2 + 1)
    ]
    return torch.stack([mean.abs(), length**2 * mean.square(), *two_point], 1)


def judge(
    flow: LatticeFlow, target: Phi4, config: dict[str, Any], history: History, out: Path
) -> Results:
    """Everything that the samples of a trained flow tell, with pictures."""
    seed, count, sites, length = config["seed"], config["samples"], target.sites, target.length
    torch.manual_seed(seed)
    found = settled(flow, target, count, lambda samples: samples.corrected_free_energy)

    def means_of(samples: WeightedSamples) -> list[Estimate]:
        return [samples.mean(values) for values in observables(samples.x, length).unbind(1)]

    samples, finer = (
        drawn(flow, target, count, seed, factor) for factor in (found.factor, 2 * found.factor)
    )
    means, finer_means = means_of(samples), means_of(finer)
    chain = samples.chain()
    known = HybridMonteCarlo(target, seed=seed, between=flip_clusters).measure(
        lambda x: observables(x, length)
    )
    draw_learning(history, target, samples.corrected_free_energy.value / sites, out)
    draw_samples(samples, target, seed, out)
    draw_two_point(means[2:], known[2:], out)
    corrected = samples.corrected_free_energy
    return Results(
        length=length,
        mass_squared=target.mass_squared,
        coupling=target.coupling,
        seed=seed,
        parameters=sum(p.numel() for p in flow.parameters()),
        minutes=history.rows[-1]["minutes"],
        steps=int(history.rows[-1]["step"]),
        free_energy=samples.free_energy.value / sites,
        free_energy_se=samples.free_energy.error / sites,
        free_energy_double_steps=finer.free_energy.value / sites,
        free_energy_corrected=corrected.value / sites,
        free_energy_corrected_se=corrected.error / sites,
        free_energy_corrected_double_steps=finer.corrected_free_energy.value / sites,
        ess=samples.effective_sample_size,
        ess_double_steps=finer.effective_sample_size,
        pareto_k=samples.pareto_k,
        samples=count,
        acceptance=chain.acceptance,
        autocorrelation_time=chain.autocorrelation_time(observables(samples.x, length)[:, 0]),
        magnetisation=means[0],
        magnetisation_double_steps=finer_means[0].value,
        magnetisation_monte_carlo=known[0],
        susceptibility=means[1],
        susceptibility_double_steps=finer_means[1].value,
        susceptibility_monte_carlo=known[1],
        two_point=means[2:],
        two_point_double_steps=[mean.value for mean in finer_means[2:]],
        two_point_monte_carlo=known[2:],
        solver_steps=[found.factor * transport.steps for transport in transports(flow)],
        command=command(),
    )


def run(config: dict[str, Any], out: Path, overwrite: bool) -> dict[str, Any]:
    """One lattice, from noise to its results."""
    target = Phi4(config["length"], MASS_SQUARED, config["lambda"])
    open_folder(out, config, overwrite)
    torch.manual_seed(config["seed"])
    flow = LatticeFlow.towards(target)
    budget = {name: config[name] for name in ("minutes", "steps", "seed")}
    history = train(flow, target, out, name=f"L = {target.length}", **budget)
    results = judge(flow, target, config, history, out)
    values = {"lambda" if k == "coupling" else k: v for k, v in asdict(results).items()}
    write_json(out / "results.json", values)
    return values


def main(
    length: Annotated[int, typer.Option(min=2, help="L, the sites along one side.")] = 8,
    coupling: Annotated[
        float | None,
        typer.Option("--lambda", help=f"λ; known for L = {', '.join(map(str, COUPLINGS))}."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/phi4-L.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Training time; 5 if --steps is left out.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps, for a reproducible end.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and noise.")] = 0,
    samples: Annotated[
        int, typer.Option(min=100, help="Drawn from the trained flow for its figures.")
    ] = SAMPLES,
    overwrite: Annotated[bool, typer.Option(help="Begin anew in a folder with a run.")] = False,
) -> None:
    """Train a flow towards the φ⁴ theory and weigh its samples."""
    if coupling is None and length not in COUPLINGS:
        raise typer.BadParameter(f"expected a coupling for L = {length}", param_hint="--lambda")
    config = {
        "length": length,
        "lambda": COUPLINGS[length] if coupling is None else coupling,
        "minutes": minutes if minutes or steps else 5.0,
        "steps": steps,
        "seed": seed,
        "samples": samples,
    }
    start = time.monotonic()
    with one_line_errors(ValueError, OSError, DivergenceError):
        results = run(config, out or Path("runs") / f"phi4-{length}", overwrite)
    typer.echo(json.dumps(results, indent=2))
    typer.echo(f"{(time.monotonic() - start) / 60:.1f} minutes in all, {os.cpu_count()} cores")


if __name__ == "__main__":
    typer.run(main)
