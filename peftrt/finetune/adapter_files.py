"""The files of the adapter that a run goes on from."""

from __future__ import annotations

import json
from pathlib import Path

from peftrt.finetune.errors import UserError
from peftrt.formats.pair import CONFIG_NAME, form_of

LABELS = "labels.json"


def adapter_files(directory: Path, task: str) -> tuple[str, ...]:
    """What a run for this task reads of an adapter's directory."""
    return (CONFIG_NAME, form_of(str(directory)).weights, *((LABELS,) if task == "classify" else ()))


def check_adapter(directory: Path, task: str) -> None:
    """Raise UserError unless the directory looks like one that a run for this task has left."""
    if not directory.is_dir():
        raise UserError(f"--adapter: no such directory: {directory}")
    for name in (CONFIG_NAME, form_of(str(directory)).weights):
        if not (directory / name).is_file():
            raise UserError(f"--adapter: {directory} has no {name}: expected the directory of an adapter")
    if task == "classify":
        adapter_labels(directory)


def adapter_labels(directory: Path) -> tuple[str, ...]:
    """The labels of an adapter's head, in the order of its rows.

    Raises:
        UserError: the directory does not tell them.
    """
    path = directory / LABELS
    if not path.is_file():
        raise UserError(
            f"--adapter: {directory} has no {LABELS}: a list of the labels, in the order of the head's rows"
        )
    try:
        labels = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"--adapter: {path} is damaged: {error}") from None
    strings = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    if not strings or len(labels) < 2 or len(set(labels)) != len(labels):
        raise UserError(f"--adapter: {path} must be a list of two or more different labels, got {labels!r:.200}")
    return tuple(labels)
