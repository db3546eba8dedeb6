"""Whether samples look like digits, and are no copies: what a classifier and neighbours say."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from torch import Tensor

WHITE = 255


@dataclass(frozen=True)
class Verdict:
    """What a classifier and the training images say of images.

    Attributes:
        count: of the images.
        confidence: mean of the highest probability that the classifier gives to a digit.
        confidence_se: its standard error.
        entropy: of the digits that it takes them for, relative to ln 10: 1 if all are as many.
        shares: of the ten digits among them.
        distance: mean Euclidean distance to the nearest training image, in grey levels from 0 to 1.
        copies: share of the images that equal a training image.
    """

    count: int
    confidence: float
    confidence_se: float
    entropy: float
    shares: list[float]
    distance: float
    copies: float


def train_classifier(levels: Tensor, labels: Tensor, components: int = 1000) -> Pipeline:
    """Logistic regression on radial functions of the pixels, where probabilities are calibrated.

    Far from all digits the radial functions vanish and the ten probabilities are those of the
    labels: what looks like no digit gets little confidence. (A support vector machine or a network
    is most confident of noise.)

    Args:
        levels: grey levels of real digits, 0 to 255, shape (N, 784).
        labels: which digits they are, shape (N,).
        components: how many of the digits radial functions are about.
    """
    return make_pipeline(
        Nystroem(gamma=0.02, n_components=min(components, len(levels)), random_state=0),
        LogisticRegression(C=10, max_iter=300),
    ).fit(grey(levels), labels.numpy())


def judge(classifier: Pipeline, levels: Tensor, train: Tensor) -> Verdict:
    """What a classifier says of images, and how far they are from the training images.

    Args:
        classifier: as :func:`train_classifier` returns it.
        levels: the images, 0 to 255, shape (N, 784).
        train: the training images of the flow, alike.
    """
    probabilities = classifier.predict_proba(grey(levels))
    confidence = probabilities.max(1)
    shares = np.bincount(probabilities.argmax(1), minlength=10) / len(levels)
    _, distances = nearest(levels, train)
    present = shares[shares > 0]
    return Verdict(
        count=len(levels),
        confidence=float(confidence.mean()),
        confidence_se=float(confidence.std() / math.sqrt(len(levels))),
        entropy=float(-(present * np.log(present)).sum() / math.log(10)),
        shares=shares.tolist(),
        distance=float(distances.mean()),
        copies=float((distances == 0).float().mean()),
    )


def nearest(levels: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """The place of the nearest training image of each image, and its Euclidean distance."""
    known = train.float()
    places = torch.cat([torch.cdist(part.float(), known).argmin(1) for part in levels.split(100)])
    # differences again, since those of cdist's products leave copies a distance
    return places, (levels.float() - known[places]).norm(dim=1) / WHITE


def grey(levels: Tensor) -> NDArray[np.float32]:
    """Grey levels from 0 to 1, as scikit-learn wants them."""
    greys: NDArray[np.float32] = levels.numpy().astype(np.float32) / np.float32(WHITE)
    return greys
