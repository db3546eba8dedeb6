"""Timings that can be compared on a machine whose speed drifts: interleaved, round by round."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Item = TypeVar("Item")


class Track(Protocol):
    """Hands on the items of a sequence, and shows a progress bar meanwhile."""

    def __call__(self, items: Sequence[Item], /) -> Iterator[Item]:
        """Iterate over ``items``."""


@dataclass(frozen=True)
class Spread:
    """The median of a few figures, and the smallest and largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: list[float]) -> Spread:
        """The spread of ``figures``."""
        return cls(statistics.median(figures), min(figures), max(figures))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Timings:
    """Seconds for each candidate, one entry for each round."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """The median time of a candidate."""
        return statistics.median(self.seconds[name])

    def ratio(self, numerator: str, denominator: str) -> Spread:
        """The ratio of two candidates' times within the same round."""
        pairs = zip(self.seconds[numerator], self.seconds[denominator], strict=True)
        return Spread.of([above / below for above, below in pairs])


def interleave(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int, track: Track
) -> Timings:
    """Time candidates in turns (A B C, A B C, ...), after one untimed call of each.

    Args:
        candidates: what to time.
        rounds: how often.
        track: shows a progress bar over the calls.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    turns = itertools.product(range(rounds + 1), candidates.items())
    for turn, (name, call) in track(list(turns)):
        start = time.perf_counter()
        call()
        if turn > 0:
            seconds[name].append(time.perf_counter() - start)
    return Timings(seconds)


@contextmanager
def progress_bars(console: Console) -> Iterator[tuple[Progress, Track]]:
    """Two bars, one above the other: for the parts of a benchmark, and for the calls of a part.

    Yields:
        The upper bar, whose ``track`` goes through the parts, and the lower one.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    # a lively bar would compete with what is timed
    with Progress(
        *columns, TimeElapsedColumn(), console=console, refresh_per_second=1, transient=True
    ) as progress:

        def track(items: Sequence[Item]) -> Iterator[Item]:
            task = progress.add_task("calls", total=len(items))
            yield from progress.track(items, task_id=task)
            progress.remove_task(task)

        yield progress, track
