"""What to install where an example misses a package; imported first, for what it does.

import nflows_mongeampere.examples.extras  # noqa: F401
"""

from __future__ import annotations

import sys
from types import TracebackType


def explain(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Report an error that nobody caught; of a missing package, say what to do about it."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.partition(".")[0]
        sys.stderr.write(
            f"{package}: this package is not installed; the examples and benchmarks need it. "
            'Install the extra "examples", in the root of the repository: '
            'pip install --editable ".[examples]"\n'
        )
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = explain
