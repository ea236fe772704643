"""The two tasks: how a model's head, its loss and its evaluation look for classification and for language modelling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from peftrt.finetune.examples import IGNORE, Batch, Examples
from peftrt.finetune.metrics import accuracy, macro_f1, perplexity

Forward = Callable[[Batch], Tensor]


def classify_loss(logits: Tensor, batch: Batch) -> Tensor:
    """The sum over the batch of the cross-entropy; logits ``[B, classes]``."""
    return F.cross_entropy(logits.float(), batch.labels, reduction="sum")


def causal_lm_loss(logits: Tensor, batch: Batch) -> Tensor:
    """The sum over all tokens of the cross-entropy of the next one; logits ``[B, T, V]``."""
    ahead = logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(ahead, batch.labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Inside, the modules are in evaluation mode and no gradient is recorded."""
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.train(mode)


def predict(forward: Forward, examples: Examples, batch_size: int, device: Any = "cpu") -> NDArray[np.int64]:
    """The class of the highest logit of each example."""
    predicted = np.empty(len(examples), np.int64)
    for indices in examples.by_length(batch_size):
        predicted[indices] = forward(examples.batch(indices).to(device)).argmax(-1).cpu().numpy()
    return predicted


def evaluate_classify(forward: Forward, examples: Examples, batch_size: int, device: Any = "cpu") -> dict[str, float]:
    """Accuracy, macro-F1 and mean loss of ``forward``'s logits."""
    loss = 0.0

    def watched(batch: Batch) -> Tensor:
        nonlocal loss
        logits = forward(batch)
        loss += float(classify_loss(logits, batch))
        return logits

    predicted = predict(watched, examples, batch_size, device)
    return {
        "accuracy": accuracy(predicted, examples.classes),
        "macro_f1": macro_f1(predicted, examples.classes),
        "loss": loss / len(examples),
    }


def evaluate_causal_lm(forward: Forward, examples: Examples, batch_size: int, device: Any = "cpu") -> dict[str, float]:
    """Perplexity and mean loss a token of ``forward``'s logits."""
    loss, targets = 0.0, 0
    for indices in examples.by_length(batch_size):
        batch = examples.batch(indices).to(device)
        loss += float(causal_lm_loss(forward(batch), batch))
        targets += batch.targets
    return {"perplexity": perplexity(loss / targets), "loss": loss / targets}
