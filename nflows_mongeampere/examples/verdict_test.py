"""The classifier's verdict: digits are told from noise, copies from samples."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits

from nflows_mongeampere.examples.verdict import judge, nearest, train_classifier


@pytest.fixture(scope="module")
def digits():
    """Real digits at 8x8, enlarged, with their labels."""
    small = torch.tensor(load_digits().images).mul(15).byte()
    large = torch.nn.functional.pad(small.repeat_interleave(3, 1).repeat_interleave(3, 2), [2] * 4)
    return large.flatten(1), torch.tensor(load_digits().target)


@pytest.fixture(scope="module")
def classifier(digits):
    levels, labels = digits
    return train_classifier(levels[:1000], labels[:1000], components=300)


def test_real_digits_are_recognised_with_confidence(digits, classifier):
    levels, labels = digits
    verdict = judge(classifier, levels[1000:], levels[:1000])
    assert classifier.score(levels[1000:].numpy() / 255, labels[1000:].numpy()) > 0.9
    assert verdict.count == 797
    assert verdict.confidence > 0.7
    assert verdict.entropy > 0.98


def test_what_is_no_digit_gets_little_confidence(digits, classifier):
    levels, _ = digits
    noise = torch.randint(256, (100, 784)).byte()
    permuted = levels[1000:1100, torch.randperm(784)]
    for images in (noise, permuted):
        assert judge(classifier, images, levels[:1000]).confidence < 0.4


def test_class_balance_is_that_of_the_predictions(digits, classifier):
    levels, _ = digits
    predicted = classifier.predict(levels.numpy() / 255)
    some = np.concatenate([np.flatnonzero(predicted == digit)[:6] for digit in (2, 7, 7)])
    verdict = judge(classifier, levels[some], levels[:1000])
    assert verdict.shares == pytest.approx([0, 0, 1 / 3, 0, 0, 0, 0, 2 / 3, 0, 0])
    expected = -(math.log(1 / 3) / 3 + math.log(2 / 3) * 2 / 3) / math.log(10)
    assert verdict.entropy == pytest.approx(expected)


def test_nearest_training_images_are_those_of_scipy(digits):
    levels, _ = digits
    places, distances = nearest(levels[1000:1050], levels[:1000])
    every = cdist(levels[1000:1050].numpy() / 255, levels[:1000].numpy() / 255)
    np.testing.assert_array_equal(places, every.argmin(1))
    np.testing.assert_allclose(distances, every.min(1), rtol=1e-5)


def test_copies_are_found(digits, classifier):
    levels, _ = digits
    half = torch.cat([levels[:5], levels[:5].roll(1, 1)])
    assert judge(classifier, half, levels[:1000]).copies == 0.5
    assert judge(classifier, levels[:5], levels[:1000]).distance == 0
