"""torchdyn's continuous adjoints, for its own solvers."""

from __future__ import annotations

import itertools
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nflows_mongeampere.integration.errors import IntegrationError, forbid_second_derivatives

if TYPE_CHECKING:
    from nflows_mongeampere.integration.integrator import Solve


def states(solve: Solve) -> list[Tensor]:
    """The states at each time but the first, with torchdyn's gradient."""
    integrator, times = solve.integrator, solve.times
    problem_class, adaptive = _import_ode_problem(), integrator.adaptive
    # torchdyn warns of tolerances that are not its defaults where the solver ignores them
    tolerances = (integrator.atol, integrator.rtol) if adaptive else (1e-3, 1e-3)
    field = _RisingField(solve)
    problem = problem_class(
        field,
        solver=integrator.solver_instance(solve.dynamics.state.dtype),
        # implicit Euler cannot integrate the adjoint equation, which torchdyn does not trace
        solver_adjoint=None if solve.method.reversible else "rk4",
        atol=tolerances[0],
        rtol=tolerances[1],
        atol_adjoint=tolerances[0],
        rtol_adjoint=tolerances[1],
        sensitivity=integrator.sensitivity,
    )
    found = [solve.dynamics.state]
    for start, stop in itertools.pairwise(times):
        grid = [start, stop] if adaptive else solve.grid(start, stop)
        span = found[-1].new_tensor([field.sign * (t - times[0]) for t in grid])
        field.evaluations = 0
        try:
            state = problem(found[-1], span)[1][-1]
        except AssertionError as error:
            raise IntegrationError(
                f"times: from {start:g} to {stop:g} in {len(grid) - 1} steps; torchdyn's "
                "adjoints cannot tell times so close apart: use fewer steps, times further "
                "apart, or sensitivity='recompute'"
            ) from error
        if state.requires_grad:
            state.register_hook(field.begin_backward)
        found.append(state)
    return found[1:]


class _RisingField(nn.Module):
    """The equations of motion as torchdyn's adjoints want them: in rising time, with parameters.

    torchdyn differentiates with respect to ``parameters()``. On the way forward these are the
    tensors that the rate depends on, whose graph carries gradients on to the model; on the way back
    they are copies that do not depend on each other, real where the tensors are complex.
    """

    def __init__(self, solve: Solve) -> None:
        super().__init__()
        self._solve, self._start, self.evaluations = solve, solve.times[0], 0
        self.sign = 1.0 if solve.times[1] > solve.times[0] else -1.0
        # torchdyn's adaptive loops have no bound of their own; a step has up to 7 evaluations
        self._most = 7 * solve.integrator.max_steps if solve.integrator.adaptive else None
        tensors: list[Any] = list(solve.dynamics.tensors)
        learning = {i: _real(t) for i, t in enumerate(tensors) if t is not None and t.requires_grad}
        copies = {i: t.detach().requires_grad_() for i, t in learning.items()}
        for i, copy in copies.items():
            tensors[i] = torch.view_as_complex(copy) if tensors[i].is_complex() else copy
        self._dynamics = solve.dynamics.rebound(tensors)
        nothing = [solve.dynamics.state.new_zeros(1, requires_grad=True)]
        self._given = list(learning.values()) or nothing
        self._copies = list(copies.values()) or nothing
        self._goes_back = False

    def parameters(self, recurse: bool = True):  # type: ignore[no-untyped-def]
        return iter(self._copies if self._goes_back else self._given)

    def begin_backward(self, grad: Tensor) -> None:
        """Watch the solve of the adjoint equation, which starts from ``grad``."""
        forbid_second_derivatives(grad)
        self.evaluations, self._goes_back = 0, True

    # torchdyn looks for a parameter of this name
    def forward(self, t: Tensor, state: Tensor) -> Tensor:
        self.evaluations += 1
        if self._most is not None and self.evaluations > self._most:
            raise IntegrationError(
                f"solver {self._solve.integrator.solver!r} did not arrive within max_steps="
                f"{self._most // 7}: the potential explodes or is too stiff for the tolerance; "
                "raise atol and rtol or max_steps, use smaller weights, or use a fixed-step solver"
            )
        rate = self.sign * self._dynamics.rate(self._start + self.sign * t, state)
        if torch.is_grad_enabled():
            # torchdyn needs a gradient, be it zero, for every parameter and for the time
            rate = rate + 0 * (t.sum() + sum(p.sum() for p in self._copies))
        return rate


def _real(tensor: Tensor) -> Tensor:
    # no view, for torchdyn's gradients of it begin anywhere in memory
    return torch.stack([tensor.real, tensor.imag], -1) if tensor.is_complex() else tensor


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
