"""From files to tokenised examples: labels, truncation, packing, and the share held out for evaluation."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from peftrt.finetune.adapter_files import adapter_labels
from peftrt.finetune.errors import UserError
from peftrt.finetune.examples import Examples
from peftrt.finetune.records import Record, read_records
from peftrt.finetune.settings import FILES, Settings

_CHUNK = 256  # records tokenised together
_NAMED = 20  # labels that an error lists


@dataclass(frozen=True)
class Dataset:
    """Examples to train on, examples to evaluate on (or None), and the labels' names in the order of the classes.

    Of a former task: examples to measure on and to replay, by the options that they came with, and those held out.
    """

    train: Examples
    evaluation: Examples | None
    labels: tuple[str, ...] = ()
    former: Mapping[str, Examples] = field(default_factory=dict)
    former_evaluation: Examples | None = None

    @property
    def largest_token(self) -> int:
        parts = (self.train, self.evaluation, self.former_evaluation, *self.former.values())
        return max(part.largest_token for part in parts if part is not None)


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
    """Read and tokenise the files of examples that the settings name.

    Labels are those of the adapter that the run goes on from, or all that there are in ``data`` and ``replay``.

    Args:
        settings: the run's.
        tokenizer: a Hugging Face tokenizer.
        max_length: tokens an example has at most; a packed block has exactly that many.
        pad_id: the token that fills batches up.

    Raises:
        UserError: a line that cannot be read, an unknown label, or nothing to train or to evaluate on.
    """
    parts: dict[str, _Rows] = {}
    for name in FILES:
        path = getattr(settings, name)
        if path is None:
            continue
        same = next((other for other in parts if getattr(settings, other) == path), None)
        parts[name] = parts[same] if same else _Rows(_rows(Path(path), settings, tokenizer, max_length))
        if not parts[name].lengths:
            what = f"a block of {max_length} tokens" if path.lower().endswith(".txt") else "an example with text"
            raise UserError(f"--{name.replace('_', '-')}: {path} has not even {what}")
    labels, whose = _all_labels(parts, settings) if settings.task == "classify" else ((), "")
    sets = {}
    for name, part in parts.items():
        path = Path(getattr(settings, name))
        classes = _classes(part, labels, path, whose) if settings.task == "classify" else None
        sets[name] = part.examples(classes, pad_id)
    former, former_evaluation = _former(parts, sets, settings)
    if settings.eval_data:
        return Dataset(sets["data"], sets["eval_data"], labels, former, former_evaluation)
    train, evaluation = _divided("data", parts, sets, settings)
    return Dataset(train, evaluation, labels, former, former_evaluation)


def _all_labels(parts: Mapping[str, _Rows], settings: Settings) -> tuple[tuple[str, ...], str]:
    """The labels in the order of the classes, and whose they are."""
    if settings.adapter is not None:
        return adapter_labels(Path(settings.adapter)), "the adapter's head"
    found = {label for name in ("data", "replay") if name in parts for label in parts[name].labels}
    return _sorted_labels(found, settings.data), "the training data"


def _former(
    parts: Mapping[str, _Rows], sets: Mapping[str, Examples], settings: Settings
) -> tuple[dict[str, Examples], Examples | None]:
    """The former task's examples by option, and those held out of them: of one file where both options name it."""
    kept, held_out = {}, {}
    for name in ("ewc", "replay"):
        if name in parts:
            kept[name], evaluation = _divided(name, parts, sets, settings)
            if evaluation is not None:
                held_out[getattr(settings, name)] = evaluation
    return kept, reduce(Examples.joined, held_out.values()) if held_out else None


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


def _classes(part: _Rows, names: tuple[str, ...], path: Path, whose: str) -> list[int]:
    index = {name: i for i, name in enumerate(names)}
    for label, line in zip(part.labels, part.lines, strict=True):
        if label not in index:
            known = ", ".join(repr(name) for name in names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
            raise UserError(f"{path}:{line}: unknown label {label!r}; {whose} has {known}")
    return [index[label] for label in part.labels]


def _divided(
    name: str, parts: Mapping[str, _Rows], sets: Mapping[str, Examples], settings: Settings
) -> tuple[Examples, Examples | None]:
    """What a file has to train on, and what is held out of it: by the texts' hashes, so that equal texts are on the
    same side, in all files of a run.
    """
    hashes = np.array(parts[name].hashes, np.uint64)
    if not settings.eval_share:
        return sets[name], None
    # The seed moves the window of hashes that is held out.
    shifted = hashes + np.uint64(text_hash(f"seed {settings.seed}"))
    held_out = shifted < np.uint64(settings.eval_share * 2**64)
    if not held_out.any():
        held_out = shifted == shifted.min()
    if held_out.all():
        few = f"{getattr(settings, name)} has too few different examples to hold some out"
        raise UserError(f"--{name}: {few}: use --eval-share 0")
    return sets[name].select(np.flatnonzero(~held_out)), sets[name].select(np.flatnonzero(held_out))
