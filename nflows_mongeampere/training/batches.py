"""Batches that are a function of their number, so that a training can be taken up anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from nflows_mongeampere import validation

# a batch is a tensor, or a tuple of tensors with as many rows
Preparation = Callable[[Any, torch.Generator], Any]


class EndlessBatches(Dataset[Any]):
    """An endless sequence of shuffled batches, of which number k depends on the seed and k alone.

    The rows are shuffled anew in each pass over the data; rows left over at the end of a pass are
    dropped. Where torch.distributed runs several processes, each takes its part of the same batch,
    noise included: together they see what one would.

    Args:
        data: shape (N, ...), of any dtype; or several such tensors of as many rows, of which a
            batch is a tuple: data and context, say.
        batch_size: rows of a batch, over all processes.
        seed: of the order and the noise.
        prepare: what is done to a whole batch, with a random generator for its noise:
            dequantisation, say. Where the batches go to spawned workers it has to be picklable, a
            function of a module.

    Raises:
        TypeError: if ``data`` is no tensor and no sequence of tensors.
        ValueError: if the tensors differ in their rows, or have fewer than ``batch_size``.

    Example:
        >>> import torch
        >>> batches = EndlessBatches(torch.arange(10.0)[:, None], batch_size=4, seed=0)
        >>> batches[7].shape, torch.equal(batches[7], batches[7])
        (torch.Size([4, 1]), True)
    """

    def __init__(
        self,
        data: Tensor | Sequence[Tensor],
        batch_size: int,
        seed: int = 0,
        prepare: Preparation | None = None,
    ) -> None:
        several = isinstance(data, (list, tuple)) and len(data) > 0
        self.data = tuple(data) if several else (data,)
        for part in self.data:
            expected = "a torch.Tensor of shape (N, ...), or several with as many rows"
            validation.kind("data", part, isinstance(part, Tensor) and part.dim() > 0, expected)
        counts = [len(part) for part in self.data]
        if len(set(counts)) > 1:
            raise ValueError(f"data: got tensors of {counts} rows, expected as many in each")
        self.prepare, self._several, self._rows = prepare, several, counts[0]
        self.seed = validation.integer("seed", seed, minimum=0)
        self.batch_size = validation.integer("batch_size", batch_size)
        if self.batch_size > self._rows:
            raise ValueError(
                f"batch_size: got {batch_size}, more than the {self._rows} rows of data; use a "
                "smaller batch"
            )
        self._order: tuple[int, Tensor] | None = None  # of the last pass
        self._process = (0, 1)

    def __getitem__(self, number: int) -> Any:
        """Batch ``number``, this process's part of it."""
        number_of_pass, place = divmod(number, self._rows // self.batch_size)
        rows = self._shuffled(number_of_pass)[place * self.batch_size :][: self.batch_size]
        batch: Any = tuple(part[rows] for part in self.data)
        batch = batch if self._several else batch[0]
        if self.prepare is not None:
            batch = self.prepare(batch, _generator(self.seed, number, 1))
        share = self._share()
        return batch[share] if isinstance(batch, Tensor) else tuple(part[share] for part in batch)

    def __getstate__(self) -> dict[str, Any]:
        """What goes to a spawned worker, in which torch.distributed does not run."""
        return {**vars(self), "_order": None, "_process": _process()}

    def _share(self) -> slice:
        """The rows that fall to this process."""
        spawned = get_worker_info() is not None and _process() == (0, 1)
        rank, processes = self._process if spawned else _process()
        if self.batch_size % processes:
            raise ValueError(
                f"batch_size: got {self.batch_size}, expected a multiple of the {processes} "
                "processes"
            )
        return slice(rank, None, processes)

    def _shuffled(self, number_of_pass: int) -> Tensor:
        """The order of the rows in a pass."""
        if self._order is None or self._order[0] != number_of_pass:
            generator = _generator(self.seed, number_of_pass, 0)
            self._order = number_of_pass, torch.randperm(self._rows, generator=generator)
        return self._order[1]


class ValidationIntervals(Sampler[int]):
    """Counts on from interval to interval; Lightning gives their number by ``set_epoch``."""

    def __init__(self, batches: int) -> None:
        self.batches, self.number, self.skipped = batches, 0, 0
        self._resumed: int | None = None

    def resume(self, batches: int) -> None:
        """Begin the next interval after so many batches, also where the last one ended early."""
        self._resumed = batches

    def set_epoch(self, epoch: int) -> None:
        if self._resumed is not None:
            self.skipped, self._resumed = epoch * self.batches - self._resumed, None
        self.number = epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[int]:
        first = self.number * self.batches - self.skipped
        yield from range(first, first + self.batches)


def endless(batches: Dataset[Any], interval: int, **loader: Any) -> DataLoader[Any]:
    """A loader of ``batches`` 0, 1, 2, ..., in validation intervals.

    Args:
        batches: a map from the number of a batch to the batch.
        interval: batches between two validations, with their checkpoints: what Lightning calls an
            epoch.
        **loader: keywords of :class:`torch.utils.data.DataLoader`: ``num_workers``, say.
    """
    sampler = ValidationIntervals(validation.integer("interval", interval))
    return DataLoader(batches, batch_size=None, sampler=sampler, **loader)


def _process() -> tuple[int, int]:
    """The rank of this process, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _generator(*numbers: int) -> torch.Generator:
    """A random generator for a purpose that some numbers name, unlike those of other numbers."""
    return torch.Generator().manual_seed(mix(*numbers))


def mix(*numbers: int) -> int:
    """A seed in which every number counts (the FNV hash, in 64 bits)."""
    state = 0xCBF29CE484222325
    for number in numbers:
        for byte in int(number).to_bytes(8, "little", signed=True):
            state = ((state ^ byte) * 0x100000001B3) % 2**64
    return state - 2**63
