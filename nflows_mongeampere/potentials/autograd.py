"""Potentials given as any neural network, differentiated by autograd."""

from __future__ import annotations

import inspect
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from nflows_mongeampere import validation
from nflows_mongeampere.differentiation import derivative, differentiation, transformed
from nflows_mongeampere.dynamics import Dynamics, Field, Time
from nflows_mongeampere.potentials.base import Potential

# What spoils a potential where x goes through it, and what to take instead.
_UNFIT: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    (
        (
            *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ReLU6, nn.SELU, nn.Threshold),
            *(nn.Hardtanh, nn.Hardsigmoid, nn.Hardshrink, nn.Softshrink),
            *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
        ),
        "whose slope jumps: the Laplacian misses what the gradient does there and densities are "
        "not normalised; take Softplus, SiLU or Tanh, or average pooling",
    ),
    ((_BatchNorm,), "which couples the rows of a batch; take LayerNorm"),
    ((_DropoutNd,), "which draws anew in every evaluation along a path; leave it out"),
)

# Coordinates of the exact Laplacian that are differentiated at once.
_CHUNK = 64


class AutogradPotential(Potential):
    r"""A potential :math:`u` given by any module that maps (B, ...) to (B,).

    Gradient and Laplacian come from autograd. The exact Laplacian
    :math:`\sum_i \partial_i^2 u` costs one backward pass for each coordinate. Hutchinson's estimate
    :math:`\varepsilon^T (\nabla\nabla u)\, \varepsilon` costs one in all and is unbiased; inside a
    flow one probe :math:`\varepsilon` is drawn for each solve and held through it (Grathwohl et
    al., `arXiv:1810.01367 <https://arxiv.org/abs/1810.01367>`_), so that the field stays smooth.

    Args:
        module: maps ``x`` of shape (B, ...) to (B,). Where its ``forward`` has parameters named
            ``t`` or ``context`` it is given the time, a tensor of shape (), and the context. It
            must treat rows separately and be twice differentiable in x: layers of ReLU, BatchNorm
            or Dropout are warned of, unless x does not go through them.
        laplacian: ``"exact"`` or ``"hutchinson"``.
        probe: distribution of the probe, ``"rademacher"`` or ``"gaussian"``.

    Raises:
        TypeError, ValueError: for arguments that do not fit.

    Example:
        >>> import torch
        >>> class Bowl(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x.square().sum(1)
        >>> AutogradPotential(Bowl()).laplacian(torch.zeros(2, 3)).detach()
        tensor([6., 6.])
    """

    def __init__(
        self, module: nn.Module, *, laplacian: str = "exact", probe: str = "rademacher"
    ) -> None:
        super().__init__()
        expected = "a torch.nn.Module with a forward"
        validation.kind("module", module, isinstance(module, nn.Module), expected)
        _warn_of_unfit_layers(module)
        self.module = module
        self.laplacian_method = validation.choice("laplacian", laplacian, ("exact", "hutchinson"))
        self.probe = validation.choice("probe", probe, ("rademacher", "gaussian"))
        accepted = inspect.signature(module.forward).parameters
        unknown = [
            name
            for name, parameter in list(accepted.items())[1:]
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            and name not in ("t", "context")
        ]
        if unknown:
            raise TypeError(
                f"module: got a forward({', '.join(accepted)}), which needs {', '.join(unknown)}; "
                "expected forward(x), besides x at most a time named t and a context named context"
            )
        self.time_dependent = "t" in accepted
        self._context = accepted.get("context")

    def arguments(self) -> dict[str, Any]:
        return {"module": self.module, "laplacian": self.laplacian_method, "probe": self.probe}

    @property
    def stochastic(self) -> bool:
        """Whether the Laplacian is Hutchinson's estimate."""
        return self.laplacian_method != "exact"

    def _field(self, inputs: Tensor) -> Field:
        return partial(self._gradient_and_laplacian, probe=self._draw_probe(inputs))

    def _accept_context(
        self, name: str, x: Tensor, context: Tensor | None, like: Tensor | None
    ) -> Tensor | None:
        if self._context is None:
            return None
        if context is None:
            if self._context.default is inspect.Parameter.empty:
                raise ValueError(
                    f"context: got None, expected a tensor, because {type(self.module).__name__}"
                    ".forward requires one"
                )
            return None
        validation.batch("context", context, like)
        if context.shape[0] != x.shape[0]:
            raise ValueError(
                f"context: got {len(context)} rows, expected {len(x)}: one for each row of {name}"
            )
        return context

    def _draw_probe(self, x: Tensor) -> Tensor | None:
        if not self.stochastic:
            return None
        where: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
        if self.probe == "gaussian":
            return torch.randn(x.shape, **where)
        return torch.randint(2, x.shape, **where) * 2 - 1

    def dynamics(
        self, inputs: Tensor, context: Tensor | None, evaluations: int, costs: bool = False
    ) -> Dynamics:
        if torch.jit.is_tracing() or getattr(torch.compiler, "is_exporting", bool)():
            raise NotImplementedError(
                f"potential: got an AutogradPotential of {type(self.module).__name__}, through "
                "whose derivatives torch.export and torch.jit.trace do not see; use torch.compile, "
                "or a potential in closed form"
            )
        return super().dynamics(inputs, context, evaluations, costs)

    def _value(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        arguments: dict[str, Tensor | None] = {}
        if self.time_dependent:
            arguments["t"] = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        if self._context is not None:
            arguments["context"] = context
        value: Tensor = self.module(x, **arguments)
        what = "one value for each row; squeeze or sum the rest"
        return validation.returned("module", self.module, value, x.shape[:1], what)

    def _gradient(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        if _functional(x, context, *self.parameters()):
            slope: Tensor = torch.func.grad(lambda y: self._value(y, t, context).sum())(x)
            return slope
        with differentiation(x, context) as (point, row_context, keep_graph):
            return derivative(self._value(point, t, row_context), point, keep_graph)

    def _laplacian(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        probe = self._draw_probe(x)
        laplacian: Tensor = self._gradient_and_laplacian(x, t, context, probe=probe)[1]
        return laplacian

    def _gradient_and_laplacian(
        self,
        x: Tensor,
        t: Time | None,
        context: Tensor | None,
        probe: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if _functional(x, context, *self.parameters()):
            return self._functional_gradient_and_laplacian(x, t, context, probe)
        with differentiation(x, context) as (point, row_context, keep_graph):
            gradient = derivative(self._value(point, t, row_context), point, keep_graph=True)
            if probe is None:
                laplacian = _trace_of_jacobian(gradient, point, keep_graph)
            else:
                product = derivative((gradient * probe).sum(), point, keep_graph)
                laplacian = (product * probe).flatten(1).sum(1)
        if not keep_graph:
            gradient, laplacian = gradient.detach(), laplacian.detach()
        return gradient, laplacian

    def _functional_gradient_and_laplacian(
        self, x: Tensor, t: Time | None, context: Tensor | None, probe: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same by ``torch.func``, which nests within its own transforms and in compilers."""
        slope = torch.func.grad(lambda y: self._value(y, t, context).sum())
        gradient, pull, *_ = torch.func.vjp(slope, x)
        if probe is not None:
            return gradient, (pull(probe)[0] * probe).flatten(1).sum(1)
        size = x.shape[1:].numel()

        def second_derivative(direction: Tensor) -> Tensor:
            along = direction.view(x.shape[1:]).expand_as(x)
            second: Tensor = (pull(along)[0] * along).flatten(1).sum(1)
            return second

        directions = torch.eye(size, dtype=x.dtype, device=x.device)
        diagonal = torch.func.vmap(second_derivative, chunk_size=_CHUNK)(directions)
        return gradient, diagonal.sum(0)


def _functional(*tensors: Tensor | None) -> bool:
    return torch.compiler.is_compiling() or transformed(*tensors)


def _warn_of_unfit_layers(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        for unfit, reason in _UNFIT:
            if isinstance(layer, unfit) and getattr(layer, "p", 1) != 0:
                warnings.warn(
                    f"module: {type(module).__name__} has a layer {type(layer).__name__}"
                    f"{f' ({name})' if name else ''}, {reason}. Ignore this if x does not go "
                    "through it, but the context alone",
                    UserWarning,
                    stacklevel=3,
                )


def _trace_of_jacobian(field: Tensor, x: Tensor, keep_graph: bool) -> Tensor:
    r""":math:`\sum_i \partial f_i / \partial x_i` for each row of ``field`` (B, ...)."""
    if not field.requires_grad:
        return x.new_zeros(len(x))
    columns = field.flatten(1)
    trace = x.new_zeros(len(x))
    for first in range(0, columns.shape[1], _CHUNK):
        width = min(_CHUNK, columns.shape[1] - first)
        # direction i of the chunk asks every row for the derivative of its entry first + i
        directions = torch.eye(width, dtype=x.dtype, device=x.device)[:, None, :]
        (rows,) = torch.autograd.grad(
            columns[:, first : first + width],
            x,
            directions.expand(-1, len(x), -1),
            retain_graph=True,
            create_graph=keep_graph,
            is_grads_batched=True,
            allow_unused=True,
            materialize_grads=True,
        )
        block = rows.flatten(2)[:, :, first : first + width]
        trace = trace + torch.diagonal(block, dim1=0, dim2=2).sum(1)
    return trace
