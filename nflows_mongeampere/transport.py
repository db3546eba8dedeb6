"""The transport map of a Monge-Ampère flow, which the nflows and normflows faces share."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nflows_mongeampere import accuracy, validation
from nflows_mongeampere.accuracy import AccuracyWarning, ErrorEstimate, StepChoice
from nflows_mongeampere.differentiation import usable
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


class TransportCosts:
    r"""What the paths of a batch cost, summed over the flows that the batch went through.

    Attributes:
        kinetic: :math:`\int \|\nabla u\|^2 dt`, shape (B,): for straight paths at constant speed,
            the squared distance of optimal transport, over T (Finlay et al., `arXiv:2002.02798
            <https://arxiv.org/abs/2002.02798>`_; Onken et al., `arXiv:2006.00104
            <https://arxiv.org/abs/2006.00104>`_).
        roughness: :math:`\int (d\Delta u/dt)^2 dt` along the path, shape (B,): zero where a step of
            any length gives the exact log-density.
    """

    kinetic: Tensor
    roughness: Tensor

    def add(self, kinetic: Tensor, roughness: Tensor) -> None:
        """Add the costs of one flow."""
        before = getattr(self, "kinetic", kinetic)
        if before.shape != kinetic.shape:
            raise ValueError(
                f"inputs: got {len(kinetic)} rows after a batch of {len(before)}; the costs of "
                "each batch need a with block of their own"
            )
        self.kinetic = kinetic + getattr(self, "kinetic", 0)
        self.roughness = roughness + getattr(self, "roughness", 0)

    def __getattr__(self, name: str) -> Tensor:
        raise AttributeError(
            f"{name}: no batch has gone through the flow yet; evaluate it inside the with block"
        )


@contextmanager
def transport_costs(model: nn.Module) -> Iterator[TransportCosts]:
    """Record the costs of transport of every Monge-Ampère flow in ``model``.

    In reduced coordinates they cost no further matrix product. Penalties on them keep a flow easy
    to integrate.

    Args:
        model: a flow, or anything that contains some.

    Yields:
        The costs of the batches that went through the flows since.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if there is no Monge-Ampère flow in ``model``, or where a batch of another size
            goes through it.

    Example:
        >>> import torch
        >>> from nflows_mongeampere import MongeAmpereFlow, transport_costs
        >>> flow = MongeAmpereFlow(2, 16)
        >>> with transport_costs(flow) as costs:
        ...     nll = -flow.log_prob(torch.randn(8, 2)).mean()
        >>> loss = nll + 0.01 * costs.kinetic.mean() + 0.01 * costs.roughness.mean()
    """
    flows = transports(model)
    if not flows:
        raise ValueError(
            f"model: got {type(model).__name__}, in which no Monge-Ampère flow is found"
        )
    costs = TransportCosts()
    for transport in flows:
        transport._costs = costs
    try:
        yield costs
    finally:
        for transport in flows:
            transport._costs = None


def transports(model: nn.Module) -> list[Transport]:
    """Every Monge-Ampère flow in ``model``, of either face."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    return [module for module in model.modules() if isinstance(module, Transport)]


@contextmanager
def refined(model: nn.Module, factor: int = 2) -> Iterator[None]:
    """Evaluate every Monge-Ampère flow in ``model`` with more steps, for a while.

    Where the figures of a model change, they were figures of the solver.

    Args:
        model: a flow, or anything that contains some.
        factor: how many times the steps; the tolerances of an adaptive solver become as many times
            smaller, squared.

    Raises:
        TypeError: if ``model`` is no module, or ``factor`` no integer.
        ValueError: if ``factor`` is below 1.

    Example:
        >>> import torch
        >>> from nflows_mongeampere import MongeAmpereFlow, refined
        >>> flow, x = MongeAmpereFlow(2, 16), torch.randn(8, 2)
        >>> coarse = flow.log_prob(x)
        >>> with refined(flow):
        ...     change = flow.log_prob(x) - coarse
    """
    factor = validation.integer("factor", factor)
    flows = transports(model)
    before = [transport.integrator for transport in flows]
    for transport in flows:
        transport.integrator = replace(
            transport.integrator,
            steps=factor * transport.steps,
            atol=transport.integrator.atol / factor**2,
            rtol=transport.integrator.rtol / factor**2,
        )
    try:
        yield
    finally:
        for transport, integrator in zip(flows, before, strict=True):
            transport.integrator = integrator


class Transport(nn.Module):
    r"""The map :math:`x(t_0) \mapsto x(t_1)` along the gradient of a potential.

    Noise lives at :math:`t = 0` and data at :math:`t =` ``time``. See
    :class:`~nflows_mongeampere.integration.Integrator` for the keywords not explained here.

    Args:
        potential: the scalar potential :math:`u`.
        time: T, the time from noise to data.
        steps, solver, sensitivity, atol, rtol, max_steps: how the equations are integrated.

    Attributes:
        tolerance: the error of log-densities that :meth:`choose_steps` was asked for, in nats.
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
        self.integrator = Integrator(
            solver=solver,
            steps=steps,
            sensitivity=sensitivity,
            atol=atol,
            rtol=rtol,
            max_steps=max_steps,
        )
        self._built_steps = self.integrator.steps
        self._adopt(self.integrator.steps, tolerance=None)
        self._costs: TransportCosts | None = None

    @property
    def steps(self) -> int:
        """The number of fixed steps; may be set, to evaluate the same flow more finely.

        Other steps than those of the constructor are part of the ``state_dict``: a flow that takes
        one up is the flow that was saved, also where a training has refined it.
        """
        return self.integrator.steps

    @steps.setter
    def steps(self, value: int) -> None:
        self.integrator = replace(self.integrator, steps=value)

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
        to_data = self._forward_to_data != validation.boolean("inverse", inverse)
        return accuracy.estimate_error(self, inputs, context, to_data)

    def choose_steps(
        self,
        inputs: Tensor,
        tolerance: float,
        context: Tensor | None = None,
        *,
        inverse: bool = False,
    ) -> StepChoice:
        """Set :attr:`steps` to the fewest that give log-densities to ``tolerance``.

        The choice is logged and saved in the ``state_dict``. From then on the flow warns, once,
        where it is evaluated without gradients at an error above the tolerance; a few rows of
        evaluations 1, 2, 4, 8, ... are watched.

        Args:
            inputs: a batch to choose by, as ``forward`` takes it, or ``inverse`` if that is asked.
            tolerance: the largest error of a log-determinant in the batch, in nats.
            context: one row for each input, where the potential is conditional.
            inverse: whether to choose for ``inverse`` instead of ``forward``.

        Returns:
            The steps, their error and the tolerance.

        Raises:
            TypeError, ValueError: for arguments that do not fit, or an adaptive solver.
            IntegrationError: if no number of steps meets the tolerance.
        """
        to_data = self._forward_to_data != validation.boolean("inverse", inverse)
        choice = accuracy.choose_steps(self, inputs, tolerance, context, to_data)
        self._adopt(choice.steps, choice.tolerance)
        return choice

    def get_extra_state(self) -> Tensor:
        """The steps and the tolerance of :meth:`choose_steps`, for the ``state_dict``.

        Each is zero where there is nothing to take up: steps of the constructor, no tolerance.
        """
        changed = self.tolerance is not None or self.steps != self._built_steps
        steps = self.steps if changed else 0
        return torch.tensor([steps, self.tolerance or 0.0], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take up the steps of a ``state_dict``, unless they were those of a constructor."""
        valid = isinstance(state, Tensor) and state.is_floating_point() and state.shape == (2,)
        valid = valid and state.layout == torch.strided
        numbers = state.tolist() if valid and not state.is_meta else [math.nan]
        if not all(map(math.isfinite, numbers)) or min(numbers) < 0:
            raise ValueError(
                f"state: got {state!r}, expected two finite numbers of at least 0, the steps and "
                "the tolerance that get_extra_state gave"
            )
        steps, tolerance = numbers
        if steps > 0:
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
        path = self._follow("inputs", inputs, context, moments)
        start = (inputs, torch.zeros_like(path[0][1]))
        points, logabsdet = zip(start, *path, strict=True)
        grid = torch.tensor(moments, dtype=inputs.dtype, device=inputs.device)
        return Trajectory(grid, torch.stack(points), torch.stack(logabsdet))

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
        times = (0.0, self.time) if to_data else (self.time, 0.0)
        result = self._follow(name, inputs, context, times)[-1]
        if self.tolerance is not None and not torch.is_grad_enabled() and len(inputs) > 0:
            self._watch(inputs, context, to_data, self.tolerance)
        return result

    def _watch(
        self, inputs: Tensor, context: Tensor | None, to_data: bool, tolerance: float
    ) -> None:
        """Warn, once, of an error above the tolerance; look at evaluations 1, 2, 4, 8, ..."""
        self._evaluations += 1
        if self._warned or self._evaluations & (self._evaluations - 1):
            return
        few = None if context is None else context[:8]
        error = accuracy.estimate_error(self, inputs[:8], few, to_data).logabsdet
        found = float(error.square().mean().sqrt())
        if found > tolerance:
            self._warned = True
            warnings.warn(
                f"log-densities are off by {found:.2g} nats at steps={self.steps}, more than the "
                f"tolerance of {tolerance:.2g} that was asked for; call choose_steps again",
                AccuracyWarning,
                stacklevel=4,
            )

    def _follow(
        self, name: str, inputs: Tensor, context: Tensor | None, times: Sequence[float]
    ) -> list[tuple[Tensor, Tensor]]:
        """The points and their log-determinants at each of ``times`` but the first."""
        dense = isinstance(inputs, Tensor) and not inputs.is_meta
        if dense and torch.is_autocast_enabled(inputs.device.type):
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
        inputs, context = usable(inputs), None if context is None else usable(context)
        costs = self._costs is not None
        dynamics = self.potential.dynamics(inputs, context, self.integrator.evaluations, costs)
        if len(inputs) == 0:
            states = [dynamics.state] * len(times)
        else:
            states = self.integrator.solve(dynamics, times, self.time)
        if self._costs is not None:
            sign = 1 if times[-1] > times[0] else -1
            self._costs.add(*(sign * cost for cost in dynamics.costs(states[-1])))
        return [dynamics.outputs(state) for state in states[1:]]

    def _refine(self, value: Tensor) -> Tensor:
        """``value`` in the precision of the parameters, where autocast has halved it."""
        like = next(self.parameters(), value)
        halved = getattr(value, "dtype", None) in (torch.float16, torch.bfloat16)
        return value.to(like.dtype) if halved else value

    def _check_times(self, times: Sequence[float] | Tensor) -> list[float]:
        try:
            if isinstance(times, str):
                raise TypeError
            moments = [float(times[i]) for i in range(len(times))]
        except OverflowError:
            moments = [math.inf]
        except (TypeError, ValueError, RuntimeError, LookupError) as error:
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
