"""The benchmarks: their flows, data and runs, and what they refuse."""

from __future__ import annotations

import csv
import json
import math
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import typer
from rich.console import Console

import architectures
import comparison_cells
import comparison_rates
import comparison_report
import defects
import densities
import flows
import peers
import speed
import speed_problem
import tables
from nflows_mongeampere import (
    AutogradPotential,
    ConvolutionalPotential,
    MongeAmpereTransform,
    RidgePotential,
)
from nflows_mongeampere.models import transports
from nflows_mongeampere.potentials import Potential
from ot_flow import OTFlowPotential

pytestmark = pytest.mark.long

CONTINUOUS = {
    *("ridge", "moving", "stacked", "deep", "coupling", "network", "ot-flow"),
    *("torchflows", "zuko", "torchdyn-hutchinson", "torchdyn-exact"),
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
    model.train().training_loss(x).backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    model.eval()
    model.settle(x)
    for transport in transports(model):  # settled for densities, which need fewer than a round trip
        transport.steps *= 4
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
        if isinstance(model, flows.OTFlow):  # which starts far from it
            for parameter in (model.potential.outer, model.potential.root):
                parameter.mul_(0.1)
        if isinstance(model, flows.Torchflows):  # the same; unequal weights, see its docstring
            potential = model.flow.f.time_deriv
            potential.w.copy_(0.1 * torch.rand_like(potential.w))
            potential.A.mul_(0.1)
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


def test_torchflows_keeps_another_divergence_than_that_of_its_velocity():
    """Why it is judged by one of our own; where this fails, theirs can be had again."""
    model = shaken("torchflows")
    x = torch.randn(100, 2)
    with torch.no_grad():
        model.steps *= 8
        theirs = model.log_prob(x)
        model.settle(x)
        assert (model.log_prob(x) - theirs).abs().max() > 1e-3


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


class Value(torch.nn.Module):
    """The value of a potential alone."""

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        self.potential = potential

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.potential(x, t)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_ot_flow_has_the_published_value_and_its_derivatives(layers):
    potential = OTFlowPotential(3, 7, layers=layers).double()
    for parameter in (potential.outer, potential.slope, potential.constant):
        torch.nn.init.normal_(parameter)
    x, t = 2 * torch.randn(5, 3, dtype=torch.float64), 0.3
    exact = AutogradPotential(Value(potential))
    torch.testing.assert_close(potential.gradient(x, t), exact.gradient(x, t))
    torch.testing.assert_close(potential.laplacian(x, t), exact.laplacian(x, t))
    s = torch.cat([x, torch.full((5, 1), 0.7)], dim=1).double()  # from the data to the noise

    def sigma(z: torch.Tensor) -> torch.Tensor:
        return (z.exp() + (-z).exp()).log()

    first, *rest = potential.network
    u = sigma(first(s))
    for layer in rest:
        u = u + sigma(layer(u)) / layers
    quadratic = 0.5 * torch.einsum("bi,ki,kj,bj->b", s, potential.root, potential.root, s)
    value = u @ potential.outer + quadratic + s @ potential.slope + potential.constant
    torch.testing.assert_close(potential(x, t), value)


@torch.no_grad()
def test_ot_flow_pays_for_transport_and_for_what_breaks_its_equation():
    """By sums over a grid of times on the paths."""
    torch.manual_seed(0)
    model = flows.OTFlow(2, 8, steps=32, transport=0.3, residual=0.7).double()
    x = torch.randn(6, 2, dtype=torch.float64)
    times = torch.linspace(1, 0, 65, dtype=torch.float64)
    (transform,) = transports(model)
    potential, kinetic, residual = model.potential, [], []
    for t, points in zip(times, transform.trajectory(x, times).points, strict=True):
        speed = potential.gradient(points, t).square().sum(1) / 2
        change = potential(points, t - 1e-5) - potential(points, t + 1e-5)  # τ = 1 - t
        kinetic.append(speed.mean())
        residual.append((change / 2e-5 - speed).abs().mean())
    costs = [float(torch.trapezoid(torch.stack(each), -times)) for each in (kinetic, residual)]
    expected = -model.log_prob(x).mean() + 0.3 * costs[0] + 0.7 * costs[1]
    assert min(costs) > 0.1
    torch.testing.assert_close(model.training_loss(x), expected, rtol=1e-3, atol=0)


def test_linear_layer_widens_narrow_data():
    """What coupling layers of nflows cannot: their scales are at most 1.001."""
    narrow = 0.25 * torch.randn(500, 2)
    losses = {}
    for name, build in (("bare", flows.realnvp), ("behind", flows.behind_linear(flows.realnvp))):
        torch.manual_seed(0)
        model = build(2, 8)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(60):
            optimizer.zero_grad()
            model.training_loss(narrow).backward()
            optimizer.step()
        losses[name] = model.training_loss(narrow).item()
    entropy = 1 + math.log(2 * math.pi) + 2 * math.log(0.25)
    assert losses["behind"] < entropy + 0.5 < entropy + 1.5 < losses["bare"]


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


def write_archive(root: Path) -> None:
    """Small files in the format of the archive of tables, of a known content."""
    random = np.random.default_rng(0)
    for name in ("power", "gas", "hepmass", "miniboone", "BSDS300"):
        (root / name).mkdir()
    np.save(root / "power" / "data.npy", random.normal(size=(300, 8)) * np.arange(1, 9))
    np.save(root / "miniboone" / "data.npy", 3 + random.normal(size=(300, 43)))


def test_power_and_miniboone_are_prepared_as_published(tmp_path):
    write_archive(tmp_path)
    train, validation, test = tables.TABLES["power"](tmp_path)
    assert [part.shape for part in (train, validation, test)] == [(243, 6), (27, 6), (30, 6)]
    known = np.concatenate([train, validation])
    np.testing.assert_allclose(known.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(known.std(0), 1)
    raw = np.load(tmp_path / "power" / "data.npy")
    np.random.RandomState(42).shuffle(raw)
    raw = raw[:, [0, 2, 4, 5, 6, 7]]
    noise = np.concatenate([train, validation, test]) * raw[:270].std(0) - raw
    noise -= noise.mean(0)
    # noise within its units, up to the standardisation; none in the time of day
    for column, unit in enumerate((0.001, 0.01, 1, 1, 1, 0)):
        others = np.polyfit(raw[:, column], noise[:, column], 1)
        left = noise[:, column] - np.polyval(others, raw[:, column])
        assert np.ptp(left) == pytest.approx(unit, rel=0.1, abs=1e-9)
    train, validation, test = tables.TABLES["miniboone"](tmp_path)
    raw = np.load(tmp_path / "miniboone" / "data.npy")
    mean, deviation = raw[:270].mean(0), raw[:270].std(0)
    np.testing.assert_allclose(np.concatenate([train, validation, test]), (raw - mean) / deviation)
    assert len(validation) == 27


def test_gas_loses_columns_that_repeat_others(tmp_path):
    pandas = pytest.importorskip("pandas")
    write_archive(tmp_path)
    values = np.random.default_rng(0).normal(size=(200, 4))
    twins = values[:, :1] + 0.01 * np.random.default_rng(1).normal(size=(200, 2))
    table = pandas.DataFrame(np.hstack([values, twins]), columns=list("abcdef"))
    for name in ("Time", "Meth", "Eth"):
        table.insert(0, name, 0.0)
    table.to_pickle(tmp_path / "gas" / "ethylene_CO.pickle")
    parts = tables.TABLES["gas"](tmp_path)
    kept = values[:, 1:], twins[:, 1:]  # of three alike the first two go
    expected = np.hstack(kept)
    expected = (expected - expected.mean(0)) / expected.std(0, ddof=1)
    np.testing.assert_allclose(np.concatenate(parts), expected)
    assert [len(part) for part in parts] == [162, 18, 20]


def test_hepmass_keeps_the_signal_and_continuous_columns(tmp_path):
    pandas = pytest.importorskip("pandas")
    write_archive(tmp_path)
    random = np.random.default_rng(0)
    for name, count, more in (("1000_train.csv", 100, 0), ("1000_test.csv", 60, 1)):
        rows = random.normal(size=(count, 5 + more))
        rows[:, 0] = np.arange(count) % 2
        rows[:, 3] = np.arange(count) % 3 == 0  # comes again and again
        pandas.DataFrame(rows).to_csv(tmp_path / "hepmass" / name, index=False)
    train, validation, test = tables.TABLES["hepmass"](tmp_path)
    assert [part.shape for part in (train, validation, test)] == [(45, 3), (5, 3), (30, 3)]
    raw = pandas.read_csv(tmp_path / "hepmass" / "1000_train.csv").to_numpy()[1::2][:, [1, 2, 4]]
    expected = (raw - raw.mean(0)) / raw.std(0, ddof=1)
    np.testing.assert_allclose(np.concatenate([train, validation]), expected)
    raw_test = pandas.read_csv(tmp_path / "hepmass" / "1000_test.csv").to_numpy()[1::2][
        :, [1, 2, 4]
    ]
    np.testing.assert_allclose(test, (raw_test - raw.mean(0)) / raw.std(0, ddof=1))


def test_bsds300_is_taken_as_it_is(tmp_path):
    h5py = pytest.importorskip("h5py")
    write_archive(tmp_path)
    parts = [np.random.default_rng(i).normal(size=(40, 63)) for i in range(3)]
    with h5py.File(tmp_path / "BSDS300" / "BSDS300.hdf5", "w") as file:
        for name, part in zip(("train", "validation", "test"), parts, strict=True):
            file[name] = part
    for found, part in zip(tables.TABLES["bsds300"](tmp_path), parts, strict=True):
        np.testing.assert_array_equal(found, part)


@pytest.mark.parametrize(
    ("name", "features", "count"), [("diamonds", 6, 53_930), ("weather", 7, 23_006)]
)
def test_tables_that_packages_ship(name, features, count):
    pytest.importorskip("pandas")
    try:
        parts = tables.TABLES[name](None)
    except ImportError:
        pytest.skip("its package is not installed")
    assert sum(len(part) for part in parts) == count
    assert all(part.shape[1] == features for part in parts)
    rows = np.concatenate(parts)
    assert len(np.unique(rows, axis=0)) == count
    # no value comes again: ties are dequantised
    assert all(len(np.unique(column)) == count for column in rows.T)
    data = densities.DATA[name](None)
    assert data.features == features
    assert len(data.validation) == 2000
    assert data.batches(0)[0].shape == (256, features)


def test_a_missing_reader_of_tables_names_the_extra(monkeypatch, tmp_path):
    write_archive(tmp_path)
    (tmp_path / "BSDS300" / "BSDS300.hdf5").touch()
    (tmp_path / "gas" / "ethylene_CO.pickle").touch()
    for name, module in (("bsds300", "h5py"), ("gas", "pandas")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"{module}, which is missing; .*\[tables\]"):
            tables.TABLES[name](tmp_path)


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
CHOSEN = ["--data", "moons", "--flow", "ridge", "--flow", "realnvp", "--seeds", 2]
CHOSEN += ["--learning-rate", 1e-2]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("architectures") / "run"
    code, out, err = start("--out", folder, *CHOSEN, "--seconds", SECONDS)
    assert code == 0, err
    assert "4 cells, 0 of them done before" in out
    return folder


def test_run_leaves_table_figures_and_pictures(run):
    assert sorted(path.name for path in (run / "architectures").iterdir()) == [
        "architectures.csv",
        "toys.png",
    ]
    assert (run / "architectures" / "toys.png").read_bytes().startswith(b"\x89PNG")
    with (run / "architectures" / "architectures.csv").open() as file:
        rows = {row["flow"]: row for row in csv.DictReader(file) if row["seed"] == "0"}
    assert set(rows) == {"ridge", "realnvp"}
    page = (run / "architectures.md").read_text()
    for flow, row in rows.items():
        cell = json.loads((run / "cells" / f"moons_{flow}_0.json").read_text())
        assert cell["failure"] == ""
        assert 1.55 < cell["nll"] < 10  # the entropy of the moons is 1.59
        assert float(row["nll"]) == pytest.approx(cell["nll"])
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
    assert page.index("the density of the data") < page.index("Monge-Ampère")


def test_run_ranks_by_differences_on_the_same_points(run):
    losses = {
        flow: np.stack(
            [np.load(run / "cells" / f"moons_{flow}_{seed}.npz")["losses"] for seed in (0, 1)]
        )
        for flow in ("ridge", "realnvp")
    }
    first, second = sorted(losses, key=lambda flow: losses[flow].mean())
    page = (run / "architectures.md").read_text()
    # two seeds: the squared error of their mean is a quarter of the squared difference
    seeds = {flow: np.diff(each.mean(1))[0] ** 2 / 4 for flow, each in losses.items()}
    own = math.sqrt(losses[first].mean(0).var(ddof=1) / 10_000 + seeds[first])
    nll, title = losses[first].mean(), flows.FLOWS[first].title
    assert f"| **{title}** | **{nll:.3f}** | {own:.3f} |  |" in page
    spread = 500 * abs(float(np.diff(losses[first].mean(1))[0]))  # half of it, in thousandths
    assert f"| **{nll:.3f}({spread:.0f})** |" in page
    difference = (losses[second] - losses[first]).mean(0)
    error = math.sqrt(difference.var(ddof=1) / 10_000 + sum(seeds.values()))
    assert f"| {difference.mean():.3f} ± {error:.3f} |" in page
    bold = f"| **{flows.FLOWS[second].title}** |" in page
    assert bold == (difference.mean() <= error)


def test_finished_cells_are_kept_and_missing_ones_made(run):
    kept, gone = (run / "cells" / f"moons_{flow}_0.json" for flow in ("ridge", "realnvp"))
    before = kept.stat().st_mtime_ns
    gone.unlink()
    code, out, err = start("--out", run, *CHOSEN, "--seconds", SECONDS)
    assert code == 0, err
    assert "4 cells, 3 of them done before" in out
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
        (["--data", "power"], "--data-dir: left out, expected the folder with power/data.npy"),
        (["--data", "gas", "--data-dir", "."], "there is no gas/ethylene_CO.pickle in ."),
        (
            ["--data", "moons", "--flow", "ridge", "--rates", "none.csv"],
            "no learning rate was chosen for ridge on moons; choose one with --tune --data moons",
        ),
    ],
)
def test_options_are_checked(arguments, message, tmp_path):
    code, _, err = start("--out", tmp_path / "o", *arguments)
    assert code == 2
    assert message in err
    assert not (tmp_path / "o").exists()


def test_tuning_chooses_by_validation_and_is_taken_up_again(monkeypatch, tmp_path):
    out, rates = tmp_path / "o", tmp_path / "rates.csv"
    rates.write_text("data,flow,learning_rate,seconds,0.001\ncircles,maf,0.001,6,1.5\n")
    arguments = ["--tune", "--out", out, "--rates", rates, "--seconds", 0.3]
    arguments += ["--data", "moons", "--flow", "ridge"]
    code, text, err = start(*arguments)
    assert code == 0, err
    assert "4 cells, 0 of them done before" in text
    cells = [json.loads(path.read_text()) for path in (out / "cells").glob("*.json")]
    best = min(cells, key=lambda cell: cell["validation"])
    assert {cell["learning_rate"] for cell in cells} >= set(comparison_rates.RATES)
    assert len(cells) == 4 + (best["learning_rate"] in {3e-4, 1e-3, 3e-2, 1e-1})
    assert comparison_rates.read_rates(rates) == {
        ("moons", "ridge"): best["learning_rate"],
        ("circles", "maf"): 1e-3,
    }
    code, text, _ = start(*arguments)
    assert code == 0
    assert "4 cells, 4 of them done before" in text
    # the comparison takes them
    (cell,) = architectures.plan({"moons": 2}, ["ridge"], 1, 1, None, rates)
    assert cell.learning_rate == best["learning_rate"]


def test_diverged_trials_are_chosen_only_if_all_are(tmp_path):
    def trial(rate: float, validation: float, failure: str) -> comparison_cells.Figures:
        return comparison_cells.Figures(
            *("moons", "maf", 0, 1.0, failure, rate), validation=validation
        )

    losses = (2.0, 1.8, 1.5, math.nan)
    some = [trial(*each, "") for each in zip(comparison_rates.RATES, losses, strict=True)]
    some[2] = trial(1e-2, 1.5, "diverged")
    comparison_rates.write_rates(some, tmp_path / "some.csv")
    assert comparison_rates.read_rates(tmp_path / "some.csv") == {("moons", "maf"): 3e-3}
    every = [trial(each.learning_rate, each.validation, "diverged") for each in some]
    comparison_rates.write_rates(every, tmp_path / "every.csv")
    assert comparison_rates.read_rates(tmp_path / "every.csv") == {("moons", "maf"): 1e-2}


def test_budgets_are_of_the_processor(tmp_path):
    """A training that sleeps half of the time is given twice the time by the clock."""

    class Sleepy(flows.Nflows):
        def log_prob(self, x):
            time.sleep(0.02)
            return super().log_prob(x)

    data = densities.DATA["moons"](None)
    slow = Sleepy(2, *flows.ridge(2, 8).flow._transform._transforms)
    cell = comparison_cells.Cell("moons", "ridge", 0, 0.5, 1e-2)
    start_clock, start_processor = time.monotonic(), time.process_time()
    steps, _, _ = comparison_cells.train(cell, slow, data)
    processor = time.process_time() - start_processor
    assert time.monotonic() - start_clock > processor + 0.02 * steps
    assert 0.5 < processor < 20


def test_a_cell_that_does_not_end_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(comparison_cells, "PATIENCE", 0.5)
    (tmp_path / "cells").mkdir()
    cell = comparison_cells.Cell("moons", "torchdyn-exact", 0, 0.3, 1e-3)
    comparison_cells.run_cells([cell], tmp_path, None, Console(quiet=True))
    failure = json.loads(cell.path(tmp_path, ".json").read_text())["failure"]
    assert failure == "not done 0.5 s after its time of training"


def test_missing_packages_name_the_extra(monkeypatch):
    extra = r'pip install "nflows-mongeampere\[examples\]"'
    monkeypatch.setitem(sys.modules, "zuko.flows", None)
    with pytest.raises(ImportError, match=extra):
        flows.FLOWS["zuko"].make(2)
    monkeypatch.setitem(sys.modules, "torchflows.bijections.continuous.otflow", None)
    with pytest.raises(ImportError, match=extra):
        flows.FLOWS["torchflows"].make(2)
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
    monkeypatch.setitem(flows.FLOWS, "bad", flows.Architecture("Bad", build, {2: 8}))
    (tmp_path / "cells").mkdir()
    cell = comparison_cells.Cell("moons", "bad", 0, 0.5, 1e-3)
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
