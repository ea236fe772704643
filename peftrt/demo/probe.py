"""The baseline: logistic regression on the frozen encoder's embeddings, trained until nothing moves any more."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTIES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
_FOLDS = 5


def fit_probe(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The weight and bias of ``softmax(x W^T + b)``, its penalty chosen by cross-validation.

    Args:
        features: fp32 ``[M, K]``.
        labels: int64 ``[M]``, in 0 ... classes - 1.
        classes: N.

    Returns:
        W ``[N, K]``, b ``[N]``.
    """
    fold = torch.arange(len(labels)) % _FOLDS

    def score(penalty: float) -> float:
        right = 0
        for held_out in range(_FOLDS):
            inside = fold != held_out
            weight, bias = _minimise(features[inside], labels[inside], classes, penalty)
            right += int((F.linear(features[~inside], weight, bias).argmax(1) == labels[~inside]).sum())
        return right / len(labels)

    return _minimise(features, labels, classes, max(PENALTIES, key=score))


def _minimise(features: Tensor, labels: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """The minimum of ``cross-entropy + penalty / 2 |W|^2``, which is convex, by L-BFGS."""
    weight = torch.zeros(classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(features, weight, bias), labels) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()
