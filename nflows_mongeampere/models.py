"""The Monge-Ampère flows within a model, all at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from nflows_mongeampere import validation
from nflows_mongeampere.costs import TransportCosts, recording
from nflows_mongeampere.transport import Transport


def transports(model: nn.Module) -> list[Transport]:
    """Every Monge-Ampère flow in ``model``, of either adapter."""
    validation.kind("model", model, isinstance(model, nn.Module), "a torch.nn.Module")
    return [module for module in model.modules() if isinstance(module, Transport)]


@contextmanager
def refined(model: nn.Module, factor: int = 2) -> Iterator[None]:
    """Evaluate every Monge-Ampère flow in ``model`` with more steps, for a while.

    Trust a number only if more steps leave it unchanged.

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
        >>> _ = torch.nn.init.normal_(flow.transform.potential.amplitude)
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


@contextmanager
def transport_costs(model: nn.Module) -> Iterator[TransportCosts]:
    """Record the costs of transport of every Monge-Ampère flow in ``model``.

    In reduced coordinates they cost no further matrix product. Penalties on them keep a flow easy
    to integrate. Blocks may be nested: each records for itself.

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
    with recording(flows) as costs:
        yield costs
