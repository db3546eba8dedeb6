"""The transport map of a Monge-Ampère flow, which the nflows and normflows faces share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nflows_mongeampere import validation
from nflows_mongeampere.integration import Integrator
from nflows_mongeampere.potentials import Potential


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


class Transport(nn.Module):
    r"""The map :math:`x(t_0) \mapsto x(t_1)` along the gradient of a potential.

    Noise lives at :math:`t = 0` and data at :math:`t =` ``time``. See
    :class:`~nflows_mongeampere.integration.Integrator` for the keywords not explained here.

    Args:
        potential: the scalar potential :math:`u`.
        time: T, the time from noise to data.
        steps, solver, sensitivity, atol, rtol, max_steps: how the equations are integrated.
    """

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
        self.integrator = Integrator(
            solver=solver,
            steps=steps,
            sensitivity=sensitivity,
            atol=atol,
            rtol=rtol,
            max_steps=max_steps,
        )

    @property
    def steps(self) -> int:
        """The number of fixed steps; may be set, to evaluate the same flow more finely."""
        return self.integrator.steps

    @steps.setter
    def steps(self, value: int) -> None:
        self.integrator = replace(self.integrator, steps=value)

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
        path = self._follow("inputs", inputs, context, moments)
        start = (inputs, torch.zeros_like(path[0][1]))
        points, logabsdet = zip(start, *path, strict=True)
        return Trajectory(inputs.new_tensor(moments), torch.stack(points), torch.stack(logabsdet))

    def _to_data(self, name: str, noise: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._follow(name, noise, context, (0.0, self.time))[-1]

    def _to_noise(self, name: str, data: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._follow(name, data, context, (self.time, 0.0))[-1]

    def _follow(
        self, name: str, inputs: Tensor, context: Tensor | None, times: Sequence[float]
    ) -> list[tuple[Tensor, Tensor]]:
        """The points and their log-determinants at each of ``times`` but the first."""
        if isinstance(inputs, Tensor) and torch.is_autocast_enabled(inputs.device.type):
            # errors add up along the path: a log-density in half precision means nothing
            with torch.autocast(inputs.device.type, enabled=False):
                context = None if context is None else self._refine(context)
                return self._follow(name, self._refine(inputs), context, times)
        self.potential.check_batch(name, inputs, context)
        if torch.is_inference_mode_enabled():
            # potentials and implicit solvers differentiate, which inference tensors forbid
            with torch.inference_mode(False), torch.no_grad():
                context = None if context is None else context.clone()
                return self._follow(name, inputs.clone(), context, times)
        dynamics = self.potential.dynamics(inputs, context, self.integrator.evaluations)
        if len(inputs) == 0:
            states = [dynamics.state] * len(times)
        else:
            states = self.integrator.solve(dynamics, times, self.time)
        return [dynamics.outputs(state) for state in states[1:]]

    def _refine(self, value: Tensor) -> Tensor:
        """``value`` in the precision of the parameters, where autocast has halved it."""
        like = next(self.parameters(), value)
        halved = getattr(value, "dtype", None) in (torch.float16, torch.bfloat16)
        return value.to(like.dtype) if halved else value

    def _check_times(self, times: Sequence[float] | Tensor) -> list[float]:
        try:
            moments = [float(t) for t in times]
        except (TypeError, ValueError) as error:
            raise TypeError(f"times: got {times!r}, expected a sequence of numbers") from error
        steps = [after - before for before, after in itertools.pairwise(moments)]
        if (
            not steps
            or not all(math.isfinite(t) for t in moments)
            or min(moments) < 0
            or max(moments) > self.time
            or not (all(step > 0 for step in steps) or all(step < 0 for step in steps))
        ):
            raise ValueError(
                f"times: got {moments}, expected at least two times between 0 (noise) and "
                f"{self.time} (data), all rising or all falling"
            )
        return moments

    def extra_repr(self) -> str:
        return f"time={self.time}, {self.integrator}"
