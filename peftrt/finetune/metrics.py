"""What an evaluation measures."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def accuracy(predicted: NDArray[np.int64], actual: NDArray[np.int64]) -> float:
    """The share of predictions that are right."""
    return float((predicted == actual).mean())


def macro_f1(predicted: NDArray[np.int64], actual: NDArray[np.int64]) -> float:
    """The mean of ``2 TP / (2 TP + FP + FN)`` over the classes that occur in either, each counted alike."""
    scores = []
    for label in np.union1d(predicted, actual):
        hits = int(((predicted == label) & (actual == label)).sum())
        scores.append(2 * hits / (int((predicted == label).sum()) + int((actual == label).sum())))
    return float(np.mean(scores))


def perplexity(loss: float) -> float:
    """``exp`` of the mean loss a token, in nats; infinite where that is beyond a float."""
    return math.exp(loss) if loss < 700 else math.inf
