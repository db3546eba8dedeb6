"""The peak memory of one training step, measured in a process of its own.

Called by ``measure_peak`` as ``python peak_memory.py VARIANT SIZE``, with the size as JSON.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from speed_problem import Problem, Size


def measure_peak(variant: str, size: Size, *, unfragmented: bool = False) -> int:
    """The bytes that the first training step of a fresh process adds to its peak memory.

    Args:
        variant: one of those of ``Problem``.
        size: the size of the problem.
        unfragmented: let the C library return each freed block to the system at once (glibc only),
            so that the peak is that of the memory in use, without holes between what is kept.
    """
    command = [sys.executable, __file__, variant, json.dumps(asdict(size))]
    setting = {"MALLOC_MMAP_THRESHOLD_": "65536"} if unfragmented else {}
    process = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, **setting}
    )
    if process.returncode != 0:
        raise RuntimeError(
            f"the process that measures the memory of {variant!r} ended with code "
            f"{process.returncode} (-9: killed, most likely for lack of memory)\n{process.stderr}"
        )
    return int(process.stdout)


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


def _main(variant: str, size: str) -> None:
    problem = Problem(Size(**json.loads(size)))
    before = _peak_resident_bytes()
    problem.train(variant)
    print(_peak_resident_bytes() - before)


if __name__ == "__main__":
    _main(*sys.argv[1:])
