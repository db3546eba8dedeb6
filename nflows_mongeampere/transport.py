"""The transport map of a Monge-Ampère flow, which the nflows and normflows adapters share."""

from __future__ import annotations

import itertools
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nflows_mongeampere import accuracy, validation
from nflows_mongeampere.accuracy import AccuracyWarning, ErrorEstimate, StepChoice
from nflows_mongeampere.configured import Configured
from nflows_mongeampere.costs import recorders_of, unrecorded
from nflows_mongeampere.differentiation import compiling, full_precision, ordinary
from nflows_mongeampere.dynamics import ScoredDynamics
from nflows_mongeampere.integration import Integrator, Solve
from nflows_mongeampere.integration.defects import Slopes
from nflows_mongeampere.potentials import Potential

# A training looks at the solver's error in every so many solves, and is warned where its mean is
# more than so many nats, and so many for each entry of an event.
WATCHED_SOLVES, EXPLOITED = 20, (0.05, 1e-3)


class Trajectory(NamedTuple):
    r"""The path of a batch through a flow.

    Attributes:
        times: shape (K,).
        points: shape (K, B, ...).
        logabsdet: :math:`\ln|\partial x(t_k) / \partial x(t_0)|`, shape (K, B).
    """

    times: Tensor
    points: Tensor
    logabsdet: Tensor


class Transport(Configured, nn.Module):
    r"""The map :math:`x(t_0) \mapsto x(t_1)` along the gradient of a potential.

    Noise lives at :math:`t = 0` and data at :math:`t =` ``time``. See
    :class:`~nflows_mongeampere.integration.Integrator` for the keywords not explained here.

    Args:
        potential: the scalar potential :math:`u`.
        time: T, the time from noise to data.
        steps, solver, sensitivity, atol, rtol, max_steps: how the equations are integrated.

    Attributes:
        tolerance: the error that :meth:`choose_steps` was asked for, in nats.
    """

    # whether the direction that the host library calls forward leads from noise to data
    _forward_to_data: bool

    def __init__(
        self,
        potential: Potential,
        *,
        time: float = 1.0,
        steps: int = 8,
        solver: str | nn.Module = "rk4",
        sensitivity: str = "autograd",
        atol: float = 1e-6,
        rtol: float = 1e-5,
        max_steps: int = 1000,
    ) -> None:
        super().__init__()
        if not isinstance(potential, Potential):
            raise TypeError(
                f"potential: got {type(potential).__name__}, expected a Potential; wrap a module "
                "that maps (B, ...) to (B,) in AutogradPotential"
            )
        self.potential = potential
        self.time = validation.positive("time", time)
        self.integrator = Integrator(solver, steps, sensitivity, atol, rtol, max_steps)
        self.tolerance: float | None = None
        # the base distribution of a flow that has nothing else, in a tuple that hides it
        self._base: tuple[Any, ...] = ()
        self._evaluations, self._warned = 0, False
        self._slopes: Slopes | None = None
        self._solves, self._exploited = 0, 0

    def arguments(self) -> dict[str, Any]:
        return {"potential": self.potential, "time": self.time, **self.integrator.arguments()}

    @property
    def steps(self) -> int:
        """The number of fixed steps; may be set, to evaluate the same flow more finely.

        The steps are part of the ``state_dict``: a flow that loads one has the density that was
        saved.
        """
        return self.integrator.steps

    @steps.setter
    def steps(self, value: int) -> None:
        self.integrator = replace(self.integrator, steps=value)

    @torch.no_grad()
    def estimate_error(
        self, inputs: Tensor, context: Tensor | None = None, *, inverse: bool = False
    ) -> ErrorEstimate:
        """How far the outputs and log-determinants of a batch are from the exact solution.

        The solve is compared with one of twice the steps (for an adaptive solver, of a hundredth of
        the tolerance), and its outputs are sent back. This costs four solves without gradients; a
        few rows are enough to watch a training.

        Args:
            inputs: shape (B, ...), as ``forward`` takes them, or ``inverse`` where that is asked.
            context: one row for each input, where the potential is conditional.
            inverse: whether to judge ``inverse`` instead of ``forward``.

        Returns:
            The errors of outputs, log-determinants and of the round trip, row by row.

        Raises:
            TypeError, ValueError: for arguments that do not fit.
            IntegrationError: where the solver fails.
        """
        to_data = self._forward_to_data != inverse
        solve = self._solver("inputs", inputs, context, to_data)
        outputs, of_outputs, of_logabsdet = accuracy.compare(solve, self.integrator)
        back, _ = self._solver("inputs", outputs, context, not to_data)(self.integrator)
        return ErrorEstimate(of_outputs, of_logabsdet, accuracy.distance(back, inputs))

    def choose_steps(
        self,
        inputs: Tensor,
        tolerance: float,
        context: Tensor | None = None,
        *,
        inverse: bool = False,
    ) -> StepChoice:
        r"""Set :attr:`steps` to the fewest that give densities to ``tolerance``.

        Call it after training. The tolerance is one of ``log_prob`` in a
        :class:`~nflows_mongeampere.MongeAmpereFlow`, whose base distribution is known, and one of
        :math:`\ln|\det|` elsewhere. The choice is logged and saved in the ``state_dict``. From then
        on you are warned once if the error of an evaluation without gradients exceeds the
        tolerance; a few rows of evaluations 1, 2, 4, 8, ... are watched.

        Args:
            inputs: a batch to choose by, as ``forward`` takes it, or ``inverse`` if that is asked.
            tolerance: the largest error in the batch, in nats.
            context: one row for each input, where the potential is conditional.
            inverse: whether to choose for ``inverse`` instead of ``forward``.

        Returns:
            The steps, their error and the tolerance.

        Raises:
            TypeError, ValueError: for arguments that do not fit, or an adaptive solver.
            IntegrationError: if no number of steps meets the tolerance.
        """
        if isinstance(inputs, Tensor) and inputs.shape[:1] == (0,):
            raise ValueError(
                "inputs: got no rows, expected the data or noise to choose the steps by"
            )
        to_data = self._forward_to_data != inverse
        solve = self._density("inputs", inputs, context, to_data)
        quantity = "log_prob" if self._base and not to_data else "logabsdet"
        choice = accuracy.choose_steps(solve, self.integrator, tolerance, quantity)
        self._adopt(choice.steps, choice.tolerance)
        return choice

    def get_extra_state(self) -> Tensor:
        """What the density depends on besides the weights, for the ``state_dict``.

        The steps, the tolerance of :meth:`choose_steps` (zero for none), ``atol`` and ``rtol``.
        """
        settings = self.integrator
        numbers = [settings.steps, self.tolerance or 0.0, settings.atol, settings.rtol]
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take up the steps and tolerances of a ``state_dict``."""
        if not isinstance(state, Tensor) or state.shape != (4,) or not min(state.tolist()) >= 0:
            raise ValueError(
                f"state: got {state!r}, expected four finite numbers of at least 0: the steps and "
                "tolerances that get_extra_state gave"
            )
        steps, tolerance, atol, rtol = state.tolist()
        self.integrator = replace(self.integrator, atol=atol, rtol=rtol)
        self._adopt(int(steps), tolerance or None)

    def _adopt(self, steps: int, tolerance: float | None) -> None:
        self.steps, self.tolerance = steps, tolerance
        self._evaluations, self._warned = 0, False

    def trajectory(
        self, inputs: Tensor, times: Sequence[float] | Tensor, context: Tensor | None = None
    ) -> Trajectory:
        """The path of a batch, which starts at ``inputs`` at the first of ``times``.

        Rising times follow noise to data, falling times data to noise.

        Args:
            inputs: shape (B, ...).
            times: at least two times between 0 and ``time``, strictly monotone.
            context: one row for each input, where the potential is conditional.

        Returns:
            Times, points and log-determinants; those of the last time are what ``forward`` or
            ``inverse`` gives, if the first and last time are the ends of the flow and the steps
            between the times come out even.

        Raises:
            TypeError, ValueError: for arguments that do not fit.
            IntegrationError: where the solver fails.
        """
        moments = self._check_times(times)
        path = self._follow("inputs", inputs, context, moments, first=0)
        points, logabsdet = zip(*path, strict=True)
        grid = torch.tensor(moments, dtype=points[0].dtype, device=points[0].device)
        return Trajectory(grid, torch.stack(points), torch.stack(logabsdet))

    @property
    def carries_score(self) -> bool:
        """Whether :meth:`carry_score` can be called now: with gradients by hand, without costs."""
        steps = self.integrator.method.reversible and not self.integrator.adaptive
        return steps and self.potential.by_hand and not recorders_of(self)

    def carry_score(
        self, inputs: Tensor, score: Tensor, context: Tensor | None, to_data: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""The map, with the score :math:`\nabla \ln p` of the density that moves along.

        Args:
            inputs: shape (B, ...).
            score: of the density of the inputs, in their shape.
            context: one row for each input, or None.
            to_data: whether from noise to data.

        Returns:
            Outputs, log-determinants, and the score of the density of the outputs, through which no
            gradient goes.
        """
        inputs, context = self.potential.accept("inputs", inputs, context)
        dynamics = ScoredDynamics(self.potential.dynamics(inputs, context, evaluations=1), score)
        state = self.integrator.solve(dynamics, self._ends(to_data), self.time)[-1]
        return dynamics.points(state), dynamics.logabsdet(state), dynamics.score(state)

    def _map(
        self, name: str, inputs: Tensor, context: Tensor | None, to_data: bool
    ) -> tuple[Tensor, Tensor]:
        """The whole way from noise to data or back, with its log-determinant.

        Args:
            name: what the user calls ``inputs``.
            inputs: shape (B, ...).
            context: one row for each input, or None.
            to_data: whether from noise to data.
        """
        result = self._follow(name, inputs, context, self._ends(to_data))[-1]
        if self.training and torch.is_grad_enabled():
            self._watch_training(result[0])
        elif self.tolerance is not None and len(inputs) > 0 and not torch.is_grad_enabled():
            self._watch(inputs, context, to_data, self.tolerance)
        return result

    @property
    def solver_error(self) -> Tensor | None:
        r"""About how far the log-determinants of the last batch are off in nats, shape (B,).

        An estimate from the stages of the solve, at no further evaluation
        (:mod:`~nflows_mongeampere.integration.defects`); :meth:`estimate_error` is more accurate.
        None before the first batch, for adaptive solvers, which meet their tolerance, and where
        there is nothing to compare.
        """
        return None if self._slopes is None else self._slopes.error()

    def _watch_training(self, outputs: Tensor) -> None:
        """Warn, once, of a training that lives off the error of its solver; look now and then."""
        self._solves += 1
        if self._exploited > 1 or self._solves % WATCHED_SOLVES:
            return
        error = self.solver_error
        if error is None:
            return
        found = float(error.mean())
        allowed = EXPLOITED[0] + EXPLOITED[1] * outputs.shape[1:].numel()
        # twice in a row, because a steep start may pass
        self._exploited = self._exploited + 1 if found > allowed else 0
        if self._exploited > 1:
            warnings.warn(
                f"the training of {place_of(self)} lives off its solver: log-densities are off by "
                f"about {found:.2g} nats at steps={self.steps}. Take more steps, a lower learning "
                "rate or penalties on the costs of transport, or train with SolverGuard",
                AccuracyWarning,
                stacklevel=callers_level(),
            )

    def _ends(self, to_data: bool) -> tuple[float, float]:
        return (0.0, self.time) if to_data else (self.time, 0.0)

    def _follow(
        self,
        name: str,
        inputs: Tensor,
        context: Tensor | None,
        times: Sequence[float],
        first: int = -1,
    ) -> list[tuple[Tensor, Tensor]]:
        """Check a batch and follow it: its points and log-determinants at ``times[first:]``."""
        inputs, context = self._accept(name, inputs, context)
        return self._integrate(self.integrator, inputs, context, times, first)

    def _accept(
        self, name: str, inputs: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Check a batch; where autocast has halved it, in the precision of the parameters."""
        if isinstance(inputs, Tensor) and torch.is_autocast_enabled(inputs.device.type):
            inputs = self._refine(inputs)
            context = None if context is None else self._refine(context)
        return self.potential.accept(name, inputs, context)

    def _integrate(
        self,
        integrator: Integrator,
        inputs: Tensor,
        context: Tensor | None,
        times: Sequence[float],
        first: int = -1,
    ) -> list[tuple[Tensor, Tensor]]:
        """The points of a checked batch and their log-determinants at ``times[first:]``."""
        recorders, evaluations = recorders_of(self), integrator.evaluations
        with full_precision(inputs.device.type):
            inputs, context = ordinary(inputs), ordinary(context)
            dynamics = self.potential.dynamics(inputs, context, evaluations, bool(recorders))
            if inputs.shape[0] == 0:
                states = [dynamics.state] * len(times)
            else:
                solve = Solve(integrator, dynamics, times, self.time)
                states = solve.run()
                if not compiling():
                    # beside nn.Module, which looks at every attribute that is set
                    object.__setattr__(self, "_slopes", solve.slopes())
            for recorder in recorders:
                sign = 1 if times[-1] > times[0] else -1
                recorder.add(*(sign * cost for cost in dynamics.costs(states[-1])))
            return [(dynamics.points(state), dynamics.logabsdet(state)) for state in states[first:]]

    def _solver(
        self, name: str, inputs: Tensor, context: Tensor | None, to_data: bool
    ) -> accuracy.Map:
        """The map as a function of the integrator, with the same random probe in each solve."""
        inputs, context = self._accept(name, inputs, context)
        devices = [inputs.device] if inputs.is_cuda else []

        def solve(integrator: Integrator) -> tuple[Tensor, Tensor]:
            with unrecorded(), torch.random.fork_rng(devices=devices):
                return self._integrate(integrator, inputs, context, self._ends(to_data))[-1]

        return solve

    def _density(
        self, name: str, inputs: Tensor, context: Tensor | None, to_data: bool
    ) -> accuracy.Map:
        """As :meth:`_solver`, with log-densities in place of log-determinants where possible."""
        solve = self._solver(name, inputs, context, to_data)
        if not self._base or to_data:
            return solve

        def density(integrator: Integrator) -> tuple[Tensor, Tensor]:
            noise, logabsdet = solve(integrator)
            return noise, logabsdet + self._base[0].log_prob(noise, context=context)

        return density

    def _watch(
        self, inputs: Tensor, context: Tensor | None, to_data: bool, tolerance: float
    ) -> None:
        """Warn, once, of an error above the tolerance; look at evaluations 1, 2, 4, 8, ..."""
        self._evaluations += 1
        if self._warned or self._evaluations & (self._evaluations - 1):
            return
        few = None if context is None else context[:8]
        solve = self._density("inputs", inputs[:8], few, to_data)
        found = float(accuracy.compare(solve, self.integrator)[2].max())
        if found > tolerance:
            self._warned = True
            warnings.warn(
                f"densities are off by {found:.2g} nats at steps={self.steps}, more than the "
                f"tolerance of {tolerance:.2g} that was asked for; call choose_steps again",
                AccuracyWarning,
                stacklevel=callers_level(),
            )

    def _refine(self, value: Tensor) -> Tensor:
        """``value`` in the precision of the parameters, where autocast has halved it."""
        like = next(self.parameters(), value)
        halved = getattr(value, "dtype", None) in (torch.float16, torch.bfloat16)
        return value.to(like.dtype) if halved else value

    def _check_times(self, times: Sequence[float] | Tensor) -> list[float]:
        moments = [float(moment) for moment in times]
        steps = [after - before for before, after in itertools.pairwise(moments)]
        if (
            not steps
            or not all(map(math.isfinite, moments))
            or min(moments) < 0
            or max(moments) > self.time
            or not (all(step > 0 for step in steps) or all(step < 0 for step in steps))
        ):
            raise ValueError(
                f"times: got {moments}, expected at least two times between 0 (noise) and "
                f"{self.time} (data), all rising or all falling"
            )
        return moments


def callers_level() -> int:
    """The ``stacklevel`` at which a warning points to the user's code, beyond all libraries."""
    libraries = tuple(
        str(Path(sys.modules[name].__file__ or "").parent)
        for name in ("torch", "nflows", "nflows_mongeampere", "normflows")
        if name in sys.modules
    )
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(libraries):
        if frame.f_code.co_filename.endswith("_test.py"):
            break
        frame, level = frame.f_back, level + 1
    return level


def place_of(layer: nn.Module) -> str:
    """Where a layer is in the outermost module that is being called, with its type."""
    name, frame = "", sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            names = [name for name, module in owner.named_modules() if module is layer]
            name = f"{names[0]}, a " if names and names[0] else name
    return f"{name}{type(layer).__name__}"
