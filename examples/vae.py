"""A variational autoencoder whose posterior is bent by a Monge-Ampère flow.

normflows' ``NormalizingFlowVAE`` on scikit-learn's 8x8 digits in black and white, with two latent
variables and three kinds of posterior q(z | x), trained for the same time with like encoders and
decoders:

- the diagonal Gaussian of normflows;
- the same behind a flow that does not see x, which does what a learned prior would do;
- a flow of nflows that sees x: a Gaussian, then a Monge-Ampère flow with the embedded x as context.

In two dimensions ln p(x) = ln ∫ p(x | z) p(z) dz is a sum over a grid, so that the bounds

    ELBO = ⟨ln p(x, z) - ln q(z | x)⟩  ≤  ⟨ln 1/K Σ_k p(x, z_k) / q(z_k | x)⟩  ≤  ln p(x)

can be held against what they bound, and a posterior against the true one.

    python examples/vae.py --out runs/vae --seconds 20 --seeds 3
"""

from __future__ import annotations

import nflows_mongeampere.examples.extras  # noqa: F401

import math
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import torch
import typer
from nflows.distributions import ConditionalDiagonalNormal
from nflows.flows import Flow
from normflows import NormalizingFlowVAE
from normflows.distributions import DiagGaussian, NNBernoulliDecoder, NNDiagGaussian
from normflows.distributions.encoder import BaseEncoder
from normflows.nets import MLP
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

import digits
from nflows_mongeampere import MongeAmpereFlow, RidgePotential, refined
from nflows_mongeampere.examples.pictures import draw_rows, save_figure
from nflows_mongeampere.examples.runs import write_results
from nflows_mongeampere.normflows import MongeAmpere
from nflows_mongeampere.training import EndlessBatches, Objective, endless, fit

LATENTS, HIDDEN, RIDGES, STEPS = 2, 128, 32, 2
SAMPLES = 100  # of the importance-weighted bound
GRID, EDGE = 241, 6.0  # points on a side of the grid of latents, from -EDGE to EDGE
console = Console()


class FlowEncoder(BaseEncoder):
    """A conditional flow of nflows as an encoder of normflows.

    Args:
        flow: of the latents, with x as its context.
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, num_samples: int = 1) -> tuple[Tensor, Tensor]:
        """Latents, shape (B, num_samples, D), and ln q(z | x), shape (B, num_samples)."""
        pair: tuple[Tensor, Tensor] = self.flow.sample_and_log_prob(num_samples, context=x)
        return pair


class VAE(NormalizingFlowVAE):
    """normflows' VAE, with the bounds of ln p(x) that it is trained and judged by."""

    def elbo(self, x: Tensor) -> Tensor:
        """One draw of ln p(x, z) - ln q(z | x) for each row of ``x``."""
        return self._log_weights(x, 1)[:, 0]

    def log_prob(self, x: Tensor, num_samples: int = SAMPLES) -> Tensor:
        """The importance-weighted bound, ln of the mean of p(x, z) / q(z | x)."""
        return self._log_weights(x, num_samples).logsumexp(1) - math.log(num_samples)

    def _log_weights(self, x: Tensor, num_samples: int) -> Tensor:
        """Draws of ln p(x, z) / q(z | x), shape (B, num_samples)."""
        _, log_q, log_p = self(x, num_samples)
        weights: Tensor = log_p - log_q
        return weights


class NegativeELBO(Objective):
    """Trains a :class:`VAE`."""

    def loss(self, batch: Tensor) -> Tensor:
        flow: Any = self.flow
        self.entries = batch[0].numel()
        loss: Tensor = -flow.elbo(batch).mean()
        return loss


def gaussian() -> VAE:
    """The posterior is a diagonal Gaussian."""
    return _vae(NNDiagGaussian(_encoder(2 * LATENTS)))


def shared() -> VAE:
    """The same, behind one flow for all x."""
    potential = RidgePotential(LATENTS, RIDGES)
    return _vae(NNDiagGaussian(_encoder(2 * LATENTS)), MongeAmpere(potential, steps=STEPS))


def conditional() -> VAE:
    """The same, behind a flow that depends on x."""
    flow = MongeAmpereFlow(
        LATENTS,
        RIDGES,
        context_features=HIDDEN,
        embedding_net=nn.Sequential(_encoder(HIDDEN), nn.LeakyReLU()),
        distribution=ConditionalDiagonalNormal([LATENTS], nn.Linear(HIDDEN, 2 * LATENTS)),
        steps=STEPS,
    )
    return _vae(FlowEncoder(flow))


def _encoder(outputs: int) -> MLP:
    return MLP([digits.FEATURES, HIDDEN, outputs])


def _vae(encoder: BaseEncoder, *flows: nn.Module) -> VAE:
    decoder = NNBernoulliDecoder(MLP([LATENTS, HIDDEN, HIDDEN, digits.FEATURES]))
    return VAE(DiagGaussian(LATENTS, trainable=False), encoder, flows, decoder)


POSTERIORS: dict[str, Callable[[], VAE]] = {
    "Gaussian": gaussian,
    "Monge-Ampère, shared": shared,
    "Monge-Ampère, conditional": conditional,
}


def black_and_white(levels: Tensor) -> Tensor:
    """1 for ink, 0 for paper."""
    return (levels > digits.LEVELS // 2).float()


def train(name: str, images: Tensor, watched: Tensor, seconds: float, seed: int) -> VAE:
    """The VAE at the checkpoint with the best validation ELBO."""
    torch.manual_seed(seed)
    vae = POSTERIORS[name]()

    def optimizer(vae: nn.Module) -> torch.optim.Optimizer:
        # potentials start at zero and have further to go than the weights of networks
        potentials = [p for key, p in vae.named_parameters() if "potential" in key]
        networks = [p for key, p in vae.named_parameters() if "potential" not in key]
        return torch.optim.Adam(
            [{"params": networks, "lr": 5e-3}, {"params": potentials, "lr": 3e-2}]
        )

    with tempfile.TemporaryDirectory() as folder:
        fit(
            NegativeELBO(vae, optimizer=optimizer, minutes=seconds / 60, seed=seed),
            endless(EndlessBatches(images, 100, seed), interval=100),
            DataLoader(watched.repeat(5, 1), batch_size=5 * len(watched)),  # type: ignore[arg-type]
            folder,
            name=f"{name:>25}, seed {seed}",
        )
    vae.cpu().eval()
    return vae


@torch.no_grad()
def log_joint(vae: VAE, x: Tensor, z: Tensor) -> Tensor:
    """The values of ln p(x, z) for each row of ``x`` and each of ``z``, shape (B, Z)."""
    logits = vae.decoder.net(z)
    log_likelihood: Tensor = x @ logits.T - nn.functional.softplus(logits).sum(1)
    log_prior: Tensor = vae.prior.log_prob(z)
    return log_likelihood + log_prior


def log_evidence(vae: VAE, x: Tensor, points: int = GRID) -> Tensor:
    """The values of ln p(x), by a sum over a square grid of latents, shape (B,)."""
    side = torch.linspace(-EDGE, EDGE, points)
    area = float(side[1] - side[0]) ** 2
    return log_joint(vae, x, torch.cartesian_prod(side, side)).logsumexp(1) + math.log(area)


@dataclass(frozen=True)
class Score:
    """The bounds of one VAE, means over the test images in nats.

    Attributes:
        posterior: which one.
        seed: of weights, batches and noise.
        parameters: how many are trained.
        elbo: the bound that is trained.
        elbo_double_steps: the same at twice the integration steps, with the same noise.
        weighted: the importance-weighted bound of ``SAMPLES`` samples.
        evidence: ln p(x), by the grid.
    """

    posterior: str
    seed: int
    parameters: int
    elbo: float
    elbo_double_steps: float
    weighted: float
    evidence: float


@torch.no_grad()
def score(name: str, vae: VAE, test: Tensor, seed: int) -> Score:
    """The bounds and what they bound."""

    def elbo() -> float:
        torch.manual_seed(0)
        return vae.elbo(test.repeat(50, 1)).mean().item()

    coarse = elbo()
    with refined(vae):
        fine = elbo()
    return Score(
        posterior=name,
        seed=seed,
        parameters=sum(p.numel() for p in vae.parameters()),
        elbo=coarse,
        elbo_double_steps=fine,
        weighted=vae.log_prob(test).mean().item(),
        evidence=log_evidence(vae, test).mean().item(),
    )


def table(scores: list[Score], seconds: float) -> Table:
    """Means over the seeds, ± their standard deviation."""
    result = Table(title=f"8x8 digits in black and white, test set, {seconds:g} s of training each")
    for column in ("posterior", "ELBO", f"bound, K = {SAMPLES}", "ln p(x)", "ln p(x) - ELBO"):
        result.add_column(column, justify="left" if column == "posterior" else "right")
    for name in POSTERIORS:
        rows = [s for s in scores if s.posterior == name]
        columns = (
            [s.elbo for s in rows],
            [s.weighted for s in rows],
            [s.evidence for s in rows],
            [s.evidence - s.elbo for s in rows],
        )
        result.add_row(name, *(_spread(values) for values in columns))
    return result


def _spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


@torch.no_grad()
def draw(vaes: dict[str, VAE], test: Tensor, path: Path) -> None:
    """Reconstructions and samples; true posteriors with samples of the encoder on them."""
    count, shown = 10, 4
    torch.manual_seed(0)
    noise = torch.randn(count, LATENTS)
    rows = [("digits", test[:count])]
    for name, vae in vaes.items():
        latents = vae(test[:count])[0][:, 0]
        rows += [(name.replace(", ", "\n"), vae.decoder(latents)), ("samples", vae.decoder(noise))]
    figure = plt.figure(figsize=(12.5, 5.6), layout="constrained")
    ((left, right),) = figure.subfigures(1, 2, width_ratios=(1, 1), squeeze=False)
    left.suptitle("Reconstructions, and samples from the prior")
    draw_rows(left, rows, digits.SIDE, {"cmap": "gray_r", "vmin": 0, "vmax": 1})
    right.suptitle("True posterior (grey), samples of q(z | x) (red)")
    axes: Any = right.subplots(len(vaes), shown, squeeze=False)
    for (name, vae), line in zip(vaes.items(), axes, strict=True):
        line[0].set_ylabel(name.replace(", ", "\n"), fontsize=9)
        for x, axis in zip(test[:shown, None], line, strict=True):
            z = vae(x, 300)[0][0]
            center, reach = z.mean(0), 5 * float(z.std(0).max())
            across, up = (torch.linspace(float(c) - reach, float(c) + reach, 81) for c in center)
            posterior = log_joint(vae, x, torch.cartesian_prod(across, up)).softmax(1)
            extent = [float(across[0]), float(across[-1]), float(up[0]), float(up[-1])]
            axis.imshow(
                posterior.reshape(81, 81).T.sqrt(), origin="lower", cmap="Greys", extent=extent
            )
            axis.scatter(*z.T, s=3, alpha=0.5, linewidths=0, color="C3")
            axis.set(xticks=[], yticks=[])
    save_figure(figure, path)


def main(
    out: Annotated[Path, typer.Option(help="Folder for results.json and vae.png.")] = Path(
        "runs/vae"
    ),
    seconds: Annotated[float, typer.Option(min=1, help="Training time of each VAE.")] = 20,
    seeds: Annotated[int, typer.Option(min=1, help="VAEs of each kind.")] = 3,
) -> None:
    """Train VAEs with three kinds of posterior for the same time each, compare and draw them."""
    out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", module="normflows")
    data = digits.load()
    images, watched, test = map(black_and_white, (data.train, data.validation, data.test))
    scores: list[Score] = []
    first: dict[str, VAE] = {}
    for seed in range(seeds):
        for name in POSTERIORS:
            vae = train(name, images, watched, seconds, seed)
            scores.append(score(name, vae, test, seed))
            first.setdefault(name, vae)
    draw(first, test, out / "vae.png")
    write_results(
        out,
        scores=[asdict(s) for s in scores],
    )
    console.print(table(scores, seconds))
    console.print(f"picture: {out / 'vae.png'}    numbers: {out / 'results.json'}")


if __name__ == "__main__":
    typer.run(main)
