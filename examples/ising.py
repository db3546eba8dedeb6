"""The two-dimensional Ising model at its critical point, by a flow that has its symmetries exactly.

    python examples/ising.py --length 16 --out runs/ising --minutes 60 --seed 0

The spins are summed out in favour of a continuous field, arXiv:1809.10188, eq. 13. A flow is
trained towards its density by minimising the variational free energy, which lies above the exact
one. An interrupted run is taken up by the same command.
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, Transform
from scipy.optimize import brentq
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.data import DataLoader, TensorDataset

from nflows_mongeampere import (
    MongeAmpereTransform,
    RidgePotential,
    SymmetrizedPotential,
    refined,
)
from nflows_mongeampere.examples.pictures import save_figure
from nflows_mongeampere.examples.runs import open_folder
from nflows_mongeampere.files import write
from nflows_mongeampere.groups import Group, point_group, translations
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
from nflows_mongeampere.models import transports
from nflows_mongeampere.variational import Estimate, WeightedSamples, weigh

PUBLISHED = {16: -2.2940}  # free energy per site at L = 16, arXiv:1809.10188
SAMPLES = 10_000  # drawn from a trained flow for its figures
PATH_LENGTH = 16  # the largest lattice that is trained by path gradients unless asked otherwise
TOLERANCE = 1e-4  # of a free energy per site, when the solver's steps are doubled


@dataclass(frozen=True)
class Settings:
    """A flow with the settings of its training.

    Attributes:
        pieces: Monge-Ampère transforms, one after the other.
        kernels: ridges of each for L from 16, before they are moved over the lattice; smaller
            lattices, where they cost less, have more, as 1 / L.
        steps: of each solve, at least.
        samples: fields in each step of the training.
        learning_rate: the highest, for L up to 16; larger lattices learn more slowly, as 1 / L.
        interval: training steps between two validations.
    """

    pieces: int = 12
    kernels: int = 4
    steps: int = 2
    samples: int = 64
    learning_rate: float = 1e-2
    interval: int = 50


SETTINGS = Settings()


class Average(nn.Module):
    """The mean of fields over their images under a group: what a symmetric field is learnt by."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def forward(self, fields: Tensor) -> Tensor:
        images = self.group.act(fields.reshape(-1, self.group.features))
        return images.mean(0).view_as(fields)


class LatticeModes(Transform):
    r"""A linear transform that stretches each Fourier mode of a field on a square lattice.

    From data to noise it maps :math:`\hat x_k \to e^{-s_k} \hat x_k`, where :math:`s` has the
    symmetries of the square.

    Args:
        log_scale: :math:`s`, where it starts, shape (L, L).
    """

    def __init__(self, log_scale: Tensor) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(log_scale.clone())
        register_parametrization(self, "log_scale", Average(point_group(tuple(log_scale.shape))))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._stretch(inputs, -self.log_scale)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._stretch(inputs, self.log_scale)

    def _stretch(self, field: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        sides = log_scale.shape
        modes = torch.fft.rfft2(field.view(-1, *sides))
        modes = modes * log_scale.exp()[:, : modes.shape[-1]]
        stretched = torch.fft.irfft2(modes, s=sides).flatten(1)
        return stretched, log_scale.sum().expand(len(field))


def best_gaussian(target: Ising) -> Tensor:
    r"""Variances of the Fourier modes, (L, L), of the Gaussian of lowest free energy.

    With :math:`\lambda_k` the eigenvalues of :math:`K + \alpha I`, they solve
    :math:`1 / s_k = 1 / \lambda_k - c` with :math:`c = E\,\mathrm{sech}^2 x`, where x is normal
    with the mean of :math:`s` as its variance.
    """
    wave = (2 * math.pi * torch.arange(target.length, dtype=torch.float64) / target.length).cos()
    widths: Tensor = 2 * (wave[:, None] + wave) / target.temperature + target.alpha
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(150))

    def variances(curvature: float) -> Tensor:
        return (1 / widths - curvature).reciprocal()

    def excess(curvature: float) -> float:
        x = variances(curvature).mean().sqrt() * nodes
        return float(weights @ x.cosh().pow(-2) / weights.sum()) - curvature

    curvature: float = brentq(excess, 0, (1 - 1e-9) / float(widths.max()))
    return variances(curvature).float()


def smooth_kernels(length: int, count: int) -> Tensor:
    """Noisy bells around the first site, from one site wide to the whole lattice, (count, L^2)."""
    site = torch.arange(length)
    along = torch.minimum(site, length - site).square()
    distance = (along[:, None] + along).flatten()
    widths = 0.4 * length ** torch.linspace(0, 1, count)
    bells = torch.exp(-distance / (2 * widths[:, None].square()))
    return nn.functional.normalize(bells * (1 + 0.3 * torch.randn(bells.shape)))


def make_flow(target: Ising, settings: Settings) -> Flow:
    """The best Gaussian's modes, behind potentials of every translate of symmetric kernels."""
    shape = (target.length, target.length)
    kernels = max(settings.kernels, settings.kernels * 16 // target.length)
    moves, square = translations(shape), Average(point_group(shape))

    def piece() -> Transform:
        ridges = RidgePotential(target.sites, kernels, activation="logcosh", bias=False)
        with torch.no_grad():
            ridges.weight.copy_(smooth_kernels(target.length, kernels))
        # kernels that the square leaves alone: its symmetries cost no further terms
        register_parametrization(ridges, "weight", square)
        return MongeAmpereTransform(SymmetrizedPotential(ridges, moves), steps=settings.steps)

    pieces = [piece() for _ in range(settings.pieces)]
    modes = LatticeModes(0.5 * best_gaussian(target).log())
    return Flow(CompositeTransform([modes, *pieces]), StandardNormal([target.sites]))


def make_optimizer(settings: Settings, sites: int, flow: nn.Module) -> torch.optim.Optimizer:
    """Adam; amplitudes, which are divided by the number of sites, learn as many times faster."""
    named = dict(flow.named_parameters())
    amplitudes = [p for name, p in named.items() if name.endswith("amplitude")]
    rest = [p for name, p in named.items() if not name.endswith("amplitude")]
    rate = settings.learning_rate * min(1.0, 16 / math.sqrt(sites))
    groups = [{"params": amplitudes, "lr": rate * sites}, {"params": rest, "lr": rate}]
    return torch.optim.Adam(groups, betas=(0.9, 0.99))


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


def settle_solver(flow: Flow, target: Ising, samples: int, seed: int) -> None:
    """Double the solver's steps until that changes the free energy per site no more."""
    coarse = seeded_free_energy(flow, target, samples, seed)
    while True:
        with refined(flow):
            fine = seeded_free_energy(flow, target, samples, seed)
        if abs(fine - coarse) < TOLERANCE / 10:  # small beside the statistical error
            return
        coarse = fine
        for transport in transports(flow):
            transport.steps *= 2


def seeded_free_energy(flow: Flow, target: Ising, samples: int, seed: int) -> float:
    """The variational free energy per site, from the same noise each time."""
    torch.manual_seed(seed)
    return weigh(flow, target, samples).free_energy.value / target.sites


def swendsen_wang(target: Ising, sweeps: int, seed: int) -> Iterator[Tensor]:
    """Spins (L, L) of a periodic lattice in equilibrium, after one cluster update each."""
    generator, length = np.random.default_rng(seed), target.length
    sites = np.arange(target.sites).reshape(length, length)
    heads = np.concatenate([sites.ravel(), sites.ravel()])
    tails = np.concatenate([np.roll(sites, -1, 0).ravel(), np.roll(sites, -1, 1).ravel()])
    spins = np.ones(target.sites)
    for sweep in range(-(sweeps // 10), sweeps):
        # equal neighbours stick together with probability 1 - e^(-2/T), and clusters flip alike
        stuck = generator.random(len(heads)) < -math.expm1(-2 / target.temperature)
        bonds = stuck & (spins[heads] == spins[tails])
        ones = np.ones(int(bonds.sum()))
        graph = coo_array((ones, (heads[bonds], tails[bonds])), (target.sites, target.sites))
        count, cluster = connected_components(graph, directed=False)
        spins = generator.choice([-1.0, 1.0], count)[cluster]
        if sweep >= 0:
            yield torch.from_numpy(spins).float().view(length, length)


@dataclass(frozen=True)
class Reference:
    """Means over Monte Carlo sweeps, with standard errors from blocks.

    Attributes:
        energy: for each site, with its error.
        structure: S(k) of every mode, shape (L, L), and its error.
    """

    energy: Estimate
    structure: tuple[Tensor, Tensor]


def reference(target: Ising, sweeps: int, seed: int, blocks: int = 50) -> Reference:
    """Energy and structure factor by cluster Monte Carlo."""
    spins = torch.stack(list(swendsen_wang(target, sweeps, seed)))
    energy = -target.neighbour_products(spins) / target.sites
    structure = torch.fft.fft2(spins).abs().square() / target.sites

    def mean(values: Tensor) -> tuple[Tensor, Tensor]:
        length = sweeps // blocks
        means = values[: blocks * length].view(blocks, length, *values.shape[1:]).mean(1)
        return means.mean(0), means.std(0) / math.sqrt(blocks)

    value, error = mean(energy)
    return Reference(Estimate(value.item(), error.item()), mean(structure))


def draw_learning(history: History, target: Ising, folder: Path) -> None:
    """The gap to the exact free energy against the steps, with the published one."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    exact, steps = target.free_energy, [row["step"] for row in history.rows]
    for key, label in (("train", "training"), ("validation", "at twice the solver's steps")):
        gaps = [row[key] / target.sites - exact for row in history.rows]
        axes.plot(steps, gaps, label=label)
    if target.length in PUBLISHED and target.temperature == CRITICAL_TEMPERATURE:
        axes.axhline(
            PUBLISHED[target.length] - exact, color="grey", linestyle=":", label="published"
        )
    axes.set(
        xlabel="training steps",
        ylabel="free energy above the exact one, per site (nats)",
        xscale="log",
        yscale="log",
    )
    axes.legend(frameon=False)
    save_figure(figure, folder / "learning.png")


@torch.no_grad()
def draw_samples(samples: WeightedSamples, target: Ising, seed: int, folder: Path) -> None:
    """Fields, and spins drawn from them."""
    torch.manual_seed(seed)
    chosen = samples.x[torch.multinomial(samples.log_weights.softmax(0), 6, replacement=True)]
    fields, spins = target.field(chosen), target.sample_spins(chosen)
    figure, axes = plt.subplots(2, 6, figsize=(10, 3.6), layout="constrained")
    for column in range(6):
        axes[0, column].imshow(spins[column], cmap="gray", vmin=-1, vmax=1)
        image = axes[1, column].imshow(fields[column], cmap="RdBu_r", vmin=-4, vmax=4)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("spins")
    axes[1, 0].set_ylabel("field x")
    figure.colorbar(image, ax=axes[1])
    save_figure(figure, folder / "samples.png")


@torch.no_grad()
def draw_path(flow: Flow, target: Ising, seed: int, folder: Path) -> None:
    """One draw of noise on its way into a critical configuration, transform by transform."""
    torch.manual_seed(seed)
    points = [flow._distribution.sample(1)]
    names = ["noise"]
    for number, transform in enumerate(reversed(list(flow._transform._transforms)), 1):
        points.append(transform.inverse(points[-1])[0])
        names.append(f"after {number}" if isinstance(transform, MongeAmpereTransform) else "field")
    shown = [*range(0, len(points) - 1, max(1, len(points) // 5)), len(points) - 1]
    points = [points[i] for i in shown] + [points[-1].tanh()]
    names = [names[i] for i in shown] + ["mean spin"]
    figure, axes = plt.subplots(
        1, len(points), figsize=(1.7 * len(points), 2.1), layout="constrained"
    )
    for axis, point, name in zip(axes, points, names, strict=True):
        size = float(point.abs().max())
        axis.imshow(target.field(point)[0], cmap="RdBu_r", vmin=-size, vmax=size)
        axis.set(xticks=[], yticks=[], title=name)
    save_figure(figure, folder / "path.png")


def draw_structure(structure: Tensor, error: Tensor, known: Reference, folder: Path) -> None:
    """The structure factor along an axis of the lattice, from the flow and from Monte Carlo."""
    length = len(structure)
    modes = torch.arange(length // 2 + 1)
    wave = 2 * math.pi * modes / length
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    exact, exact_error = known.structure
    axes.errorbar(
        wave,
        exact[0, modes],
        exact_error[0, modes],
        fmt="s",
        mfc="none",
        label="cluster Monte Carlo",
    )
    axes.errorbar(wave, structure[0, modes], error[0, modes], fmt=".", label="flow, by weights")
    axes.set(xlabel="k", ylabel="S(k)", yscale="log")
    axes.legend(frameon=False)
    save_figure(figure, folder / "structure.png")


def judge(
    flow: Flow, target: Ising, config: dict[str, Any], history: History, out: Path
) -> Results:
    """Everything that the samples of a trained flow tell, with pictures."""
    seed, count, sites = config["seed"], config["samples"], target.sites
    settle_solver(flow, target, min(count, 1000), seed)
    torch.manual_seed(seed)
    samples = weigh(flow, target, count)
    free_energy, corrected = samples.free_energy, samples.corrected_free_energy
    few = min(count, 1000)
    with refined(flow):
        fine = seeded_free_energy(flow, target, few, seed)
    change = fine - seeded_free_energy(flow, target, few, seed)
    energy, chain = target.energy(samples.x), samples.chain()
    modes = target.structure_factor(samples.x).flatten(1).unbind(1)
    structure = torch.tensor([samples.mean(mode) for mode in modes])
    values, errors = (part.view(target.length, target.length) for part in structure.unbind(1))
    known = reference(target, sweeps=max(2000, count), seed=seed)
    draw_learning(history, target, out)
    draw_samples(samples, target, seed, out)
    draw_path(flow, target, seed, out)
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
        free_energy_double_steps=free_energy.value / sites + change,
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
        solver_steps=[transport.steps for transport in transports(flow)],
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
    write(out / "results.json", json.dumps(asdict(results), indent=2) + "\n")
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
    try:
        results = run(config, out or Path("runs") / f"ising-{length}", overwrite, SETTINGS)
    except (ValueError, OSError, DivergenceError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(json.dumps(asdict(results), indent=2))
    typer.echo(f"{(time.monotonic() - start) / 60:.1f} minutes in all, {os.cpu_count()} cores")


if __name__ == "__main__":
    typer.run(main)
