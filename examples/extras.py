"""What to install where an example misses a package; imported first, for what it does.

import extras  # noqa: F401
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[1]


def explain(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Report an error that nobody caught; of a missing package, say what to do about it."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.partition(".")[0]
        print(
            f"{package}: this package is not installed; the examples and benchmarks need it. "
            f'Install the extra "examples": pip install "{ROOT}[examples]"',
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = explain
