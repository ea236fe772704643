"""How much of a first task is forgotten after a second one: plainly, with EWC, and with replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftrt.compare.data import Task
from peftrt.compare.methods import Method
from peftrt.compare.settings import Settings
from peftrt.compare.subject import Subject
from peftrt.compare.training import Show, fit, score
from peftrt.continual import EWC, ReplayBuffer
from peftrt.finetune.examples import Batch
from peftrt.finetune.settings import Settings as RunSettings
from peftrt.finetune.tasks import classify_loss

LAMBDA = RunSettings.ewc_lambda  # what finetune begins with
SAMPLES = 200  # of the first task: those that the Fisher is measured on, and those that are replayed
SHARE = 0.5  # of a batch: how many of the first task's examples come beside the second's

Heads = dict[str, nn.Module]


def forget(
    settings: Settings, method: Method, variant: str, seed: int, tasks: list[Task], show: Show
) -> dict[str, Any]:
    """Train the first task, then the second with a head of its own; the first is measured again through its head.

    Args:
        variant: "plain", "ewc" (a penalty on what the first task needs of the body) or "replay" (examples of the first
            task, through its head, beside those of the second).

    Returns:
        The first task's accuracy ``before`` and ``after``, their difference ``forgotten``, and the second's.
    """
    first, second = tasks[:2]
    torch.manual_seed(seed)
    subject = Subject.load(settings, first.labels)
    subject.adapt(method)
    fit(settings, method, seed, subject, first, show)
    before = score(subject, first)["accuracy"]
    penalty = _consolidated(subject, first) if variant == "ewc" else None
    buffer = _buffer(first, seed) if variant == "replay" else None
    former = subject.head_modules()
    for module in former.values():
        module.requires_grad_(False)
    torch.manual_seed(seed + 1)
    heads = Subject.load(settings, second.labels).head_modules()
    subject.put_head(heads)

    def loss(batch: Batch) -> Tensor:
        total = classify_loss(subject.logits(batch), batch)
        # the trainer divides by the number of examples
        if penalty is not None:
            total = total + len(batch.labels) * penalty()
        if buffer is not None:
            drawn = buffer.sample(max(1, round(SHARE * len(batch.labels))))
            total = total + _through(subject, former, heads, _as_batch(drawn).to(subject.device))
        return total

    fit(settings, method, seed, subject, second, show, loss)
    learnt = score(subject, second)["accuracy"]
    subject.put_head(former)
    after = score(subject, first)["accuracy"]
    return {"before": before, "after": after, "forgotten": before - after, "second": learnt}


def _through(subject: Subject, former: Heads, heads: Heads, batch: Batch) -> Tensor:
    """The sum of the former task's losses, through its own head, which stays as it is."""
    subject.put_head(former)
    try:
        return classify_loss(subject.logits(batch), batch)
    finally:
        subject.put_head(heads)


def _consolidated(subject: Subject, task: Task) -> Callable[[], Tensor]:
    """The penalty on changes of the body that the task would notice."""
    ewc = EWC(subject.body, LAMBDA)
    batches = [task.train.batch(np.arange(i, i + 1)).to(subject.device) for i in _some(task)]

    def loss(body: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(subject.logits(batch).float(), batch.labels, reduction="none")

    ewc.consolidate(batches, loss)
    return ewc.penalty


def _buffer(task: Task, seed: int) -> ReplayBuffer:
    """Examples of the task to rehearse."""
    buffer = ReplayBuffer(SAMPLES, "reservoir", seed, padding={"ids": task.train.pad_id})
    for indices in task.train.by_length(64):
        batch = task.train.batch(indices)
        buffer.add({"ids": batch.input_ids, "mask": batch.attention_mask, "labels": batch.labels})
    return buffer


def _as_batch(drawn: dict[str, Tensor]) -> Batch:
    return Batch(drawn["ids"], drawn["mask"], drawn["labels"], int(drawn["mask"].sum()))


def _some(task: Task) -> list[int]:
    """Some of the task's examples, spread over all of them."""
    count = len(task.train)
    return [*range(0, count, max(1, count // SAMPLES))][:SAMPLES]
