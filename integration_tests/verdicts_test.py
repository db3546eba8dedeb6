"""Samples and anomalies of MNIST runs: made-up runs are judged as they were made."""

from __future__ import annotations

import gzip
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from sklearn.datasets import load_digits

import anomalies
from nflows_mongeampere.examples import images
from programs import call, start


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """Files like MNIST's: scikit-learn's digits, enlarged and repeated, with their labels."""
    folder = tmp_path_factory.mktemp("mnist")
    small = (load_digits().images * 15).astype(np.uint8)
    large = np.pad(np.kron(small, np.ones((1, 3, 3), np.uint8)), ((0, 0), (2, 2), (2, 2)))
    for name, count in (("train", 60_000), ("t10k", 10_000)):
        header = struct.pack(">4i", 0x803, count, 28, 28)
        rows = np.resize(large, (count, 28, 28))
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + rows.tobytes())
        labels = np.resize(load_digits().target.astype(np.uint8), count)
        packed = gzip.compress(struct.pack(">2i", 0x801, count) + labels.tobytes(), 1)
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(packed)
    return folder


def test_labels_are_in_the_parts_of_the_images(data_dir):
    labels = images.load_labels(data_dir)
    expected = np.resize(load_digits().target, 60_000)
    assert labels.train.tolist() == expected[:50_000].tolist()
    assert labels.validation.tolist() == expected[50_000:].tolist()
    assert len(labels.test) == 10_000


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "there is no train-labels-idx1-ubyte"),
        (b"", ValueError, "is damaged: got 0 bytes"),
        (struct.pack(">2i", 0x801, 60_000) + bytes(10), ValueError, "is damaged: got 18 bytes"),
        (struct.pack(">2i", 0x803, 60_000) + bytes(60_000), ValueError, "begin with 00000803"),
    ],
)
def test_damaged_labels_are_refused(content, error, message, tmp_path):
    if content is not None:
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(error, match=f"--data-dir: .*{message}"):
        images.load_labels(tmp_path)


def test_damaged_archives_of_labels_are_refused(data_dir, tmp_path):
    name = "train-labels-idx1-ubyte.gz"
    (tmp_path / name).write_bytes((data_dir / name).read_bytes()[:-50])
    with pytest.raises(ValueError, match="is damaged"):
        images.load_labels(tmp_path)


def made_up_run(folder: Path, preset: str, samples: np.ndarray) -> Path:
    folder.mkdir()
    results = {"preset": preset, "nll": 1000.0, "minutes": 1.0, "command": f"mnist.py {preset}"}
    (folder / "results.json").write_text(json.dumps(results))
    np.save(folder / "samples.npy", samples)
    return folder


@pytest.mark.long
def test_copies_and_noise_are_judged_as_such(data_dir, tmp_path):
    copies = images.load_mnist(data_dir).train[:70].numpy()
    noise = np.random.default_rng(0).integers(0, 256, (30, 784)).astype(np.uint8)
    runs = [
        made_up_run(tmp_path / "a", "copies", copies),
        made_up_run(tmp_path / "b", "noise", noise),
    ]
    out = tmp_path / "new" / "out"
    done = start("benchmarks/mnist_samples.py", *runs, "--data-dir", data_dir, "--out", out)
    assert done.returncode == 0, done.stderr
    verdict = json.loads((out / "samples_verdict.json").read_text())
    first, second = verdict["runs"]
    assert verdict["classifier_accuracy"] > 0.95
    assert (first["preset"], first["count"], first["copies"]) == ("copies", 70, 1.0)
    assert first["relative_confidence"] == pytest.approx(1, abs=0.05)
    assert (second["preset"], second["count"], second["copies"]) == ("noise", 30, 0.0)
    assert second["relative_confidence"] < 0.4
    assert second["distance"] > 5
    assert (out / "samples_verdict.png").read_bytes().startswith(b"\x89PNG")
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("| copies |"))
    assert row.endswith("| 0.00 | 100.0% |")


@pytest.mark.long
def test_runs_without_samples_are_refused(data_dir, tmp_path):
    run = made_up_run(tmp_path / "a", "fast", np.zeros((5, 64)))
    arguments = (run, "--data-dir", data_dir, "--out", tmp_path / "out")
    done = call("benchmarks/mnist_samples.py", *arguments)
    assert done.returncode == 2
    assert "expected uint8 of shape (N, 784)" in done.stderr
    (run / "samples.npy").unlink()
    done = call("benchmarks/mnist_samples.py", *arguments)
    assert done.returncode == 2
    assert "holds no samples.npy" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory) -> Path:
    """A short training."""
    out = tmp_path_factory.mktemp("runs") / "fast"
    quick = ("--validation-images", 100, "--test-images", 10, "--draws", 1)
    done = start(
        "mnist.py", "--preset", "fast", "--steps", 3, "--data-dir", data_dir, "--out", out, *quick
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.long
def test_anomalies_of_a_run(run, data_dir, tmp_path):
    arguments = ("--data-dir", data_dir, "--out", tmp_path / "out", "--images", 20)
    done = call("anomalies.py", "--run", run, *arguments)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    kinds = set(anomalies.make_anomalies(images.load_mnist(data_dir).test[:1]))
    assert set(results["roc_auc"]) == kinds
    assert set(results["bits_per_pixel"]) == {"digits", *kinds}
    assert results["roc_auc"]["uniform noise"]["log-density"] > 0.99
    for kind in kinds:
        assert f"| {kind} | {results['bits_per_pixel'][kind]:.2f} |" in done.stdout
    assert (tmp_path / "out" / "anomalies.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_restored_flows_have_the_loss_of_their_run(run, data_dir):
    """The bits of the run's results, from the restored checkpoint."""
    data = images.load_mnist(data_dir)
    densities = anomalies.evaluate(anomalies.load_flow(run, data.train), data.test[:10])
    results = json.loads((run / "results.json").read_text())
    assert -densities.logits.mean().item() == pytest.approx(results["nll"], rel=1e-5)
    assert densities.bits.mean() / 784 == pytest.approx(results["bits_per_dim"], rel=1e-5)


@pytest.mark.long
def test_other_runs_are_refused(data_dir, tmp_path):
    other = made_up_run(tmp_path / "a", "phi4", np.zeros((1, 784), np.uint8))
    done = call("anomalies.py", "--run", other, "--data-dir", data_dir, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "is of the preset 'phi4'" in done.stderr


def test_areas_are_those_of_rank_sums():
    """Mann and Whitney's U over the number of pairs, with scores from their definitions."""
    rng = np.random.default_rng(0)
    (p, q), (s, t) = rng.normal(-900, 50, (2, 40)), rng.integers(2000, 3000, (2, 40))
    normal, others = (
        anomalies.Densities(torch.tensor(x), torch.tensor(-x), torch.tensor(bits).double())
        for x, bits in ((p, s), (q, t))
    )
    found = anomalies.areas(normal, others, typical=-910.0)
    expected = {
        "log-density": (-p, -q),
        "logit space": (p, q),
        "typicality": (abs(p + 910), abs(q + 910)),
        "complexity": (-p / math.log(2) - s, -q / math.log(2) - t),
    }
    assert list(found) == list(expected)
    for score, (digits, images_) in expected.items():
        pairs = mannwhitneyu(images_, digits).statistic / 1600
        assert found[score] == pytest.approx(pairs), score


def test_anomalies_are_what_they_are_called(data_dir):
    digits = images.load_mnist(data_dir).test[:30]
    kinds = anomalies.make_anomalies(digits)
    for kind, levels in kinds.items():
        assert levels.shape == (30, 784), kind
        assert levels.dtype == torch.uint8, kind
    assert torch.equal(kinds["inverted"].int() + digits.int(), torch.full((30, 784), 255))
    assert torch.equal(kinds["permuted pixels"].sort(1)[0], digits.sort(1)[0])
    assert torch.equal(kinds["mirrored"].view(30, 28, 28)[:, :, 0], digits[:, 27::28])
    shifted = kinds["shifted by 4 pixels"].view(30, 28, 28)
    assert torch.equal(shifted[:, 4:, 4:], digits.view(30, 28, 28)[:, :-4, :-4])
    assert torch.equal(kinds["lower half erased"][:, :392], digits[:, :392])
    assert kinds["lower half erased"][:, 392:].max() == kinds["blank"].max() == 0
    assert (kinds["constant grey"] == kinds["constant grey"][:, :1]).all()
    assert kinds["8×8 digits, enlarged"].max() > 200
    # a blur keeps the ink within the frame
    ink = digits.double().sum(1)
    torch.testing.assert_close(kinds["blurred"].double().sum(1), ink, rtol=0.02, atol=0)
