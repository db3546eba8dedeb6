"""Batches that are a function of their number, so that a training can be taken up anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, Sampler

from nflows_mongeampere import validation

Preparation = Callable[[Tensor, torch.Generator], Tensor]


class EndlessBatches(Dataset[Tensor]):
    """An endless row of shuffled batches, of which number k depends on the seed and k alone.

    The rows are dealt out anew in each pass over the data. Where torch.distributed runs several
    processes, each takes its part of the same batch, noise included: together they see what one
    would.

    Args:
        data: shape (N, ...), of any dtype.
        batch_size: rows of a batch, over all processes.
        seed: of the order and the noise.
        prepare: what is done to the rows of a whole batch, with a random generator for its noise:
            dequantisation, say.

    Example:
        >>> import torch
        >>> batches = EndlessBatches(torch.arange(10.0)[:, None], batch_size=4, seed=0)
        >>> batches[7].shape, torch.equal(batches[7], batches[7])
        (torch.Size([4, 1]), True)
    """

    def __init__(
        self,
        data: Tensor,
        batch_size: int,
        seed: int = 0,
        prepare: Preparation | None = None,
    ) -> None:
        if not isinstance(data, Tensor) or data.dim() == 0:
            raise TypeError(
                f"data: got {validation.describe(data)}, expected a torch.Tensor of shape (N, ...)"
            )
        self.data, self.prepare = data, prepare
        self.seed = validation.integer("seed", seed, minimum=0)
        self.batch_size = validation.integer("batch_size", batch_size)
        if self.batch_size > len(data):
            raise ValueError(
                f"batch_size: got {batch_size}, more than the {len(data)} rows of data; use a "
                "smaller batch"
            )
        self._order = lru_cache(maxsize=1)(self._shuffle)

    def __getitem__(self, number: int) -> Tensor:
        """Batch ``number``, this process's part of it."""
        epoch, place = divmod(number, len(self.data) // self.batch_size)
        rows = self._order(epoch)[place * self.batch_size :][: self.batch_size]
        batch = self.data[rows]
        if self.prepare is not None:
            batch = self.prepare(batch, _generator(self.seed, number, 1))
        return batch[self._share()]

    def _share(self) -> slice:
        """The rows that fall to this process."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return slice(None)
        rank, processes = distributed.get_rank(), distributed.get_world_size()
        if self.batch_size % processes:
            raise ValueError(
                f"batch_size: got {self.batch_size}, expected a multiple of the {processes} "
                "processes"
            )
        return slice(rank, None, processes)

    def _shuffle(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.data), generator=_generator(self.seed, epoch, 0))


class _Chapters(Sampler[int]):
    """Counts on from chapter to chapter; Lightning says which chapter it is by ``set_epoch``."""

    def __init__(self, steps: int) -> None:
        self.steps, self.chapter = steps, 0

    def set_epoch(self, epoch: int) -> None:
        self.chapter = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[int]:
        yield from range(self.chapter * self.steps, (self.chapter + 1) * self.steps)


def endless(batches: Dataset[Tensor], chapter: int) -> DataLoader[Tensor]:
    """A loader of ``batches`` 0, 1, 2, ..., in chapters after which Lightning may stop and resume.

    Args:
        batches: a map from the number of a batch to the batch.
        chapter: batches between two validations and checkpoints: what Lightning calls an epoch.
    """
    return DataLoader(
        batches, batch_size=None, sampler=_Chapters(validation.integer("chapter", chapter))
    )


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
