"""What came of a comparison: the trainings' files, and the means over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import peftrt
from peftrt.compare.cells import Cell
from peftrt.compare.methods import HEAD, Method
from peftrt.compare.settings import VARIANTS, Settings
from peftrt.finetune.errors import RunError

# figure -> by which of a training's numbers
_MEANS = ("accuracy", "macro_f1", "peak_bytes", "steps_per_second", "file_bytes", "base_ms", "adapted_ms", "seconds")
_ALIKE = ("trainable", "total", "steps")


def collect(out: Path, settings: Settings, methods: Sequence[Method], cells: Sequence[Cell]) -> dict[str, Any]:
    """Everything that the comparison measured.

    Returns:
        ``methods``: a row a method, means over seeds with the accuracy's ``spread`` (its standard deviation, 0 of one
        seed); ``forgetting``: a row for each method and variant; ``trainings``: all of them.
    """
    trainings = [_read(out / cell.file) for cell in cells]
    rows = [_row(method, [t for t in trainings if t["method"] == method.name]) for method in methods]
    forgotten = []
    for method in methods:
        for variant in VARIANTS:
            own = [t for t in trainings if (t["method"], t["variant"]) == (method.name, variant)]
            if own:
                forgotten.append({"method": method.name, "variant": variant, **_figures(own, _FORGOTTEN)})
    return {
        "peftrt": peftrt.__version__,
        "torch": torch.__version__,
        "threads": settings.threads or torch.get_num_threads(),
        "settings": asdict(settings),
        "methods": rows,
        "forgetting": forgotten,
        "trainings": trainings,
    }


_FORGOTTEN = ("before", "after", "forgotten", "second")


def _row(method: Method, trainings: list[dict[str, Any]]) -> dict[str, Any]:
    own = [training for training in trainings if training["variant"] is None]
    row: dict[str, Any] = {"method": method.name, "lr": method.lr, "seeds": len(own), **_figures(own, _MEANS)}
    row |= {name: own[0][name] for name in _ALIKE}
    row["trainable_share"] = row["trainable"] / row["total"]
    row["added_latency"] = statistics.fmean(t["adapted_ms"] / t["base_ms"] - 1 for t in own)
    # nothing of the body is shared by the tasks: a head of its own for each
    row["forgets"] = method.place != HEAD
    return row


def _figures(trainings: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        values = [training[name] for training in trainings]
        found[name] = statistics.fmean(values)
        found[f"{name}_spread"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}): remove it, and the next call trains it again") from None
