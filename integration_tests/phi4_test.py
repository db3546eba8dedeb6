"""The φ⁴ example: hybrid Monte Carlo against quadrature, runs, what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import phi4
from nflows_mongeampere.examples.hybrid_monte_carlo import HybridMonteCarlo, flip_clusters
from nflows_mongeampere.targets import Phi4
from programs import call, start

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "phi4"
    done = start("phi4.py", "--length", 6, "--steps", 200, "--samples", 4000, "--out", out)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout[: done.stdout.rindex("}") + 1])["length"] == 6
    return out


def test_a_run_agrees_with_hybrid_monte_carlo(run):
    results = json.loads((run / "results.json").read_text())
    assert results["lambda"] == 6.975
    assert results["ess"] > 0.7  # the published flow accepts 79 % after 500 steps
    assert results["acceptance"] > 0.7
    assert results["free_energy"] > results["free_energy_corrected"]
    error = results["free_energy_corrected_se"]
    change = results["free_energy_corrected_double_steps"] - results["free_energy_corrected"]
    assert abs(change) < error / 3
    for name in ("magnetisation", "susceptibility"):
        (value, bar), (known, known_bar) = results[name], results[f"{name}_monte_carlo"]
        assert abs(value - known) < 4 * math.hypot(bar, known_bar)
        assert abs(results[f"{name}_double_steps"] - value) < bar
    assert len(results["two_point"]) == 4
    pairs = zip(results["two_point"], results["two_point_monte_carlo"], strict=True)
    for (value, bar), (known, known_bar) in pairs:
        assert abs(value - known) < 4.5 * math.hypot(bar, known_bar)
    command = "python examples/phi4.py --length 6 --steps 200 --samples 4000"
    assert results["command"] == command
    names = {path.name for path in run.iterdir()}
    figures = {"learning.png", "samples.png", "two_point.png"}
    assert names == figures | {
        *("best.ckpt", "last.ckpt", "config.json", "metrics.csv", "results.json")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", 1], "--length"),
        (["--length", 9], "expected a coupling for L = 9"),
        (["--lambda", -1], "error: coupling: got -1.0"),
        (["--minutes", -1], "--minutes"),
    ],
)
def test_nonsense_is_refused(arguments, message, tmp_path):
    refused = call("phi4.py", *arguments, "--out", tmp_path / "run")
    assert refused.returncode == 2
    assert message in refused.stderr
    assert not (tmp_path / "run").exists()


def test_observables_are_their_definitions():
    x = torch.randn(3, 16)
    found = phi4.observables(x, 4)
    rows = x.view(3, 4, 4)
    expected = torch.zeros(3)
    for a in range(4):
        for b in range(4):
            right, below = rows[:, a, (b + 1) % 4], rows[:, (a + 1) % 4, b]
            expected += rows[:, a, b] * (right + below) / 32
    torch.testing.assert_close(found[:, 3], expected)
    torch.testing.assert_close(found[:, 2], x.square().mean(1))
    torch.testing.assert_close(found[:, 0], x.mean(1).abs())
    torch.testing.assert_close(found[:, 1], x.sum(1).square() / 16)


@pytest.mark.parametrize("between", [None, flip_clusters])
def test_hybrid_monte_carlo_is_the_integral_over_four_sites(between):
    target = Phi4(2, -4.0, 6.975)
    grid = torch.linspace(-2, 2, 33, dtype=torch.float64)
    x = torch.cartesian_prod(grid, grid, grid, grid)
    exact = target.log_prob(x).softmax(0) @ phi4.observables(x, 2)
    for estimate, value in zip(
        HybridMonteCarlo(target, chains=100, warm_up=100, between=between).measure(
            lambda phi: phi4.observables(phi, 2), trajectories=200
        ),
        exact.tolist(),
        strict=True,
    ):
        assert abs(estimate.value - value) < 4 * estimate.error
        assert estimate.error < 0.02


def test_a_short_hybrid_monte_carlo_agrees_with_a_long_one():
    """At L = 6, without clusters, against six times as long by other chains, with them."""
    target = Phi4(6, -4.0, 6.975)

    def observed(phi: Tensor) -> Tensor:
        return phi4.observables(phi, 6)

    short = HybridMonteCarlo(target, chains=100).measure(observed, 100)
    long = HybridMonteCarlo(target, seed=1, between=flip_clusters).measure(observed, 300)
    for few, many in zip(short, long, strict=True):
        assert abs(few.value - many.value) < 4.5 * math.hypot(few.error, many.error)
        assert many.error < few.error
