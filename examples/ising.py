"""The two-dimensional Ising model at its critical point, by a flow that has its symmetries exactly.

    python examples/ising.py --length 16 --out runs/ising --minutes 60 --seed 0
    python examples/ising.py --length 8 --couplings -1 -0.5 --field 0.2 --temperature 2 --minutes 5

The spins are summed out in favour of a continuous field, arXiv:1809.10188, eq. 13. A flow is
trained towards its density by minimising the variational free energy, which lies above the exact
one. An interrupted run is taken up by the same command.
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

from ising_monte_carlo import reference
from ising_pictures import draw_learning, draw_path, draw_samples, draw_structure
from nflows_mongeampere import refined
from nflows_mongeampere.examples.runs import command, one_line_errors, open_folder, write_json
from nflows_mongeampere.examples.weighing import settled
from nflows_mongeampere.lattices import LatticeFlow, train
from nflows_mongeampere.models import transports
from nflows_mongeampere.targets import CRITICAL_TEMPERATURE, Ising
from nflows_mongeampere.targets.spins import means, spin_observables
from nflows_mongeampere.training import DivergenceError, History
from nflows_mongeampere.variational import Estimate, weigh

SAMPLES = 10_000  # drawn from a trained flow for its figures
OBSERVABLES = ("free_energy", "specific_heat", "magnetisation", "susceptibility", "binder")


@dataclass(frozen=True)
class Results:
    """What a run ends with; free energies in nats for each site.

    Attributes:
        parameters: how many are trained.
        minutes: of training, validation included.
        steps: of the optimiser.
        free_energy: the variational one, with its standard error.
        free_energy_double_steps: the same with the change at twice the solver's steps, that of the
            first 1,000 samples.
        exact: its value; ``gap`` is how far the variational one lies above it.
        ess: the effective sample size as a part of the samples.
        free_energy_corrected: by the weights of the samples.
        samples: how many were drawn for all this.
        spins: free energy over T, specific heat, magnetisation, susceptibility and Binder cumulant
            of the spins, by the weights, with standard errors; the exact free energy of the spins
            and the magnetisation by cluster Monte Carlo beside them.
        energy, structure: the energy of the spins per site and ``S(k)`` at the smallest k, by the
            weights, with their standard errors, and the same from cluster Monte Carlo.
        acceptance: of an independence Metropolis-Hastings chain.
        autocorrelation_time: of the energy in that chain, in steps.
        solver_steps: of each Monge-Ampère transform.
    """

    length: int
    temperature: float
    seed: int
    parameters: int
    minutes: float
    steps: int
    free_energy: float
    free_energy_se: float
    free_energy_double_steps: float
    exact: float
    gap: float
    ess: float
    free_energy_corrected: float
    free_energy_corrected_se: float
    samples: int
    energy: Estimate
    energy_monte_carlo: Estimate
    structure: Estimate
    structure_monte_carlo: Estimate
    acceptance: float
    autocorrelation_time: float
    spins: dict[str, Any]
    solver_steps: list[int]
    command: str


def judge(
    flow: LatticeFlow, target: Ising, config: dict[str, Any], history: History, out: Path
) -> Results:
    """Everything that the samples of a trained flow tell, with pictures."""
    seed, count, sites = config["seed"], config["samples"], target.sites
    torch.manual_seed(seed)
    found = settled(flow, target, count, lambda samples: samples.free_energy)
    with refined(flow, found.factor):
        samples = weigh(flow, target, count)
        solver_steps = [transport.steps for transport in transports(flow)]
        energy, chain = target.energy(samples.x), samples.chain()
        draw_path(flow, target, seed, out)
    free_energy, corrected = samples.free_energy, samples.corrected_free_energy
    values, errors = means(samples, target.structure_factor(samples.x))
    known = reference(target, sweeps=max(2000, count), seed=seed)
    draw_learning(history, target, out)
    draw_samples(samples, target, seed, out)
    draw_structure(values, errors, known, out)
    exact, spins = target.free_energy, spin_observables(target, samples)
    return Results(
        length=target.length,
        temperature=target.temperature,
        seed=seed,
        parameters=sum(p.numel() for p in flow.parameters()),
        minutes=history.rows[-1]["minutes"],
        steps=int(history.rows[-1]["step"]),
        free_energy=free_energy.value / sites,
        free_energy_se=free_energy.error / sites,
        free_energy_double_steps=free_energy.value / sites + found.finer - found.figure,
        exact=exact,
        gap=free_energy.value / sites - exact,
        ess=samples.effective_sample_size,
        free_energy_corrected=corrected.value / sites,
        free_energy_corrected_se=corrected.error / sites,
        samples=count,
        energy=samples.mean(energy),
        energy_monte_carlo=known.energy,
        structure=Estimate(values[0, 1].item(), errors[0, 1].item()),
        structure_monte_carlo=Estimate(*(part[0, 1].item() for part in known.structure)),
        acceptance=chain.acceptance,
        autocorrelation_time=chain.autocorrelation_time(energy),
        spins={
            **{name: getattr(spins, name) for name in OBSERVABLES},
            "free_energy_exact": target.spin_free_energy,
            "magnetisation_monte_carlo": known.magnetisation,
        },
        solver_steps=solver_steps,
        command=command(),
    )


def run(config: dict[str, Any], out: Path, overwrite: bool) -> Results:
    """One lattice, from noise to its results."""
    target = Ising(
        config["length"],
        config["temperature"],
        config["boundary"],
        couplings=config["couplings"],
        field=config["field"],
    )
    _ = target.free_energy  # is known, or the run is refused before it trains
    open_folder(out, config, overwrite)
    torch.manual_seed(config["seed"])
    flow = LatticeFlow.towards(target)
    budget = {name: config[name] for name in ("minutes", "steps", "seed", "path_gradient")}
    history = train(flow, target, out, name=f"L = {target.length}", **budget)
    results = judge(flow, target, config, history, out)
    write_json(out / "results.json", asdict(results))
    return results


def main(
    length: Annotated[int, typer.Option(min=2, help="L, the sites along one side.")] = 16,
    temperature: Annotated[
        float, typer.Option(help="T, in units of the coupling.")
    ] = CRITICAL_TEMPERATURE,
    boundary: Annotated[str, typer.Option(help="periodic or open.")] = "periodic",
    couplings: Annotated[
        tuple[float, float], typer.Option(help="J of the bonds along either axis.")
    ] = (1.0, 1.0),
    field: Annotated[float, typer.Option(help="H, in units of the coupling.")] = 0.0,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/ising-L.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Training time; 10 if --steps is left out.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps, for a reproducible end.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and noise.")] = 0,
    samples: Annotated[
        int, typer.Option(min=100, help="Drawn from the trained flow for its figures.")
    ] = SAMPLES,
    path_gradient: Annotated[bool, typer.Option(help="Leave the score out.")] = True,
    overwrite: Annotated[bool, typer.Option(help="Begin anew in a folder with a run.")] = False,
) -> None:
    """Train a flow towards the Ising model and weigh its samples."""
    config = {
        "length": length,
        "temperature": temperature,
        "boundary": boundary,
        "couplings": list(couplings),
        "field": field,
        "minutes": minutes if minutes or steps else 10.0,
        "steps": steps,
        "seed": seed,
        "samples": samples,
        "path_gradient": path_gradient,
    }
    start = time.monotonic()
    with one_line_errors(ValueError, OSError, DivergenceError):
        results = run(config, out or Path("runs") / f"ising-{length}", overwrite)
    typer.echo(json.dumps(asdict(results), indent=2))
    typer.echo(f"{(time.monotonic() - start) / 60:.1f} minutes in all, {os.cpu_count()} cores")


if __name__ == "__main__":
    typer.run(main)
