"""What the paths of a batch cost, recorded while it goes through a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor


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


# The open with blocks: what they record, and of which flows.
_open: list[tuple[TransportCosts, Sequence[object]]] = []


@contextmanager
def recording(flows: Sequence[object]) -> Iterator[TransportCosts]:
    """Record the costs of the batches that go through some flows; blocks may be nested."""
    record = TransportCosts(), flows
    _open.append(record)
    try:
        yield record[0]
    finally:
        _open.remove(record)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Within it no costs are recorded."""
    paused = _open[:]
    _open.clear()
    try:
        yield
    finally:
        _open.extend(paused)


def recorders_of(transport: object) -> list[TransportCosts]:
    """What records the costs of a flow now; a copy of a flow is another one."""
    return [costs for costs, flows in _open if any(flow is transport for flow in flows)]
