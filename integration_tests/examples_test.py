"""The examples run to the end and write what they promise."""

import json

import pytest

from programs import call, start

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    run = start("digits.py", "--seconds", 3, "--out", out)
    assert run.returncode == 0, run.stderr
    return out, run.stdout


def test_digits_writes_results_and_picture(digits):
    out, printed = digits
    results = json.loads((out / "results.json").read_text())
    scores = {score["name"]: score for score in results["scores"]}
    assert len(scores) == 5
    assert set(scores) >= {"Monge-Ampère", "Monge-Ampère coupling", "Gaussian"}
    for name, score in scores.items():
        assert name in printed
        assert 60 < score["nll"] < 64 * 4.1  # log2(17) bits for each pixel is a uniform guess
        assert 0 < score["nll_se"] < 2
    assert (out / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["digits.png", "results.json"]


def test_digits_density_is_right_to_the_solver(digits):
    results = json.loads((digits[0] / "results.json").read_text())
    flows = [score for score in results["scores"] if score["name"].startswith("Monge-Ampère")]
    assert len(flows) == 2
    for flow in flows:
        assert abs(flow["nll"] - flow["nll_double_steps"]) < 0.05
    assert results["reconstruction_error"] < 0.05  # grey levels out of 17


def test_digits_checks_its_options(tmp_path):
    run = call("digits.py", "--seconds", 0, "--out", tmp_path / "no")
    assert run.returncode == 2
    assert "--seconds" in run.stderr
    assert not (tmp_path / "no").exists()
