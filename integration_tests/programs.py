"""Running the examples as a user does, or in this process, which saves the imports."""

import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def start(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A program of examples/ with these arguments, as a process of its own."""
    command = [sys.executable, str(EXAMPLES / program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def call(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The same in this process, for what ends soon."""
    command = [str(EXAMPLES / program), *map(str, arguments)]
    out, err, threads = StringIO(), StringIO(), torch.get_num_threads()
    with mock.patch.object(sys, "argv", command), redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_path(command[0], run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        finally:
            torch.set_num_threads(threads)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())
