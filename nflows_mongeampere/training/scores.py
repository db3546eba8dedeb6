"""Samples of a flow with the slope of their log-density, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from nflows.transforms import CompositeTransform, InverseTransform
from torch import Tensor, nn

from nflows_mongeampere.transport import Transport
from nflows_mongeampere.variational import rows_for


class Scored(NamedTuple):
    r"""Samples, the log-density :math:`\ln q(x)` and its slope :math:`\nabla \ln q(x)`.

    Attributes:
        x: with the graph of the way that they came, shape (N, ...).
        log_prob: shape (N,), without a graph.
        score: in the shape of ``x``, without a graph.
    """

    x: Tensor
    log_prob: Tensor
    score: Tensor


def sample_with_score(flow: Any, num_samples: int, context: Tensor | None = None) -> Scored | None:
    r"""Samples with their score, in one solve for each Monge-Ampère flow.

    A Monge-Ampère flow carries the score along its path
    (:class:`~nflows_mongeampere.dynamics.ScoredDynamics`). Through any other layer
    :math:`x = g(z)` it goes by the derivative of its inverse,
    :math:`\nabla \ln q(x) = J_{g^{-1}}^T \nabla \ln q(z) + \nabla \ln|\det J_{g^{-1}}|`.

    Args:
        flow: a flow of nflows, or an unconditional model of normflows.
        num_samples: N, for each row of context where there is one.
        context: what the flow is conditioned on, shape (C, ...), or None.

    Returns:
        The samples, or None where some Monge-Ampère flow cannot carry the score.
    """
    layers = [*layers_towards_data(flow)]
    if not all(layer.carries_score for layer, _ in layers if isinstance(layer, Transport)):
        return None
    if context is None:
        base = flow._distribution if hasattr(flow, "_distribution") else flow.q0
        z = base.sample(num_samples) if hasattr(flow, "_distribution") else base(num_samples)[0]
        state = _start(base, z)
    elif hasattr(flow, "_embedding_net"):
        embedded = flow._embedding_net(context)
        context = rows_for(embedded, len(embedded) * num_samples)
        z = flow._distribution.sample(num_samples, context=embedded).flatten(0, 1)
        state = _start(flow._distribution, z, context)
    else:
        return None
    for layer, forward in layers:
        state = _carry(layer, forward, state, context)
    return state


def _start(base: Any, z: Tensor, *context: Tensor) -> Scored:
    """Samples of the base distribution, with their log-density and score."""
    point = z.detach().requires_grad_()
    log_prob = base.log_prob(point, *context)
    (score,) = torch.autograd.grad(log_prob.sum(), point)
    return Scored(z, log_prob.detach(), score)


def layers_towards_data(flow: Any) -> Iterator[tuple[nn.Module, bool]]:
    """The layers from noise to data, and whether each is taken by its ``forward``."""
    if hasattr(flow, "_transform"):
        yield from _parts(flow._transform, forward=False)
    else:
        for layer in flow.flows:
            yield from _parts(layer, forward=True)


def _parts(layer: Any, forward: bool) -> Iterator[tuple[nn.Module, bool]]:
    """The layers of a composite one."""
    if isinstance(layer, InverseTransform):
        yield from _parts(layer._transform, not forward)
    elif isinstance(layer, CompositeTransform):
        for part in layer._transforms if forward else reversed(layer._transforms):
            yield from _parts(part, forward)
    else:
        yield layer, forward


def _carry(layer: Any, forward: bool, state: Scored, context: Tensor | None) -> Scored:
    x, log_prob, score = state
    if isinstance(layer, Transport):
        to_data = forward == layer._forward_to_data
        outputs, logabsdet, score = layer.carry_score(x, score, context, to_data)
    else:
        ahead, back = layer.forward, layer.inverse
        if not forward:
            ahead, back = back, ahead
        given = [] if context is None else [context]
        outputs, logabsdet = ahead(x, *given)
        point = outputs.detach().requires_grad_()
        origin, logabsdet_back = back(point, *given)
        along = (origin * score).sum() + logabsdet_back.sum()
        (score,) = torch.autograd.grad(along, point)
    return Scored(outputs, log_prob - logabsdet.detach(), score)
