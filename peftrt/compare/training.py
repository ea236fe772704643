"""One training of one method, and everything that is measured of it."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import peftrt
from peftrt.adapters.report import count
from peftrt.compare.data import Task
from peftrt.compare.memory import Peak
from peftrt.compare.methods import BODY, FULL, Method
from peftrt.compare.settings import Settings
from peftrt.compare.subject import Subject
from peftrt.finetune.examples import Batch
from peftrt.finetune.metrics import accuracy, macro_f1
from peftrt.finetune.tasks import classify_loss, evaluating, predict
from peftrt.finetune.trainer import Plan, Step, Trainer
from peftrt.formats.safe import write_tensors

_ALTERNATIONS = 9
_EVALUATED = 64  # examples a batch
WARM_UP = 0.1  # of the steps

Show = Callable[[Step], None]


def train(settings: Settings, method: Method, seed: int, tasks: list[Task], show: Show) -> dict[str, Any]:
    """Train on the first task, and measure.

    Args:
        settings: of the comparison.
        method: what is trained.
        seed: of the head, the adapter and the order of the examples.
        tasks: the first is learnt.
        show: is told of every step.

    Returns:
        What is measured, as it goes into the training's file.
    """
    task = tasks[0]
    _warm_up(settings, task)
    peak = Peak()
    torch.manual_seed(seed)
    subject = Subject.load(settings, task.labels)
    subject.adapt(method)
    peak.begin()
    trainer = fit(settings, method, seed, subject, task, show)
    highest = peak.bytes
    trained = sum(parameter.numel() for parameter in subject.trained().values())
    measured = {
        **score(subject, task),
        "trainable": trained,
        "total": count(subject.model),
        "peak_bytes": highest,
        "steps": trainer.step,
        "seconds": sum(step.seconds for step in trainer.history),
        "steps_per_second": 1 / statistics.median(step.seconds for step in trainer.history),
        "file_bytes": file_bytes(subject, method),
        "losses": [step.loss for step in trainer.history],
    }
    return {**measured, **latency(settings, subject, task)}


def fit(
    settings: Settings,
    method: Method,
    seed: int,
    subject: Subject,
    task: Task,
    show: Show,
    loss: Callable[[Batch], Tensor] | None = None,
) -> Trainer:
    """Train what requires gradients, for as many steps as all methods have.

    Args:
        loss: the sum over a batch; by default the cross-entropy of the model's logits.
    """

    def of_batch(batch: Batch) -> Tensor:
        return classify_loss(subject.logits(batch), batch) if loss is None else loss(batch)

    warm_up = round(WARM_UP * settings.steps)
    plan = Plan(settings.steps, method.lr, warmup=warm_up, batch_size=settings.batch_size, seed=seed)
    trainer = Trainer(subject.trained(), of_batch, task.train, plan, subject.device)
    subject.model.train()
    for step in trainer:
        show(step)
    subject.model.eval()
    return trainer


def score(subject: Subject, task: Task) -> dict[str, float]:
    """Accuracy and macro-F1 on what is held out."""
    with evaluating(subject.model):
        predicted = predict(subject.logits, task.held_out, _EVALUATED, subject.device)
    classes = task.held_out.classes
    return {"accuracy": accuracy(predicted, classes), "macro_f1": macro_f1(predicted, classes)}


def _warm_up(settings: Settings, task: Task) -> None:
    """Code and threads come into memory once, and are no part of what a method takes."""
    subject = Subject.load(settings, task.labels)
    batch = task.train.batch(np.arange(min(2, len(task.train)))).to(subject.device)
    classify_loss(subject.logits(batch), batch).backward()


def file_bytes(subject: Subject, method: Method) -> int:
    """What has to be stored for the task: an adapter and a head, or the whole model."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if method.place == FULL:
            peftrt.export(subject.model, directory / "model", dtype=torch.float32)
        else:
            peftrt.save(subject.adapted(method), directory / "adapter")
        if method.place == BODY:
            head = {
                f"{path}.{name}": tensor
                for path, module in subject.head_modules().items()
                for name, tensor in module.state_dict().items()
            }
            write_tensors(directory / "head.safetensors", head)
        return sum(file.stat().st_size for file in directory.rglob("*.safetensors"))


def latency(settings: Settings, subject: Subject, task: Task) -> dict[str, float]:
    """Milliseconds of a forward, of the model as it was published and as it was trained, in turn."""
    base = Subject.load(settings, task.labels)
    base.model.eval()
    rows = np.arange(min(settings.batch_size, len(task.held_out)))
    batch = task.held_out.batch(rows).to(subject.device)
    times: dict[str, list[float]] = {"base_ms": [], "adapted_ms": []}
    with evaluating(subject.model, base.model):
        for number in range(_ALTERNATIONS + 2):
            for name, who in (("base_ms", base), ("adapted_ms", subject)):
                seconds = _timed(who, batch)
                if number >= 2:
                    times[name].append(1000 * seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def _timed(subject: Subject, batch: Batch) -> float:
    if subject.device.type == "cuda":
        torch.cuda.synchronize(subject.device)
    start = time.perf_counter()
    subject.logits(batch)
    if subject.device.type == "cuda":
        torch.cuda.synchronize(subject.device)
    return time.perf_counter() - start
