"""Flows at work: classes of digits, sbi, the posterior of a VAE, nested sampling."""

import json
import tempfile

import numpy as np
import pytest
import torch
from sbi.inference import NPE
from sbi.simulators.linear_gaussian import (
    linear_gaussian,
    true_posterior_linear_gaussian_mvn_prior,
)
from sbi.utils.tracking import TensorBoardTracker
from sklearn.datasets import load_digits
from torch.distributions import MultivariateNormal
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

import conditional_digits
import inference
import nested_sampling
import vae
from nflows_mongeampere.training import (
    EndlessBatches,
    MaximumLikelihood,
    endless,
    fit,
)
from programs import call

pytestmark = pytest.mark.long

# classes of digits


@pytest.fixture(scope="module")
def labelled_digits():
    return conditional_digits.load()


def test_each_digit_has_its_own_label(labelled_digits):
    images, labels = labelled_digits
    bunch = load_digits()
    known = {tuple(row): label for row, label in zip(bunch.data, bunch.target, strict=True)}
    for part in ("train", "validation", "test"):
        for row, label in zip(getattr(images, part), getattr(labels, part), strict=True):
            assert known[tuple(row.tolist())] == label


def test_the_flow_learns_that_the_class_matters(labelled_digits, tmp_path):
    images, labels = labelled_digits
    flow = conditional_digits.conditional_pipeline(images.train)
    rows = (images.train, labels.train)
    watched = conditional_digits.dequantised(
        (images.validation, labels.validation), torch.Generator()
    )
    batches = EndlessBatches(rows, 100, 0, conditional_digits.dequantised)
    fit(
        MaximumLikelihood(flow, learning_rate=1e-2, steps=100, warmup_steps=10),
        endless(batches, interval=100),
        DataLoader(TensorDataset(*watched), batch_size=len(watched[0])),
        tmp_path,
    )
    result = conditional_digits.score(flow.eval(), images.test[:150], labels.test[:150])
    assert result.accuracy > 0.85  # 0.1 by chance
    assert result.nll < result.mixture_nll - 1 < 100  # 101.0 for the Gaussian of digits.py
    assert abs(result.nll - result.nll_double_steps) < 0.05


# posteriors of sbi


def test_the_posterior_of_a_linear_gaussian_is_found():
    mean, prior = torch.zeros(2), MultivariateNormal(torch.zeros(2), torch.eye(2))
    noise = torch.tensor([[0.5, 0.3], [0.3, 0.4]])
    shift = torch.tensor([1.0, -1.0])
    theta = prior.sample((1000,))
    x = linear_gaussian(theta, shift, noise)
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        trainer = NPE(
            prior,
            inference.monge_ampere,
            tracker=TensorBoardTracker(writer),
            show_progress_bars=False,
        )
        trainer.append_simulations(theta, x).train(learning_rate=1e-2, stop_after_epochs=8)
    posterior = trainer.build_posterior()
    for observed in torch.tensor([[1.0, -1.0], [2.0, -1.5]]):
        exact = true_posterior_linear_gaussian_mvn_prior(observed, shift, noise, mean, torch.eye(2))
        samples = posterior.sample((4000,), x=observed, show_progress_bars=False)
        torch.testing.assert_close(samples.mean(0), exact.mean, rtol=0, atol=0.12)
        torch.testing.assert_close(samples.T.cov(), exact.covariance_matrix, rtol=0, atol=0.07)
        # within what the densities differ by, the divergence from the exact posterior is zero
        divergence = posterior.log_prob(samples, x=observed) - exact.log_prob(samples)
        assert divergence.mean().abs() < 0.1


def test_the_likelihood_of_a_linear_gaussian_is_found():
    problem = inference.PROBLEMS[inference.Task.linear_gaussian]
    theta = problem.prior.sample((1000,))
    (entry, *_) = inference.ESTIMATORS[inference.Method.nle]
    trainer, estimator = inference.train(
        inference.Method.nle, entry, problem, theta, problem.simulate(theta), epochs=60
    )
    theta = problem.prior.sample((1000,))
    x = problem.simulate(theta)
    exact = MultivariateNormal(theta, inference.NOISE).log_prob(x)
    with torch.no_grad():
        divergence = exact - estimator.log_prob(x[None], condition=theta)[0]
    assert 0 < divergence.mean() < 0.1  # nats; 1.7 between x and its mean over the prior
    posterior = trainer.build_posterior(**inference.SAMPLING[inference.Method.nle])
    for observed in torch.tensor([[1.0, -1.0], [2.5, -1.5]]):  # the prior ends at 3
        exact = problem.posterior(observed, 20_000)
        samples = posterior.sample((2000,), x=observed, show_progress_bars=False)
        torch.testing.assert_close(samples.mean(0), exact.mean(0), rtol=0, atol=0.15)
        torch.testing.assert_close(samples.T.cov(), exact.T.cov(), rtol=0, atol=0.1)


def test_the_estimator_answers_in_the_shapes_of_sbi():
    theta, x = torch.randn(20, 3), torch.randn(20, 4)
    estimator = inference.monge_ampere(theta, x)
    with torch.no_grad():
        for parameter in estimator.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        assert estimator.loss(theta, x).shape == (20,)
        samples = estimator.sample((7,), x[:5])
        assert samples.shape == (7, 5, 3)
        log_prob = estimator.log_prob(samples, x[:5])
        assert log_prob.shape == (7, 5)
        each = estimator.log_prob(samples[:, 2:3], x[2:3])
        torch.testing.assert_close(each, log_prob[:, 2:3])
        samples, log_prob = estimator.sample_and_log_prob((7,), x[:1])
        expected = estimator.log_prob(samples, x[:1])
        torch.testing.assert_close(log_prob, expected, rtol=1e-3, atol=1e-3)
    estimator.loss(theta, x).mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in estimator.parameters())


@pytest.mark.parametrize(
    ("task", "width"),
    [
        (inference.Task.two_moons, 0.01),
        (inference.Task.gaussian_mixture, 0.1),
        (inference.Task.linear_gaussian, 0.05),
    ],
)
def test_exact_samples_are_those_of_simulations_that_hit_the_observation(task, width):
    problem = inference.PROBLEMS[task]
    observed = problem.simulate(problem.prior.sample((1,)))[0]
    theta = problem.prior.sample((10_000_000,))
    hit = theta[((problem.simulate(theta) - observed).abs() < width).all(1)]
    exact = problem.posterior(observed, 5000)
    assert len(hit) > 300
    for origin in (torch.zeros(2), observed):
        a, b = (hit - origin).abs(), (exact - origin).abs()
        error = 4 * b.std(0) * (1 / len(a) + 1 / len(b)) ** 0.5 + width / 4
        assert ((a.mean(0) - b.mean(0)).abs() < error).all()


# the posterior of a VAE


@pytest.fixture(scope="module")
def black_and_white(labelled_digits):
    images, _ = labelled_digits
    return tuple(map(vae.black_and_white, (images.train, images.validation, images.test)))


@pytest.mark.parametrize("name", list(vae.POSTERIORS))
def test_the_bounds_of_the_evidence_are_in_order(name, black_and_white, tmp_path):
    train, watched, test = black_and_white
    test = test[:100]
    model = vae.POSTERIORS[name]()
    before = vae.score(name, model, test, seed=0)
    fit(
        vae.NegativeELBO(model, learning_rate=5e-3, steps=100),
        endless(EndlessBatches(train, 100), interval=100),
        DataLoader(watched, batch_size=len(watched)),
        tmp_path,
    )
    after = vae.score(name, model.eval(), test, seed=0)
    assert after.elbo > before.elbo + 5
    assert after.elbo < after.weighted < after.evidence + 0.02
    assert abs(after.elbo - after.elbo_double_steps) < 0.02
    finer = vae.log_evidence(model, test, 2 * vae.GRID).mean().item()
    assert after.evidence == pytest.approx(finer, abs=0.01)


def test_an_encoder_knows_the_density_of_its_latents(black_and_white):
    model = vae.conditional()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        x = black_and_white[0][:4]
        z, log_q = model.q0(x, num_samples=3)
        assert z.shape == (4, 3, vae.LATENTS)
        assert log_q.shape == (4, 3)
        expected = model.q0.flow.log_prob(z.flatten(0, 1), context=x.repeat_interleave(3, dim=0))
        torch.testing.assert_close(log_q.flatten(), expected, rtol=1e-3, atol=1e-3)


# nested sampling


def test_the_exact_evidence_is_that_of_a_fine_grid():
    cells = np.arange(-5, 5, 0.0025) + 0.00125
    points = {"x": cells[:, None], "y": cells}
    evidence = np.exp(nested_sampling.Rosenbrock().log_likelihood(points)).mean()
    assert nested_sampling.exact_log_evidence() == pytest.approx(np.log(evidence), abs=1e-4)


def test_nested_sampling_finds_the_evidence():
    run = nested_sampling.sample("Monge-Ampère", live=200, seed=0)
    assert abs(run.log_evidence - nested_sampling.exact_log_evidence()) < 4 * run.error < 1
    assert run.calls > 2000


# the commands


@pytest.mark.parametrize(
    ("script", "options", "picture"),
    [
        ("conditional_digits.py", ("--seconds", "1"), "conditional.png"),
        (
            "inference.py",
            ("--simulations=100", "--observations=1", "--seeds=1", "--epochs=1"),
            "inference.png",
        ),
        ("nested_sampling.py", ("--live", "50", "--seeds", "1"), None),
        ("vae.py", ("--seconds", "1", "--seeds", "1"), "vae.png"),
    ],
)
def test_an_example_writes_what_it_promises(script, options, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call(script, *options, "--out", "out")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(written) == {"results.json", picture} - {None}
    assert all(written[name].startswith(b"\x89PNG") for name in set(written) - {"results.json"})
    results = json.loads((out / "results.json").read_text())
    assert results["command"].startswith(f"python examples/{script} ")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # no logs of sbi beside it
    assert "Monge-Ampère" in done.stdout or "given the class" in done.stdout
