"""Flows for fields on a periodic lattice, with the symmetries of their action.

An action of your own, from nothing to its free energy::

    target = LatticeAction((8, 8), action)  # action: fields (B, 8, 8) -> (B,)
    flow = LatticeFlow.towards(target)  # has its symmetries, starts at its best Gaussian
    train(flow, target, "runs/mine", minutes=1)
    samples = weigh(flow, target, 10_000)
    print(samples.corrected_free_energy, samples.effective_sample_size)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from nflows.flows import Flow
from nflows.transforms import CompositeTransform
from torch import Tensor, nn

from nflows_mongeampere import validation
from nflows_mongeampere.convergence import converged
from nflows_mongeampere.flow import Noise
from nflows_mongeampere.groups import Group, lattice_shape
from nflows_mongeampere.modes import LatticeModes
from nflows_mongeampere.potentials.lattice import LatticePotential, lattice_group
from nflows_mongeampere.targets import LatticeAction as LatticeAction
from nflows_mongeampere.transform import MongeAmpereTransform
from nflows_mongeampere.variational import target_log_prob
from nflows_mongeampere.variational import weigh as weigh

if TYPE_CHECKING:
    from nflows_mongeampere.training import History

# Two actions are the same if they differ by less than this part of their size, in float32.
SAME = 1e-4

# Fields on which the best Gaussian is found; half of them are the negatives of the others.
GAUSSIAN_FIELDS = 512

# Steps of a training between two validations, and the solver's error that its guard allows for
# each site, in nats.
INTERVAL, GUARDED = 50, 5e-4

# How much the free energy of a trained flow may change at twice its solver's steps, in nats, and on
# how many of its fields that is judged.
SETTLED, JUDGED = 2e-3, 200

# A new flow is first trained on a lattice half as long, for this part of its minutes, unless that
# has a side shorter than so many sites.
FIRST, SHORTEST = 0.3, 6


class LatticeFlow(Flow):
    r"""A flow for fields on a periodic lattice, with the symmetries of the lattice exactly.

    Noise goes through Monge-Ampère flows of :class:`~nflows_mongeampere.LatticePotential`, then
    its Fourier modes are stretched (:class:`~nflows_mongeampere.modes.LatticeModes`). Everything an
    :class:`nflows.flows.Flow` can do: ``log_prob``, ``sample``, ``sample_and_log_prob``.

    Args:
        shape: of the lattice, in any number of dimensions.
        pieces: Monge-Ampère flows, one after the other.
        kernels: of each.
        powers: functions of each parity for each kernel.
        even: whether the density of :math:`-\phi` is that of :math:`\phi`; else the flow has a mean
            too.
        group: the symmetries besides translations (and the sign), which keep the first site; the
            point group of the lattice unless given.
        context_features: width of the context, or None.
        **transport: ``time``, ``steps``, ``solver``, ... as in
            :class:`~nflows_mongeampere.MongeAmpereTransform`; ``steps`` is 1 unless given.

    Raises:
        TypeError, ValueError: for arguments that do not fit.

    Example:
        >>> import torch
        >>> from nflows_mongeampere.lattices import LatticeFlow
        >>> flow = LatticeFlow((4, 4))
        >>> flow.sample(3).shape
        torch.Size([3, 16])
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        pieces: int = 6,
        kernels: int = 4,
        powers: int = 3,
        even: bool = True,
        group: Group | None = None,
        context_features: int | None = None,
        **transport: Any,
    ) -> None:
        sides = lattice_shape("shape", shape)
        group = lattice_group(sides, group)
        settings: dict[str, Any] = {"powers": powers, "even": even, "group": group}
        count = validation.integer("pieces", pieces)
        transforms = [
            MongeAmpereTransform(
                LatticePotential(sides, kernels, context_features=context_features, **settings),
                **{"steps": 1, **transport},
            )
            for _ in range(count)
        ]
        modes = LatticeModes(torch.zeros(sides), None if even else 0.0, group)
        base = Noise([math.prod(sides)], modes)
        super().__init__(CompositeTransform([modes, *transforms]), base)

    @classmethod
    def towards(cls, target: Any, **settings: Any) -> LatticeFlow:
        """A flow with the symmetries of a target, which starts at its best Gaussian.

        Args:
            target: a :class:`~nflows_mongeampere.targets.LatticeAction`, or any object with
                ``log_prob`` and the ``shape`` of the lattice.
            **settings: of the class, other than ``shape``, ``even`` and ``group``.

        Raises:
            TypeError: if ``target`` lacks one of these.
            ValueError: if translations change its log-density, or it is NaN or infinite.
        """
        found = symmetries(target)
        flow = cls(_shape(target), even=found.even, group=found.group, **settings)
        flow.start(*best_gaussian(target, found))
        return flow

    @torch.no_grad()
    def start(self, log_scale: Tensor, mean: float = 0.0) -> None:
        """Start at a Gaussian.

        Args:
            log_scale: logarithms of the standard deviations of the Fourier modes, in the shape of
                the lattice.
            mean: of all sites; ignored by an even flow.
        """
        self.modes.log_scale = log_scale  # type: ignore[assignment]
        if self.modes.mean is not None:
            self.modes.mean.fill_(mean)

    def resized(self, shape: Sequence[int], group: Group | None = None) -> LatticeFlow:
        """A new flow with the settings of this one, for a lattice of another shape.

        Args:
            shape: of that lattice.
            group: its symmetries; the point group unless given.
        """
        return LatticeFlow(**{**self.arguments(), "shape": shape, "group": group})

    @torch.no_grad()
    def adopt(self, smaller: LatticeFlow, correction: Tensor) -> None:
        r"""Take over what a flow has learnt on a smaller lattice.

        Kernels of the smaller lattice are those of the larger one that vanish further away. Its
        scales are not: they depend on the size, but by how much those of the flow differ from the
        ones of the best Gaussian varies slowly with the wave vector.

        Args:
            smaller: a flow with the same settings.
            correction: of the logarithms of the scales of the smaller lattice against its best
                Gaussian, in the shape of that lattice; added to the scales here.
        """
        added = _interpolated(correction, self.shape)
        self.modes.log_scale = self.modes.log_scale + added  # type: ignore[assignment]
        if self.modes.mean is not None and smaller.modes.mean is not None:
            self.modes.mean.copy_(smaller.modes.mean)
        for piece, learnt in zip(self.pieces, smaller.pieces, strict=True):
            mine, other = piece.potential, learnt.potential
            assert isinstance(other, LatticePotential)
            state = other.state_dict()
            state["weight"] = _padded(other.symmetric_weight, smaller.shape, self.shape)
            mine.load_state_dict(state)

    @property
    def modes(self) -> LatticeModes:
        """The last transform before the data, which makes the Gaussian that the flow starts at."""
        modes: LatticeModes = self._transform._transforms[0]
        return modes

    @property
    def pieces(self) -> list[MongeAmpereTransform]:
        """The Monge-Ampère flows, from data to noise."""
        return list(self._transform._transforms)[1:]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the lattice."""
        potential: Any = self.pieces[0].potential
        shape: tuple[int, ...] = potential.shape
        return shape

    @property
    def group(self) -> Group:
        """The symmetries besides translations and the sign."""
        return self.modes.group

    @property
    def new(self) -> bool:
        """Whether nothing has been learnt yet, so that the flow is a Gaussian."""
        potentials: list[Any] = [piece.potential for piece in self.pieces]
        return not any(bool(potential.amplitude.any()) for potential in potentials)

    def arguments(self) -> dict[str, Any]:
        """The arguments that build a flow like this one, without what it has learnt."""
        transport = self.pieces[0].arguments()
        potential = transport.pop("potential").arguments()
        return {**potential, "pieces": len(self.pieces), **transport}


class Symmetries(NamedTuple):
    """What leaves a target on a periodic lattice alone, besides translations.

    Attributes:
        even: whether a change of the sign does.
        group: the rotations and reflections that do, and keep the first site.
    """

    even: bool
    group: Group


@torch.no_grad()
def symmetries(target: Any) -> Symmetries:
    """Find the symmetries of a target, by its log-density at a few random fields.

    Args:
        target: an object with ``log_prob`` and ``shape``.

    Raises:
        TypeError: if ``target`` lacks one of these.
        ValueError: if translations change its log-density.
    """
    shape = _shape(target)
    generator = torch.Generator().manual_seed(0)
    fields = torch.randn(4, *shape, generator=generator)
    expected = target_log_prob(target, fields.flatten(1))

    def kept(images: Tensor) -> bool:
        found = target_log_prob(target, images.flatten(1))
        return bool(((found - expected).abs() <= SAME * (1 + expected.abs())).all())

    for dimension in range(1, len(shape) + 1):
        if not kept(fields.roll(1, dimension)):
            raise ValueError(
                f"target: its log-density changes when fields move by a site along dimension "
                f"{dimension - 1} of {shape}, expected a periodic lattice; use a MongeAmpereFlow "
                "for any other"
            )
    sites = torch.arange(fields[0].numel()).reshape(shape)
    flips = [sites.flip(d).roll(1, d) for d in range(len(shape))]
    every = range(len(shape))
    moves = [
        *flips,
        *(
            sites.transpose(d, e)
            for d, e in itertools.combinations(every, 2)
            if shape[d] == shape[e]
        ),
        sites.flip([*every]).roll([1] * len(shape), [*every]),
    ]
    rows = fields.flatten(1)
    group = Group.generated_by(
        [sites.flatten(), *(m.flatten() for m in moves if kept(rows[:, m.flatten()]))]
    )
    return Symmetries(kept(-fields), group)


def best_gaussian(target: Any, found: Symmetries | None = None) -> tuple[Tensor, float]:
    r"""The Gaussian of lowest variational free energy, with the symmetries of a target.

    .. math:: F(s, m) = -\sum_k s_k - \langle \ln \pi\big(m + U^\dagger e^{s} U \xi\big)
              \rangle_{\xi \sim \mathcal{N}(0, 1)}

    with U the Fourier transform, is minimised by L-BFGS on the same few hundred :math:`\xi`.

    Args:
        target: an object with ``log_prob`` and ``shape``.
        found: its symmetries, or None to look for them.

    Returns:
        The logarithms s of the standard deviations of the Fourier modes, in the shape of the
        lattice, and the mean m, 0 where the target is even.

    Raises:
        ValueError: if the log-density is NaN or infinite on the way.
    """
    found = symmetries(target) if found is None else found
    shape = _shape(target)
    modes = LatticeModes(torch.zeros(shape), None if found.even else 0.0, found.group)
    noise = torch.randn(
        GAUSSIAN_FIELDS // 2, math.prod(shape), generator=torch.Generator().manual_seed(0)
    )
    noise = torch.cat([noise, -noise])
    optimizer = torch.optim.LBFGS(modes.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def free_energy() -> Tensor:
        optimizer.zero_grad()
        x, logabsdet = modes.inverse(noise)
        loss = -logabsdet.mean()
        if bool(x.isfinite().all()):
            loss = loss - target_log_prob(target, x).mean()
            loss.backward()
        if not bool(loss.isfinite()) or not bool(x.isfinite().all()):
            raise ValueError(
                "target: no Gaussian has the lowest free energy, or its action is infinite; "
                "check that it is finite and bounded below"
            )
        return loss

    optimizer.step(free_energy)
    mean = 0.0 if modes.mean is None else modes.mean.item()
    return modes.log_scale.detach(), mean


def make_optimizer(flow: nn.Module, learning_rate: float = 2e-2) -> torch.optim.Optimizer:
    r"""Adam for a :class:`LatticeFlow`, with learning rates that suit the size of the lattice.

    Args:
        flow: what is trained.
        learning_rate: of the amplitudes of an 8 x 8 lattice. Larger ones learn more slowly, as
            :math:`1 / \sqrt{D}`; kernels and modes, which have D entries, at a third of that.
    """
    named = dict(flow.named_parameters())
    amplitudes = [p for name, p in named.items() if name.endswith(("amplitude", "context_weight"))]
    chosen = {id(p) for p in amplitudes}
    rest = [p for p in named.values() if id(p) not in chosen]
    sites = max(p.numel() for name, p in named.items() if "log_scale" in name)
    rate = learning_rate * min(1.0, 8 / math.sqrt(sites))
    groups = [{"params": amplitudes, "lr": rate}, {"params": rest, "lr": rate / 3}]
    return torch.optim.Adam(groups, betas=(0.9, 0.99))


def train(
    flow: LatticeFlow,
    target: Any,
    folder: str | Path,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    num_samples: int = 64,
    learning_rate: float = 2e-2,
    path_gradient: bool = True,
    seed: int = 0,
    smaller_first: bool = True,
    name: str = "training",
) -> History:
    """Train a flow towards a target by its variational free energy, and leave it for evaluation.

    Path gradients, a solver that is watched, a learning rate that falls to zero over the budget. In
    the end the solver takes as many steps as make the free energy stand still to 0.002 nats. An
    interrupted training is taken up from its folder.

    What a flow learns hardly depends on the size of the lattice, but the price of a step does: a
    new flow is first trained on a lattice half as long, and that one on one half as long again.

    Args:
        flow: what is trained.
        target: an object with ``log_prob`` and ``shape``; with ``resized(shape)``, which gives the
            same target on another lattice, smaller lattices come first.
        folder: for checkpoints and metrics, as in :func:`~nflows_mongeampere.training.fit`.
        minutes: the budget in wall-clock time, and
        steps: in steps of the optimiser on each lattice; at least one of them.
        num_samples: fields in each step.
        learning_rate: the highest; see :func:`make_optimizer`.
        path_gradient: as in :class:`~nflows_mongeampere.training.ReverseKL`.
        seed: of everything that is random in a step.
        smaller_first: whether smaller lattices come first; leave it out for an action that is
            written for one shape.
        name: what stands before the progress bar.

    Returns:
        The history of the training.

    Raises:
        DivergenceError: if the loss is NaN, infinite or explodes; a smaller learning rate helps.
    """
    from torch.utils.data import DataLoader, TensorDataset

    from nflows_mongeampere.training import (
        EndlessBatches,
        ReverseKL,
        SolverGuard,
        endless,
        fit,
        restore,
    )

    shape, folder, budget = _shape(target), Path(folder), minutes
    settings: dict[str, Any] = {
        "num_samples": num_samples,
        "learning_rate": learning_rate,
        "path_gradient": path_gradient,
        "seed": seed,
    }
    half = tuple(side // 2 for side in shape)
    even = all(side % 2 == 0 for side in shape) and min(half) >= SHORTEST
    if smaller_first and flow.new and even and hasattr(target, "resized"):
        below = target.resized(half)
        found = symmetries(below)
        smaller = flow.resized(half, found.group)
        log_scale, mean = best_gaussian(below, found)
        smaller.start(log_scale, mean)
        first = None if minutes is None else FIRST * minutes
        place = folder / "x".join(map(str, half))
        train(smaller, below, place, minutes=first, steps=steps, name=place.name, **settings)
        flow.adopt(smaller, smaller.modes.log_scale - log_scale)
        budget = None if minutes is None else (1 - FIRST) * minutes
    objective = ReverseKL(
        flow.train(),
        target,
        num_samples=num_samples,
        path_gradient=path_gradient,
        optimizer=partial(make_optimizer, learning_rate=learning_rate),
        steps=steps,
        minutes=budget,
        seed=seed,
    )
    ticks = torch.zeros(num_samples, 1)  # the flow draws its batches itself
    history = fit(
        objective,
        endless(EndlessBatches(ticks, num_samples), INTERVAL),
        DataLoader(TensorDataset(ticks[:4]), batch_size=1),
        folder,
        name=name,
        callbacks=[SolverGuard(GUARDED * max(64, math.prod(shape)))],
    )
    # the learning rate has come down to zero and nothing can be learnt by heart: the last is best
    restore(objective, Path(folder) / "last.ckpt")
    flow.cpu().eval()
    torch.manual_seed(seed)
    settled = converged(flow, lambda: weigh(flow, target, JUDGED).free_energy.value, SETTLED)
    for piece in flow.pieces:
        piece.steps *= settled.factor
    return history


def _padded(kernels: Tensor, shape: tuple[int, ...], larger: tuple[int, ...]) -> Tensor:
    """Kernels (K, D) around the first site, on a larger lattice: zero further away."""
    padded = kernels.new_zeros(len(kernels), *larger)
    places = []
    for side, longer in zip(shape, larger, strict=True):
        site = torch.arange(side)
        places.append(torch.where(site <= side // 2, site, site - side) % longer)
    index: tuple[Any, ...] = (slice(None), *torch.meshgrid(*places, indexing="ij"))
    padded[index] = kernels.unflatten(1, shape)
    return padded.flatten(1)


def _interpolated(modes: Tensor, larger: tuple[int, ...]) -> Tensor:
    """Numbers for each wave vector of a lattice, linearly in between for those of a larger one."""
    for dimension, longer in enumerate(larger):
        side = modes.shape[dimension]
        place = torch.arange(longer, dtype=modes.dtype) * side / longer
        first = place.floor().long()
        part = (place - first).reshape([-1, *[1] * (modes.dim() - dimension - 1)])
        lower = modes.index_select(dimension, first % side)
        upper = modes.index_select(dimension, (first + 1) % side)
        modes = torch.lerp(lower, upper, part)
    return modes


def _shape(target: Any) -> tuple[int, ...]:
    """The shape of the lattice of a target."""
    for name in ("log_prob", "shape"):
        if not hasattr(target, name):
            raise TypeError(
                f"target: got {type(target).__name__} without {name}, expected a LatticeAction or "
                "another object with log_prob and the shape of its lattice"
            )
    return lattice_shape("target.shape", target.shape)
