"""From files to tokenised examples: labels, truncation, packing, and the share held out for evaluation."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from peftrt.finetune.errors import UserError
from peftrt.finetune.examples import Examples
from peftrt.finetune.records import Record, read_records
from peftrt.finetune.settings import Settings

_CHUNK = 256  # records tokenised together
_NAMED = 20  # labels that an error lists


@dataclass(frozen=True)
class Dataset:
    """Examples to train on, examples to evaluate on (or None), and the labels' names in the order of the classes."""

    train: Examples
    evaluation: Examples | None
    labels: tuple[str, ...] = ()

    @property
    def largest_token(self) -> int:
        return max(part.largest_token for part in (self.train, self.evaluation) if part is not None)


class _Rows:
    """The tokenised examples of one file, with what is needed to label and to split them."""

    def __init__(self, rows: Iterable[tuple[list[int], Record]]) -> None:
        self.tokens, self.lengths = array("i"), array("q")
        self.labels: list[str] = []
        self.lines: list[int] = []
        self.hashes = array("Q")
        interned: dict[str, str] = {}
        for ids, record in rows:
            self.tokens.extend(ids)
            self.lengths.append(len(ids))
            self.lines.append(record.line)
            self.hashes.append(text_hash(record.text))
            if record.label is not None:
                self.labels.append(interned.setdefault(record.label, record.label))

    def examples(self, classes: list[int] | None, pad_id: int) -> Examples:
        return Examples(np.array(self.tokens), np.array(self.lengths), classes, pad_id)


def load_dataset(settings: Settings, tokenizer: Any, max_length: int, pad_id: int) -> Dataset:
    """Read and tokenise ``settings.data`` and ``settings.eval_data``.

    Args:
        settings: the run's.
        tokenizer: a Hugging Face tokenizer.
        max_length: tokens an example has at most; a packed block has exactly that many.
        pad_id: the token that fills batches up.

    Raises:
        UserError: a line that cannot be read, an unknown label, or nothing to train or to evaluate on.
    """
    files = [Path(settings.data), *([Path(settings.eval_data)] if settings.eval_data else [])]
    parts = [_Rows(_rows(path, settings, tokenizer, max_length)) for path in files]
    for path, part, option in zip(files, parts, ("--data", "--eval-data"), strict=False):
        if not part.lengths:
            what = f"a block of {max_length} tokens" if path.suffix.lower() == ".txt" else "an example with text"
            raise UserError(f"{option}: {path} has not even {what}")
    names: tuple[str, ...] = ()
    classes: list[list[int] | None] = [None] * len(parts)
    if settings.task == "classify":
        names = _sorted_labels(set(parts[0].labels), settings.data)
        classes = [_classes(part, names, path) for path, part in zip(files, parts, strict=True)]
    sets = [part.examples(labels, pad_id) for part, labels in zip(parts, classes, strict=True)]
    if settings.eval_data:
        return Dataset(sets[0], sets[1], names)
    train, evaluation = _split(parts[0], settings)
    return Dataset(sets[0].select(train), sets[0].select(evaluation) if len(evaluation) else None, names)


def text_hash(text: str) -> int:
    """A number below 2^64 that depends on the text alone, on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _rows(path: Path, settings: Settings, tokenizer: Any, max_length: int) -> Iterator[tuple[list[int], Record]]:
    if path.suffix.lower() == ".txt":
        yield from _packed(path, tokenizer, max_length)
        return
    classify = settings.task == "classify"
    end = None if classify else tokenizer.eos_token_id
    records = read_records(path, settings.text_column, settings.label_column if classify else None)
    while chunk := list(islice(records, _CHUNK)):
        rows = tokenizer([record.text for record in chunk], truncation=True, max_length=max_length)["input_ids"]
        for ids, record in zip(rows, chunk, strict=True):
            if end is not None and len(ids) < max_length and ids[-1:] != [end]:
                ids = [*ids, end]
            # A token without one before it has no loss: a text of one token teaches a language model nothing.
            if len(ids) > (0 if classify else 1):
                yield ids, record


def _packed(path: Path, tokenizer: Any, size: int) -> Iterator[tuple[list[int], Record]]:
    """The text as one stream of tokens, cut into blocks; what is left at the end is dropped."""
    buffer: list[int] = []
    number = 0
    lines = (record.text for record in read_records(path, ""))
    while chunk := "".join(islice(lines, _CHUNK)):
        buffer += tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(buffer) - size + 1, size):
            number += 1
            yield buffer[start : start + size], Record(f"block {number}", None, number)
        buffer = buffer[len(buffer) // size * size :]


def _sorted_labels(labels: set[str], path: str) -> tuple[str, ...]:
    """Whole numbers by their value, anything else by the alphabet."""
    if len(labels) < 2:
        raise UserError(f"--data: {path}: to classify needs at least two labels, got only {next(iter(labels))!r}")
    try:
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(labels))


def _classes(part: _Rows, names: tuple[str, ...], path: Path) -> list[int]:
    index = {name: i for i, name in enumerate(names)}
    for label, line in zip(part.labels, part.lines, strict=True):
        if label not in index:
            known = ", ".join(repr(name) for name in names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
            raise UserError(f"{path}:{line}: unknown label {label!r}; the training data has {known}")
    return [index[label] for label in part.labels]


def _split(part: _Rows, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and to hold out: by the texts' hashes, so that equal texts are on the same side."""
    hashes = np.array(part.hashes, np.uint64)
    if not settings.eval_share:
        return np.arange(len(hashes)), np.arange(0)
    # The seed moves the window of hashes that is held out.
    shifted = hashes + np.uint64(text_hash(f"seed {settings.seed}"))
    held_out = shifted < np.uint64(settings.eval_share * 2**64)
    if not held_out.any():
        held_out = shifted == shifted.min()
    if held_out.all():
        raise UserError(f"--data: {settings.data} has too few different examples to hold some out: use --eval-share 0")
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
