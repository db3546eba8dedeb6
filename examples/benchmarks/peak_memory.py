"""The peak memory of one training step, measured in a process of its own.

Called by ``measure_peak`` as ``python peak_memory.py VARIANT SIZE``, with the size as JSON.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from speed_problem import Problem, Size


@dataclass(frozen=True)
class Peak:
    """What a training step adds to the peak memory of its process, in bytes.

    Attributes:
        first: as the first step of the process, with all that libraries load at first use.
        later: as the second one.
    """

    first: int
    later: int


def measure_peak(variant: str, size: Size) -> Peak:
    """The memory of a training step, in a fresh process."""
    command = [sys.executable, __file__, variant, json.dumps(asdict(size))]
    process = subprocess.run(command, check=False, capture_output=True, text=True)
    if process.returncode != 0:
        raise RuntimeError(
            f"the process that measures the memory of {variant!r} ended with code "
            f"{process.returncode} (-9: killed, most likely for lack of memory)\n{process.stderr}"
        )
    return Peak(**json.loads(process.stdout))


def _peak_resident_bytes() -> int:
    """The peak resident memory of this process since it was started."""
    status = Path("/proc/self/status")
    if status.exists():
        # on Linux ru_maxrss starts from the peak of the parent; this field does not
        match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if match:
            return int(match[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_peak() -> None:
    """Let the peak start again from the memory in use, where the system can do that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _growth_of_peak(variant: str, problem: Problem) -> int:
    _reset_peak()
    before = _peak_resident_bytes()
    problem.train(variant)
    return _peak_resident_bytes() - before


def _main(variant: str, size: str) -> None:
    problem = Problem(Size(**json.loads(size)))
    first = _growth_of_peak(variant, problem)
    later = _growth_of_peak(variant, problem)
    print(json.dumps(asdict(Peak(first, later))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
