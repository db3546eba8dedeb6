"""The benchmarks: their flows, data and runs, and what they refuse."""

from __future__ import annotations

import csv
import json
import math
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import typer

import architectures
import comparison_cells
import comparison_report
import defects
import densities
import flows
import peers
import speed
import speed_problem
from nflows_mongeampere import ConvolutionalPotential, MongeAmpereTransform, RidgePotential

pytestmark = pytest.mark.long

CONTINUOUS = {
    *("ridge", "moving", "stacked", "network"),
    *("zuko", "torchdyn-hutchinson", "torchdyn-exact"),
}


def square(points: int, side: float) -> tuple[torch.Tensor, float]:
    """The midpoints of a grid over [-side, side]², and the area of a cell."""
    axis = side * ((torch.arange(points) + 0.5) / points * 2 - 1)
    return torch.cartesian_prod(axis, axis), (2 * side / points) ** 2


# flows


@pytest.mark.parametrize("name", flows.FLOWS)
def test_flow_answers_the_interface(name):
    model = flows.FLOWS[name].make(2)
    x = torch.randn(7, 2)
    loss = -model.train().log_prob(x).mean()
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    model.eval()
    model.settle(x)
    with torch.no_grad():
        log_prob = model.log_prob(x)
        z = model.to_noise(x)
        back = model.to_data(z)
        samples = model.sample(5)
    assert log_prob.shape == (7,)
    assert not log_prob.requires_grad
    assert not x.requires_grad
    assert samples.shape == (5, 2)
    assert not samples.requires_grad
    torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3)
    assert (model.evaluations > 1) == (name in CONTINUOUS)


def shaken(name: str) -> flows.Model:
    """An untrained flow that is no longer its base: amplitudes start at zero."""
    model = flows.FLOWS[name].make(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.abs().max() == 0:
                parameter.normal_(std=0.02)
    model.train().log_prob(torch.randn(64, 2))  # what adapts to its first batch has done so
    return model.eval()


@pytest.mark.parametrize("name", flows.FLOWS)
def test_density_is_normalised_and_that_of_the_samples(name):
    """For samples x of q, the mean of p(x)/q(x) is the integral of p, whose own is 1."""
    model = shaken(name)
    model.settle(torch.randn(100, 2))
    with torch.no_grad():
        x = model.sample(4000)
        q = model.log_prob(x)
    low, centre, high = torch.quantile(x, torch.tensor([0.3, 0.5, 0.7]), dim=0)
    p = torch.distributions.Normal(centre, (high - low) / 2).log_prob(x).sum(1)
    weights = (p - q).exp()
    error = 5 * float(weights.std()) / math.sqrt(4000)
    assert error < 0.3
    assert float(weights.mean()) == pytest.approx(1, abs=error)


def test_hutchinson_estimates_the_exact_trace():
    """In the mean over probes, for the flows that train with it."""
    for name in ("torchdyn-hutchinson", "zuko", "network"):
        torch.manual_seed(0)
        model = flows.FLOWS[name].build(8, 8).eval()
        x = torch.randn(2, 8)
        with torch.no_grad():
            estimates = torch.stack([model.log_prob(x) for _ in range(40)])
            model.settle(x)
            exact = model.log_prob(x)
            assert torch.equal(exact, model.log_prob(x))
        error = estimates.std(0) / math.sqrt(40)
        if name != "network":  # whose potential starts at zero
            assert estimates.std(0).min() > 0
        assert ((estimates.mean(0) - exact).abs() < 5 * error + 1e-3).all(), name


# data


@pytest.mark.parametrize("name", densities.TOYS)
def test_toy_density_is_that_of_its_samples(name):
    data = densities.DATA[name](None)
    assert data.test.shape == (10_000, 2)
    assert data.test.abs().max() < 5
    x, area = square(120, 5.0)
    density = data.toy.log_prob(x).exp()
    assert float(density.sum() * area) == pytest.approx(1, abs=0.01)
    # the shares of quadrants of a shifted cross, in samples and in the density
    for sign in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        corner = torch.tensor(sign)

        def inside(points, corner=corner):
            return ((points - 0.3) * corner > 0).all(1)

        expected = float(density[inside(x)].sum() * area)
        assert float(inside(data.test).float().mean()) == pytest.approx(expected, abs=0.025)
    assert not torch.equal(data.batches(0)[0], data.batches(1)[0])
    assert torch.equal(data.batches(0)[3], data.batches(0)[3])
    assert data.batches(0)[0].shape == (256, 2)


def test_digits_are_white_and_their_volume_is_that_of_the_map():
    data = densities.DATA["digits"](None)
    batches = torch.cat([data.batches(0)[i] for i in range(12)])
    torch.testing.assert_close(torch.cov(batches.T), torch.eye(64), rtol=0, atol=0.4)
    assert data.test.shape == (360 * 5, 64)
    pictures = data.to_picture(data.test)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    # ln|dy/dx| = Σ ln(slope of the logit) - ½ ln det Σ, by autograd through the inverse
    y = data.test[0].double()
    inverse = torch.func.jacrev(lambda v: data.to_picture(v[None].float())[0].double() * 17)(y)
    expected = -torch.linalg.slogdet(inverse)[1]
    assert float(data.volume[0]) == pytest.approx(float(expected), abs=0.2)


# runs


def start(*arguments: object) -> tuple[int, str, str]:
    """The command in this process: its exit code, output and errors."""
    out, err = StringIO(), StringIO()
    command = ["architectures.py", *map(str, arguments)]
    with mock.patch.object(sys, "argv", command), redirect_stdout(out), redirect_stderr(err):
        try:
            typer.run(architectures.main)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
    return code, out.getvalue(), err.getvalue().replace("\n", " ")


SECONDS = 3  # beside other work these are a few dozen steps
CHOSEN = ["--data", "moons", "--flow", "ridge", "--flow", "realnvp", "--seeds", 1]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("architectures") / "run"
    code, out, err = start("--out", folder, *CHOSEN, "--seconds", SECONDS)
    assert code == 0, err
    assert "2 cells, 0 of them done before" in out
    return folder


def test_run_leaves_table_figures_and_pictures(run):
    assert sorted(path.name for path in (run / "architectures").iterdir()) == [
        "architectures.csv",
        "toys.png",
    ]
    assert (run / "architectures" / "toys.png").read_bytes().startswith(b"\x89PNG")
    with (run / "architectures" / "architectures.csv").open() as file:
        rows = {row["flow"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"ridge", "realnvp"}
    page = (run / "architectures.md").read_text()
    for flow, row in rows.items():
        cell = json.loads((run / "cells" / f"moons_{flow}_0.json").read_text())
        assert cell["failure"] == ""
        assert 1.55 < cell["nll"] < 10  # the entropy of the moons is 1.59
        assert float(row["nll"]) == pytest.approx(cell["nll"])
        assert f"| {flows.FLOWS[flow].title} | {cell['nll']:.3f} |" in page
        assert cell["steps"] >= 1
        assert cell["round_trip_error"] < 0.1  # trained for a moment, by the clock
        assert cell["samples_timed"] == 1000
        for key in ("step_seconds", "log_prob_seconds", "sample_seconds", "nll_se"):
            assert 0 < cell[key] < 60
        assert 0 < cell["peak_memory_mb"] < 500
        arrays = np.load(run / "cells" / f"moons_{flow}_0.npz")
        assert arrays["samples"].shape == (1000, 2)
        assert 0.2 < arrays["density"].mean() * 36 < 1.05  # of a square of area 36
    assert int(rows["ridge"]["parameters"]) == 128 * (2 + 2)
    assert int(rows["ridge"]["evaluations"]) >= 4 * 4
    assert page.index("the density of the data") < page.index("Monge-Ampère |")


def test_finished_cells_are_kept_and_missing_ones_made(run):
    kept, gone = (run / "cells" / f"moons_{flow}_0.json" for flow in ("ridge", "realnvp"))
    before = kept.stat().st_mtime_ns
    gone.unlink()
    code, out, err = start("--out", run, *CHOSEN, "--seconds", SECONDS)
    assert code == 0, err
    assert "2 cells, 1 of them done before" in out
    assert kept.stat().st_mtime_ns == before
    assert gone.exists()


def test_folder_of_other_settings_is_refused(run):
    before = (run / "architectures.md").read_text()
    code, _, err = start("--out", run, *CHOSEN, "--seconds", 2)
    assert code == 2
    assert "--out: " in err
    assert f"'seconds': {SECONDS:.1f}" in err
    assert (run / "architectures.md").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "stars"], "--data: got 'stars', expected some of moons, circles"),
        (["--flow", "glow"], "--flow: got 'glow', expected some of ridge, moving"),
        (["--seconds", "0"], "--seconds"),
        (["--seeds", "0"], "--seeds"),
        (["--data", "mnist", "--data-dir", "nowhere"], "--data-dir: there is no train-images"),
    ],
)
def test_options_are_checked(arguments, message, tmp_path):
    code, _, err = start("--out", tmp_path / "o", *arguments)
    assert code == 2
    assert message in err
    assert not (tmp_path / "o").exists()


def test_missing_packages_name_the_extra(monkeypatch):
    extra = r'pip install "nflows-mongeampere\[examples\]"'
    monkeypatch.setitem(sys.modules, "zuko.flows", None)
    with pytest.raises(ImportError, match=extra):
        flows.FLOWS["zuko"].make(2)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    for name in ("digits", "picture"):
        with pytest.raises(ImportError, match=extra):
            densities.DATA[name](None)


class Exploding(flows.Nflows):
    """A flow whose training loss is no number once it has been validated so many times."""

    def __init__(self, features: int, hidden: int, after: int) -> None:
        super().__init__(features, *flows.realnvp(features, hidden).flow._transform._transforms)
        self.after = after

    def log_prob(self, x):
        broken = self.training and torch.is_grad_enabled() and self.after <= 0
        self.after -= not self.training
        return super().log_prob(x) * (math.nan if broken else 1.0)


def refuse(features: int, hidden: int) -> flows.Model:
    raise RuntimeError("no such luck")


@pytest.mark.parametrize(
    ("build", "failure", "judged"),
    [
        (partial(Exploding, after=0), "the loss is NaN", False),
        (partial(Exploding, after=1), "the loss is NaN", True),
        (refuse, "RuntimeError: no such luck", False),
    ],
)
def test_failures_are_results(build, failure, judged, monkeypatch, tmp_path):
    """A training that explodes is judged at its best checkpoint, if it came to one."""
    monkeypatch.setitem(flows.FLOWS, "bad", flows.Architecture("Bad", build, {2: 8}, {2: 1e-3}))
    (tmp_path / "cells").mkdir()
    cell = comparison_cells.Cell("moons", "bad", 0, 0.5)
    comparison_cells.run_cell(cell, tmp_path, None)
    figures = json.loads(cell.path(tmp_path, ".json").read_text())
    assert failure in figures["failure"]
    assert math.isfinite(figures["nll"]) == judged
    assert math.isfinite(figures["validation"]) == judged
    comparison_report.report(tmp_path, None)
    assert failure in (tmp_path / "architectures.md").read_text()


def test_peers_are_timed_side_by_side(monkeypatch, tmp_path):
    few = {
        name: peers.PEERS[name] for name in (peers.OURS, "nflows RealNVP", "zuko CNF, Hutchinson")
    }
    monkeypatch.setattr(peers, "PEERS", few)
    peers.main(out=tmp_path, repeats=2, quick=True)
    page = (tmp_path / "peers.md").read_text()
    for job in ("Training step", "Log-density", "Sampling"):
        assert f"## {job}: D = 64, H = 32, batch 10" in page
    assert f"| {peers.OURS} | 2,112 | 40 |" in page
    found = json.loads((tmp_path / "results.json").read_text())
    for job in ("training step", "log-density", "sampling"):
        seconds = found[f"{job}, 64 dimensions"]["seconds"]
        assert set(seconds) == set(few)
        assert all(second > 0 for times in seconds.values() for second in times)


def test_exact_traces_are_left_out_where_they_would_take_minutes():
    wide = peers.make_models(peers.Size(784, 8))
    assert peers.OURS in wide
    assert not [name for name in wide if "exact" in name]
    narrow = peers.make_models(peers.Size(64, 8))
    assert "zuko CNF, exact trace" in narrow
    assert narrow["zuko CNF, exact trace"].flow.transform.exact


# speed


SECTIONS = {
    *("machine", "agreement", "small_flows", "one_step", "convolutions", "symmetry"),
    *("path_gradient", "networks", "training", "evaluation", "memory"),
    *("scaling_batch", "scaling_steps", "memory_steps"),
}
WANTED = {
    "D = 2, training step": "0.5",
    "D = 2, evaluation": "0.65",
    "D = 64, training step": "0.7",
    "D = 64, evaluation": "0.95",
}


def test_speed_measures_every_section(tmp_path):
    speed.main(out=tmp_path, quick=True)
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found) == SECTIONS
    page = (tmp_path / "speed.md").read_text()
    assert f"| torch | {torch.__version__} |" in page
    # everything that is timed computes the same numbers
    assert all(max(differences.values()) < 1e-5 for differences in found["agreement"].values())
    for figures in (*found["small_flows"].values(), *found["one_step"].values()):
        assert all(seconds > 0 for times in figures["seconds"].values() for seconds in times)
    # the ratio is wanted beside each measured one
    for name, wanted in WANTED.items():
        ratio = found["small_flows"][name]["ratio"]
        assert (
            f"| {ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f}) | ≤ {wanted} |"
            in page
        )
    assert found["path_gradient"]["path / whole gradient"]["wanted"] == 1.3
    assert found["training"]["wanted"] == found["evaluation"]["wanted"] == {"autograd": 5.5}
    assert found["memory"]["wanted"] == {"recompute": 15}
    assert 0 < found["convolutions"]["share of matrix products"]["median"] < 1
    for kept in (found["networks"]["saved_bytes"], found["memory"]["saved_bytes"]):
        assert 0 < kept["recompute"] < kept["autograd"] / 2
    assert found["memory"]["saved_bytes"]["autograd"] < found["memory"]["saved_bytes"]["published"]
    states = {steps: sizes["states"] for steps, sizes in found["memory_steps"]["bytes"].items()}
    saved = {steps: sizes["saved"] for steps, sizes in found["memory_steps"]["bytes"].items()}
    assert saved["16"] - saved["8"] == states["16"] - states["8"]


def test_reference_through_every_stage_has_the_gradients_by_hand():
    for potential in (RidgePotential(6, 5), ConvolutionalPotential((1, 2, 3), 2, kernel_size=3)):
        torch.nn.init.normal_(potential.double().amplitude)
        transform = MongeAmpereTransform(potential, steps=3)
        reference = speed_problem.through_every_stage(transform)
        x = torch.randn(4, 6, dtype=torch.float64)
        torch.testing.assert_close(
            *(speed_problem.gradients(way, potential, x) for way in (transform, reference))
        )
        # and comes to them by a graph of its own
        staged, by_hand = (
            speed_problem.saved_bytes(partial(speed_problem.log_density, way, x))
            for way in (reference, transform)
        )
        assert staged > by_hand


# the free estimate of the solver's error


def test_true_error_is_that_of_the_double_steps():
    layer = MongeAmpereTransform(RidgePotential(2, 8).double(), steps=4)
    torch.nn.init.normal_(layer.potential.amplitude)
    rows = torch.randn(50, 2, dtype=torch.float64)
    (look,) = defects.look_at(defects.Flow(defects.CompositeTransform([layer]), None), rows, 7)
    expected = layer.estimate_error(rows).logabsdet
    assert float(expected.max()) > 1e-5
    assert defects.rms(look.true) == pytest.approx(defects.rms(expected), rel=0.2)
    layer(rows)
    torch.testing.assert_close(look.estimated, layer.solver_error)
    figures = look.figures()
    assert figures["ratio"] == pytest.approx(figures["estimated"] / figures["true"])
    rising = torch.arange(5.0)
    assert defects.rank_correlation(rising, rising.exp()) == pytest.approx(1)
    assert defects.rank_correlation(rising, -rising) == pytest.approx(-1)


def test_defects_leave_table_figures_and_picture(tmp_path):
    defects.main(out=tmp_path, seeds=1, quick=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "defects.md",
        "defects.png",
        "results.json",
    ]
    assert (tmp_path / "defects.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found["layers"]) == {"moons, 4 rk4 steps, seed 0", "spirals, 4 × 1 rk4 step, seed 0"}
    page = (tmp_path / "defects.md").read_text()
    for name, story in found["layers"].items():
        assert story["warned_at"] is None
        for look in story["layers"]:
            cells = (name[:-8], 0, look["iteration"], look["layer"], f"{look['true']:.1e}")
            assert "| " + " | ".join(map(str, cells)) + " |" in page
    looks = [look for story in found["layers"].values() for look in story["layers"]]
    assert len(looks) == 3 * (1 + 4)
    assert {look["iteration"] for look in looks} == {6, 20, 60}


def test_warnings_of_a_training_are_noted():
    """Two Euler steps at this rate live off their error, to which nobody else listens."""
    training = defects.Training("moons", 1, 2, 0.1, 100, hidden=32, solver="euler", honest=False)
    story = defects.train(training, seed=0, rows=20)
    assert story.warned_at in (40, 60, 80, 100)
    assert "the training of _transform._transforms.0" in story.warning
    overview = defects.overview([story])
    assert overview.rows[0][-1] == str(story.warned_at)
    assert overview.notes == ["Trainings that were warned: 1 of 1 with too few."]
