"""How a flow is integrated: settings, and the loops over the steps."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torchdyn.numerics.solvers.ode import SOLVER_DICT, str_to_solver
from torchdyn.numerics.utils import adapt_step, init_step

from nflows_mongeampere import validation
from nflows_mongeampere.differentiation import compiling, transformed, vectorized
from nflows_mongeampere.dynamics import Dynamics
from nflows_mongeampere.integration import adjoints
from nflows_mongeampere.integration.defects import Slopes
from nflows_mongeampere.integration.discrete import DiscreteAdjoint
from nflows_mongeampere.integration.errors import IntegrationError
from nflows_mongeampere.integration.implicit import ImplicitEuler
from nflows_mongeampere.integration.methods import EXPLICIT, Method, Rate, TorchdynStep, repair

SENSITIVITIES = ("autograd", "recompute", "adjoint", "interpolated_adjoint")
"""Where gradients come from; see `Integrator`."""


@dataclass(frozen=True)
class Integrator:
    r"""How a flow is integrated: a solver, its steps, and where gradients come from.

    Args:
        solver: a torchdyn ODE solver: its name (``"euler"``, ``"midpoint"``, ``"rk4"``,
            ``"dopri5"``, ``"tsit5"``, ``"ieuler"``, ``"alf"``) or an instance. Fixed-step solvers
            treat each sample by itself. The adaptive ones (``"dopri5"``, ``"tsit5"``) take the
            steps that the worst row of a batch needs, and ``"ieuler"`` solves its implicit equation
            for the whole batch: with these a log-density depends, within the tolerance, on what it
            was batched with.
        steps: number of equal steps over the whole time of the flow, for fixed-step solvers.
        sensitivity: where gradients come from.

            - ``"autograd"``: the gradient of the discrete solution. Potentials that know the
              product of an adjoint with the Jacobian of their field give it by hand
              (:mod:`~nflows_mongeampere.integration.discrete`), the others by autograd through
              every stage; so do second derivatives and function transforms;
            - ``"recompute"``: the same gradient, but only the states between steps are kept, and
              each step is computed again on the way back: a third more work, a fraction of the
              memory;
            - ``"adjoint"``, ``"interpolated_adjoint"``: torchdyn's continuous adjoints, whose
              gradient differs from that of the discrete solution by the solver's error. They
              have no second derivatives, and neither has ``"ieuler"``.
        atol: absolute tolerance of adaptive solvers, for each row of a batch: on the root mean
            square over its coordinates, and on its log-determinant.
        rtol: relative tolerance of adaptive solvers, likewise.
        max_steps: the most steps, accepted or not, that an adaptive solver may try between two
            times, before it raises :class:`IntegrationError`.

    Raises:
        TypeError, ValueError: for settings that do not fit.
    """

    solver: str | nn.Module = "rk4"
    steps: int = 8
    sensitivity: str = "autograd"
    atol: float = 1e-6
    rtol: float = 1e-5
    max_steps: int = 1000

    def __post_init__(self) -> None:
        if isinstance(self.solver, str):
            validation.choice("solver", self.solver, SOLVER_DICT)
        elif getattr(self.solver, "stepping_class", None) not in ("fixed", "adaptive"):
            raise TypeError(
                f"solver: got {self.solver!r}, expected the name of a torchdyn solver "
                f"({', '.join(sorted(SOLVER_DICT))}) or an instance of one"
            )
        validation.integer("steps", self.steps)
        validation.choice("sensitivity", self.sensitivity, SENSITIVITIES)
        validation.positive("atol", self.atol)
        validation.positive("rtol", self.rtol)
        validation.integer("max_steps", self.max_steps)
        with torch.device("cpu"):  # read now: compilers and the meta device see no numbers
            method = self.method
        if method.augmented and self.continuous:
            raise ValueError(
                f"sensitivity: got {self.sensitivity!r} with solver {self.solver!r}, whose state "
                "torchdyn's adjoints cannot carry; use sensitivity='recompute'"
            )

    def arguments(self) -> dict[str, Any]:
        """The settings, by name."""
        return {setting.name: getattr(self, setting.name) for setting in fields(self)}

    @cached_property
    def torchdyn(self) -> nn.Module:
        """The torchdyn solver, ours alone."""
        if isinstance(self.solver, str):
            solver: nn.Module = str_to_solver(self.solver, torch.float64)
            return solver
        return copy.deepcopy(self.solver)

    @cached_property
    def method(self) -> Method:
        """One step of the solver."""
        known = {**EXPLICIT, ImplicitEuler.solver: ImplicitEuler}
        return known.get(type(self.torchdyn), TorchdynStep)(self.torchdyn)

    def solver_instance(self, dtype: torch.dtype) -> nn.Module:
        """A torchdyn solver for states of ``dtype``, with its tableau as it should be."""
        if isinstance(self.solver, str):
            solver: nn.Module = str_to_solver(self.solver, dtype)
        else:
            solver = copy.deepcopy(self.solver)
        repair(solver)
        return solver

    @property
    def adaptive(self) -> bool:
        """Whether the solver chooses its own steps."""
        return self.method.adaptive

    @property
    def order(self) -> int:
        """The order of the solver: its error falls as ``steps ** -order``."""
        return self.method.order

    @property
    def evaluations(self) -> int:
        """About how often the equations of motion are evaluated in one solve."""
        return self.method.evaluations * self.steps

    @property
    def continuous(self) -> bool:
        """Whether gradients are those of a continuous adjoint."""
        return self.sensitivity in ("adjoint", "interpolated_adjoint")

    def solve(self, dynamics: Dynamics, times: Sequence[float], duration: float) -> list[Tensor]:
        """Integrate through ``times``, in rising or falling order.

        Args:
            dynamics: the equations of motion, with the state at ``times[0]``.
            times: where the state is wanted; at least two, strictly monotone.
            duration: the time over which :attr:`steps` steps are spread; an interval between two
                times gets its share of them, rounded up.

        Returns:
            The state at each of the times.

        Raises:
            IntegrationError: if the solver does not arrive or a state is not finite.
            NotImplementedError: where a compiler or function transform cannot see through.
        """
        return Solve(self, dynamics, times, duration).run()


@dataclass
class Path:
    """The steps of a solve.

    Attributes:
        states: at each time but the first.
        steps: where each step begins, and its length.
        arrivals: the numbers of the steps that end at one of the times.
        before: the solver's own state before each step.
    """

    states: list[Tensor] = field(default_factory=list)
    steps: list[tuple[float, float]] = field(default_factory=list)
    arrivals: list[int] = field(default_factory=list)
    before: list[Tensor] = field(default_factory=list)


@dataclass
class Solve:
    """One batch on its way through some times.

    Attributes:
        integrator: the settings.
        dynamics: the equations of motion.
        times: where the state is wanted.
        duration: the time over which the steps are spread.
    """

    integrator: Integrator
    dynamics: Dynamics
    times: Sequence[float]
    duration: float
    _rates: list[Tensor] = field(default_factory=list, repr=False)
    _steps: list[tuple[float, float]] = field(default_factory=list, repr=False)

    @property
    def method(self) -> Method:
        """One step of the solver."""
        return self.integrator.method

    def run(self) -> list[Tensor]:
        """The states at each of the times; see :meth:`Integrator.solve`."""
        self.check_visible()
        start, stop = self.times[0], self.times[-1]
        if self.integrator.continuous:
            states = adjoints.states(self)
        elif self.has_gradient_by_hand():
            recompute = self.integrator.sensitivity == "recompute" or self.method.adaptive
            tensors = self.dynamics.tensors
            states = [*DiscreteAdjoint.apply(self, recompute, self.dynamics.state, *tensors)]
        else:
            states = self.march(self.dynamics.state).states
        if not validation.looks_finite(states[-1]):
            raise IntegrationError(
                f"solver {type(self.integrator.torchdyn).__name__} reached NaN or infinite values "
                f"between t = {start:g} and t = {stop:g}: the potential is too steep for its "
                "steps; use more steps, a shorter time, smaller weights, or a lower learning rate"
            )
        return [self.dynamics.state, *states]

    def slopes(self) -> Slopes:
        """The rates of the log-determinant that the last run has met."""
        return Slopes(self._rates, [abs(dt) for _, dt in self._steps], self.method.order)

    def has_gradient_by_hand(self) -> bool:
        """Whether gradients are wanted that nothing else has to see through."""
        if not torch.is_grad_enabled():
            return False
        wanted = [t for t in (self.dynamics.state, *self.dynamics.tensors) if t is not None]
        recompute = self.integrator.sensitivity == "recompute"
        return (
            any(t.requires_grad for t in wanted)
            and self.method.reversible
            and (self.dynamics.by_hand or recompute)
            and not compiling()
            and not transformed(*wanted)
        )

    def check_visible(self) -> None:
        """Raise where a compiler or transform is at work and cannot see through this solve."""
        settings, method = self.integrator, self.method
        tensors = (self.dynamics.state, *self.dynamics.tensors)
        if (method.adaptive or method.implicit) and (compiling() or vectorized(*tensors)):
            raise NotImplementedError(
                f"solver: got {settings.solver!r}, whose steps depend on the numbers in a batch, "
                "which torch.compile, torch.export, torch.jit.trace and torch.func.vmap do not "
                "see; use a fixed-step solver such as 'rk4'"
            )
        if method.implicit and transformed(*tensors):
            raise NotImplementedError(
                f"solver: got {settings.solver!r}, whose root torch.func and forward-mode "
                "differentiation cannot see through; use an explicit solver such as 'rk4'"
            )
        if settings.continuous and (compiling() or transformed(*tensors)):
            raise NotImplementedError(
                f"sensitivity: got {settings.sensitivity!r}, which is for backward() alone; "
                "torch.func, forward-mode differentiation and compilers need "
                "sensitivity='autograd'"
            )

    def rebound(self, tensors: Sequence[Tensor | None]) -> Solve:
        """The same solve with other tensors."""
        return replace(self, dynamics=self.dynamics.rebound(tensors))

    def march(self, state: Tensor, rate: Rate | None = None) -> Path:
        """Take all steps.

        Args:
            state: at the first time.
            rate: evaluates the equations of motion; by default in the form that autograd sees
                through where gradients are enabled.
        """
        if rate is None:
            # an implicit step differentiates, whatever the mode outside
            by_hand = self.dynamics.by_hand and self.method.reversible
            seen = torch.is_grad_enabled() or compiling()
            seen = seen or transformed(state, *self.dynamics.tensors)
            rate = self.dynamics.evaluate if by_hand and not seen else self.dynamics.rate
        path, y = Path(), self.method.begin(rate, self.times[0], state)
        self._rates, self._steps = [], path.steps
        advance = self._adaptive if self.method.adaptive else self._fixed
        for start, stop in itertools.pairwise(self.times):
            y = advance(rate, y, start, stop, path)
            path.arrivals.append(len(path.steps) - 1)
            path.states.append(self.method.end(y))
        return path

    def _fixed(self, rate: Rate, y: Tensor, start: float, stop: float, path: Path) -> Tensor:
        row, compared = self.dynamics.coordinates, self.integrator.evaluations > 1
        for t, t_next in itertools.pairwise(self.grid(start, stop)):
            path.steps.append((t, t_next - t))
            path.before.append(y)
            y, slopes = self.method.step(rate, t, t_next - t, y)
            if slopes and compared:  # a copy, which does not keep the slopes alive
                self._rates.append(torch.stack([slope[row] for slope in slopes]).detach())
        return y

    def grid(self, start: float, stop: float) -> list[float]:
        """The times between two of :attr:`times` at which steps begin, and the last one."""
        share = self.integrator.steps * abs(stop - start) / self.duration
        count = max(1, math.ceil(share - 1e-9))
        return [start + (stop - start) * i / count for i in range(count)] + [stop]

    def _adaptive(self, rate: Rate, y: Tensor, start: float, stop: float, path: Path) -> Tensor:
        method, sign = self.method, 1.0 if stop > start else -1.0
        t, slope = start, rate(start, y)
        size = self._first_step(rate, y, slope, start, sign)
        for _ in range(self.integrator.max_steps):
            arrives = size >= abs(stop - t)
            dt = stop - t if arrives else sign * size
            candidate, slopes = method.step(rate, t, dt, y, slope)
            ends: list[Tensor] = []

            def last(
                at: float = t + dt, y: Tensor = candidate, ends: list[Tensor] = ends
            ) -> Tensor:
                ends.append(rate(at, y))
                end: Tensor = ends[0]
                return end

            ratio = self._error_ratio(y, candidate, method.error(dt, slopes, last))
            if ratio <= 1:
                path.steps.append((t, dt))
                path.before.append(y)
                t, y = t + dt, candidate
                if arrives:
                    return y
                slope = ends[0] if ends else rate(t, y)
            size = self._next_step(abs(dt), ratio)
            if not t + size > t:  # too small to move, or NaN
                break
        raise IntegrationError(
            f"solver {type(self.integrator.torchdyn).__name__} stopped at t = {t:g} on its way "
            f"from {start:g} to {stop:g}, with steps of {size:.2g}, of which it may try "
            f"max_steps={self.integrator.max_steps}: the potential explodes or is too stiff for "
            "the tolerance; raise atol and rtol or max_steps, use smaller weights, or use a "
            "fixed-step solver"
        )

    @torch.no_grad()
    def _error_ratio(self, y: Tensor, candidate: Tensor, error: Tensor) -> float:
        """The error of a step in units of the tolerance, of the worst row of the batch."""
        scale = self.integrator.rtol * torch.maximum(y.abs(), candidate.abs())
        ratio = (error / (scale + self.integrator.atol)).abs()
        moving = self.dynamics.coordinates
        of_points = ratio[:moving].square().mean(0).sqrt().max()
        worst = float(torch.maximum(of_points, ratio[moving:].max()))
        return worst if math.isfinite(worst) else math.inf

    def _next_step(self, size: float, ratio: float) -> float:
        """Torchdyn's rule."""
        solver = self.integrator.torchdyn
        tensor = torch.tensor([size], dtype=torch.float64)
        limits = (solver.safety, solver.min_factor, solver.max_factor)
        return float(
            adapt_step(
                tensor,
                tensor.new_tensor(ratio),
                *(torch.as_tensor(limit).to(tensor) for limit in limits),
                self.method.order,
            )
        )

    @torch.no_grad()
    def _first_step(self, rate: Rate, y: Tensor, slope: Tensor, start: float, sign: float) -> float:
        # torchdyn's guess is made for rising times
        def rising(tau: Tensor, y: Tensor) -> Tensor:
            return sign * rate(start + sign * float(tau), y)

        zero, settings = y.new_zeros(()), self.integrator
        step = init_step(
            rising, sign * slope, y, zero, self.method.order, settings.atol, settings.rtol
        )
        return float(step)
