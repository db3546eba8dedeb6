import sys
from pathlib import Path

import pytest
import torch

from nflows_mongeampere.examples.runs import command, fast_bfloat16, open_folder, write_json


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


def test_overwriting_a_run_leaves_no_checkpoint_to_go_on_from(tmp_path):
    open_folder(tmp_path, {"seed": 0}, overwrite=False)
    (tmp_path / "8x8").mkdir()
    for name in ("last.ckpt", "8x8/last.ckpt", "8x8/best.ckpt"):
        (tmp_path / name).write_text("weights")
    write_json(tmp_path / "results.json", {})
    open_folder(tmp_path, {"seed": 1}, overwrite=True)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["config.json"]


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx2": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": True}, True),
        ({"neon": True}, False),
    ],
)
def test_bfloat16_is_for_processors_that_have_it(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert fast_bfloat16() is expected


def test_without_word_of_the_processor_bfloat16_is_left_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not fast_bfloat16()
