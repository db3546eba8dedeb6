import sys
from pathlib import Path

import pytest

from nflows_mongeampere.examples.runs import command


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], ""),
        (["--length", "4", "--between", "1.6", "3.6"], " --length 4 --between 1.6 3.6"),
        (["--out", "here", "--steps", "3", "--data-dir=there"], " --steps 3"),
        (["--overwrite", "--no-path-gradient"], " --no-path-gradient"),
        (["--title", "two words"], " --title 'two words'"),
    ],
)
def test_the_command_leaves_out_what_names_folders(given, expected, monkeypatch):
    program = str(Path("examples") / "benchmarks" / "speed.py")
    monkeypatch.setattr(sys, "argv", [program, *given])
    assert command() == "python examples/benchmarks/speed.py" + expected
