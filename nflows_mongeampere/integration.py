"""Integration of the equations of motion by torchdyn's solvers."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchdyn.numerics.solvers.ode import (
    SOLVER_DICT,
    AsynchronousLeapfrog,
    ImplicitEuler,
    RungeKutta4,
    str_to_solver,
)
from torchdyn.numerics.utils import adapt_step, hairer_norm, init_step

from nflows_mongeampere import validation
from nflows_mongeampere.dynamics import Dynamics

# a torchdyn solver: torchdyn has no types, and its two base classes share none
Solver = Any

SENSITIVITIES = ("autograd", "recompute", "adjoint", "interpolated_adjoint")


class IntegrationError(RuntimeError):
    """A solver did not reach the end of the interval with a finite state."""


@dataclass(frozen=True)
class Integrator:
    r"""How a flow is integrated: a solver, its steps, and where gradients come from.

    Args:
        solver: a torchdyn ODE solver: its name (``"euler"``, ``"midpoint"``, ``"rk4"``,
            ``"dopri5"``, ``"tsit5"``, ``"ieuler"``, ``"alf"``) or an instance. Fixed-step solvers
            treat each sample by itself. The adaptive ones (``"dopri5"``, ``"tsit5"``) choose steps
            by an error norm over the whole batch, and ``"ieuler"`` solves its implicit equation for
            the whole batch: with these a log-density depends, within the tolerance, on what it was
            batched with.
        steps: number of equal steps over the whole time of the flow, for fixed-step solvers.
        sensitivity: where gradients come from.

            - ``"autograd"``: the gradient of the discrete solution, through every stage;
            - ``"recompute"``: the same gradient, but only the states between steps are kept, and
              each step is computed again on the way back: a third more work, a fraction of the
              memory;
            - ``"adjoint"``, ``"interpolated_adjoint"``: torchdyn's continuous adjoints, whose
              gradient differs from that of the discrete solution by the solver's error. They
              have no second derivatives, and neither has ``"ieuler"``.
        atol: absolute tolerance of adaptive solvers on each entry of the state.
        rtol: relative tolerance of adaptive solvers.
        max_steps: the most steps, accepted or not, that an adaptive solver may try between two
            times, before it raises :class:`IntegrationError`.
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
        elif not (
            callable(getattr(self.solver, "step", None))
            and callable(getattr(self.solver, "sync_device_dtype", None))
            and _has_stepping_class(self.solver)
        ):
            raise TypeError(
                f"solver: got {self.solver!r}, expected the name of a torchdyn solver "
                f"({', '.join(sorted(SOLVER_DICT))}) or an instance of one"
            )
        if getattr(self.solver, "stepping_class", None) == "adaptive" and isinstance(
            self.solver, AsynchronousLeapfrog
        ):
            raise ValueError(
                "solver: got an adaptive AsynchronousLeapfrog, whose error estimate does not "
                "shrink with its steps; use one with stepping_class='fixed', or 'dopri5'"
            )
        validation.integer("steps", self.steps)
        validation.choice("sensitivity", self.sensitivity, SENSITIVITIES)
        validation.positive("atol", self.atol)
        validation.positive("rtol", self.rtol)
        validation.integer("max_steps", self.max_steps)
        if self._uses_adjoint and isinstance(self._instance(torch.float32), AsynchronousLeapfrog):
            raise ValueError(
                f"sensitivity: got {self.sensitivity!r} with solver {self.solver!r}, whose state "
                "torchdyn's adjoints cannot carry; use sensitivity='recompute'"
            )

    @property
    def adaptive(self) -> bool:
        """Whether the solver chooses its own steps."""
        return bool(self._instance(torch.float32).stepping_class == "adaptive")

    @property
    def order(self) -> int:
        """The order of the solver: its error falls as ``steps ** -order``."""
        return int(getattr(self._instance(torch.float32), "order", 1))

    @property
    def _uses_adjoint(self) -> bool:
        return self.sensitivity in ("adjoint", "interpolated_adjoint")

    @property
    def evaluations(self) -> int:
        """About how often the equations of motion are evaluated in one solve."""
        return min(self.order, 4) * self.steps

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
        """
        solver = self._instance(dynamics.state.dtype)
        # torchdyn moves the tableau of the solver to the device and dtype of the state
        solver.sync_device_dtype(dynamics.state, torch.zeros(()))
        if isinstance(solver, RungeKutta4):
            # torchdyn takes the first three of the times 0, 1/2, 1/2, 1 for the last three stages
            c, *weights = solver.tableau
            solver.tableau = (c[-3:], *weights)
        if self._uses_adjoint:
            states = self._solve_adjoint(solver, dynamics, times, duration)
        else:
            states = self._solve_stepwise(solver, dynamics, times, duration)
        if not bool(torch.isfinite(states[-1].detach()).all()):
            raise IntegrationError(
                f"solver {_name(solver)} reached NaN or infinite values between t = {times[0]:g} "
                f"and t = {times[-1]:g}: the potential is too steep for its steps; use more steps, "
                "a shorter time, smaller weights, or a lower learning rate"
            )
        return states

    def _solve_stepwise(
        self, solver: Solver, dynamics: Dynamics, times: Sequence[float], duration: float
    ) -> list[Tensor]:
        stepper = _Stepper(solver, dynamics, recompute=self.sensitivity == "recompute")
        states = [stepper.start(times[0])]
        for start, stop in itertools.pairwise(times):
            if self.adaptive:
                states.append(self._adaptive(solver, stepper, states[-1], start, stop))
            else:
                states.append(self._fixed(stepper, states[-1], start, stop, duration))
        return [stepper.strip(state) for state in states]

    def _fixed(
        self, stepper: _Stepper, state: Tensor, start: float, stop: float, duration: float
    ) -> Tensor:
        grid = self._grid(start, stop, duration)
        for t, t_next in itertools.pairwise(grid):
            state, _ = stepper(t, t_next - t, state)
        return state

    def _grid(self, start: float, stop: float, duration: float) -> list[float]:
        count = max(1, math.ceil(self.steps * abs(stop - start) / duration - 1e-9))
        return [start + (stop - start) * i / count for i in range(count)] + [stop]

    def _adaptive(
        self, solver: Solver, stepper: _Stepper, state: Tensor, start: float, stop: float
    ) -> Tensor:
        sign = 1.0 if stop > start else -1.0
        t, size = start, self._first_step(solver, stepper.dynamics, state, start, sign)
        for _ in range(self.max_steps):
            arrives = size >= abs(stop - t)
            dt = stop - t if arrives else sign * size
            candidate, error = stepper(t, dt, state)
            ratio = self._error_ratio(state, candidate, error)
            if ratio <= 1:
                t, state = t + dt, candidate
                if arrives:
                    return state
            size = float(
                adapt_step(
                    ratio.new_tensor([abs(dt)]),
                    ratio,
                    solver.safety.to(ratio),
                    solver.min_factor.to(ratio),
                    solver.max_factor.to(ratio),
                    solver.order,
                )
            )
            if not t + size > t:  # too small to move, or NaN
                break
        raise IntegrationError(
            f"solver {_name(solver)} stopped at t = {t:g} on its way from {start:g} to {stop:g}, "
            f"with steps of {size:.2g}, of which it may try max_steps={self.max_steps}: the "
            "potential explodes or is too stiff for the tolerance; raise atol and rtol or "
            "max_steps, use smaller weights, or use a fixed-step solver"
        )

    @torch.no_grad()
    def _error_ratio(self, state: Tensor, candidate: Tensor, error: Tensor | None) -> Tensor:
        """The error of a step in units of the tolerance; infinite where the step failed."""
        if error is None or error.shape != state.shape:
            raise IntegrationError(
                "solver: it returned no error estimate of the state from its step; use an adaptive "
                "solver with an embedded pair, like 'dopri5', or a fixed-step one"
            )
        scale = self.atol + self.rtol * torch.maximum(state.abs(), candidate.abs())
        ratio: Tensor = hairer_norm(error / scale)
        return torch.nan_to_num(ratio, nan=math.inf, posinf=math.inf)

    def _first_step(
        self, solver: Solver, dynamics: Dynamics, state: Tensor, start: float, sign: float
    ) -> float:
        # torchdyn's guess is made for rising times
        def rising(tau: Tensor, y: Tensor) -> Tensor:
            return sign * dynamics(start + sign * tau, y)

        with torch.no_grad():
            zero = state.new_zeros(())
            step = init_step(
                rising, rising(zero, state), state, zero, solver.order, self.atol, self.rtol
            )
        return float(step)

    def _solve_adjoint(
        self, solver: Solver, dynamics: Dynamics, times: Sequence[float], duration: float
    ) -> list[Tensor]:
        problem_class = _import_ode_problem()
        adaptive = self.adaptive
        # torchdyn warns of tolerances that are not its defaults where the solver ignores them
        tolerances = (self.atol, self.rtol) if adaptive else (1e-3, 1e-3)
        sign = 1.0 if times[1] > times[0] else -1.0
        # torchdyn's adaptive loops have no bound of their own; a step has up to 7 evaluations
        most = 7 * self.max_steps if adaptive else None
        field = _AdjointField(dynamics, times[0], sign, most, _name(solver))
        problem = problem_class(
            field,
            # implicit Euler cannot integrate the adjoint equation, which torchdyn does not trace
            solver=solver,
            solver_adjoint="rk4" if isinstance(solver, ImplicitEuler) else None,
            atol=tolerances[0],
            rtol=tolerances[1],
            atol_adjoint=tolerances[0],
            rtol_adjoint=tolerances[1],
            sensitivity=self.sensitivity,
        )
        states = [dynamics.state]
        for start, stop in itertools.pairwise(times):
            grid = [start, stop] if adaptive else self._grid(start, stop, duration)
            span = states[-1].new_tensor([sign * (t - times[0]) for t in grid])
            field.evaluations = 0
            try:
                with _search(solver):
                    state = problem(states[-1], span)[1][-1]
            except AssertionError as error:
                raise IntegrationError(
                    f"times: from {start:g} to {stop:g} in {len(grid) - 1} steps; torchdyn's "
                    "adjoints cannot tell times so close apart: use fewer steps, times further "
                    "apart, or sensitivity='recompute'"
                ) from error
            if state.requires_grad:
                state.register_hook(field.begin_backward)
            states.append(state)
        return states

    def _instance(self, dtype: torch.dtype) -> Solver:
        if isinstance(self.solver, str):
            return str_to_solver(self.solver, dtype)
        return copy.deepcopy(self.solver)


class _Stepper:
    """One step of a torchdyn solver, with its gradient.

    Args:
        solver: a torchdyn solver.
        dynamics: the equations of motion.
        recompute: whether to keep only the state at the start of the step for the gradient.
    """

    def __init__(self, solver: Solver, dynamics: Dynamics, recompute: bool) -> None:
        self.dynamics = dynamics
        self._solver = solver
        self._recompute = recompute
        self._requires_grad = [p.requires_grad for p in dynamics.parameters]
        self._leapfrog = isinstance(solver, AsynchronousLeapfrog)
        self._implicit = isinstance(solver, ImplicitEuler)

    def start(self, t: float) -> Tensor:
        """The solver's own state: for leapfrog, positions and velocities side by side."""
        state = self.dynamics.state
        return torch.cat([state, self.dynamics(t, state)], dim=-1) if self._leapfrog else state

    def strip(self, state: Tensor) -> Tensor:
        """The state of the dynamics within the solver's own."""
        return state[..., : state.shape[-1] // 2] if self._leapfrog else state

    def __call__(self, t: float, dt: float, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """The state after ``dt``, and the solver's estimate of the error where it has one."""
        if self._recompute and torch.is_grad_enabled():
            # the search for a root differentiates, and each derivative would repeat a checkpoint
            found = self._advance(t, dt, state) if self._implicit else None
            result: tuple[Tensor, Tensor | None] = checkpoint(
                self._repeatable_step,
                *(t, dt, state, found),
                use_reentrant=False,
                preserve_rng_state=False,
            )
            return result
        return self._step(t, dt, state)

    def _repeatable_step(
        self, t: float, dt: float, state: Tensor, found: tuple[Tensor, Tensor | None] | None
    ) -> tuple[Tensor, Tensor | None]:
        """The step, even if parameters were frozen or thawed since, as normflows does."""
        flags = [p.requires_grad for p in self.dynamics.parameters]
        self._set_requires_grad(self._requires_grad)
        try:
            return self._step(t, dt, state, found)
        finally:
            self._set_requires_grad(flags)

    def _set_requires_grad(self, flags: Sequence[bool]) -> None:
        for parameter, flag in zip(self.dynamics.parameters, flags, strict=True):
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)

    def _step(
        self,
        t: float,
        dt: float,
        state: Tensor,
        found: tuple[Tensor, Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        advanced, error = self._advance(t, dt, state) if found is None else found
        if self._implicit:
            advanced = self._differentiable_implicit_step(advanced.detach(), t, dt, state)
        return advanced, error

    def _advance(self, t: float, dt: float, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the solver makes of the state."""
        with _search(self._solver):
            step = self._solver.step(self.dynamics, state, t, dt)
        if not isinstance(step, tuple) or len(step) < 3:
            raise IntegrationError(
                f"solver {_name(self._solver)} returned {type(step).__name__} from its step, "
                "expected a tuple (slope, state, error), like torchdyn's solvers"
            )
        advanced, error = step[1:3]
        if not isinstance(advanced, Tensor) or _kind(advanced) != _kind(state):
            raise IntegrationError(
                f"solver {_name(self._solver)} returned {validation.describe(advanced)} from its "
                f"step, expected {validation.describe(state)}, like the state it was given"
            )
        return advanced, error

    def _differentiable_implicit_step(
        self, root: Tensor, t: float, dt: float, state: Tensor
    ) -> Tensor:
        r"""Attach the gradient of :math:`y = y_0 + f(t, y)\,dt` to its ``root``.

        torchdyn finds the root outside of autograd. By the implicit function theorem the
        adjoint :math:`\lambda` of :math:`y` solves :math:`\lambda = g + dt\, J^T \lambda`, which is
        iterated to a fixed point.
        """
        if not torch.is_grad_enabled():
            return root
        root = root.requires_grad_()
        image = state + dt * self.dynamics(t, root)
        if not image.requires_grad:
            return root.detach()
        solution = state + dt * self.dynamics(t, root.detach())

        def solve(grad: Tensor) -> Tensor:
            _forbid_second_derivatives(grad)
            adjoint = grad
            for _ in range(1000):
                (product,) = torch.autograd.grad(image, root, adjoint, retain_graph=True)
                update = grad + product
                size = update.norm()
                if not bool(size.isfinite()):
                    break
                converged = bool((update - adjoint).norm() <= _EPSILON[grad.dtype] * size)
                adjoint = update
                if converged:
                    return adjoint
            raise IntegrationError(
                "solver ImplicitEuler: the gradient of a step did not converge, because the step "
                "is too long for the field; use more steps"
            )

        if solution.requires_grad:
            solution.register_hook(solve)
        # the value of the root, whether or not gradients are asked for
        return root.detach() + (solution - solution.detach())


def _forbid_second_derivatives(grad: Tensor) -> None:
    """Raise if the gradient that passes here is to be differentiated again."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "create_graph: got True, but the adjoint sensitivities and solver 'ieuler' have no "
            "second derivatives; use an explicit solver with sensitivity='autograd' or 'recompute'"
        )


_EPSILON = {torch.float32: 1e-7, torch.float64: 1e-14}


class _AdjointField(nn.Module):
    """The equations of motion as torchdyn's adjoints want them: in rising time, with parameters.

    torchdyn differentiates with respect to ``parameters()``; these are the tensors, leaves or not,
    that the derivative depends on, and the graph carries their gradients on to the model.

    Args:
        dynamics: the equations of motion.
        start: the time where they start.
        sign: whether time rises or falls.
        most: how often they may be evaluated in one solve, forward or backward, or None.
        solver: the name of the solver.
    """

    def __init__(
        self, dynamics: Dynamics, start: float, sign: float, most: int | None, solver: str
    ) -> None:
        super().__init__()
        self._most, self._solver, self.evaluations = most, solver, 0
        self._dynamics, self._start, self._sign = dynamics, start, sign
        self._tensors = tuple(p for p in dynamics.parameters if p.requires_grad)
        if not self._tensors:
            self._tensors = (dynamics.state.new_zeros(1, requires_grad=True),)

    def parameters(self, recurse: bool = True):  # type: ignore[no-untyped-def]
        return iter(self._tensors)

    def begin_backward(self, grad: Tensor) -> None:
        """Watch the solve of the adjoint equation, which starts from ``grad``."""
        _forbid_second_derivatives(grad)
        self.evaluations = 0

    # torchdyn looks for a parameter of this name
    def forward(self, t: Tensor, state: Tensor) -> Tensor:
        self.evaluations += 1
        if self._most is not None and self.evaluations > self._most:
            raise IntegrationError(
                f"solver {self._solver} did not arrive within max_steps={self._most // 7}: the "
                "potential explodes or is too stiff for the tolerance; raise atol and rtol or "
                "max_steps, use smaller weights, or use a fixed-step solver"
            )
        derivative = self._sign * self._dynamics(self._start + self._sign * t, state)
        if torch.is_grad_enabled():
            # torchdyn needs a gradient, be it zero, for every parameter and for the time
            derivative = derivative + 0 * (t.sum() + sum(p.sum() for p in self._tensors))
        return derivative


def _import_ode_problem():  # type: ignore[no-untyped-def]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchdyn.core.problems import ODEProblem
    except Exception as error:  # torchvision raises RuntimeError where it does not fit torch
        raise ImportError(
            "sensitivity='adjoint' and 'interpolated_adjoint' need torchdyn.core, which imports "
            f"Lightning and torchvision and failed with: {error}. Install a torchvision that fits "
            "your torch, or use sensitivity='recompute', which needs neither"
        ) from error
    return ODEProblem


@contextmanager
def _search(solver: Solver) -> Iterator[None]:
    """Say so where the search of an implicit solver for its root overflows."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(solver, ImplicitEuler) or type(error) is not RuntimeError:
            raise
        raise IntegrationError(
            f"solver {_name(solver)} found no solution of its step ({error}): the potential is too "
            "steep; use more steps or smaller weights"
        ) from error


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout


def _has_stepping_class(solver: object) -> bool:
    return getattr(solver, "stepping_class", None) in ("fixed", "adaptive")


def _name(solver: Solver) -> str:
    return type(solver).__name__
