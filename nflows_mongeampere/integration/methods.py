r"""Single steps of torchdyn's solvers, forward and backward.

A method advances a state :math:`y` by one step of :math:`\dot y = f(t, y)`. The explicit ones also
go back: they carry the adjoint :math:`\lambda = \partial L / \partial y` from the end of a step
to its beginning, exactly, by products with the Jacobian of each stage.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchdyn.numerics.solvers import ode as torchdyn

# f(t, y), and λ ↦ Jᵀλ (coordinates only) of the last stage that has not been taken back yet
Rate = Callable[[float, Tensor], Tensor]
Pullback = Callable[[Tensor], Tensor]


class Method(ABC):
    """One step of a solver.

    Attributes:
        order: the error of a solution falls as the step to this power.
        adaptive: whether a step comes with an estimate of its error, by which it is chosen.
        evaluations: of the rate in one step.
        reversible: whether :meth:`step_back` carries adjoints.
        augmented: whether its own state holds more than that of the equations of motion.
        implicit: whether a step solves an equation, whose gradient is for backward() alone.
    """

    order: int
    adaptive: bool = False
    evaluations: int = 1
    reversible: bool = False
    augmented: bool = False
    implicit: bool = False

    @abstractmethod
    def step(
        self, rate: Rate, t: float, dt: float, y: Tensor, first: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The state after ``dt``, and the slopes of the step.

        Args:
            rate: evaluates f.
            t: where the step begins.
            dt: its length.
            y: the state there.
            first: f(t, y), where it is known.
        """

    def begin(self, rate: Rate, t: float, y: Tensor) -> Tensor:
        """The solver's own state at the start."""
        return y

    def end(self, y: Tensor) -> Tensor:
        """The state of the equations of motion within the solver's own."""
        return y

    def error(self, dt: float, slopes: Sequence[Tensor], last: Callable[[], Tensor]) -> Tensor:
        """The estimated error of a step of an adaptive method; ``last`` is the slope at its end."""
        raise NotImplementedError

    def step_back(self, pullback: Pullback, dt: float, adjoint: Tensor, moving: int) -> Tensor:
        """The adjoint before a step, from that after it.

        Args:
            pullback: goes through the stages of the step from the last to the first.
            dt: the length of the step.
            adjoint: of the state after the step.
            moving: the first so many rows are coordinates; the rest do not act back.
        """
        raise NotImplementedError

    def begin_back(self, pullback: Pullback, adjoint: Tensor, moving: int) -> Tensor:
        """The adjoint of the state at the start, from that of the solver's own."""
        return adjoint

    def end_back(self, adjoint: Tensor) -> Tensor:
        """The adjoint of the solver's own state at the end."""
        return adjoint


class RungeKutta(Method):
    r"""An explicit Runge-Kutta method with the tableau (a, b, c).

    .. math:: k_i = f\Big(t + c_i\,dt,\; y + dt \sum_{j<i} a_{ij} k_j\Big), \qquad
              y' = y + dt \sum_i b_i k_i.

    With :math:`\lambda` the adjoint of :math:`y'`, that of :math:`y` is
    :math:`\lambda + \sum_i \mu_i`, where

    .. math:: \lambda_i = dt\, \Big(b_i \lambda + \sum_{j>i} a_{ji} \mu_j\Big), \qquad
              \mu_i = J_i^T \lambda_i,

    for stages in reverse, with :math:`J_i` the Jacobian of f at stage i.

    Args:
        order: of the method.
        a: rows of weights of stages 2, 3, ...
        b: weights of the solution.
        c: times of the stages, in steps.
        error: weights of the estimated error over the stages and the slope at the end of the step,
            for adaptive methods.
    """

    reversible = True

    def __init__(
        self,
        order: int,
        a: Sequence[Sequence[float]],
        b: Sequence[float],
        c: Sequence[float],
        error: Sequence[float] = (),
    ) -> None:
        self.order, self.adaptive, self.evaluations = order, bool(error), len(b)
        self.a, self.b, self.c, self._error = ((), *map(tuple, a)), tuple(b), tuple(c), error

    def step(
        self, rate: Rate, t: float, dt: float, y: Tensor, first: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        slopes = [rate(t, y) if first is None else first]
        for c, weights in zip(self.c[1:], self.a[1:], strict=True):
            slopes.append(rate(t + c * dt, _combine(y, dt, weights, slopes)))
        return _combine(y, dt, self.b, slopes), slopes

    def error(self, dt: float, slopes: Sequence[Tensor], last: Callable[[], Tensor]) -> Tensor:
        *weights, end = self._error
        estimate = _combine(torch.zeros_like(slopes[0]), dt, weights, slopes)
        return estimate.add(last(), alpha=dt * end) if end else estimate

    def step_back(self, pullback: Pullback, dt: float, adjoint: Tensor, moving: int) -> Tensor:
        stages = len(self.b)
        products: list[Tensor] = [adjoint] * stages
        for i in reversed(range(stages)):
            at_stage = adjoint * (dt * self.b[i])
            coordinates = at_stage[:moving]
            for j in range(i + 1, stages):
                if self.a[j][i]:
                    coordinates.add_(products[j], alpha=dt * self.a[j][i])
            products[i] = pullback(at_stage)
        before = adjoint.clone()
        coordinates = before[:moving]
        for product in products:
            coordinates.add_(product)
        return before


class AsynchronousLeapfrog(Method):
    r"""torchdyn's asynchronous leapfrog: the state is a position above a velocity, (2 rows, B).

    .. math:: k = f\big(t + \tfrac{dt}{2},\; x + \tfrac{dt}{2} v\big), \qquad
              v' = 2 \gamma k + (1 - 2 \gamma) v, \qquad
              x' = x + \tfrac{dt}{2} (v + v'),

    from :math:`v = f(t, x)` at the start.
    """

    order, reversible, augmented = 2, True, True

    def __init__(self, solver: Any) -> None:
        if solver.stepping_class == "adaptive":
            raise ValueError(
                "solver: got an adaptive AsynchronousLeapfrog, whose error estimate does not "
                "shrink with its steps; use one with stepping_class='fixed', or 'dopri5'"
            )
        self._gamma = float(solver.const)

    def step(
        self, rate: Rate, t: float, dt: float, y: Tensor, first: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        x, v = y.chunk(2)
        slope = rate(t + dt / 2, torch.add(x, v, alpha=dt / 2))
        turned = 2 * self._gamma * slope + (1 - 2 * self._gamma) * v
        return torch.cat([x + dt / 2 * (v + turned), turned]), [slope]

    def begin(self, rate: Rate, t: float, y: Tensor) -> Tensor:
        return torch.cat([y, rate(t, y)])

    def end(self, y: Tensor) -> Tensor:
        return y.chunk(2)[0]

    def step_back(self, pullback: Pullback, dt: float, adjoint: Tensor, moving: int) -> Tensor:
        of_x, of_v = adjoint.chunk(2)
        turned = torch.add(of_v, of_x, alpha=dt / 2)
        product = pullback(2 * self._gamma * turned)
        x = of_x.clone()
        x[:moving] += product
        v = (1 - 2 * self._gamma) * turned + dt / 2 * of_x
        v[:moving] += dt / 2 * product
        return torch.cat([x, v])

    def begin_back(self, pullback: Pullback, adjoint: Tensor, moving: int) -> Tensor:
        of_x, of_v = adjoint.chunk(2)
        before = of_x.clone()
        before[:moving] += pullback(of_v.contiguous())
        return before

    def end_back(self, adjoint: Tensor) -> Tensor:
        return torch.cat([adjoint, torch.zeros_like(adjoint)])


class TorchdynStep(Method):
    """The step of a solver that torchdyn does not have, as it is; autograd goes through it."""

    def __init__(self, solver: Any) -> None:
        self._solver = solver
        self.order = int(getattr(solver, "order", 1))
        self.adaptive = solver.stepping_class == "adaptive"

    def step(
        self, rate: Rate, t: float, dt: float, y: Tensor, first: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        self._solver.sync_device_dtype(y, torch.zeros(()))
        _, advanced, error = self._solver.step(rate, y, t, dt)[:3]
        return advanced, [] if error is None else [error]

    def error(self, dt: float, slopes: Sequence[Tensor], last: Callable[[], Tensor]) -> Tensor:
        return slopes[0]


def _combine(y: Tensor, dt: float, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """Y + dt (w₁ k₁ + w₂ k₂ + ...)."""
    for weight, slope in zip(weights, slopes, strict=False):
        if weight:
            y = torch.add(y, slope, alpha=dt * weight)
    return y


def _embedded(solver: Any) -> RungeKutta:
    c, a, b, error = _tableau(solver)
    if [*a[-1], 0.0] == b:  # the last stage is the first of the next step and serves the error
        return RungeKutta(solver.order, a[:-1], b[:-1], (0.0, *c[:-1]), error)
    return RungeKutta(solver.order, a, b, (0.0, *c), (*error, 0.0))


def _classical(solver: Any) -> RungeKutta:
    # torchdyn's step takes the first three of the times 0, 1/2, 1/2, 1 for its last three stages
    c, a, b, _ = _tableau(solver)
    return RungeKutta(solver.order, a, b, (0.0, *c[-3:]))


def repair(solver: Any) -> None:
    """Give torchdyn's classical method the times of its last three stages."""
    if type(solver) is torchdyn.RungeKutta4:
        c, *weights = solver.tableau
        solver.tableau = (c[-3:], *weights)


def _tableau(solver: Any) -> tuple[list[float], list[list[float]], list[float], list[float]]:
    """The numbers of a solver, in double precision where they are torchdyn's own."""
    c, a, b, error = solver.tableau
    exact = type(solver)(dtype=torch.float64).tableau
    own = all(torch.equal(x, y.to(x)) for x, y in zip((c, *a, b), _flat(exact), strict=True))
    c, a, b, error = exact if own else (c, a, b, error)
    return c.tolist(), [row.tolist() for row in a], b.tolist(), error.tolist()


def _flat(tableau: Any) -> tuple[Tensor, ...]:
    c, a, b, _ = tableau
    return (c, *a, b)


# How each of torchdyn's explicit solvers is read.
EXPLICIT: dict[type, Callable[[Any], Method]] = {
    torchdyn.Euler: lambda _: RungeKutta(1, (), (1.0,), (0.0,)),
    torchdyn.Midpoint: lambda _: RungeKutta(2, ((0.5,),), (0.0, 1.0), (0.0, 0.5)),
    torchdyn.RungeKutta4: _classical,
    torchdyn.DormandPrince45: _embedded,
    torchdyn.Tsitouras45: _embedded,
    torchdyn.AsynchronousLeapfrog: AsynchronousLeapfrog,
}
