"""The MNIST example: its transforms against nflows and autograd, its runs, what it refuses."""

from __future__ import annotations

import csv
import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, PiecewiseLinearCDF
from sklearn.datasets import load_digits
from torch.distributions import MultivariateNormal

import mnist_flows
from nflows_mongeampere.examples import images
from programs import call, start

pytestmark = pytest.mark.long

QUICK = ["--validation-images", "100", "--test-images", "100", "--draws", "2"]


@pytest.fixture(scope="module")
def levels() -> torch.Tensor:
    """Real digits at 8x8, with the grey levels 0 to 16."""
    return torch.tensor(load_digits().data, dtype=torch.int64)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """Files like MNIST's: scikit-learn's digits, enlarged and repeated."""
    folder = tmp_path_factory.mktemp("mnist")
    small = (load_digits().images * 15).astype(np.uint8)
    large = np.pad(np.kron(small, np.ones((1, 3, 3), np.uint8)), ((0, 0), (2, 2), (2, 2)))
    for name, count in (("train", 60_000), ("t10k", 10_000)):
        rows = np.resize(large, (count, 28, 28))
        header = struct.pack(">4i", 0x803, count, 28, 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + rows.tobytes())
    return folder


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "fast"
    done = start(
        "mnist.py", "--preset", "fast", "--steps", 3, "--data-dir", data_dir, "--out", out, *QUICK
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout[: done.stdout.rindex("}") + 1])["preset"] == "fast"
    return out


def test_a_run_leaves_results(run):
    results = json.loads((run / "results.json").read_text())
    assert results["preset"] == "fast"
    assert results["seed"] == 0
    assert results["steps"] == 3
    # potential, and the linear transform of nflows
    assert results["parameters"] == 1024 * (784 + 2) + 784 * 783 + 2 * 784
    assert results["nll"] == pytest.approx(sum(results["nll_draws"]) / 2, rel=1e-6)
    assert abs(results["nll"] - results["nll_double_steps"]) < 0.05
    assert results["solver_steps"] == [3]
    assert 0 < results["nll_se"] < 100
    assert results["reconstruction_error"] < 1
    assert 0 < results["peak_memory_mb"] < 1500
    command = "python examples/mnist.py --preset fast --steps 3 "
    assert results["command"] == command + " ".join(map(str, QUICK))


def test_bits_are_those_of_the_density_of_grey_levels(run, data_dir):
    """Recomputed from the definition, with the same images and noise."""
    results = json.loads((run / "results.json").read_text())
    test = images.load_mnist(data_dir).test[:100]
    bits = []
    for draw in range(2):
        x = images.dequantise(test, torch.Generator().manual_seed(draw), 256).double()
        s = 1e-6 + (1 - 2e-6) * x
        # p(x) = p(y) |dy/dx| with y = logit(s)
        log_slope = ((1 - 2e-6) / (s * (1 - s))).log().sum(1).mean()
        nats = results["nll_draws"][draw] - log_slope + 784 * np.log(256)
        bits.append(nats / (784 * np.log(2)))
    assert results["bits_per_dim"] == pytest.approx(np.mean(bits), abs=1e-4)


def test_a_run_leaves_figures_metrics_and_checkpoints(run):
    assert sorted(path.name for path in run.iterdir()) == [
        "best.ckpt",
        "config.json",
        "last.ckpt",
        "learning.png",
        "metrics.csv",
        "path.png",
        "results.json",
        "samples.npy",
        "samples.png",
    ]
    for name in ("learning", "path", "samples"):
        assert (run / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert np.load(run / "samples.npy").shape == (64, 784)
    with (run / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["step"]) == 3


def test_a_finished_run_is_left_alone(run, data_dir):
    before = (run / "results.json").stat().st_mtime_ns
    arguments = ["--data-dir", data_dir, "--out", run, *QUICK]
    again = call("mnist.py", "--preset", "fast", "--steps", 3, *arguments)
    assert again.returncode == 2
    assert "holds this run, finished" in again.stderr
    other = call("mnist.py", "--preset", "stacked", "--steps", 3, *arguments)
    assert other.returncode == 2
    assert "--out: " in other.stderr
    assert "'fast'" in other.stderr
    assert "--overwrite" in other.stderr
    assert (run / "results.json").stat().st_mtime_ns == before


def test_a_convolutional_flow_starts_at_the_gaussian_copula(data_dir):
    """Its potentials are zero at first; marginals and linear transform are set from data."""
    generator = torch.Generator().manual_seed(0)
    levels = images.load_mnist(data_dir).train[:3000].int()
    levels = (levels + torch.randint(0, 60, levels.shape, generator=generator)).clamp(max=255)
    flow = Flow(CompositeTransform(mnist_flows.convolutional(levels)), StandardNormal([784]))
    y = mnist_flows.logits(levels[:200], generator)
    with torch.no_grad():
        found = flow.log_prob(y)
        before = CompositeTransform(mnist_flows.convolutional(levels)[:3])
        z = before(mnist_flows.logits(levels, torch.Generator().manual_seed(0)))[0].double()
        points, logabsdet = before(y)
        copula = MultivariateNormal(z.mean(0), torch.cov(z.T))
        expected = copula.log_prob(points.double()) + logabsdet
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "slow"], "--preset: got 'slow', expected one of paper, fast"),
        (["--data", "cifar"], "--data: got 'cifar', expected one of mnist, patches"),
        (["--steps", "0"], "--steps"),
        (["--minutes", "-1"], "--minutes"),
        (["--seed", "-1"], "--seed"),
        (["--draws", "0"], "--draws"),
    ],
)
def test_options_are_checked(arguments, message, data_dir, tmp_path):
    done = call("mnist.py", "--data-dir", data_dir, "--out", tmp_path / "run", *arguments)
    assert done.returncode == 2
    assert message in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_photographs_are_a_second_set_of_images(tmp_path, monkeypatch):
    # bfloat16 where the processor has it alone: without, a step takes twelve times as long
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["--preset", "stacked", "--data", "patches", "--steps", 2]
    done = call("mnist.py", *arguments, "--out", tmp_path / "run", *QUICK)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["precision"] == "32-true"
    assert abs(results["nll"] - results["nll_double_steps"]) < 0.05
    assert results["reconstruction_error"] < 1


@pytest.mark.parametrize("name", ["fast", "whitened", "stacked"])
def test_every_parameter_has_one_learning_rate(name, data_dir):
    preset = mnist_flows.PRESETS[name]
    flow = CompositeTransform(preset.build(images.load_mnist(data_dir).train[:2000]))
    groups = mnist_flows.make_optimizer(preset, flow).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in flow.parameters() if p.requires_grad)
    assert {group["lr"] for group in groups} > {preset.learning_rate}


@pytest.mark.parametrize("halved", [False, True])
def test_muon_takes_float32_where_bfloat16_is_slow(halved, data_dir, monkeypatch):
    """Against the polar factor's iterations by hand, in float64."""
    monkeypatch.setattr(mnist_flows, "fast_bfloat16", lambda: halved)
    network = mnist_flows.PixelNetwork(1, 1, (4, 4), width=8, blocks=1)
    kernel = network.blocks[0][1].weight
    optimizer = mnist_flows.make_optimizer(mnist_flows.PRESETS["stacked"], network)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    x, before = kernel.grad.flatten(1).double(), kernel.detach().clone()
    optimizer.step()
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    step = ((before - kernel.detach()) / 0.025).flatten(1)
    assert ((step - x).abs().max() < 1e-4) is not halved  # bfloat16 has three digits


def damaged(kind: str, good: Path, folder: Path) -> None:
    """A folder whose training images are damaged in some way."""
    name, test = images.MNIST_FILES
    folder.mkdir()
    (folder / test).write_bytes((good / test).read_bytes())
    content = (good / name).read_bytes()[: 16 + 784 * 10]
    if kind == "missing":
        return
    if kind == "truncated":
        (folder / name).write_bytes(content[:-100])
    elif kind == "empty":
        (folder / name).write_bytes(b"")
    elif kind == "labels":
        (folder / name).write_bytes(struct.pack(">4i", 0x801, 10, 28, 28) + content[16:])
    elif kind == "few":
        (folder / name).write_bytes(struct.pack(">4i", 0x803, 10, 28, 28) + content[16:])
    elif kind == "no gzip":
        (folder / f"{name}.gz").write_bytes(content)
    elif kind == "truncated gzip":
        (folder / f"{name}.gz").write_bytes(gzip.compress(content, 1)[:-50])
    elif kind == "flipped gzip":
        packed = bytearray(gzip.compress(content, 1))
        packed[len(packed) // 2] ^= 0xFF
        (folder / f"{name}.gz").write_bytes(bytes(packed))


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("missing", FileNotFoundError, "there is no train-images-idx3-ubyte"),
        ("truncated", ValueError, "is damaged: got 7756 bytes"),
        ("empty", ValueError, "is damaged"),
        ("labels", ValueError, "is damaged: .*00000801"),
        ("few", ValueError, "got 10 and 10000 entries"),
        ("no gzip", ValueError, "is damaged"),
        ("truncated gzip", ValueError, "is damaged"),
        ("flipped gzip", ValueError, "is damaged"),
    ],
)
def test_damaged_data_is_refused(kind, error, message, data_dir, tmp_path):
    damaged(kind, data_dir, tmp_path / "data")
    with pytest.raises(error, match=f"--data-dir: .*{message}"):
        images.load_mnist(tmp_path / "data")


def test_refusals_are_short_and_leave_nothing(data_dir, tmp_path):
    missing = call("mnist.py", "--data-dir", tmp_path / "none", "--out", tmp_path / "run")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: --data-dir: there is no train-images-idx3-ubyte")
    assert missing.stderr.count("\n") <= 2
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("mine")
    taken = call("mnist.py", "--data-dir", data_dir, "--out", tmp_path / "file")
    assert taken.returncode == 2
    assert "is a file, expected a folder" in taken.stderr
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    full = call("mnist.py", "--data-dir", data_dir, "--out", tmp_path / "folder", "--overwrite")
    assert full.returncode == 2
    assert "holds other files" in full.stderr
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["thesis.tex"]


def test_gzipped_files_are_read_too(data_dir, tmp_path):
    for name in images.MNIST_FILES:
        packed = gzip.compress((data_dir / name).read_bytes(), 1)
        (tmp_path / f"{name}.gz").write_bytes(packed)
    parts = images.load_mnist(tmp_path)
    expected = images.load_mnist(data_dir)
    assert torch.equal(parts.test, expected.test)
    assert (len(parts.train), len(parts.validation)) == (50_000, 10_000)
    assert torch.equal(
        torch.cat([parts.train, parts.validation]), torch.cat([expected.train, expected.validation])
    )


def test_some_digits_are_moved_by_a_pixel():
    levels = torch.zeros(400, 28, 28, dtype=torch.uint8)
    levels[:, 10, 20] = 7
    generator = torch.Generator().manual_seed(0)
    moved = mnist_flows.shifted(levels.flatten(1), generator, 1, 0.5).view(-1, 28, 28)
    assert (moved.flatten(1).sum(1) == 7).all()
    places, counts = moved.nonzero()[:, 1:].unique(dim=0, return_counts=True)
    assert places.tolist() == [[row, column] for row in (9, 10, 11) for column in (19, 20, 21)]
    assert 200 < counts[4] < 245  # half of them, and a ninth of the others
    assert counts.sum() == 400
    assert torch.equal(mnist_flows.shifted(levels, generator, 1, 0.0), levels.flatten(1))


def test_marginals_are_those_of_nflows(levels):
    ours = images.Marginals(levels, 17).double()
    theirs = PiecewiseLinearCDF([64], 17).double()
    theirs.load_state_dict(ours.state_dict())
    x = images.dequantise(levels[:50], torch.Generator().manual_seed(0), 17).double()
    for mine, nflows in zip(ours(x), theirs(x), strict=True):
        torch.testing.assert_close(mine, nflows, rtol=1e-5, atol=1e-6)
    back, logabsdet = ours.inverse(ours(x)[0])
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logabsdet, -ours(x)[1])


def test_marginals_are_the_histogram_of_the_data(levels):
    marginals = images.Marginals(levels, 17)
    mass = marginals.unnormalized_pdf.softmax(1)
    frequencies = torch.stack([(levels == level).double().mean(0) for level in range(17)], dim=1)
    torch.testing.assert_close(mass.double(), frequencies, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["Pixels", "NormalQuantile"])
def test_elementwise_transforms_have_the_slopes_of_autograd(name):
    transform = images.Pixels(1e-6) if name == "Pixels" else images.Quantile()
    x = torch.linspace(-4, 4, 60, dtype=torch.float64).view(5, 12)
    if name == "NormalQuantile":
        x = x / 9 + 0.5
    x.requires_grad_()
    y, logabsdet = transform(x)
    (slopes,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(logabsdet, slopes.log().sum(1))
    back, inverse = transform.inverse(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse, -logabsdet)


def test_normal_quantiles_are_those_of_torch():
    x = torch.rand(20, 3, dtype=torch.float64)
    y, _ = images.Quantile()(x)
    torch.testing.assert_close(torch.distributions.Normal(0, 1).cdf(y), x)


def test_whitening_makes_the_covariance_one():
    mixing = torch.randn(6, 6)
    points = torch.randn(1000, 6) @ mixing + 3
    white, logabsdet = images.whitening(points)(points)
    torch.testing.assert_close(torch.cov(white.T), torch.eye(6), rtol=0, atol=1e-3)
    torch.testing.assert_close(white.mean(0), torch.zeros(6), rtol=0, atol=1e-3)
    expected = -0.5 * torch.linalg.slogdet(torch.cov(points.T))[1]
    torch.testing.assert_close(logabsdet, expected.expand(1000), rtol=1e-3, atol=1e-3)
