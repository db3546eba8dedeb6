"""Flows for fields on a lattice, with the symmetries of their action.

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

import numpy as np
import torch
from nflows.flows import Flow
from nflows.transforms import CompositeTransform
from torch import Tensor, nn

from nflows_mongeampere import validation
from nflows_mongeampere.convergence import converged
from nflows_mongeampere.differentiation import compiling, transformed
from nflows_mongeampere.flow import Noise
from nflows_mongeampere.groups import BOUNDARIES, Group, lattice_shape, mirrored
from nflows_mongeampere.modes import LatticeModes
from nflows_mongeampere.potentials.lattice import LatticePotential, frame, lattice_group
from nflows_mongeampere.targets import LatticeAction as LatticeAction
from nflows_mongeampere.transform import MongeAmpereTransform
from nflows_mongeampere.variational import target_log_prob
from nflows_mongeampere.variational import weigh as weigh

if TYPE_CHECKING:
    from nflows_mongeampere.training import History
    from nflows_mongeampere.training.optimizers import FullMatrixSOAP

# Two actions are the same if they differ by less than this part of their size, in float64 or, where
# one takes no float64, in float32.
SAME = {torch.float64: 1e-6, torch.float32: 1e-4}

# Fields on which the best Gaussian is found; half of them are the negatives of the others.
GAUSSIAN_FIELDS = 512

# The highest learning rate on an 8 x 8 lattice, for fields of one and couplings of one.
LEARNING_RATE = 2e-2

# Steps of a training between two validations, and the solver's error that its guard allows for
# each site, in nats.
INTERVAL, GUARDED = 50, 2e-4

# How much the free energy of a trained flow may change at twice its solver's steps, in nats, and on
# how many of its fields that is judged.
SETTLED, JUDGED = 2e-3, 200

# The degree, unless given, of the polynomials by which a flow depends on a parameter.
DEGREE = 4

# A new flow is first trained on a lattice half as long, for this part of its minutes, unless that
# has a side shorter than so many sites.
FIRST, SHORTEST = 0.3, 6


class Chebyshev(nn.Module):
    r"""Chebyshev polynomials of a parameter, as the context of what depends on it smoothly.

    .. math:: T_n(\cos\theta) = \cos n\theta, \quad n = 1 \ldots N, \qquad
              \cos\theta = \frac{2c - a - b}{b - a}

    Args:
        between: a and b.
        degree: N.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
    """

    def __init__(self, between: Sequence[float], degree: int) -> None:
        super().__init__()
        fits = isinstance(between, Sequence) and not isinstance(between, str)
        expected = "two numbers, the lowest and the highest value of the parameter"
        validation.kind("between", between, fits and len(between) == 2, expected)
        low, high = (validation.number(f"between[{i}]", end) for i, end in enumerate(between))
        if not low < high:
            raise ValueError(f"between: got {(low, high)}, expected the lower value first")
        self.between, self.degree = (low, high), validation.integer("degree", degree)

    @property
    def nodes(self) -> list[float]:
        """The N + 1 values at which a polynomial of degree N is found best."""
        (low, high), count = self.between, self.degree + 1
        angles = [math.pi * (i + 0.5) / count for i in range(count)]
        return [(low + high) / 2 - (high - low) / 2 * math.cos(angle) for angle in angles]

    def grid(self, count: int) -> Tensor:
        """Values that are spread evenly between the ends, shape (count, 1)."""
        return torch.linspace(*self.between, count)[:, None]

    def forward(self, context: Tensor) -> Tensor:
        """The polynomials of values of shape (C, 1), shape (C, N).

        Raises:
            ValueError: if a value lies beyond the ends.
        """
        low, high = self.between
        place = (2 * context - low - high) / (high - low)
        if not compiling() and not transformed(context) and bool((place.abs() > 1 + 1e-5).any()):
            raise ValueError(
                f"context: got values from {context.min():g} to {context.max():g}, expected them "
                f"between {low:g} and {high:g}, for which the flow was built"
            )
        polynomials = [torch.ones_like(place), place]
        for _ in range(self.degree - 1):
            polynomials.append(2 * place * polynomials[-1] - polynomials[-2])
        return torch.cat(polynomials[1:], dim=1)


class LatticeFlow(Flow):
    r"""A flow for fields on a lattice, with the symmetries of the lattice exactly.

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
            point group of the lattice unless given. For an open lattice it acts on the
            :attr:`~nflows_mongeampere.LatticePotential.frame` of the kernels.
        between: the lowest and the highest value of a parameter of the action, such as a
            temperature, for all of which this is one flow: the context is that parameter, shape
            (C, 1). Or None, for a flow without context.
        degree: of the polynomials in the parameter by which scales and amplitudes depend on it.
        boundary: ``"periodic"`` or ``"open"``.
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
        between: Sequence[float] | None = None,
        degree: int = DEGREE,
        boundary: str = "periodic",
        **transport: Any,
    ) -> None:
        sides = lattice_shape("shape", shape)
        validation.choice("boundary", boundary, BOUNDARIES)
        group = lattice_group(frame(sides, boundary), group)
        parameter = None if between is None else Chebyshev(between, degree)
        context_features = None if parameter is None else parameter.degree
        settings: dict[str, Any] = {
            "powers": powers,
            "even": even,
            "group": group,
            "boundary": boundary,
        }
        count = validation.integer("pieces", pieces)
        transforms = [
            MongeAmpereTransform(
                LatticePotential(sides, kernels, context_features=context_features, **settings),
                **{"steps": 1, **transport},
            )
            for _ in range(count)
        ]
        modes = LatticeModes(
            torch.zeros(sides),
            None if even else 0.0,
            _group_of_modes(group, sides, boundary),
            context_features,
            boundary,
        )
        base = Noise([math.prod(sides)], modes)
        super().__init__(CompositeTransform([modes, *transforms]), base, parameter)

    @classmethod
    def towards(cls, target: Any, **settings: Any) -> LatticeFlow:
        """A flow with the symmetries of a target, which starts at its best Gaussian.

        Args:
            target: a :class:`~nflows_mongeampere.targets.LatticeAction`, or any object with
                ``log_prob`` and the ``shape`` of the lattice. Its ``log_prob`` takes the parameter
                of each field as ``context`` where the flow is for a range of it (``between``).
            **settings: of the class, other than ``shape``, ``even``, ``group`` and ``boundary``.

        Raises:
            TypeError: if ``target`` lacks one of these.
            ValueError: if translations change its log-density, or it is NaN or infinite.
        """
        shape, between = _shape(target), settings.get("between")
        degree = settings.get("degree", DEGREE)
        found = symmetries(target, [] if between is None else Chebyshev(between, degree).nodes)
        flow = cls(
            shape, even=found.even, group=found.group, boundary=_boundary(target), **settings
        )
        flow.start(*flow.best_gaussian(target))
        return flow

    def best_gaussian(self, target: Any) -> tuple[Tensor, Tensor]:
        """The best Gaussian of a target, in the form that :meth:`start` takes."""
        found = Symmetries(self.modes.mean is None, self.group)
        if self.parameter is None:
            log_scale, mean = best_gaussian(target, found)
            return log_scale[None], torch.tensor([mean])
        nodes = self.parameter.nodes
        each = [best_gaussian(_Fixed(target, node), found) for node in nodes]
        polynomials = self.parameter(torch.tensor(nodes)[:, None])
        basis = torch.cat([torch.ones_like(polynomials[:, :1]), polynomials], 1)
        log_scale = torch.stack([scale for scale, _ in each])
        means = torch.tensor([mean for _, mean in each])
        through = torch.linalg.inv(basis)
        return torch.tensordot(through, log_scale, 1), through @ means

    @torch.no_grad()
    def start(self, log_scale: Tensor, mean: Tensor) -> None:
        """Start at a Gaussian.

        Args:
            log_scale: logarithms of the standard deviations of the Fourier modes, shape (N + 1,
                \\*shape): the coefficients of the polynomials in the parameter, of which the first
                is 1. N is 0 where there is no parameter.
            mean: of all sites, in the same way, shape (N + 1,); ignored by an even flow.
        """
        self.scales = log_scale
        if self.modes.mean is not None:
            self.modes.mean.copy_(mean[0])
        if self.modes.context_mean is not None:
            self.modes.context_mean.copy_(mean[1:])

    @property
    def scales(self) -> Tensor:
        """The logarithms of the scales of the modes, as :meth:`start` takes them."""
        modes = self.modes
        constant: Tensor = modes.log_scale[None]
        if modes.context_weight is None:
            return constant
        return torch.cat([constant, modes.context_weight])

    @scales.setter
    def scales(self, log_scale: Tensor) -> None:
        self.modes.log_scale = log_scale[0]  # type: ignore[assignment]
        if self.modes.context_weight is not None:
            self.modes.context_weight = log_scale[1:]  # type: ignore[assignment]

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
            correction: of :attr:`scales` of the smaller flow against its best Gaussian; added to
                the scales here.
        """
        added = [_interpolated(part, self.shape, self.modes.boundary) for part in correction]
        self.scales = self.scales + torch.stack(added)
        for name in ("mean", "context_mean"):
            mine, learnt = getattr(self.modes, name), getattr(smaller.modes, name)
            if mine is not None:
                mine.copy_(learnt)
        for piece, learnt in zip(self.pieces, smaller.pieces, strict=True):
            piece.steps = learnt.steps  # with fewer, training would begin by living off its solver
            mine, other = piece.potential, learnt.potential
            assert isinstance(mine, LatticePotential)
            assert isinstance(other, LatticePotential)
            state = other.state_dict()
            kernels = _padded(other.symmetric_weight, other.frame, mine.frame)
            state["weight"] = mine.invariants.right_inverse(kernels)
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
    def parameter(self) -> Chebyshev | None:
        """The parameter that is the context, or None."""
        net: nn.Module = self._embedding_net
        return net if isinstance(net, Chebyshev) else None

    @property
    def group(self) -> Group:
        """The symmetries besides translations and the sign, as the class takes them."""
        potential: Any = self.pieces[0].potential
        group: Group = potential.group
        return group

    @property
    def new(self) -> bool:
        """Whether nothing has been learnt yet, so that the flow is a Gaussian."""
        potentials: list[Any] = [piece.potential for piece in self.pieces]
        return not any(bool(potential.amplitude.any()) for potential in potentials)

    def arguments(self) -> dict[str, Any]:
        """The arguments that build a flow like this one, without what it has learnt."""
        transport = self.pieces[0].arguments()
        potential = transport.pop("potential").arguments()
        degree = potential.pop("context_features")
        if self.parameter is not None:
            potential |= {"between": self.parameter.between, "degree": degree}
        return {**potential, "pieces": len(self.pieces), **transport}


class Symmetries(NamedTuple):
    """What leaves a target on a lattice alone, besides translations.

    Attributes:
        even: whether a change of the sign does.
        group: the rotations and reflections that do, as :class:`LatticeFlow` takes them: they keep
            the first site of a periodic lattice, or the first entry of the frame of an open one.
    """

    even: bool
    group: Group


class _Fixed:
    """A target at one value of its parameter."""

    def __init__(self, target: Any, value: float) -> None:
        self.shape, self.boundary = _shape(target), _boundary(target)
        self._target, self._value = target, value

    def log_prob(self, x: Tensor) -> Tensor:
        return target_log_prob(self._target, x, x.new_full((len(x), 1), self._value))


@torch.no_grad()
def symmetries(target: Any, parameters: Sequence[float] = ()) -> Symmetries:
    """Find the symmetries of a target, by its log-density at a few random fields.

    Some have a mean of zero and some of one, where terms of odd powers add up. The log-densities of
    two fields are the same if they differ by less than 1e-6 of their size.

    Args:
        target: an object with ``log_prob`` and ``shape``.
        parameters: values of its parameter, at all of which they hold; none where it has none.

    Raises:
        TypeError: if ``target`` lacks one of these.
        ValueError: if translations change its log-density.
    """
    shape = _shape(target)
    generator = torch.Generator().manual_seed(0)
    fields = torch.randn(4, *shape, generator=generator).double()
    fields = torch.cat([fields, fields + 1])
    members = [_Fixed(target, value) for value in parameters] or [target]

    def log_probs(fields: Tensor) -> Tensor:
        return torch.stack([target_log_prob(member, fields.flatten(1)) for member in members])

    try:
        expected = log_probs(fields)
    except RuntimeError:  # an action with tables in float32
        fields = fields.float()
        expected = log_probs(fields)

    def kept(images: Tensor) -> bool:
        change = (log_probs(images) - expected).abs()
        return bool((change <= SAME[fields.dtype] * (1 + expected.abs())).all())

    boundary = _boundary(target)
    for dimension in range(1, len(shape) + 1) if boundary == "periodic" else ():
        if not kept(fields.roll(1, dimension)):
            raise ValueError(
                f"target: its log-density changes when fields move by a site along dimension "
                f"{dimension - 1} of {shape}, expected a periodic lattice; a target with borders "
                "says boundary='open', and for any other use a MongeAmpereFlow"
            )
    every, kernel = [*range(len(shape))], frame(shape, boundary)
    sites, distances = (torch.arange(math.prod(sides)).reshape(sides) for sides in (shape, kernel))

    rows, moves = fields.flatten(1), [distances]
    subsets = [[d for d in every if chosen >> d & 1] for chosen in range(2 ** len(every))]
    for axes, dims in itertools.product(itertools.permutations(every), subsets):
        images = sites.permute(axes)
        images = mirrored(images, dims) if boundary == "periodic" else images.flip(dims)
        if images.shape == sites.shape and kept(rows[:, images.flatten()]):
            moves.append(mirrored(distances.permute(axes), dims))
    group = Group.generated_by([move.flatten() for move in moves])
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
    boundary = _boundary(target)
    group = _group_of_modes(found.group, shape, boundary)
    modes = LatticeModes(torch.zeros(shape), None if found.even else 0.0, group, boundary=boundary)
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


def make_optimizer(flow: LatticeFlow, learning_rate: float = LEARNING_RATE) -> FullMatrixSOAP:
    r"""SOAP for a :class:`LatticeFlow`: all parameters of a transform together.

    Args:
        flow: what is trained.
        learning_rate: for an 8 x 8 lattice; larger ones, of D sites, learn at :math:`8 / \sqrt{D}`
            of it.
    """
    from nflows_mongeampere.training.optimizers import FullMatrixSOAP

    layers: list[nn.Module] = [flow.modes, *flow.pieces]
    groups = [{"params": layer.parameters()} for layer in layers]
    sites = math.prod(flow.shape)
    return FullMatrixSOAP(groups, learning_rate * min(1.0, 8 / math.sqrt(sites)))


def train(
    flow: LatticeFlow,
    target: Any,
    folder: str | Path,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    num_samples: int = 64,
    learning_rate: float = LEARNING_RATE,
    path_gradient: bool = True,
    seed: int = 0,
    smaller_first: bool = True,
    name: str = "training",
) -> History:
    """Train a flow towards a target by its variational free energy.

    It is left on the CPU, in evaluation mode.

    Path gradients, a solver that is watched, a learning rate that falls to zero over the budget. In
    the end the solver takes as many steps as make the free energy stand still to 0.002 nats. An
    interrupted training is taken up from its folder.

    What a flow learns hardly depends on the size of the lattice, but the price of a step does: a
    new flow is first trained on a lattice half as long, and that one on one half as long again.

    Args:
        flow: what is trained.
        target: an object with ``log_prob`` and ``shape``; with ``resized(shape)``, which gives the
            same target on another lattice, smaller lattices come first.
        folder: for checkpoints and metrics, as in :func:`~nflows_mongeampere.training.fit`. One
            that holds a finished training is read: another flow or target needs another folder.
        minutes: the budget in wall-clock time, and
        steps: in steps of the optimiser on each lattice; at least one of them.
        num_samples: fields in each step.
        learning_rate: the highest, see :func:`make_optimizer`.
        path_gradient: as in :class:`~nflows_mongeampere.training.ReverseKL`.
        seed: of everything that is random in a step.
        smaller_first: whether smaller lattices come first; False for an action that is written for
            one shape, such as one with a table of momenta.
        name: what stands before the progress bar.

    Returns:
        The history of the training.

    Raises:
        DivergenceError: if the loss is NaN, infinite or explodes; a smaller learning rate helps.
    """
    plan = _Plan(minutes, steps, smaller_first, num_samples, learning_rate, path_gradient, seed)
    history = _descend(flow, target, Path(folder), plan, name)
    # without a parameter of the action, fields alone
    context = None if flow.parameter is None else flow.parameter.grid(JUDGED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settled = converged(
            flow,
            lambda: weigh(flow, target, JUDGED, context=context).free_energy.value,
            SETTLED,
        )
    for piece in flow.pieces:
        piece.steps *= settled.factor
    return history


class _Plan(NamedTuple):
    """How lattices are trained, as :func:`train` takes it."""

    minutes: float | None
    steps: int | None
    smaller_first: bool
    num_samples: int
    learning_rate: float
    path_gradient: bool
    seed: int

    def part(self, share: float) -> _Plan:
        """A part of the minutes, and all steps."""
        return self._replace(minutes=None if self.minutes is None else share * self.minutes)


def _descend(
    flow: LatticeFlow,
    target: Any,
    folder: Path,
    plan: _Plan,
    name: str,
) -> History:
    """Train a flow, and a smaller one before it, and leave it with the solver's steps of training.

    The larger one begins with the steps with which the smaller one ended.
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

    shape = _shape(target)
    half = tuple(side // 2 for side in shape)
    even = all(side % 2 == 0 for side in shape) and min(half) >= SHORTEST
    if plan.smaller_first and flow.new and even and hasattr(target, "resized"):
        below = _resized(target, half)
        nodes = [] if flow.parameter is None else flow.parameter.nodes
        smaller = flow.resized(half, symmetries(below, nodes).group)
        log_scale, mean = smaller.best_gaussian(below)
        smaller.start(log_scale, mean)
        place = folder / "x".join(map(str, half))
        _descend(smaller, below, place, plan.part(FIRST), place.name)
        flow.adopt(smaller, smaller.scales - log_scale)
        plan = plan.part(1 - FIRST)
    num_samples = plan.num_samples
    # without a parameter batches only count the steps: the flow draws its fields itself
    each, batches, few = num_samples, torch.zeros(num_samples, 1), torch.zeros(4, 1)
    if flow.parameter is not None:
        each, batches = 1, flow.parameter.grid(64 * num_samples)
        few = flow.parameter.grid(4 * num_samples)
    objective = ReverseKL(
        flow.train(),
        target,
        num_samples=each,
        path_gradient=plan.path_gradient,
        optimizer=partial(make_optimizer, learning_rate=plan.learning_rate),
        steps=plan.steps,
        minutes=plan.minutes,
        seed=plan.seed,
    )
    history = fit(
        objective,
        endless(EndlessBatches(batches, num_samples), INTERVAL),
        DataLoader(TensorDataset(few), batch_size=len(few) // 4),
        folder,
        name=name,
        callbacks=[SolverGuard(GUARDED * max(64, math.prod(shape)))],
        gradient_clip_val=None,  # a step is as long as the learning rate, whatever the gradient
    )
    # the learning rate has come down to zero and nothing can be learnt by heart: the last is best
    restore(objective, folder / "last.ckpt")
    flow.cpu().eval()
    return history


def _resized(target: Any, shape: tuple[int, ...]) -> Any:
    """A target on a smaller lattice, where a flow learns first."""
    try:
        return target.resized(shape)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"target: its action fails on a lattice of shape {shape}, where the flow would learn "
            f"first ({error}); write it for any shape, or give smaller_first=False"
        ) from error


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


def _interpolated(modes: Tensor, larger: tuple[int, ...], boundary: str) -> Tensor:
    """Numbers for each wave vector of a lattice, linearly in between for those of a larger one."""
    for dimension, longer in enumerate(larger):
        side = modes.shape[dimension]
        place = torch.arange(longer, dtype=modes.dtype)
        if boundary == "periodic":
            place = place * side / longer
        else:  # of half waves, the first of which is 1 / (L + 1)
            place = ((place + 1) * (side + 1) / (longer + 1) - 1).clamp(0, side - 1)
        first = place.floor().long()
        part = (place - first).reshape([-1, *[1] * (modes.dim() - dimension - 1)])
        lower = modes.index_select(dimension, first % side)
        upper = modes.index_select(dimension, (first + 1) % side)
        modes = torch.lerp(lower, upper, part)
    return modes


def _group_of_modes(group: Group, shape: tuple[int, ...], boundary: str) -> Group:
    """Which modes have the same scale where kernels have these symmetries."""
    if boundary == "periodic":
        return group
    # reflections leave sine waves alone, up to their sign; which axes does an element exchange?
    sides = frame(shape, boundary)
    modes, places = torch.arange(math.prod(shape)).reshape(shape), []
    for permutation in group.permutations:
        images = permutation.reshape(sides)
        axes = []
        for dimension in range(len(sides)):
            first = images[tuple(int(d == dimension) for d in range(len(sides)))].item()
            entry = torch.tensor(np.unravel_index(int(first), sides))
            axes.append(int(entry.nonzero()[0]))
        places.append(modes.permute(axes).flatten())
    return Group.generated_by(places)


def _boundary(target: Any) -> str:
    """Whether the lattice of a target is periodic, as it is where nothing else is said."""
    return validation.choice("target.boundary", getattr(target, "boundary", "periodic"), BOUNDARIES)


def _shape(target: Any) -> tuple[int, ...]:
    """The shape of the lattice of a target."""
    for name in ("log_prob", "shape"):
        if not hasattr(target, name):
            raise TypeError(
                f"target: got {type(target).__name__} without {name}, expected a LatticeAction or "
                "another object with log_prob and the shape of its lattice"
            )
    return lattice_shape("target.shape", target.shape)
