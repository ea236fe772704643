"""One set of texts, tokenised once for all trainings: one task's labels, or two tasks'."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peftrt.compare.settings import Settings
from peftrt.demo.docstrings import most_frequent, read_docstrings
from peftrt.demo.encoder import tokenize
from peftrt.finetune import models
from peftrt.finetune.checkpoint import write_json
from peftrt.finetune.datasets import Dataset, load_dataset
from peftrt.finetune.errors import UserError
from peftrt.finetune.examples import Examples
from peftrt.finetune.settings import Settings as RunSettings
from peftrt.formats.safe import read_tensors, write_tensors

TENSORS, TASKS = "data.safetensors", "data.json"
_ARRAYS = ("tokens", "lengths", "classes")


@dataclass(frozen=True)
class Task:
    """What is learnt, and what it is measured on.

    Attributes:
        name: for people.
        labels: the classes' names.
        train, held_out: examples with their classes.
    """

    name: str
    labels: tuple[str, ...]
    train: Examples
    held_out: Examples


def prepare(settings: Settings, directory: Path) -> None:
    """Tokenise the texts and write them into a directory, where :func:`read_tasks` finds them.

    Raises:
        UserError: the data or the model cannot be read.
    """
    tasks = _docstrings() if settings.model is None else _from_file(settings)
    tensors, names = {}, []
    for number, task in enumerate(tasks):
        # drawn alike for every task: its texts are the others'
        drawn = np.random.default_rng(0).permutation(len(task.held_out))
        kept = np.sort(drawn[: settings.eval_limit])
        for part, examples in (("train", task.train), ("held_out", task.held_out.select(kept))):
            for name, value in examples.arrays().items():
                tensors[f"{number}.{part}.{name}"] = torch.from_numpy(value)
        names.append({"name": task.name, "labels": list(task.labels), "pad_id": task.train.pad_id})
    write_tensors(directory / TENSORS, tensors)
    write_json(directory / TASKS, names)


def read_tasks(directory: Path) -> list[Task]:
    """What :func:`prepare` wrote."""
    tensors = read_tensors(directory / TENSORS)
    found = []
    for number, entry in enumerate(json.loads((directory / TASKS).read_text("utf-8"))):

        def part(name: str, number: int = number, pad_id: int = entry["pad_id"]) -> Examples:
            tokens, lengths, classes = (tensors[f"{number}.{name}.{kind}"].numpy() for kind in _ARRAYS)
            return Examples(tokens, lengths, classes, pad_id)

        found.append(Task(entry["name"], tuple(entry["labels"]), part("train"), part("held_out")))
    return found


def _docstrings() -> list[Task]:
    """The demo's two tasks: which package a docstring is from, and what it documents."""
    docstrings = most_frequent(read_docstrings())
    ids, pad_id = tokenize([docstring.text for docstring in docstrings])
    held_out = np.array([docstring.held_out for docstring in docstrings], bool)
    tasks = []
    for name in ("package", "kind"):
        values = [getattr(docstring, name) for docstring in docstrings]
        labels = sorted(set(values))
        examples = Examples.of(ids, np.array([labels.index(value) for value in values], np.int64), pad_id)
        parts = (examples.select(np.flatnonzero(~held_out)), examples.select(np.flatnonzero(held_out)))
        tasks.append(Task(name, tuple(labels), *parts))
    return tasks


def _from_file(settings: Settings) -> list[Task]:
    assert settings.model is not None
    assert settings.data is not None
    tokenizer = models.load_tokenizer(settings.model)
    limit = models.length_limit(models.load_config(settings.model), tokenizer)
    length = models.choose_length(settings.max_length, limit)
    columns = [settings.label_column, *([settings.second_label_column] if settings.second_label_column else [])]
    tasks = []
    for column in columns:
        given: dict[str, Any] = {"model": settings.model, "data": settings.data, "task": "classify", "out": "."}
        columns_of = {"text_column": settings.text_column, "label_column": column}
        run = RunSettings.of({**given, **columns_of, "eval_share": settings.eval_share})
        run.check()
        data: Dataset = load_dataset(run, tokenizer, length, tokenizer.pad_token_id)
        if data.evaluation is None:
            raise UserError("--eval-share: there must be examples to measure on")
        tasks.append(Task(column, data.labels, data.train, data.evaluation))
    return tasks
