"""Trainings from beginning to end: resumed, in two processes, diverging, and on a coarse solver."""

from __future__ import annotations

import contextlib
import csv
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import normflows
import pytest
import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nflows_mongeampere import IntegrationError, MongeAmpereFlow, RidgePotential, refined
from nflows_mongeampere.normflows import MongeAmpere
from nflows_mongeampere.training import (
    DivergenceError,
    DivergenceGuard,
    EndlessBatches,
    MaximumLikelihood,
    Objective,
    ReverseKL,
    SolverGuard,
    endless,
    fit,
    restore,
)

# A training as users write it; its arguments are the folder, the processes and a pause in seconds.
SCRIPT = """
import sys, time
import torch
from torch.utils.data import DataLoader
from pytorch_lightning.callbacks import Callback
from nflows_mongeampere import MongeAmpereFlow
from nflows_mongeampere.training import EndlessBatches, MaximumLikelihood, endless, fit

class Slow(Callback):
    def on_train_batch_end(self, *_):
        time.sleep(float(sys.argv[3]))

def prepare(rows, generator):
    return rows + 0.1 * torch.rand(rows.shape, generator=generator)

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(5)
    flow = MongeAmpereFlow(2, 8, steps=2)
    data = torch.randn(200, 2).square()
    processes = int(sys.argv[2])
    fit(
        MaximumLikelihood(flow, learning_rate=1e-2, steps=40, seed=3),
        endless(EndlessBatches(data, 20, 3, prepare), interval=8),
        DataLoader(data, batch_size=100),
        sys.argv[1],
        callbacks=[Slow()],
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
    )
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("script") / "train.py"
    path.write_text(SCRIPT)
    return path


def command(script: Path, folder: Path, processes: int = 1, pause: float = 0.0) -> list[str]:
    return [sys.executable, str(script), str(folder), str(processes), str(pause)]


def table(folder: Path) -> list[dict[str, float]]:
    """The metrics but for the clock."""
    with (folder / "metrics.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    for row in rows:
        del row["minutes"]
    return rows


def weights(folder: Path, name: str = "last.ckpt") -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(folder / name, weights_only=True)["state_dict"]
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


@pytest.fixture(scope="module")
def uninterrupted(script, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(command(script, folder), check=True, capture_output=True)
    return folder


def test_a_killed_training_ends_like_any_other(script, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    with subprocess.Popen(
        command(script, folder, pause=0.1), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while not (folder / "last.ckpt").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3)  # within the second interval
        process.send_signal(signal.SIGKILL)
    assert len(table(folder)) < 5
    subprocess.run(command(script, folder), check=True, capture_output=True)
    assert table(folder) == table(uninterrupted)
    for name in ("last.ckpt", "best.ckpt"):
        after, expected = weights(folder, name), weights(uninterrupted, name)
        assert all(torch.equal(after[key], expected[key]) for key in expected)
    assert sorted(p.name for p in folder.iterdir()) == ["best.ckpt", "last.ckpt", "metrics.csv"]


def test_two_processes_learn_what_one_does(script, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    subprocess.run(command(script, folder, processes=2), check=True, capture_output=True)
    one, two = table(uninterrupted), table(folder)
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for key in ("train", "validation", "learning_rate"):
        torch.testing.assert_close(
            torch.tensor([row[key] for row in two]),
            torch.tensor([row[key] for row in one]),
            rtol=1e-5,
            atol=1e-5,
        )
    after, expected = weights(folder), weights(uninterrupted)
    for key in expected:
        torch.testing.assert_close(after[key], expected[key], rtol=1e-3, atol=1e-4)


def train(objective: Objective, folder: Path, **keywords: object) -> list[dict[str, float]]:
    data = torch.randn(200, 2, generator=torch.Generator().manual_seed(1)).square()
    batches = endless(EndlessBatches(data, 50), interval=10)
    keywords = {"accelerator": "cpu", **keywords}
    return fit(objective, batches, DataLoader(data, batch_size=100), folder, **keywords).rows  # type: ignore[arg-type]


def normflows_model(target: nn.Module | None = None) -> nn.Module:
    base = normflows.distributions.DiagGaussian(2, trainable=False)
    return normflows.NormalizingFlow(base, [MongeAmpere(RidgePotential(2, 16), steps=2)], target)


@pytest.mark.parametrize("face", ["nflows", "normflows"])
def test_density_estimation_learns(face, tmp_path):
    flow = MongeAmpereFlow(2, 16, steps=2) if face == "nflows" else normflows_model()
    rows = train(MaximumLikelihood(flow, learning_rate=2e-2, steps=60), tmp_path)
    assert rows[-1]["validation"] < rows[0]["validation"] - 0.5
    assert rows[-1]["step"] == 60
    assert rows[-1]["learning_rate"] < 1e-6


@pytest.mark.parametrize("face", ["nflows", "normflows"])
def test_variational_training_comes_down_to_the_exact_free_energy(face, tmp_path):
    class Ring(nn.Module):
        """exp(-(|x| - 1)²), whose integral is known."""

        def log_prob(self, x: Tensor) -> Tensor:
            return -(torch.linalg.vector_norm(x, dim=1) - 1).square()

    # 2π ∫ r exp(-(r - 1)²) dr = π (1/e + √π (1 + erf 1))
    exact = -math.log(math.pi * (math.exp(-1) + math.sqrt(math.pi) * (1 + math.erf(1))))
    if face == "nflows":
        objective = ReverseKL(
            MongeAmpereFlow(2, 16, steps=2), Ring(), learning_rate=2e-2, steps=150
        )
    else:
        objective = ReverseKL(normflows_model(Ring()), learning_rate=2e-2, steps=150)
    train(objective, tmp_path)
    objective.num_samples = 4000
    with torch.no_grad(), refined(objective.flow):
        gap = float(objective.loss(None)) - exact
    assert -0.03 < gap < 0.15


def test_minutes_end_a_training(tmp_path):
    start = time.monotonic()
    rows = train(MaximumLikelihood(MongeAmpereFlow(2, 4), minutes=0.03), tmp_path)
    assert 1.5 < time.monotonic() - start < 60
    assert rows[-1]["minutes"] >= 0.03
    assert rows[-1]["step"] < 10_000


class Spoil(Callback):
    """Undoes what was learnt, from the fourth interval on."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 3:
            with torch.no_grad():
                pl_module.flow._transform.potential.amplitude.sub_(0.5)


def test_the_flow_is_left_with_the_best_weights(tmp_path):
    objective = MaximumLikelihood(MongeAmpereFlow(2, 16, steps=2), learning_rate=1e-2, steps=50)
    rows = train(objective, tmp_path, callbacks=[Spoil()])
    best = min(row["validation"] for row in rows)
    assert best < rows[-1]["validation"] - 0.1
    data = torch.randn(200, 2, generator=torch.Generator().manual_seed(1)).square()
    with torch.no_grad(), refined(objective.flow):
        assert float(objective.loss(data)) == pytest.approx(best, abs=1e-5)


class Exploding(MaximumLikelihood):
    """Goes wrong in the way and at the step that it is told."""

    fault, step = "nan", 25

    def loss(self, batch: object) -> Tensor:
        loss = super().loss(batch)
        if self.training and self.trainer.global_step >= self.step:
            if self.fault == "error":
                raise IntegrationError("a field without bounds")
            loss = loss + {"nan": math.nan, "infinite": math.inf, "huge": 1e4}[self.fault]
        return loss


@pytest.mark.parametrize("fault", ["nan", "infinite", "huge", "error"])
def test_divergence_stops_the_training_and_keeps_the_best(fault, tmp_path):
    objective = Exploding(MongeAmpereFlow(2, 4), steps=100)
    objective.fault = fault
    with pytest.raises(DivergenceError, match=r"diverged at step \d+: .*best.ckpt.* Try a lower"):
        train(objective, tmp_path)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["global_step"] <= 30
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())
    restore(objective, tmp_path / "best.ckpt")
    with torch.no_grad():
        assert torch.isfinite(objective.flow.log_prob(torch.randn(3, 2))).all()


def test_divergence_before_the_first_checkpoint_says_so(tmp_path):
    objective = Exploding(MongeAmpereFlow(2, 4), steps=100)
    objective.step = 0
    with pytest.raises(DivergenceError, match="no checkpoint was written"):
        train(objective, tmp_path)


@pytest.mark.parametrize("entries", [1, 100])
def test_which_rise_is_a_divergence_depends_on_the_size_of_an_event(entries):
    """Five nats are many for one number, and noise for the sum over a lattice of a hundred."""
    guard = DivergenceGuard()
    trainer = lightning.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    objective = MaximumLikelihood(MongeAmpereFlow(2, 4), steps=1)
    objective.entries = entries
    losses = [*[-1.0] * 20, *[4.0] * 20]
    stopped = contextlib.nullcontext() if entries > 50 else pytest.raises(DivergenceError)
    with stopped:
        for loss in losses:
            guard.on_train_batch_end(trainer, objective, {"loss": torch.tensor(loss)}, None, 0)


def test_other_solver_steps_are_no_divergence():
    """The guard of the solver ends an exploit, and the honest loss is higher."""
    guard = DivergenceGuard()
    trainer = lightning.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    objective = MaximumLikelihood(MongeAmpereFlow(2, 4, steps=2), steps=1)
    for steps, loss in ((2, -1.0), (4, 4.0)):
        objective.flow._transform.steps = steps
        for _ in range(30):
            guard.on_train_batch_end(trainer, objective, {"loss": torch.tensor(loss)}, None, 0)
    resumed = DivergenceGuard()
    resumed.load_state_dict(guard.state_dict())
    with pytest.raises(DivergenceError, match=r"risen from 4 to"):  # noqa: PT012
        for _ in range(30):
            resumed.on_train_batch_end(trainer, objective, {"loss": torch.tensor(9.0)}, None, 0)


def test_a_field_without_bounds_in_a_validation_is_a_divergence(tmp_path):
    class Unbounded(MaximumLikelihood):
        def loss(self, batch: object) -> Tensor:
            if not self.training:
                raise IntegrationError("a field without bounds")
            return super().loss(batch)

    with pytest.raises(DivergenceError, match="a field without bounds"):
        train(Unbounded(MongeAmpereFlow(2, 4), steps=20), tmp_path)


def test_a_finished_training_is_read_and_not_trained_on(tmp_path, capsys):
    objective = MaximumLikelihood(MongeAmpereFlow(2, 4), steps=20, anneal=False)
    rows = train(objective, tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    again = MaximumLikelihood(MongeAmpereFlow(2, 4), steps=20, anneal=False)
    assert train(again, tmp_path) == rows
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    for one, other in zip(objective.flow.parameters(), again.flow.parameters(), strict=True):
        assert torch.equal(one, other)
    assert f"{tmp_path} holds a finished training of 20 steps" in capsys.readouterr().err


class Seen(MaximumLikelihood):
    """Remembers the first row of each batch, and the noise of each step."""

    def loss(self, batch: Tensor) -> Tensor:
        if self.training:
            rows, noise = self.__dict__.setdefault("seen", ([], []))
            rows.append(float(batch[0, 0]))
            noise.append(float(torch.rand(())))
        return super().loss(batch)


def test_a_longer_budget_goes_on_within_an_interval(tmp_path, capsys):
    """Three batches of ten were left: they come next."""
    halves = [Seen(MongeAmpereFlow(2, 4), steps=steps) for steps in (17, 34)]
    for half in halves:
        train(half, tmp_path / "halves")
    whole = Seen(MongeAmpereFlow(2, 4), steps=34)
    train(whole, tmp_path / "whole")
    for part in range(2):
        assert [*halves[0].seen[part], *halves[1].seen[part]] == whole.seen[part]
    assert "goes on from step 17" in capsys.readouterr().err


def test_accumulated_gradients_are_of_different_noise(tmp_path):
    objective = Seen(MongeAmpereFlow(2, 4), steps=10)
    rows = train(objective, tmp_path, accumulate_grad_batches=2)
    assert rows[-1]["step"] == 10
    for part in objective.seen:
        assert len(set(part)) == len(part) == 20


def test_restored_weights_leave_the_budget_whole(tmp_path):
    objective = MaximumLikelihood(MongeAmpereFlow(2, 4), steps=10)
    train(objective, tmp_path / "first")
    restore(objective, tmp_path / "first" / "best.ckpt")
    assert objective.progress == 1
    assert [row["step"] for row in train(objective, tmp_path / "second")] == [10]
    other = MaximumLikelihood(MongeAmpereFlow(2, 4), minutes=1)
    restore(other, tmp_path / "first" / "best.ckpt")
    assert other.progress == 0
    assert other.seconds < 30


def test_the_best_stays_the_best_in_a_folder_that_was_moved(tmp_path):
    objective = MaximumLikelihood(MongeAmpereFlow(2, 16, steps=2), learning_rate=1e-2, steps=30)
    train(objective, tmp_path / "old")
    kept = weights(tmp_path / "old", "best.ckpt")
    (tmp_path / "old").rename(tmp_path / "new")
    longer = MaximumLikelihood(MongeAmpereFlow(2, 16, steps=2), learning_rate=1e-2, steps=60)
    rows = train(longer, tmp_path / "new", callbacks=[Spoil()])
    assert min(row["validation"] for row in rows[3:]) > rows[2]["validation"]
    for key, value in weights(tmp_path / "new", "best.ckpt").items():
        assert torch.equal(value, kept[key])
    assert not (tmp_path / "old").exists()


def test_a_checkpoint_is_written_whole(tmp_path, monkeypatch):
    """Killed while it writes, a training has the checkpoint before."""
    train(MaximumLikelihood(MongeAmpereFlow(2, 4), steps=10), tmp_path)
    before = (tmp_path / "last.ckpt").read_bytes()

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(MaximumLikelihood(MongeAmpereFlow(2, 4), steps=20), tmp_path)
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_the_last_checkpoint_is_of_the_last_step(tmp_path):
    """Also where time runs out within an interval."""
    objective = MaximumLikelihood(MongeAmpereFlow(2, 4, steps=1), minutes=0.02)
    rows = train(objective, tmp_path)
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["global_step"] == rows[-1]["step"]
    assert last["budget"]["progress"] == 1


def coarse_flow() -> MongeAmpereFlow:
    """One Euler step with stiff ridges: its density is one of the solver's making."""
    flow = MongeAmpereFlow(2, 32, steps=1, solver="euler")
    nn.init.normal_(flow._transform.potential.weight, std=3.0)
    return flow


def test_an_unwatched_training_exploits_a_coarse_solver(tmp_path):
    """What the guard is for: the loss that training sees is not the loss."""
    objective = MaximumLikelihood(coarse_flow(), learning_rate=2e-2, steps=100)
    rows = train(objective, tmp_path)
    assert rows[-1]["solver_error"] < -0.3
    assert rows[-1]["solver_steps"] == 1


def test_the_guard_catches_it(tmp_path):
    objective = MaximumLikelihood(coarse_flow(), learning_rate=2e-2, steps=100)
    rows = train(objective, tmp_path / "guarded", callbacks=[SolverGuard(0.05, most=256)])
    assert rows[-1]["solver_steps"] > 1
    assert abs(rows[-1]["solver_error"]) < 0.3
    # and the steps are those of the checkpoint
    again = MaximumLikelihood(coarse_flow(), steps=100)
    restore(again, tmp_path / "guarded" / "best.ckpt")
    assert again.flow._transform.steps == objective.flow._transform.steps > 1


def validate(guard: SolverGuard, flow: MongeAmpereFlow, *errors: float) -> list[int]:
    """The steps of a flow after each of some validations with these solver errors."""
    steps = []
    for error in errors:
        trainer = SimpleNamespace(callback_metrics={"solver_error": torch.tensor(error)})
        guard.on_validation_end(trainer, flow)
        steps.append(flow._transform.steps)
    return steps


def test_the_guard_takes_steps_back_where_the_error_allows_it():
    flow = MongeAmpereFlow(2, 4, steps=4)
    guard = SolverGuard(0.1, patience=2)
    guard.on_fit_start(None, flow)
    assert validate(guard, flow, -0.2, 0.2) == [6, 9]  # half as many again
    # with 8 steps of rk4 instead of 9 the error is 1.6 times as large
    assert validate(guard, flow, 0.0215, 0.0215, 0.0215) == [9, 9, 9]
    assert validate(guard, flow, 0.02, -0.02, 0.001, 0.05, 0.001) == [9, 8, 8, 8, 8]
    saved, guard = guard.state_dict(), SolverGuard(0.1, patience=2)
    guard.load_state_dict(saved)
    guard.on_fit_start(None, flow)  # resumed: the fewest are those of the first start
    assert validate(guard, flow, *[0.0] * 10) == [7, 7, 6, 6, 5, 5, 4, 4, 4, 4]


def test_the_guard_gives_up_in_words(tmp_path):
    objective = MaximumLikelihood(coarse_flow(), learning_rate=2e-2, steps=100)
    with pytest.raises(DivergenceError, match=r"error is .* nats at 1 steps.*more than 1 "):
        train(objective, tmp_path, callbacks=[SolverGuard(0.05, most=1)])


def test_a_checkpoint_of_another_flow_is_refused(tmp_path):
    train(MaximumLikelihood(MongeAmpereFlow(2, 4), steps=10), tmp_path)
    with pytest.raises(ValueError, match=r"is the checkpoint of another flow: .*expected"):
        train(MaximumLikelihood(MongeAmpereFlow(2, 5), steps=10), tmp_path)
    with pytest.raises(ValueError, match="is the checkpoint of another flow"):
        restore(MaximumLikelihood(MongeAmpereFlow(2, 5), steps=1), tmp_path / "best.ckpt")


def test_a_damaged_checkpoint_is_refused(tmp_path):
    objective = MaximumLikelihood(MongeAmpereFlow(2, 4), steps=10)
    train(objective, tmp_path)
    content = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"last.ckpt is damaged or no checkpoint"):
        train(objective, tmp_path)
    torch.save({"state_dict": {}}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="it lacks budget, solver_steps"):
        train(objective, tmp_path)
    with pytest.raises(ValueError, match="path: there is no checkpoint"):
        restore(objective, tmp_path / "none.ckpt")
