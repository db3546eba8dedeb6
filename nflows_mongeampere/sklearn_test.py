from __future__ import annotations

import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from nflows_mongeampere import AccuracyWarning, files
from nflows_mongeampere.sklearn import MongeAmpereDensity, _Fit
from nflows_mongeampere.tabular import Bounded


@parametrize_with_checks([MongeAmpereDensity(max_iter=5)])
def test_scikit_learn_s_own_checks(estimator, check, monkeypatch):
    monkeypatch.setattr("nflows_mongeampere.sklearn.MARGINALS", ("affine",))  # those without a fit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccuracyWarning)
        check(estimator)


def mixed(rows=300, seed=0):
    """A heavy tail in a small unit, an integer, a column with ends, and one that follows others."""
    rng = np.random.default_rng(seed)
    amount = rng.lognormal(-3, 1, rows)
    count = rng.poisson(2 + 10 * np.minimum(amount, 1))
    share = rng.beta(0.7, 2, rows)
    far = 1e6 + 300 * share + rng.normal(size=rows)
    return np.stack([amount, count, share, far], axis=1)


@pytest.fixture(scope="module")
def fitted():
    bounds = {0: (0, None), 2: (0, 1)}
    return MongeAmpereDensity(bounds=bounds, max_iter=30, random_state=0).fit(mixed())


def test_it_is_better_than_a_normal(fitted):
    """Marginals and noise are in the units of the table: one that forgot a scale would be off."""
    test = mixed(1000, seed=1)
    normal = GaussianMixture(1).fit(mixed()).score(test)
    assert fitted.score(test) > normal + 0.5
    assert abs(fitted.held_out_score_ - fitted.score(test)) < 0.5


def test_the_density_of_a_table_is_normalised():
    """By quadrature, with an end, a heavy tail and several flows."""
    rng = np.random.default_rng(0)
    amounts = rng.lognormal(size=(125, 1)) * 100
    density = MongeAmpereDensity(bounds={0: (0, None)}, max_iter=20, random_state=0).fit(amounts)
    logs = np.linspace(-12, 25, 4001)  # x = exp(log), dx = x dlog
    log_density = density.score_samples(np.exp(logs)[:, None]) + logs
    assert np.trapezoid(np.exp(log_density), logs) == pytest.approx(1, abs=2e-3)


def test_samples_have_the_density_of_the_table(fitted):
    """The entropy of samples under the density is that of rows that it was fitted to."""
    samples = fitted.sample(2000)
    assert (samples[:, 1] == samples[:, 1].round()).all()
    assert (samples[:, 0] > 0).all()
    assert ((samples[:, 2] > 0) & (samples[:, 2] < 1)).all()
    table = mixed(2000, seed=2)
    real = [0, 2, 3]
    assert np.abs(np.median(samples, 0) / np.median(table, 0) - 1)[real].max() < 0.2
    assert samples[:, 1].mean() == pytest.approx(table[:, 1].mean(), rel=0.15)
    correlation = np.corrcoef(samples[:, 2], samples[:, 3])[0, 1]
    assert correlation > 0.99
    assert abs(fitted.score(samples) - fitted.score(table)) < 0.5


def test_the_probabilities_of_integers_sum_to_one():
    rng = np.random.default_rng(0)
    table = rng.poisson(4, size=(99, 1)).astype(float)
    density = MongeAmpereDensity(max_iter=60, random_state=0).fit(table)
    assert [column.integer for column in density.columns_] == [True]
    probability = np.exp(density.score_samples(np.arange(-5, 40.0)[:, None]))
    assert probability.sum() == pytest.approx(1, abs=0.1)


def test_ends_are_detected():
    rng = np.random.default_rng(0)
    visibility = np.minimum(rng.normal(9, 2, 99), 10)
    table = np.stack([visibility, rng.normal(size=99)], axis=1)
    density = MongeAmpereDensity(max_iter=10, random_state=0).fit(table)
    assert [(c.lower, c.upper) for c in density.columns_] == [(None, 10.0), (None, None)]
    assert density.sample(500)[:, 0].max() == 10
    assert np.isneginf(density.score_samples([[11.0, 0.0]])).all()
    assert np.isfinite(density.score_samples(table)).all()


def test_a_seed_decides_all():
    table = mixed(60)
    state = torch.get_rng_state()
    one, two = (MongeAmpereDensity(max_iter=10, random_state=3).fit(table) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(one.score_samples(table), two.score_samples(table))
    np.testing.assert_array_equal(one.sample(5), two.sample(5))
    other = MongeAmpereDensity(max_iter=10, random_state=4).fit(table)
    assert (other.score_samples(table) != one.score_samples(table)).any()


def test_copies_and_files_are_the_same_density(fitted, tmp_path):
    table = mixed(20, seed=5)
    expected = fitted.score_samples(table)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).score_samples(table), expected)
    fitted.save(tmp_path / "density.safetensors")
    again = MongeAmpereDensity.load(tmp_path / "density.safetensors")
    np.testing.assert_array_equal(again.score_samples(table), expected)
    assert again.columns_ == fitted.columns_
    assert again.held_out_score_ == fitted.held_out_score_
    refit = clone(again).set_params(max_iter=1).fit(table)  # bounds by name
    assert [c.lower for c in refit.columns_] == [0, None, 0, None]
    with pytest.raises(NotFittedError):
        clone(fitted).sample()


def test_a_file_of_something_else(tmp_path):
    files.save(Bounded([0.0], [1.0]), tmp_path / "bounds.safetensors")
    with pytest.raises(ValueError, match=r"path: .* holds a Bounded"):
        MongeAmpereDensity.load(tmp_path / "bounds.safetensors")


def test_pipelines_and_searches():
    table = mixed(60)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), MongeAmpereDensity(random_state=0, integers=[])),
        {"mongeamperedensity__max_iter": [0, 20]},
        cv=2,
    ).fit(table)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert len(search.best_estimator_.score_samples(table)) == 60


def test_columns_of_pandas_are_named():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(mixed(60), columns=["amount", "count", "share", "far"])
    density = MongeAmpereDensity(bounds={"share": (0, 1)}, max_iter=1, random_state=0).fit(table)
    assert [column.name for column in density.columns_] == ["amount", "count", "share", "far"]
    assert density.columns_[2].upper == 1
    assert isinstance(density.score_samples(table), np.ndarray)


def test_training_ends_at_its_best(monkeypatch):
    """Weights that the held-out rows like less than the start are thrown away."""
    start = MongeAmpereDensity(max_iter=0, random_state=0).fit(mixed(90))
    trained = MongeAmpereDensity(max_iter=100, learning_rate=3.0, random_state=0).fit(mixed(90))
    assert trained.held_out_score_ >= start.held_out_score_


def test_many_rows_may_lie_in_many_places():
    """In more than a base of 32 normals can tell apart; the true density is known."""
    rng = np.random.default_rng(0)
    centres = 30 * rng.random((60, 2))
    table = rng.permutation(centres.repeat(120, axis=0)) + 0.3 * rng.normal(size=(7200, 2))
    train, test = table[:6400], table[6400:]
    density = MongeAmpereDensity(bounds={}, max_iter=0, random_state=0).fit(train)
    squares = np.square((test[:, None] - centres) / 0.3).sum(2)
    truth = np.log(np.exp(-squares / 2).mean(1) / (2 * np.pi * 0.3**2)).mean()
    assert truth - 0.2 < density.score(test) < truth


def test_a_solver_that_stays_rough_is_told(monkeypatch):
    monkeypatch.setattr(_Fit, "_choose_steps", lambda *_: 0.25)
    with pytest.warns(
        AccuracyWarning, match=r"off by about 0\.25 nats, more than tolerance=0\.001"
    ):
        MongeAmpereDensity(max_iter=1).fit(mixed(40))


def test_solver_steps_are_chosen_by_the_tolerance():
    density = MongeAmpereDensity(max_iter=60, tolerance=1e-5, random_state=0).fit(mixed(90))
    assert density.solver_error_ <= 1e-5
    rough = density.score_samples(mixed(50, seed=8))
    for transport in (m for m in density.model_.modules() if hasattr(m, "integrator")):
        transport.integrator = replace(transport.integrator, steps=8 * transport.steps)
    assert np.abs(density.score_samples(mixed(50, seed=8)) - rough).mean() < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"integers": ["size"]}, "integers: got 'size', expected one of x0, x1, x2, x3"),
        ({"integers": "some"}, "integers: got 'some'"),
        ({"integers": [7]}, "integers: got column 7, expected less than 4"),
        ({"bounds": {2: (0, 0.5)}}, r"bounds: got \(0, 0.5\) for x2, whose values are from"),
        ({"validation_fraction": 0.9}, "validation_fraction: got 0.9, expected at most 0.5"),
        ({"components": 0}, "components: got 0"),
        ({"tolerance": 0}, "tolerance: got 0"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        MongeAmpereDensity(**change).fit(mixed(40))


def test_constant_columns_and_too_few_rows():
    table = mixed(40)
    table[:, 1] = 3
    with pytest.raises(ValueError, match="X: columns x1 are constant"):
        MongeAmpereDensity().fit(table)
    with pytest.raises(ValueError, match="minimum of 10 is required"):
        MongeAmpereDensity().fit(mixed(9))


def test_a_progress_bar_where_it_is_asked_for(capsys):
    MongeAmpereDensity(max_iter=10, verbose=True, random_state=0).fit(mixed(40))
    assert "fit" in capsys.readouterr().out
    MongeAmpereDensity(max_iter=10, random_state=0).fit(mixed(40))
    assert capsys.readouterr().out == ""


def test_outliers_among_many_rows_are_not_impossible():
    """By narrow normals alone this row would have -5,000 nats."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=7000)
    table = np.stack([x, x + 0.1 * rng.normal(size=7000)], axis=1)
    density = MongeAmpereDensity(components=2, max_iter=10, random_state=0).fit(table)
    inside, outside = density.score_samples([[0.0, 0.0], [5.0, -5.0]])
    assert inside > 0
    assert -100 < outside < -20
