"""The two-dimensional Ising model at its critical point, by a flow that has its symmetries exactly.

    python examples/ising.py --length 16 --out runs/ising --minutes 60 --seed 0

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
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from nflows.flows import Flow
from torch.utils.data import DataLoader, TensorDataset

from ising_model import Settings, make_flow, make_optimizer
from ising_monte_carlo import reference
from ising_pictures import draw_learning, draw_path, draw_samples, draw_structure
from nflows_mongeampere import refined
from nflows_mongeampere.convergence import converged
from nflows_mongeampere.examples.runs import one_line_errors, open_folder, write_json
from nflows_mongeampere.models import transports
from nflows_mongeampere.targets import CRITICAL_TEMPERATURE, Ising
from nflows_mongeampere.training import (
    DivergenceError,
    EndlessBatches,
    History,
    ReverseKL,
    SolverGuard,
    endless,
    fit,
    restore,
)
from nflows_mongeampere.variational import Estimate, weigh

SAMPLES = 10_000  # drawn from a trained flow for its figures
PATH_LENGTH = 16  # the largest lattice that is trained by path gradients unless asked otherwise
TOLERANCE = 1e-4  # of a free energy per site, when the solver's steps are doubled


@dataclass(frozen=True)
class Results:
    """What a run ends with; free energies in nats for each site.

    Attributes:
        parameters: how many are trained.
        minutes: of training, validation included.
        steps: of the optimiser.
        free_energy: the variational one, with its standard error.
        free_energy_double_steps: the same at twice the solver's steps, from the same noise.
        exact: Kaufman's value; ``gap`` is how far the variational one lies above it.
        ess: the effective sample size as a part of the samples.
        free_energy_corrected: by the weights of the samples.
        samples: how many were drawn for all this.
        energy, structure: the energy per site and ``S(k)`` at the smallest k, by the weights, with
            their standard errors, and the same from cluster Monte Carlo.
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
    solver_steps: list[int]
    command: str


def judge(
    flow: Flow, target: Ising, config: dict[str, Any], history: History, out: Path
) -> Results:
    """Everything that the samples of a trained flow tell, with pictures."""
    seed, count, sites = config["seed"], config["samples"], target.sites
    few = min(count, 1000)
    torch.manual_seed(seed)
    found = converged(
        flow,
        lambda: weigh(flow, target, few).free_energy.value / sites,
        TOLERANCE / 10,  # small beside the statistical error
    )
    with refined(flow, found.factor):
        samples = weigh(flow, target, count)
        solver_steps = [transport.steps for transport in transports(flow)]
        energy, chain = target.energy(samples.x), samples.chain()
        draw_path(flow, target, seed, out)
    free_energy, corrected = samples.free_energy, samples.corrected_free_energy
    modes = target.structure_factor(samples.x).flatten(1).unbind(1)
    structure = torch.tensor([samples.mean(mode) for mode in modes])
    values, errors = (part.view(target.length, target.length) for part in structure.unbind(1))
    known = reference(target, sweeps=max(2000, count), seed=seed)
    draw_learning(history, target, out)
    draw_samples(samples, target, seed, out)
    draw_structure(values, errors, known, out)
    exact = target.free_energy
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
        solver_steps=solver_steps,
        command=command(config),
    )


def run(config: dict[str, Any], out: Path, overwrite: bool, settings: Settings) -> Results:
    """One lattice, from noise to its results."""
    target = Ising(config["length"], config["temperature"])
    open_folder(out, config, overwrite)
    torch.manual_seed(config["seed"])
    objective = ReverseKL(
        make_flow(target, settings),
        target,
        num_samples=settings.samples,
        path_gradient=config["path_gradient"],
        optimizer=partial(make_optimizer, settings, target.sites),
        steps=config["steps"],
        minutes=config["minutes"],
        seed=config["seed"],
    )
    ticks = torch.zeros(settings.samples, 1)  # the flow draws its batches itself
    history = fit(
        objective,
        endless(EndlessBatches(ticks, len(ticks)), settings.interval),
        DataLoader(TensorDataset(ticks[:4]), batch_size=1),
        out,
        name=f"L = {target.length}",
        callbacks=[SolverGuard(2 * TOLERANCE * max(64, target.sites))],
    )
    # the learning rate has come down to zero and nothing can be learnt by heart: the last is best
    restore(objective, out / "last.ckpt")
    results = judge(objective.flow.cpu().eval(), target.cpu(), config, history, out)
    write_json(out / "results.json", asdict(results))
    return results


def path_pays(length: int) -> bool:
    """Whether path gradients, which take twice the time, get closer within an hour."""
    return length <= PATH_LENGTH


def command(config: dict[str, Any]) -> str:
    """The command of a run, but for its folder."""
    words = [f"python examples/ising.py --length {config['length']}"]
    if config["temperature"] != CRITICAL_TEMPERATURE:
        words.append(f"--temperature {config['temperature']}")
    if config["minutes"]:
        words.append(f"--minutes {config['minutes']:g}")
    if config["steps"]:
        words.append(f"--steps {config['steps']}")
    words.append(f"--seed {config['seed']}")
    if config["path_gradient"] != path_pays(config["length"]):
        words.append("--path-gradient" if config["path_gradient"] else "--no-path-gradient")
    if config["samples"] != SAMPLES:
        words.append(f"--samples {config['samples']}")
    return " ".join(words)


def main(
    length: Annotated[int, typer.Option(min=2, help="L, the sites along one side.")] = 16,
    temperature: Annotated[
        float, typer.Option(help="T, in units of the coupling.")
    ] = CRITICAL_TEMPERATURE,
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
    path_gradient: Annotated[
        bool | None,
        typer.Option(help=f"Leave the score out; by default up to L = {PATH_LENGTH}."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Begin anew in a folder with a run.")] = False,
) -> None:
    """Train a flow towards the Ising model and weigh its samples."""
    config = {
        "length": length,
        "temperature": temperature,
        "minutes": minutes if minutes or steps else 10.0,
        "steps": steps,
        "seed": seed,
        "samples": samples,
        "path_gradient": path_pays(length) if path_gradient is None else path_gradient,
    }
    start = time.monotonic()
    with one_line_errors(ValueError, OSError, DivergenceError):
        results = run(config, out or Path("runs") / f"ising-{length}", overwrite, Settings())
    typer.echo(json.dumps(asdict(results), indent=2))
    typer.echo(f"{(time.monotonic() - start) / 60:.1f} minutes in all, {os.cpu_count()} cores")


if __name__ == "__main__":
    typer.run(main)
