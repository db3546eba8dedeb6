"""Trainings from beginning to end: resumed, in two processes, diverging, and on a coarse solver."""

from __future__ import annotations

import contextlib
import csv
import math
import pickle
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import normflows
import pytest
import pytorch_lightning as lightning
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import ActNorm, CompositeTransform
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

from nflows_mongeampere import (
    IntegrationError,
    MongeAmpereFlow,
    MongeAmpereTransform,
    RidgePotential,
    refined,
)
from nflows_mongeampere.normflows import MongeAmpere
from nflows_mongeampere.training import (
    DivergenceError,
    DivergenceGuard,
    EndlessBatches,
    FullMatrixSOAP,
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


def arguments(script: Path, folder: Path, processes: int = 1, pause: float = 0.0) -> list[str]:
    return [str(script), str(folder), str(processes), str(pause)]


def run_here(script: Path, folder: Path) -> None:
    """In this process, which saves the imports."""
    with mock.patch.object(sys, "argv", arguments(script, folder)):
        runpy.run_path(str(script), run_name="__main__")


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
    run_here(script, folder)
    return folder


def test_a_killed_training_ends_like_any_other(script, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, *arguments(script, folder, pause=0.1)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (folder / "last.ckpt").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3)  # within the second interval
        process.send_signal(signal.SIGKILL)
    assert len(table(folder)) < 5
    run_here(script, folder)
    assert table(folder) == table(uninterrupted)
    for name in ("last.ckpt", "best.ckpt"):
        after, expected = weights(folder, name), weights(uninterrupted, name)
        assert all(torch.equal(after[key], expected[key]) for key in expected)
    assert sorted(p.name for p in folder.iterdir()) == ["best.ckpt", "last.ckpt", "metrics.csv"]


def test_two_processes_learn_what_one_does(script, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, *arguments(script, folder, processes=2)]
    subprocess.run(command, check=True, capture_output=True)
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


DATA = torch.randn(200, 2, generator=torch.Generator().manual_seed(1)).square()
VALIDATION = DataLoader(DATA, batch_size=100)


def train(
    objective: Objective,
    folder: Path,
    *,
    data: Tensor = DATA,
    batch_size: int = 50,
    validation: DataLoader | None = VALIDATION,
    **keywords: object,
) -> list[dict[str, float]]:
    batches = endless(EndlessBatches(data, batch_size), interval=10)
    keywords = {"accelerator": "cpu", **keywords}
    return fit(objective, batches, validation, folder, **keywords).rows  # type: ignore[arg-type]


def normflows_model(target: nn.Module | None = None) -> nn.Module:
    base = normflows.distributions.DiagGaussian(2, trainable=False)
    return normflows.NormalizingFlow(base, [MongeAmpere(RidgePotential(2, 16), steps=2)], target)


@pytest.mark.parametrize("library", ["nflows", "normflows"])
def test_density_estimation_learns(library, tmp_path):
    flow = MongeAmpereFlow(2, 16, steps=2) if library == "nflows" else normflows_model()
    rows = train(MaximumLikelihood(flow, learning_rate=2e-2, steps=60), tmp_path)
    assert rows[-1]["validation"] < rows[0]["validation"] - 0.5
    assert rows[-1]["step"] == 60
    assert rows[-1]["learning_rate"] < 1e-6


@pytest.mark.parametrize("library", ["nflows", "normflows"])
def test_variational_training_comes_down_to_the_exact_free_energy(library, tmp_path):
    class Ring(nn.Module):
        """exp(-(|x| - 1)²), whose integral is known."""

        def log_prob(self, x: Tensor) -> Tensor:
            return -(torch.linalg.vector_norm(x, dim=1) - 1).square()

    # 2π ∫ r exp(-(r - 1)²) dr = π (1/e + √π (1 + erf 1))
    exact = -math.log(math.pi * (math.exp(-1) + math.sqrt(math.pi) * (1 + math.erf(1))))
    if library == "nflows":
        objective = ReverseKL(
            MongeAmpereFlow(2, 16, steps=2), Ring(), learning_rate=3e-2, steps=100
        )
    else:
        objective = ReverseKL(normflows_model(Ring()), learning_rate=3e-2, steps=100)
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
    with torch.no_grad(), refined(objective.flow):
        assert float(objective.loss(DATA)) == pytest.approx(best, abs=1e-5)


class Exploding(MaximumLikelihood):
    """Goes wrong in the way and at the step that it is told."""

    fault, step = "nan", 25

    def loss(self, batch: object) -> Tensor:
        loss = super().loss(batch)
        if self.training and self.trainer.global_step >= self.step:
            if self.fault == "error":
                raise IntegrationError("a field without bounds")
            loss = loss * {"nan": math.nan, "infinite": math.inf, "huge": 1e4}[self.fault]
        return loss


@pytest.mark.parametrize("fault", ["nan", "infinite", "huge", "error"])
def test_divergence_stops_the_training_and_keeps_the_best(fault, tmp_path):
    objective = Exploding(MongeAmpereFlow(2, 4), steps=100)
    objective.fault = fault
    with pytest.raises(DivergenceError, match=r"diverged at step \d+: .*best.ckpt.* try a lower"):
        train(objective, tmp_path)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["global_step"] <= 30
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())
    restore(objective, tmp_path / "best.ckpt")
    with torch.no_grad():
        assert torch.isfinite(objective.flow.log_prob(torch.randn(3, 2))).all()


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, FullMatrixSOAP])
def test_divergence_in_the_first_step_says_so_and_moves_nothing(optimizer, tmp_path):
    flow = MongeAmpereFlow(2, 4)
    start = parameters_to_vector(flow.parameters())
    objective = Exploding(flow, optimizer=lambda f: optimizer(f.parameters()), steps=100)
    objective.step = 0
    with pytest.raises(DivergenceError, match="no checkpoint was written"):
        train(objective, tmp_path)
    assert torch.equal(parameters_to_vector(flow.parameters()), start)


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


@pytest.mark.parametrize("accumulated", [1, 4])
def test_accumulated_gradients_leave_the_loss_undivided(accumulated, tmp_path):
    objective = MaximumLikelihood(MongeAmpereFlow(2, 4), learning_rate=1e-12, steps=5)
    guard = DivergenceGuard()
    rows = train(objective, tmp_path, accumulate_grad_batches=accumulated, callbacks=[guard])
    batches = EndlessBatches(DATA, 50)
    expected = [float(objective.loss(batches[k]).detach()) for k in range(objective.batches)]
    means = [sum(part) / len(part) for part in (expected[:10], expected[10:]) if part]
    assert [row["train"] for row in rows] == pytest.approx(means, rel=1e-5)
    assert list(guard._recent) == pytest.approx(expected, rel=1e-5)


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


@pytest.mark.parametrize(
    ("validation", "keywords", "message"),
    [
        (None, {}, "no validation_batches"),
        (DataLoader(TensorDataset(DATA[:0])), {}, "no validation_batches"),
        (VALIDATION, {"limit_val_batches": 0}, "no validation_batches"),
        (VALIDATION, {"max_steps": 5}, "no weights were validated"),
        (VALIDATION, {"fast_dev_run": True}, "no weights were validated"),
    ],
)
def test_without_a_validation_the_last_weights_stay(
    validation, keywords, message, tmp_path, capsys
):
    objective = MaximumLikelihood(MongeAmpereFlow(2, 4), learning_rate=1e-2, steps=20)
    train(objective, tmp_path, validation=validation, **keywords)
    assert objective.flow.transform.potential.amplitude.abs().max() > 0
    assert capsys.readouterr().err.count(message) == 1
    if "fast_dev_run" in keywords:  # a rehearsal
        assert not (tmp_path / "last.ckpt").exists()
        return
    again = MaximumLikelihood(MongeAmpereFlow(2, 4), learning_rate=1e-2, steps=20)
    restore(again, tmp_path / "last.ckpt")
    for one, other in zip(objective.flow.parameters(), again.flow.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_training_that_goes_on_without_a_validation(tmp_path):
    """It keeps its last weights, not the best of those that were validated, also when read."""
    train(MaximumLikelihood(MongeAmpereFlow(2, 4), steps=10), tmp_path)
    longer = MaximumLikelihood(MongeAmpereFlow(2, 4), steps=20)
    rows = train(longer, tmp_path, validation=None)
    assert ["validation" in row for row in rows] == [True, False]
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0].startswith("step,minutes,train,validation,solver_error,learning_rate")
    assert ",,," in lines[2]
    again = MaximumLikelihood(MongeAmpereFlow(2, 4), steps=20)
    assert train(again, tmp_path, validation=None) == rows
    last = weights(tmp_path)
    for flow in (longer.flow, again.flow):
        for key, value in flow.state_dict().items():
            assert torch.equal(value, last.get(f"flow.{key}", value))


def test_a_validation_of_every_second_interval_is_not_repeated(tmp_path):
    rows = train(
        MaximumLikelihood(MongeAmpereFlow(2, 4), steps=40), tmp_path, check_val_every_n_epoch=2
    )
    assert ["validation" in row for row in rows] == [False, True, False, True]


def test_every_interval_leaves_a_last_checkpoint(tmp_path):
    """Also one that is not the best."""
    train(
        MaximumLikelihood(MongeAmpereFlow(2, 4), steps=100),
        tmp_path,
        callbacks=[Spoil()],
        max_epochs=4,
    )
    steps = [torch.load(tmp_path / name)["global_step"] for name in ("best.ckpt", "last.ckpt")]
    assert steps == [30, 40]


@pytest.mark.parametrize("folder", ["new/folder", "memory://folder"])
def test_a_checkpoint_callback_of_the_user(folder, tmp_path):
    place = folder if "://" in folder else str(tmp_path / folder)
    mine = ModelCheckpoint(place, monitor="val_loss", save_top_k=-1)
    objective = MaximumLikelihood(MongeAmpereFlow(2, 4), steps=20)
    train(objective, tmp_path / "training", callbacks=[mine])
    assert len(mine.best_k_models) == 2
    assert mine.best_model_path.startswith(place)
    loaded = lightning.Trainer(logger=False, accelerator="cpu").strategy.load_checkpoint(
        mine.best_model_path
    )
    assert loaded["global_step"] in (10, 20)


def test_a_divergence_names_the_best_checkpoint_beside_others(tmp_path):
    objective = Exploding(MongeAmpereFlow(2, 4), steps=100)
    mine = ModelCheckpoint(tmp_path / "mine")
    with pytest.raises(DivergenceError, match=r"training/best.ckpt is kept"):
        train(objective, tmp_path / "training", callbacks=[mine])


def bare_trainer(**keywords: object) -> lightning.Trainer:
    quiet = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger")
    return lightning.Trainer(**dict.fromkeys(quiet, False), accelerator="cpu", **keywords)


@pytest.mark.filterwarnings("ignore:The .*_dataloader:UserWarning")
def test_lightning_tests_as_it_validates_and_predicts_log_densities():
    torch.manual_seed(0)
    flow = MongeAmpereFlow(2, 4, steps=1)
    nn.init.normal_(flow.transform.potential.amplitude)
    objective = MaximumLikelihood(flow, steps=1)
    (validated,) = bare_trainer().validate(objective, VALIDATION, verbose=False)
    (tested,) = bare_trainer().test(objective, VALIDATION, verbose=False)
    with torch.no_grad(), refined(flow):
        fine = float(objective.loss(DATA))
    assert tested["test_loss"] == validated["val_loss"] == pytest.approx(fine, rel=1e-5)
    assert tested["solver_error"] == validated["solver_error"] != 0
    predicted = torch.cat(bare_trainer().predict(objective, DataLoader(TensorDataset(DATA), 70)))
    torch.testing.assert_close(predicted, flow.log_prob(DATA).detach())


@pytest.mark.filterwarnings("ignore:The .*_dataloader:UserWarning")
def test_lightning_predicts_samples_of_a_variational_flow():
    torch.manual_seed(0)
    flow = MongeAmpereFlow(2, 4, steps=20)
    nn.init.normal_(flow.transform.potential.amplitude)
    objective = ReverseKL(flow, torch.distributions.Normal(0.0, 1.0), num_samples=5, steps=1)
    batches = bare_trainer().predict(objective, DataLoader(torch.zeros(2, 1)))
    for x, log_q in batches:
        assert x.shape == (5, 2)
        torch.testing.assert_close(log_q, flow.log_prob(x).detach(), rtol=1e-4, atol=1e-4)
    assert not torch.equal(batches[0][0], batches[1][0])


@pytest.mark.parametrize("variational", [False, True])
def test_losses_reach_a_logger(variational, tmp_path):
    flow, logger = MongeAmpereFlow(2, 4), CSVLogger(tmp_path, name="log")
    if variational:
        target = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 2.0), 1)
        objective: Objective = ReverseKL(flow, target, steps=20)
    else:
        objective = MaximumLikelihood(flow, kinetic=0.1, steps=20)
    rows = train(objective, tmp_path / "training", logger=logger)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        logged = list(csv.DictReader(file))
    for name, column in (("train_loss", "train"), ("val_loss", "validation")):
        values = [float(row[name]) for row in logged if row[name]]
        assert values == pytest.approx([row[column] for row in rows])


def test_a_layer_that_makes_nan_is_named(tmp_path):
    """A single row has no standard deviation; the data are not at fault."""
    transform = MongeAmpereTransform(RidgePotential(2, 4))
    orders = [[ActNorm(2), transform], [transform, ActNorm(2)]]
    for number, layers in enumerate(orders):
        flow = Flow(CompositeTransform(layers), StandardNormal([2]))
        message = rf"is _transform._transforms.{number} \(ActNorm\), given 1 row; no check"
        objective = MaximumLikelihood(flow, steps=20)
        with pytest.warns(UserWarning, match="degrees of freedom"):  # noqa: SIM117
            with pytest.raises(DivergenceError, match=message) as caught:
                train(objective, tmp_path / str(number), batch_size=1)
        assert "data" not in str(caught.value)


def test_a_layer_of_normflows_that_makes_nan_is_named(tmp_path):
    """Its way to noise is the inverse, which hooks of torch do not see."""
    base = normflows.distributions.DiagGaussian(2)
    layers = [MongeAmpere(RidgePotential(2, 4)), normflows.flows.ActNorm(2)]
    objective = MaximumLikelihood(normflows.NormalizingFlow(base, layers), steps=20)
    with pytest.warns(UserWarning, match="degrees of freedom"):  # noqa: SIM117
        with pytest.raises(DivergenceError, match=r"is flows.1 \(ActNorm\), given 1 row"):
            train(objective, tmp_path, batch_size=1)


def test_data_that_are_nan_are_named(tmp_path):
    data = DATA.clone()
    data[3, 1] = math.nan
    objective = MaximumLikelihood(MongeAmpereFlow(2, 4), steps=20)
    with pytest.raises(ValueError, match="inputs: got NaN or infinite entries"):
        train(objective, tmp_path / "flow", data=data)
    objective = MaximumLikelihood(Flow(ActNorm(2), StandardNormal([2])), steps=20)
    message = "as the batch has such entries; no checkpoint"  # and no layer
    with pytest.raises(DivergenceError, match=message):
        train(objective, tmp_path / "other", data=data, batch_size=200)


def test_a_divergence_survives_a_pickle(tmp_path):
    objective = Exploding(MongeAmpereFlow(2, 4), steps=100)
    with pytest.raises(DivergenceError) as caught:
        train(objective, tmp_path)
    copied = pickle.loads(pickle.dumps(caught.value))
    assert type(copied) is DivergenceError
    assert str(copied) == str(caught.value)


def test_advice_begins_with_the_data(tmp_path):
    objective = Exploding(MongeAmpereFlow(2, 4), steps=100)
    with pytest.raises(DivergenceError, match=r"kept. Look at the data first: standardise"):
        train(objective, tmp_path)


@pytest.mark.parametrize(("scale", "shift"), [(1e3, 0.0), (1e-3, 0.0), (1.0, 100.0)])
def test_unscaled_data_are_noticed_once(scale, shift, tmp_path):
    data = torch.stack([DATA[:, 0], (DATA[:, 1] - 1) * scale + shift], dim=1)
    objective = MaximumLikelihood(MongeAmpereFlow(2, 4), learning_rate=1e-9, steps=20)
    with pytest.warns(UserWarning, match="data: 1 of 2 columns .*; worst is column 1") as caught:
        train(objective, tmp_path / "raw", data=data, validation=None)
    assert len([warning for warning in caught if "data:" in str(warning.message)]) == 1
    layers = [ActNorm(2), MongeAmpereTransform(RidgePotential(2, 4))]
    flow = Flow(CompositeTransform(layers), StandardNormal([2]))
    # warnings of the package are errors in tests
    train(MaximumLikelihood(flow, steps=2), tmp_path / "scaled", data=data, validation=None)


def test_a_bare_trainer_leaves_no_trace_in_the_layers(tmp_path):
    """The methods that are watched for a moment are the layers' own again."""
    flow = MongeAmpereFlow(2, 4)
    train(MaximumLikelihood(flow, steps=10), tmp_path)
    assert not {"forward", "inverse", "log_prob", "sample"} & {
        name for layer in flow.modules() for name in vars(layer)
    }
