"""The flows of the MNIST example, each with the settings of its training.

To add one, write what makes its transforms and add a line to :data:`PRESETS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import normflows
import torch
from nflows.flows import MaskedAutoregressiveFlow, SimpleRealNVP
from nflows.nn.nets import ResidualNet
from nflows.transforms import (
    CompositeTransform,
    LULinear,
    PiecewiseRationalQuadraticCouplingTransform,
    RandomPermutation,
    Transform,
)
from pytorch_optimizer import Muon
from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_mongeampere import (
    ConvolutionalPotential,
    MongeAmpereCouplingTransform,
    MongeAmpereTransform,
    PixelwisePotential,
    RidgePotential,
)
from nflows_mongeampere.examples.images import (
    Marginals,
    Pixels,
    Quantile,
    dequantise,
    to_logits,
    whitening,
)
from nflows_mongeampere.examples.networks import FromNormflows, GreyLevels
from nflows_mongeampere.examples.runs import fast_bfloat16
from nflows_mongeampere.multiscale import AsImages, PixelNetwork, coarse_to_fine

SIDE, LEVELS, MARGIN = 28, 256, 1e-6
FEATURES = SIDE * SIDE


@dataclass(frozen=True)
class Preset:
    """A flow, with the settings of its training.

    Attributes:
        build: makes the transforms, from logits to noise, from the training images.
        learning_rate: the highest, of Adam.
        batch_size: images.
        interval: steps between two validations.
        weight_decay: as Adam has it.
        anneal: whether the learning rate falls to zero with the budget.
        clip: largest norm of the gradient.
        solver_tolerance: nats, above which training takes more of the solver's steps.
        linear_rate: learning rate of linear transforms, relative to the rest.
        kernel_rate: learning rate of Muon, for the kernels within networks; None leaves them to
            Adam, as the rest.
        precision: of the networks in training, as Lightning calls it, where the machine is fast in
            it; flows keep theirs.
        shift: pixels by which digits are moved in training, at most; fewer digits as it goes on.
    """

    build: Callable[[Tensor], list[Transform]]
    learning_rate: float
    batch_size: int = 100
    interval: int = 100
    weight_decay: float = 0.0
    anneal: bool = True
    clip: float | None = 200.0
    solver_tolerance: float = 0.5
    linear_rate: float = 1.0
    kernel_rate: float | None = None
    precision: str = "32-true"
    shift: int = 0


def paper(levels: Tensor) -> list[Transform]:
    """The published flow: one potential, on raw logits."""
    potential = RidgePotential(FEATURES, 1024)
    return [MongeAmpereTransform(potential, time=10.0, steps=100)]


def behind_whitening(flow: Callable[[], Transform], levels: Tensor) -> list[Transform]:
    """A linear transform of nflows that whitens the data, then the flow."""
    return [whitening(images_through([], levels)), flow()]


def fast() -> Transform:
    """The published potential; its ridges start along the whitened pixels."""
    potential = RidgePotential(FEATURES, 1024)
    with torch.no_grad():
        potential.weight[:FEATURES] = torch.eye(FEATURES)
    return MongeAmpereTransform(potential, time=2.0, steps=3)


def couplings(levels: Tensor) -> list[Transform]:
    """Half of the whitened pixels flow in ridges that a network draws from the others, in turns."""
    whiten, width = whitening(images_through([], levels)), 128
    white = images_through([whiten], levels[:5000])
    row, column = torch.arange(FEATURES) // SIDE, torch.arange(FEATURES) % SIDE

    def network(passing: int, outputs: int) -> nn.Module:
        inner = (nn.Linear(passing, 2 * width), nn.SiLU(), nn.Dropout(0.2))
        return nn.Sequential(*inner, nn.Linear(2 * width, outputs), nn.SiLU())

    layers: list[Transform] = [whiten]
    for place in (row + column, row + column + 1, column, column + 1):
        moves = place % 2 == 0
        potential = RidgePotential(FEATURES // 2, 512, context_features=width)
        potential.initialize(white[:, moves])
        layers.append(MongeAmpereCouplingTransform(moves.int(), network, potential, steps=2))
    return layers


def normal_marginals(levels: Tensor) -> list[Transform]:
    """Each pixel by itself made normal."""
    return [Pixels(MARGIN), Marginals(levels, LEVELS), Quantile()]


def convolutional(levels: Tensor) -> list[Transform]:
    """Marginals made normal, then potentials of neighbouring pixels, then a linear transform."""
    before = normal_marginals(levels)
    flows = [
        MongeAmpereTransform(ConvolutionalPotential((1, SIDE, SIDE), 16), steps=2) for _ in range(2)
    ]
    return [*before, *flows, whitening(images_through(before, levels))]


def whitened_multiscale(levels: Tensor) -> list[Transform]:
    """Whitened pixels flow in what networks say of coarser ones; whitening keeps their places."""
    scales = coarse_to_fine((1, SIDE, SIDE), stiffness=10.0, steps=4)
    return [whitening(images_through([], levels)), AsImages((1, SIDE, SIDE)), scales]


def multiscale(width: int, blocks: int, ridges: int, maps: int, levels: Tensor) -> list[Transform]:
    """From fine to coarse, pixels flow in what networks say of coarser ones."""
    # paper and ink, where there is any, apart from grey: clusters, which a smooth flow tells apart
    ends = {-3.0: levels == 0, 3.0: levels >= 252}
    weights = {mean: float(end.double().mean()) for mean, end in ends.items()}
    weights = {mean: weight for mean, weight in weights.items() if weight > 0.01}
    weights[0.0] = 1 - sum(weights.values())
    means = sorted(weights)
    before = [
        Marginals(levels, LEVELS, shared=True),
        Quantile([weights[mean] for mean in means], means),
    ]
    network = partial(
        PixelNetwork,
        width=width,
        blocks=blocks,
        before=GreyLevels(before, LEVELS),
    )
    scales = coarse_to_fine(
        (1, SIDE, SIDE),
        network,
        hidden_features=ridges,
        context_channels=maps,
        stiffness=10.0,
        steps=3,
    )
    return [Pixels(MARGIN), *before, AsImages((1, SIDE, SIDE)), scales]


def realnvp() -> Transform:
    """Affine coupling layers."""
    return SimpleRealNVP(FEATURES, 512, 5, 2)._transform


def maf() -> Transform:
    """Masked autoregressive layers."""
    return MaskedAutoregressiveFlow(FEATURES, 512, 5, 2)._transform


def spline() -> Transform:
    """Rational-quadratic coupling layers."""
    layers: list[Transform] = []
    for i in range(5):
        mask = torch.arange(FEATURES) % 2 == i % 2
        layers += [
            RandomPermutation(FEATURES),
            PiecewiseRationalQuadraticCouplingTransform(
                mask.int(),
                lambda inputs, outputs: ResidualNet(inputs, outputs, 256, num_blocks=2),
                num_bins=8,
                tails="linear",
                tail_bound=5.0,
            ),
        ]
    return CompositeTransform(layers)


def whitened_spline(levels: Tensor) -> list[Transform]:
    """Marginals made normal, a linear transform that whitens them, then splines."""
    before = normal_marginals(levels)
    return [*before, whitening(images_through(before, levels)), spline()]


def glow(levels: Tensor) -> list[Transform]:
    """Marginals made normal, then blocks of Glow on images squeezed once and twice."""
    before = normal_marginals(levels)
    flows: list[normflows.flows.Flow] = []
    for channels in (16, 4):  # from noise to data
        flows += [normflows.flows.GlowBlock(channels, 64, scale_map="exp") for _ in range(6)]
        flows.append(normflows.flows.Squeeze())
    return [*before, AsImages((1, SIDE, SIDE)), FromNormflows(flows, (16, 7, 7))]


MULTISCALE = partial(
    Preset,
    learning_rate=6e-3,
    batch_size=50,
    interval=500,
    kernel_rate=0.025,
    precision="bf16-mixed",
    solver_tolerance=0.2,
    shift=1,
)
PRESETS = {
    "paper": Preset(
        paper, 1e-3, interval=500, weight_decay=1e-3, anneal=False, clip=None, solver_tolerance=5.0
    ),
    "fast": Preset(
        partial(behind_whitening, fast),
        6e-3,
        batch_size=200,
        interval=200,
        solver_tolerance=1.5,
        linear_rate=0.02,
    ),
    "coupling": Preset(
        couplings, 4e-3, batch_size=200, interval=200, solver_tolerance=1.5, linear_rate=0.02
    ),
    "whitened": Preset(
        whitened_multiscale,
        6e-3,
        interval=250,
        linear_rate=0.02,
        solver_tolerance=0.3,
        kernel_rate=0.025,
    ),
    "convolutional": Preset(
        convolutional, 2e-2, interval=200, linear_rate=0.02, solver_tolerance=2.0
    ),
    "stacked": MULTISCALE(partial(multiscale, 64, 2, 16, 16), interval=1000),
    "deep": MULTISCALE(partial(multiscale, 64, 3, 24, 24), interval=2000),
    "whitened-spline": Preset(whitened_spline, 2e-3, linear_rate=0.1),
    "glow": Preset(glow, 1.6e-2),
    "realnvp": Preset(partial(behind_whitening, realnvp), 5e-4, linear_rate=0.1),
    "maf": Preset(partial(behind_whitening, maf), 5e-4, linear_rate=0.1),
    "spline": Preset(partial(behind_whitening, spline), 5e-4, linear_rate=0.1),
}


def logits(levels: Tensor, generator: torch.Generator) -> Tensor:
    """Dequantised images in logit space, what the flows see."""
    return to_logits(dequantise(levels, generator, LEVELS), MARGIN)


def shifted(levels: Tensor, generator: torch.Generator, pixels: int, share: float) -> Tensor:
    """A share of the images moved by as many pixels at most, along both axes."""
    number = len(levels)
    moved = torch.rand(number, 2, generator=generator)
    moves = ((2 * pixels + 1) * moved).long() - pixels
    moves *= torch.rand(number, 1, generator=generator) < share
    padded = F.pad(levels.view(number, SIDE, SIDE), (pixels,) * 4)
    place = pixels + moves[:, :, None] + torch.arange(SIDE)
    rows, columns = place[:, 0, :, None], place[:, 1, None, :]
    return padded[torch.arange(number)[:, None, None], rows, columns].flatten(1)


def images_through(before: list[Transform], levels: Tensor) -> Tensor:
    """The training images behind the first transforms."""
    points = logits(levels, torch.Generator().manual_seed(0))
    with torch.no_grad():
        parts = [CompositeTransform(before)(part)[0] for part in points.split(5000)]
    return torch.cat(parts)


class Float32Muon(Muon):
    """Muon with its iterations in float32, for machines without instructions for bfloat16.

    There, a step of it takes a tenth of the time or less.
    """

    @staticmethod
    def _orthogonalize(group: dict[str, Any], updates: list[Tensor]) -> list[Tensor]:
        settings = {"num_steps": group["ns_steps"], "weights": group["ns_coeffs"]}
        return [
            zero_power_via_newton_schulz_5(update.flatten(1), **settings, dtype=torch.float32)
            for update in updates
        ]


def make_optimizer(preset: Preset, flow: nn.Module) -> torch.optim.Optimizer:
    """Adam, with learning rates of their own for linear transforms and slopes; Muon for kernels.

    Muon (K. Jordan et al., https://kellerjordan.github.io/posts/muon) takes steps along orthogonal
    matrices.
    """
    layers = [module for module in flow.modules() if isinstance(module, LULinear)]
    linear = [parameter for layer in layers for parameter in layer.parameters()]
    slopes = [m.weight for m in flow.modules() if isinstance(m, PixelwisePotential)]
    networks = [m for m in flow.modules() if isinstance(m, PixelNetwork)]
    kernels = [p for m in networks for p in m.blocks.parameters() if p.dim() > 1]
    kernels = kernels if preset.kernel_rate else []
    known = set(map(id, [*linear, *slopes, *kernels]))
    rest = [p for p in flow.parameters() if p.requires_grad and id(p) not in known]
    betas = (0.9, 0.99) if preset.anneal else (0.9, 0.999)
    settings: dict[str, Any] = {"weight_decay": preset.weight_decay, "betas": betas}
    groups: list[dict[str, Any]] = [
        {"params": rest, "lr": preset.learning_rate, **settings},
        {"params": linear, "lr": preset.learning_rate * preset.linear_rate, **settings},
        # the slopes would sharpen until the solver misses what they do
        {"params": slopes, "lr": preset.learning_rate * 0.1, **settings},
    ]
    groups = [group for group in groups if group["params"]]
    if not kernels:
        return torch.optim.Adam(groups)
    groups = [{**group, "use_muon": False} for group in groups]
    groups.append({"params": kernels, "lr": preset.kernel_rate, "use_muon": True})
    return (Muon if fast_bfloat16() else Float32Muon)(groups)
