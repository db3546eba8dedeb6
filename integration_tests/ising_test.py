"""The Ising example: its parts against enumeration, its runs, what it refuses."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from torch.utils.data import DataLoader

import ising_monte_carlo
from nflows_mongeampere.lattices import LatticeFlow
from nflows_mongeampere.targets import Ising
from nflows_mongeampere.training import (
    EndlessBatches,
    ReverseKL,
    SolverGuard,
    endless,
    fit,
    restore,
)
from programs import call, start

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "ising"
    done = start("ising.py", "--length", 4, "--steps", 600, "--samples", 2000, "--out", out)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout[: done.stdout.rindex("}") + 1])["length"] == 4
    return out


def test_a_run_leaves_results_that_the_exact_solution_bears_out(run):
    results = json.loads((run / "results.json").read_text())
    target = Ising(4)
    assert results["exact"] == target.free_energy
    assert results["gap"] == pytest.approx(results["free_energy"] - target.free_energy)
    assert 0 < results["gap"] < 0.1
    assert abs(results["free_energy"] - results["free_energy_double_steps"]) < 1e-4
    assert results["ess"] > 0.03
    error = results["free_energy_corrected_se"]
    assert results["free_energy_corrected"] == pytest.approx(target.free_energy, abs=4 * error)
    for name in ("energy", "structure"):
        (value, bar), (known, known_bar) = results[name], results[f"{name}_monte_carlo"]
        assert abs(value - known) < 4 * math.hypot(bar, known_bar)
    assert 0 < results["acceptance"] < 1
    assert results["autocorrelation_time"] >= 1
    assert results["command"] == "python examples/ising.py --length 4 --steps 600 --samples 2000"


def test_a_run_leaves_figures_metrics_and_checkpoints(run):
    names = {path.name for path in run.iterdir()}
    figures = {"learning.png", "path.png", "samples.png", "structure.png"}
    files = {"best.ckpt", "last.ckpt", "config.json", "metrics.csv", "results.json"}
    assert names == figures | files
    with (run / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(50, 601, 50))


def test_a_finished_run_is_not_overwritten_unasked(run):
    before = (run / "results.json").read_text()
    again = call("ising.py", "--length", 4, "--steps", 600, "--samples", 2000, "--out", run)
    assert again.returncode == 2
    assert "error: --out:" in again.stderr
    assert (run / "results.json").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", 1], "--length"),
        (["--temperature", 0], "error: temperature: got 0.0"),
        (["--minutes", -1], "--minutes"),
        (["--samples", 3], "--samples"),
    ],
)
def test_nonsense_is_refused(arguments, message, tmp_path):
    refused = call("ising.py", *arguments, "--out", tmp_path / "run")
    assert refused.returncode == 2
    assert message in refused.stderr
    assert not (tmp_path / "run").exists()


VARIANTS = [
    Ising(4),
    Ising(4, 2.0, couplings=(-1.0, -0.5), field=0.3),
    Ising(4, 3.0, couplings=(1.0, 0.5), field=0.5),
    Ising(4, 2.0, "open", couplings=(1.0, 0.5)),
]


@pytest.mark.parametrize("target", VARIANTS, ids=str)
def test_cluster_monte_carlo_against_enumeration(target):
    rows = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=16))).view(-1, 4, 4)
    energy = target.spin_energy(rows)
    probability = (-16 * energy.double() / target.temperature).softmax(0)
    power = (torch.fft.fft2(rows).abs().square() / 16).double()
    structure = (probability[:, None, None] * power).sum(0)
    known = ising_monte_carlo.reference(target, sweeps=20_000, seed=0)
    assert known.energy.value == pytest.approx(
        float(probability @ energy.double()), abs=4 * known.energy.error
    )
    assert known.energy.error < 0.01
    value, error = known.structure
    assert ((value - structure).abs() < 4.5 * error).all()


def test_one_flow_for_a_range_of_temperatures(tmp_path):
    arguments = "--length 4 --between 2 3.5 --steps 150 --pieces 3 --degree 3 --count 3"
    folder = ("--samples", 2000, "--out", tmp_path / "range")
    done = call("ising_temperatures.py", *arguments.split(), *folder)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "range" / "results.json").read_text())
    assert (tmp_path / "range" / "curves.png").exists()
    assert results["command"] == (
        "python examples/ising_temperatures.py --length 4 --between 2 3.5 --steps 150 "
        "--pieces 3 --degree 3 --count 3 --samples 2000"
    )
    points = results["points"]
    assert [point["temperature"] for point in points] == [2.0, 2.75, 3.5]
    for point in points:
        assert point["ess"] > 0.4
        for name in ("free_energy", "energy", "specific_heat"):
            value, error = point[name]
            assert abs(value - point[f"{name}_exact"]) < 4 * error
        known, known_error = point["magnetisation_monte_carlo"]
        value, error = point["magnetisation"]
        assert abs(value - known) < 4 * math.hypot(error, known_error)


def test_the_guard_catches_a_solver_that_is_too_coarse(tmp_path):
    """One Euler step: without the guard the free energy falls below the exact one."""
    target, gaps = Ising(4), {}
    for guarded in (False, True):
        torch.manual_seed(0)
        flow = LatticeFlow.towards(target, pieces=2, kernels=1, solver="euler")
        objective = ReverseKL(
            flow,
            target,
            num_samples=64,
            learning_rate=0.05,
            steps=200,
        )
        ticks = torch.zeros(64, 1)
        batches = endless(EndlessBatches(ticks, 64), 20)
        checks = DataLoader(ticks[:2], batch_size=1)
        callbacks = [SolverGuard(0.05, most=1024)] if guarded else []
        history = fit(objective, batches, checks, tmp_path / str(guarded), callbacks=callbacks)
        restore(objective, tmp_path / str(guarded) / "last.ckpt")
        gaps[guarded] = history.rows[-1]["train"] / 16 - target.free_energy
        steps = [row["solver_steps"] for row in history.rows]
    assert gaps[False] < -0.02  # what cannot be
    assert gaps[True] > -0.02
    assert steps[-1] > steps[0]


def tabulate(*folders: Path, out: Path) -> CompletedProcess[str]:
    return call("benchmarks/ising_table.py", *folders, "--out", out)


def test_the_table_holds_finished_runs(run, tmp_path):
    done = tabulate(run, out=tmp_path / "table")
    assert done.returncode == 0, done.stderr
    results = json.loads((run / "results.json").read_text())
    heading, _, row = done.stdout.splitlines()
    cells = dict(zip(heading.split(" | "), row.split(" | "), strict=True))
    assert float(cells["gap"]) == pytest.approx(results["gap"], abs=1e-5)
    assert cells["steps"] == "600"
    name = f"4-{results['minutes']:.0f}min-seed0"
    figures = {"learning.png", "path.png", "samples.png", "structure.png"}
    names = {path.name for path in (tmp_path / "table").iterdir()}
    assert names == figures | {f"{name}.json", f"{name}.csv"}


def test_an_unfinished_run_has_no_line(tmp_path):
    done = tabulate(tmp_path, out=tmp_path / "table")
    assert done.returncode == 2
    assert "holds no results.json" in done.stderr
    assert not (tmp_path / "table").exists()


def test_an_antiferromagnet_in_a_field(tmp_path):
    variant = ["--couplings", -1, -0.5, "--field", 0.3, "--temperature", 2.0]
    done = call(
        "ising.py", "--length", 4, *variant, "--steps", 200, "--samples", 2000, "--out", tmp_path
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    target = Ising(4, 2.0, couplings=(-1.0, -0.5), field=0.3)
    assert results["exact"] == target.free_energy
    value, error = results["spins"]["free_energy"]
    assert value == pytest.approx(target.spin_free_energy, abs=4 * error)
    (value, error), (known, known_error) = (
        results["spins"][name] for name in ("magnetisation", "magnetisation_monte_carlo")
    )
    assert abs(value - known) < 4 * math.hypot(error, known_error)
    assert " --couplings -1 -0.5 --field 0.3 --temperature 2.0" in results["command"]
