"""Simulation-based inference with sbi: a Monge-Ampère flow as the posterior or the likelihood.

From simulated pairs (θ, x), sbi's ``NPE`` learns the posterior q(θ | x), its ``NLE`` the likelihood
q(x | θ). Their density estimators are flows of nflows in an ``NFlowsFlow``, and the function
``monge_ampere`` below makes a Monge-Ampère flow one. It is trained beside sbi's default, a masked
autoregressive flow, and its neural spline flow, each as sbi configures it, on the same simulations,
until sbi finds it converged. The tasks are standard ones with exact samples of the posterior to
compare with. C2ST is the accuracy of sbi's classifier that is to tell these from samples of the
estimator: 0.5 where it cannot, 1 where it always can.

    python examples/inference.py --task two-moons --simulations 2000 --seeds 3 --out runs/inference
    python examples/inference.py --task linear-gaussian --method nle --seeds 3 --out runs/likelihood
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import torch
import typer
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform
from rich.console import Console
from rich.table import Table
from sbi.inference import NLE, NPE
from sbi.neural_nets.estimators import NFlowsFlow
from sbi.simulators.gaussian_mixture import gaussian_mixture
from sbi.simulators.linear_gaussian import linear_gaussian
from sbi.utils import BoxUniform
from sbi.utils.metrics import c2st
from sbi.utils.sbiutils import standardizing_net, standardizing_transform
from sbi.utils.tracking import TensorBoardTracker
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from nflows_mongeampere import MongeAmpereTransform, RidgePotential, refined
from nflows_mongeampere.examples.pictures import save_figure
from nflows_mongeampere.examples.runs import write_results

SAMPLES = 1000  # of each posterior
SHOWN = 2  # observations in the picture
NOISE = torch.tensor([[0.5, 0.3], [0.3, 0.4]])  # the covariance of the linear Gaussian's
console = Console()


@dataclass(frozen=True)
class Problem:
    """A prior, a simulator, and exact samples of the posterior.

    Attributes:
        bound: the prior is uniform between -bound and bound in both dimensions.
        simulate: parameters, shape (N, 2), to data, shape (N, 2).
        propose: data, shape (2,), and a number N to N exact samples of the likelihood as a density
            of θ, which become samples of the posterior where they are inside the prior.
    """

    bound: float
    simulate: Callable[[Tensor], Tensor]
    propose: Callable[[Tensor, int], Tensor]

    @property
    def prior(self) -> BoxUniform:
        return BoxUniform(torch.full((2,), -self.bound), torch.full((2,), self.bound))

    def posterior(self, x: Tensor, count: int) -> Tensor:
        """Exact samples, by rejection of those outside the prior, shape (count, 2)."""
        found = torch.empty(0, 2)
        while len(found) < count:
            theta = self.propose(x, 4 * count)
            found = torch.cat([found, theta[(theta.abs() <= self.bound).all(1)]])
        return found[:count]


def moon(count: int) -> Tensor:
    """Points on a crescent, shape (count, 2)."""
    angle = math.pi * (torch.rand(count) - 0.5)
    radius = 0.1 + 0.01 * torch.randn(count)
    return torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], dim=1)


def two_moons(theta: Tensor) -> Tensor:
    """Simulates x = moon + (-|θ₁ + θ₂|, θ₂ - θ₁) / √2 (Greenberg et al., arXiv:1905.07488)."""
    total, difference = theta.sum(1), theta[:, 1] - theta[:, 0]
    return moon(len(theta)) + torch.stack([-total.abs(), difference], dim=1) / math.sqrt(2)


def propose_two_moons(x: Tensor, count: int) -> Tensor:
    """Draw the moon and solve for θ: the sign of θ₁ + θ₂ is free."""
    minus_total, difference = (math.sqrt(2) * (x - moon(count))).T
    possible = minus_total <= 0
    sign = 2 * torch.randint(2, (count,)) - 1
    total = sign * minus_total
    return torch.stack([total - difference, total + difference], dim=1)[possible] / 2


def propose_gaussian_mixture(x: Tensor, count: int) -> Tensor:
    """The simulator of sbi adds noise of width 1 or 0.1, equally often."""
    width = torch.tensor([1.0, 0.1])[torch.randint(2, (count,))]
    return x + width[:, None] * torch.randn(count, 2)


def propose_linear_gaussian(x: Tensor, count: int) -> Tensor:
    """θ and x differ by the noise, which is symmetric."""
    theta: Tensor = linear_gaussian(x.expand(count, 2), torch.zeros(2), NOISE)
    return theta


class Task(str, Enum):
    """The tasks, by the names of the command line."""

    two_moons = "two-moons"
    gaussian_mixture = "gaussian-mixture"
    linear_gaussian = "linear-gaussian"


class Method(str, Enum):
    """What is learned: the posterior q(θ | x) or the likelihood q(x | θ)."""

    npe = "npe"
    nle = "nle"


PROBLEMS = {
    Task.two_moons: Problem(1.0, two_moons, propose_two_moons),
    Task.gaussian_mixture: Problem(10.0, gaussian_mixture, propose_gaussian_mixture),
    Task.linear_gaussian: Problem(
        3.0, lambda theta: linear_gaussian(theta, torch.zeros(2), NOISE), propose_linear_gaussian
    ),
}


def monge_ampere(theta: Tensor, x: Tensor) -> NFlowsFlow:
    """What NPE needs to build the estimator: θ and x standardised, x as the context.

    Args:
        theta: parameters of the simulations, shape (N, D).
        x: their data, shape (N, C).
    """
    flows = [
        MongeAmpereTransform(
            RidgePotential(theta.shape[1], 64, context_features=x.shape[1]), steps=4
        )
        for _ in range(2)
    ]
    transform = CompositeTransform([standardizing_transform(theta), *flows])
    flow = Flow(transform, StandardNormal(theta.shape[1:]), embedding_net=standardizing_net(x))
    return NFlowsFlow(flow, input_shape=theta[0].shape, condition_shape=x[0].shape)


def monge_ampere_likelihood(theta: Tensor, x: Tensor) -> NFlowsFlow:
    """What NLE needs: the same with the two exchanged, a density of x given θ."""
    return monge_ampere(x, theta)


@dataclass(frozen=True)
class Entry:
    """An estimator, by sbi's name or by a function that builds it, and how fast it learns."""

    name: str
    build: str | Callable[[Tensor, Tensor], NFlowsFlow]
    learning_rate: float = 5e-4  # sbi's default


SBI = (Entry("MAF, sbi's default", "maf"), Entry("NSF of sbi", "nsf"))
ESTIMATORS = {
    Method.npe: (Entry("Monge-Ampère", monge_ampere, learning_rate=1e-2), *SBI),
    Method.nle: (Entry("Monge-Ampère", monge_ampere_likelihood, learning_rate=1e-2), *SBI),
}
TRAINERS: dict[Method, Any] = {Method.npe: NPE, Method.nle: NLE}
# A posterior of NPE is sampled directly; with a likelihood, proposals from the prior are rejected,
# whose samples are independent and exact.
SAMPLING: dict[Method, dict[str, Any]] = {Method.npe: {}, Method.nle: {"sample_with": "rejection"}}


def train(
    method: Method, entry: Entry, problem: Problem, theta: Tensor, x: Tensor, epochs: int
) -> tuple[Any, Any]:
    """The training of sbi, which stops when its validation loss has not fallen for 20 epochs.

    Returns:
        sbi's trainer, and the estimator that it trained.
    """
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        tracker = TensorBoardTracker(writer)
        inference = TRAINERS[method](problem.prior, entry.build, tracker=tracker)
        inference.append_simulations(theta, x)
        estimator = inference.train(learning_rate=entry.learning_rate, max_num_epochs=epochs)
    return inference, estimator


@dataclass(frozen=True)
class Score:
    """How good one trained estimator is.

    Attributes:
        name: of the estimator.
        seed: of simulations, weights and batches.
        parameters: how many are trained.
        epochs: until it converged.
        seconds: of training.
        nll: mean of -ln q(θ | x), or -ln q(x | θ), over new simulations, in nats.
        nll_double_steps: the same at twice the integration steps; None for other flows.
        c2st: against exact samples, for each observation.
    """

    name: str
    seed: int
    parameters: int
    epochs: int
    seconds: float
    nll: float
    nll_double_steps: float | None
    c2st: list[float]


@torch.no_grad()
def test_losses(
    estimator: NFlowsFlow, inputs: Tensor, condition: Tensor
) -> tuple[float, float | None]:
    """The mean of -ln q(inputs | condition), and the same at twice the integration steps."""
    loss = estimator.loss(inputs, condition).mean().item()
    if not any(isinstance(module, MongeAmpereTransform) for module in estimator.modules()):
        return loss, None
    with refined(estimator):
        return loss, estimator.loss(inputs, condition).mean().item()


def table(scores: list[Score], floor: list[float], title: str) -> Table:
    """Means over seeds and observations, ± the standard deviation over both."""
    result = Table(title=title)
    for column in ("estimator", "parameters", "C2ST", "NLL (nats)", "at twice the steps"):
        result.add_column(column, justify="left" if column == "estimator" else "right")
    for name in dict.fromkeys(s.name for s in scores):
        rows = [s for s in scores if s.name == name]
        double = [s.nll_double_steps for s in rows if s.nll_double_steps is not None]
        result.add_row(
            name,
            f"{rows[0].parameters:,}",
            _spread([accuracy for s in rows for accuracy in s.c2st]),
            _spread([s.nll for s in rows]),
            _spread(double) if double else "",
        )
    result.add_row("exact, drawn again", "", _spread(floor), "", "")
    return result


def _spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


def draw(posteriors: dict[str, list[Tensor]], observed: Tensor, path: Path) -> None:
    """Samples of each posterior, a row for each observation."""
    rows, columns = len(observed), len(posteriors)
    size = (2.7 * columns, 2.8 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for column, (name, samples) in enumerate(posteriors.items()):
        axes[0, column].set_title(name)
        for row in range(rows):
            exact = posteriors["exact"][row]
            low, high = exact.quantile(0.005, dim=0), exact.quantile(0.995, dim=0)
            margin = 0.25 * (high - low)
            axis = axes[row, column]
            axis.scatter(*samples[row].T, s=3, alpha=0.4, linewidths=0, color=f"C{column}")
            axis.set_xlim(float(low[0] - margin[0]), float(high[0] + margin[0]))
            axis.set_ylim(float(low[1] - margin[1]), float(high[1] + margin[1]))
            axis.set(xticks=[], yticks=[])
    for row, x in enumerate(observed):
        axes[row, 0].set_ylabel(f"x = ({x[0]:.2f}, {x[1]:.2f})")
    save_figure(figure, path)


def main(
    out: Annotated[Path, typer.Option(help="Folder for results.json and inference.png.")] = Path(
        "runs/inference"
    ),
    task: Annotated[Task, typer.Option(help="What is inferred.")] = Task.two_moons,
    method: Annotated[Method, typer.Option(help="Posterior or likelihood.")] = Method.npe,
    simulations: Annotated[int, typer.Option(min=100, help="Pairs to learn from.")] = 2000,
    observations: Annotated[int, typer.Option(min=1, help="Posteriors to check.")] = 5,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each estimator.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="The most that a training may take.")] = 500,
) -> None:
    """Train posteriors on the same simulations, hold them against exact ones, draw them."""
    out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", module="nflows|sbi")
    problem = PROBLEMS[task]
    torch.manual_seed(-1)  # of no training
    observed = problem.simulate(problem.prior.sample((observations,)))
    exact = [problem.posterior(x, SAMPLES) for x in observed]
    floor = [
        c2st(e, problem.posterior(x, SAMPLES)).item() for e, x in zip(exact, observed, strict=True)
    ]
    test_theta = problem.prior.sample((SAMPLES,))
    test_x = problem.simulate(test_theta)
    pairs = (test_theta, test_x) if method is Method.npe else (test_x, test_theta)
    shown = {"exact": exact[:SHOWN]}
    scores = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        theta = problem.prior.sample((simulations,))
        x = problem.simulate(theta)
        for entry in ESTIMATORS[method]:
            console.print(f"{entry.name}, seed {seed} of {seeds}")
            torch.manual_seed(seed)
            start = time.monotonic()
            inference, estimator = train(method, entry, problem, theta, x, epochs)
            seconds = time.monotonic() - start
            posterior = inference.build_posterior(**SAMPLING[method])
            samples = [
                posterior.sample((SAMPLES,), x=o, show_progress_bars=False) for o in observed
            ]
            shown.setdefault(entry.name, samples[:SHOWN])
            nll, double = test_losses(estimator, *pairs)
            scores.append(
                Score(
                    name=entry.name,
                    seed=seed,
                    parameters=sum(p.numel() for p in estimator.parameters()),
                    epochs=inference.summary["epochs_trained"][-1],
                    seconds=seconds,
                    nll=nll,
                    nll_double_steps=double,
                    c2st=[c2st(e, s).item() for e, s in zip(exact, samples, strict=True)],
                )
            )
    draw(shown, observed[:SHOWN], out / "inference.png")
    write_results(
        out,
        c2st_exact=floor,
        scores=[asdict(s) for s in scores],
    )
    title = f"{task.value}, {method.value}, {simulations} simulations, {seeds} seeds"
    console.print(table(scores, floor, title))
    console.print(f"picture: {out / 'inference.png'}    numbers: {out / 'results.json'}")


if __name__ == "__main__":
    typer.run(main)
