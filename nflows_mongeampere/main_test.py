"""The command, as it is called."""

from __future__ import annotations

import csv
import runpy
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from nflows_mongeampere.__main__ import app
from nflows_mongeampere.sklearn import MongeAmpereDensity


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write(path, rows, header="amount,count,share"):
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


@pytest.fixture
def table(tmp_path):
    rng = np.random.default_rng(0)
    rows = zip(rng.lognormal(size=60), rng.poisson(3, 60), rng.random(60), strict=True)
    return write(tmp_path / "table.csv", rows)


def test_fit_score_and_sample(table, tmp_path):
    model, scores, new = (tmp_path / name for name in ("m.safetensors", "s.csv", "n.csv"))
    run = call("fit", table, "--out", model, "--bounds", "share=0:1", "--max-iter", 5)
    assert run.exit_code == 0, run.output
    assert "count: integers" in run.output
    assert "share: numbers, from 0, up to 1" in run.output

    assert call("score", table, "--model", model, "--out", scores).exit_code == 0
    found = list(csv.DictReader(scores.open()))
    density = MongeAmpereDensity.load(model)
    rows = np.loadtxt(table, delimiter=",", skiprows=1)
    expected = density.score_samples(rows)
    assert [int(line["line"]) for line in found] == [*range(2, 62)]
    np.testing.assert_allclose([float(line["log_density"]) for line in found], expected)

    assert call("sample", "--model", model, "--rows", 30, "--out", new).exit_code == 0
    drawn = list(csv.DictReader(new.open()))
    assert [*drawn[0]] == ["amount", "count", "share"]
    assert len(drawn) == 30
    assert all(line["count"].lstrip("-").isdigit() for line in drawn)
    assert all(0 < float(line["share"]) < 1 for line in drawn)


def test_columns_are_found_by_name(table, tmp_path):
    model = tmp_path / "m.safetensors"
    run = call("fit", table, "--out", model, "--columns", "share,amount", "--max-iter", 0)
    assert run.exit_code == 0, run.output
    rows = list(csv.DictReader(table.open()))
    expected = MongeAmpereDensity.load(model).score_samples(
        [[float(row["share"]), float(row["amount"])] for row in rows]
    )
    printed = call("score", table, "--model", model)
    lines = [line for line in printed.stdout.splitlines() if line.count(",") == 1][1:]
    np.testing.assert_allclose([float(line.split(",")[1]) for line in lines[:60]], expected)


GOOD = [[0.1 * i, i % 4, 0.01 * i] for i in range(1, 30)]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([*GOOD, [1.0, "", 0.5]], [], "line 31: no value for count"),
        ([*GOOD, [1.0, "NA", 0.5]], [], "line 31: no value for count"),
        ([*GOOD, [1.0, "red", 0.5]], [], "line 31: got 'red' for count, expected a number"),
        ([*GOOD, [1.0, 2]], [], "line 31: got 2 values, expected 3"),
        ([[a, 5, c] for a, _, c in GOOD], [], "columns count are constant"),
        (GOOD[:5], [], "minimum of 10 is required"),
        ([], [], "got no rows of numbers"),
        (GOOD, ["--columns", "size"], "there is no column 'size'"),
        (GOOD, ["--bounds", "share"], "--bounds: got 'share', expected a column and its ends"),
        (GOOD, ["--bounds", "share=0:0.1"], "for share, whose values are"),
    ],
)
def test_errors_say_what_to_do(rows, options, message, tmp_path):
    table = write(tmp_path / "table.csv", rows)
    run = call("fit", table, "--out", tmp_path / "m.safetensors", *options)
    assert run.exit_code == 2
    assert message in run.output
    assert "Traceback" not in run.output
    assert not (tmp_path / "m.safetensors").exists()


def test_rows_with_missing_values_may_be_left_out(tmp_path):
    table = write(tmp_path / "table.csv", [*GOOD, [1.0, "", 0.5]])
    run = call("fit", table, "--out", tmp_path / "m", "--drop-missing", "--max-iter", 0)
    assert "29 rows" in run.output


def test_files_that_are_not_there(tmp_path):
    run = call("score", tmp_path / "no.csv", "--model", tmp_path / "no.safetensors")
    assert run.exit_code == 2
    assert "there is no file" in run.output


def test_help_teaches(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nflows_mongeampere", "--help"])
    monkeypatch.delitem(sys.modules, "nflows_mongeampere.__main__")
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module("nflows_mongeampere", run_name="__main__")  # as python -m does
    printed = capsys.readouterr().out
    for line in ("fit table.csv --out model.safetensors", "score table.csv --model", "anomalies"):
        assert line in printed
