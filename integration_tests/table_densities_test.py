"""The examples of tables and of flow matching run to the end and write what they promise."""

import json

import numpy as np
import pytest

from nflows_mongeampere.sklearn import MongeAmpereDensity
from programs import call, start

pytestmark = pytest.mark.long


def test_table_finds_wrong_orders(tmp_path):
    done = start("table.py", "--rows", 300, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    models = json.loads((tmp_path / "results.json").read_text())["models"]
    assert len(models) == 3
    ours = models["MongeAmpereDensity"]
    assert ours["log_likelihood"] > models["KernelDensity, CV"]["log_likelihood"]
    assert ours["average_precision"] > 0.1  # 0.03 is chance
    for name in ("anomalies.png", "corner.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    density = MongeAmpereDensity.load(tmp_path / "model.safetensors")
    rows = np.loadtxt(tmp_path / "orders.csv", delimiter=",", skiprows=1)
    assert np.isfinite(density.score_samples(rows)).all()


def test_benchmark_of_tables_is_taken_up_again(tmp_path):
    options = ("--table", "wine", "--rows", 60, "--out", tmp_path)
    done = start("benchmarks/table_densities.py", *options, "--splits", 1, "--first", 7)
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "results.json").read_text())["tables"]["wine"]
    assert first["shape"] == [60, 13]
    assert [*first["splits"]] == ["7"]
    scores = {name: found["score"] for name, found in first["splits"]["7"].items()}
    for name in ("Monge-Ampère", "kernel density, CV"):
        assert -40 < scores[name] < -5
    # normals through single rows win by BIC where there are 48 rows of 13 columns
    assert scores["Gaussian mixture, BIC"] < -5
    again = call("benchmarks/table_densities.py", *options, "--splits", 2, "--first", 7)
    assert again.returncode == 0, again.stderr
    both = json.loads((tmp_path / "results.json").read_text())["tables"]["wine"]
    assert both["splits"]["7"] == first["splits"]["7"]  # seconds included: it was not run again
    assert [*both["splits"]] == ["7", "8"]
    ours, mixture = (
        [run[name]["score"] for run in both["splits"].values()]
        for name in ("Monge-Ampère", "kernel density, CV")
    )
    line = (tmp_path / "tables.md").read_text().splitlines()[-1].strip("| ").split(" | ")
    differences = np.subtract(ours, mixture)
    error = differences.std(ddof=1) / 2**0.5
    assert line[2] == f"{differences.mean():.2f} ± {error:.2f}"
    wrong = call("benchmarks/table_densities.py", "--table", "iris", "--out", tmp_path)
    assert wrong.returncode == 2
    assert "--table: got iris" in wrong.stderr


def test_flow_matching_beside_likelihood(tmp_path):
    done = call("flow_matching.py", "--seconds", 1, "--seeds", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert len(results) == 4
    for runs in results.values():
        assert 1.5 < runs[0]["nll"] < 2.9  # the entropy of the moons; a standard normal has 2.84
        assert runs[0]["solver_error"] < 0.01
    assert (tmp_path / "flow_matching.png").read_bytes().startswith(b"\x89PNG")


def test_pipeline_swap_chooses_a_rate_for_each(tmp_path):
    done = start("benchmarks/pipeline_swap.py", "--seeds", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert {*found["rates"]} == {*found["runs"]} == {"RealNVP", "Monge-Ampère"}
    for (run_,) in found["runs"].values():
        assert 1.5 < run_["nll"] < 3.5  # a Gaussian has 3.86
