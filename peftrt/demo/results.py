"""What the demo measures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peftrt.finetune.metrics import accuracy, macro_f1
from peftrt.finetune.trainer import Step


@dataclass(frozen=True)
class Score:
    """On what is held out."""

    accuracy: float
    macro_f1: float

    @classmethod
    def of(cls, predicted: NDArray[np.int64], actual: NDArray[np.int64]) -> Score:
        return cls(accuracy(predicted, actual), macro_f1(predicted, actual))


@dataclass(frozen=True)
class TaskResult:
    """What came of one task: by always saying the most frequent class, by a linear probe, by the adapter."""

    name: str
    question: str
    classes: list[str]
    majority: Score
    probe: Score
    adapted: Score
    trained_parameters: int
    adapter_bytes: int
    history: list[Step]


@dataclass(frozen=True)
class ServedRow:
    """A row of the mixed batch: its answer, and the largest difference to the row alone, in logits or embedding."""

    text: str
    tenant: str | None
    answer: str
    difference: float


@dataclass(frozen=True)
class Result:
    """Everything that the demo measured."""

    train_examples: int
    held_out_examples: int
    tasks: list[TaskResult]
    reload_difference: dict[str, float]
    served: list[ServedRow]
    seconds: float
    peak_memory_bytes: int
    threads: int
