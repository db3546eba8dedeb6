"""The flow as PyTorch's own ``torch.distributions`` sees it, for Pyro and zuko."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from nflows.transforms import Transform
from torch import Size, Tensor, nn
from torch.distributions import constraints

from nflows_mongeampere import validation
from nflows_mongeampere.integration import IntegrationError

Rows = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


class FlowTransform(nn.Module, torch.distributions.Transform):
    r"""A transform of nflows as one of ``torch.distributions``: from noise z to data x.

    .. math:: x = f(z), \qquad \ln p(x) = \ln p(z) - \ln|\partial f / \partial z|.

    Any transform of nflows will do, a :class:`~nflows_mongeampere.MongeAmpereTransform` or a
    composite with one inside. It is a module: optimisers, ``.to`` and ``state_dict`` see the
    weights of the transform. A tensor of context moves with it and is not part of its state, unless
    it is a ``Parameter``. The inverse, ``.inv``, is a module with the same weights.

    A row that is not finite, or whose solve diverges, comes out as NaN, with a determinant of NaN;
    the other rows are what they are without it. (An adaptive solver chooses its steps for the whole
    batch, so its other rows agree within the tolerance.) ``TransformedDistribution.log_prob``
    raises ``ValueError`` for such rows, as long as PyTorch validates arguments.

    Args:
        transform: a transform of nflows, whose ``forward`` leads from data to noise.
        event_shape: the shape of one event, (D,) for rows of D entries.
        context: what every evaluation is conditioned on, shape (C,), or one for each element of a
            batch, shape (batch..., C); or None. The batch shapes of context and events broadcast.
        cache_size: 0 to keep nothing, so that ``log_prob`` costs one solve for the noise and one
            for the determinant; 1 to keep the last solve, which then serves both, and the density
            of the last sample. It is used for the very tensors that it led from and to, and only
            until weights, gradient mode or these tensors change or a backward pass frees its graph.

    Raises:
        TypeError, ValueError: for arguments that do not fit, and for events of another shape.

    Example:
        >>> from nflows_mongeampere import MongeAmpereTransform, RidgePotential
        >>> from torch.distributions import Independent, Normal, TransformedDistribution
        >>> base = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
        >>> flow = FlowTransform(MongeAmpereTransform(RidgePotential(2, 16)), (2,))
        >>> TransformedDistribution(base, [flow]).rsample((3,)).shape
        torch.Size([3, 2])
    """

    bijective = True
    context: Tensor | None

    def __init__(
        self,
        transform: Transform,
        event_shape: Sequence[int],
        context: Tensor | None = None,
        cache_size: int = 0,
    ) -> None:
        expected = "a transform of nflows; of a Flow, its _transform"
        validation.kind("transform", transform, isinstance(transform, Transform), expected)
        shape = isinstance(event_shape, Sequence) and not isinstance(event_shape, str)
        expected = "the shape of one event, such as (2,)"
        validation.kind("event_shape", event_shape, shape and len(event_shape) > 0, expected)
        given = context is None or isinstance(context, Tensor)
        validation.kind("context", context, given, "a tensor or None")
        _register_with_pyro()
        nn.Module.__init__(self)
        torch.distributions.Transform.__init__(self, cache_size=cache_size)
        self.transform = transform
        self.event_shape = Size(validation.integer("event_shape", side) for side in event_shape)
        if isinstance(context, nn.Parameter):
            self.context = context
        else:
            self.register_buffer("context", context, persistent=False)
        self._to_data = True
        self._solves: list[_Solve] = []  # the last one, or none

    # torch's Transform has __eq__ alone, which would make the module unhashable
    __hash__ = nn.Module.__hash__

    def __getstate__(self) -> dict[str, Any]:
        """Copies start without the last solve, whose graph cannot be copied."""
        return {**self.__dict__, "_inv": None, "_solves": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        _register_with_pyro()
        super().__setstate__(state)

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:
        """Real events."""
        return constraints.independent(constraints.real, len(self.event_shape))

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:
        """Real events."""
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def inv(self) -> FlowTransform:
        """The inverse, a module that shares weights, context and cache."""
        if self._inv is None:
            inverse = FlowTransform(self.transform, self.event_shape, None, self._cache_size)
            inverse._to_data = not self._to_data
            for name in ("_parameters", "_buffers", "_modules", "_solves"):
                inverse.__dict__[name] = self.__dict__[name]
            # past nn.Module, to which each would be a part of the other
            self.__dict__["_inv"], inverse.__dict__["_inv"] = inverse, self
        return cast(FlowTransform, self._inv)

    def condition(self, context: Tensor) -> FlowTransform:
        """The same transform under another context, as Pyro's conditional transforms have it."""
        return self._with(context, self._cache_size)

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """The same transform with another ``cache_size``."""
        return self if cache_size == self._cache_size else self._with(self.context, cache_size)

    def clear_cache(self) -> None:
        """Forget the last solve, as Pyro's distributions ask their transforms to."""
        self._solves.clear()

    def forward_shape(self, shape: Sequence[int]) -> Size:
        """The shape of what comes from noise of ``shape``: batch shapes broadcast."""
        return Size((*self._batch_shape(self._to_data, shape), *self.event_shape))

    def inverse_shape(self, shape: Sequence[int]) -> Size:
        """The shape of the noise behind data of ``shape``: batch shapes broadcast."""
        return Size((*self._batch_shape(not self._to_data, shape), *self.event_shape))

    def forward(self, x: Tensor) -> Tensor:
        r"""Data from noise ``x``, both of shape (batch..., \*event_shape)."""
        last = self._recall()
        if last is not None and last.to_data != self._to_data and x is last.end():
            return last.kept[0]
        if last is not None and last.to_data == self._to_data and x is last.start() and last.fresh:
            return last.kept[1]
        y, logabsdet = self._solve(self._to_data, x)
        self._remember(x, y, logabsdet)
        return y

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``ln |det dy/dx|`` of noise ``x`` and data ``y``, one for each event."""
        last, back = self._recall(), self._led(y, x)
        if last is not None and last.fresh and (back or self._led(x, y)):
            return -last.kept[2] if back else last.kept[2]
        # from where the pair began, as nflows has it, unless x is where a gradient is asked for
        if back and not (x.is_leaf and x.requires_grad):
            return -self._solve(not self._to_data, y)[1]
        return self._solve(self._to_data, x)[1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data from noise and ``ln |det dy/dx|`` in one solve, as zuko's flows ask for them."""
        return self._solve(self._to_data, x)

    def extra_repr(self) -> str:
        return f"event_shape={tuple(self.event_shape)}, cache_size={self._cache_size}"

    def _with(self, context: Tensor | None, cache_size: int) -> FlowTransform:
        view = FlowTransform(self.transform, self.event_shape, context, cache_size)
        return view if self._to_data else view.inv

    def _batch_shape(self, to_data: bool, shape: Sequence[int]) -> Size:
        """The batch shape of what comes from events of ``shape``."""
        dims = len(self.event_shape)
        if tuple(shape[-dims:]) != tuple(self.event_shape):
            raise ValueError(
                f"{'x' if to_data else 'y'}: got shape {tuple(shape)}, expected (..., "
                f"{', '.join(map(str, self.event_shape))})"
            )
        contexts = () if self.context is None else self.context.shape[:-1]
        return Size(torch.broadcast_shapes(tuple(shape[:-dims]), contexts))

    def _solve(self, to_data: bool, events: Tensor) -> tuple[Tensor, Tensor]:
        """The images of events of any batch shape, which nflows takes as rows, and ln|det|."""
        batch, context = self._batch_shape(to_data, events.shape), self.context
        rows = events.expand(*batch, *self.event_shape).reshape(-1, *self.event_shape)
        if context is not None:
            context = context.expand(*batch, -1).reshape(-1, context.shape[-1])
        call = self.transform.inverse if to_data else self.transform
        images, logabsdet = _solve_rows(call, rows, context)
        return images.reshape(*batch, *self.event_shape), logabsdet.reshape(batch)

    def _remember(self, start: Tensor, end: Tensor, logabsdet: Tensor) -> None:
        """Keep the last solve; without a cache, no more than which tensor came from which."""
        solve = _Solve(self._to_data, weakref.ref(start), weakref.ref(end))
        if self._cache_size:
            solve.keep((start, end, logabsdet), self._basis())
        self._solves[:] = [solve]

    def _recall(self) -> _Solve | None:
        """The last solve, if it was kept and nothing that it depends on has changed since."""
        for solve in self._solves:
            if solve.kept and solve.stamp == _stamp(*solve.kept, *self._basis()):
                return solve
        return None

    def _basis(self) -> list[object]:
        """All that a solve depends on: weights, context, and the settings of the modules."""
        settings = [value for module in self.transform.modules() for value in vars(module).values()]
        return [*self.parameters(), *self.buffers(), *settings]

    def _led(self, start: Tensor, end: Tensor) -> bool:
        """Whether the last solve led from ``start`` to ``end``."""
        return any(start is last.start() and end is last.end() for last in self._solves)


@dataclass(eq=False)
class _Solve:
    """A solve: which tensor it led from and to and, where it is kept, what came of it."""

    to_data: bool
    start: weakref.ref[Tensor]
    end: weakref.ref[Tensor]
    kept: tuple[Tensor, ...] = ()  # start, end, ln|det|
    basis: Sequence[object] = ()  # held, so that no other object gets the id of one of these
    stamp: Sequence[object] = ()
    fresh: bool = True  # whether no backward pass has freed the graph

    def keep(self, kept: tuple[Tensor, ...], basis: Sequence[object]) -> None:
        """Keep start, end and ln|det| until these or what they depend on changes."""
        self.kept, self.basis, self.stamp = kept, basis, _stamp(*kept, *basis)
        this = weakref.ref(self)  # a graph that held what holds it would never be freed

        def backward(*_: object) -> None:
            if (solve := this()) is not None:
                solve.fresh = False

        for tensor in kept[1:3]:
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(backward)


def _stamp(*things: object) -> list[object]:
    """What changes with any of ``things``, or with the gradient mode."""
    stamp: list[object] = [torch.is_grad_enabled()]
    for thing in things:
        stamp.append(id(thing))
        if isinstance(thing, Tensor):
            stamp += [thing.is_inference() or thing._version, thing.requires_grad]
    return stamp


def _solve_rows(call: Rows, rows: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """``call``, with NaN for rows that are not finite or whose solve diverges."""
    wrong = _not_finite(rows)
    if context is not None:
        wrong = wrong | _not_finite(context)
        context = _fill(context, wrong, 0.0)
    try:
        with validation.unchecked():
            images, logabsdet = call(_fill(rows, wrong, 0.0), context)
    except IntegrationError:  # of a solver that cannot go on without one of the rows
        if len(rows) == 1:
            nothing = rows * torch.nan
            return nothing, nothing.flatten(1).sum(1)
        contexts = (None, None) if context is None else context.chunk(2)
        halves = [_solve_rows(call, *half) for half in zip(rows.chunk(2), contexts, strict=True)]
        images, logabsdet = (torch.cat(parts) for parts in zip(*halves, strict=True))
    wrong = wrong | _not_finite(images) | ~logabsdet.isfinite()
    return _fill(images, wrong, torch.nan), logabsdet.masked_fill(wrong, torch.nan)


def _not_finite(rows: Tensor) -> Tensor:
    return ~rows.detach().flatten(1).isfinite().all(1)


def _fill(rows: Tensor, where: Tensor, value: float) -> Tensor:
    return rows.masked_fill(where.view(-1, *[1] * (rows.dim() - 1)), value)


def _register_with_pyro() -> None:
    """Tell Pyro, where it is imported, that ``condition`` is that of its conditional transforms."""
    module = sys.modules.get("pyro.distributions.conditional")
    if module is not None:
        module.ConditionalTransform.register(FlowTransform)
