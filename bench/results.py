"""Result files: ``<folder>/<op>.json``, written after every cell, so that a run that is stopped has lost nothing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OWN = "peftrt"  # the contender that all others are compared with
FOLDER = Path(__file__).resolve().parent / "results"


def read(path: Path) -> dict[str, Any]:
    """One operation's results: ``{"op", "runs": {key: environment}, "cells": {id: cell}}``."""
    return json.loads(path.read_text())


def read_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Every operation's results in a device's folder, by operation."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.json"))}


def run_key(facts: Mapping[str, Any]) -> str:
    """A run's name in result files, from its environment: when it begins and from which commit."""
    commit = (facts["commit"] or "unknown")[:12] + ("-dirty" if facts["dirty"] else "")
    return f"{time.strftime('%Y-%m-%dT%H:%MZ', time.gmtime())} {commit}"


class Store:
    """The result files of one run.

    A cell that is measured replaces its former self; those that are not measured keep theirs, with the run that they
    come from. Files are the same text for the same results: cells in the order of their ids, one to a line per figure.
    """

    def __init__(self, folder: Path, run: str, environment: dict[str, Any]) -> None:
        self.folder, self._run, self._environment = folder, run, environment

    def put(self, op: str, cell_id: str, cell: dict[str, Any]) -> None:
        """Write one measured cell."""
        path = self.folder / f"{op}.json"
        content = read(path) if path.exists() else {"op": op, "runs": {}, "cells": {}}
        content["runs"][self._run] = self._environment
        content["cells"][cell_id] = {"run": self._run, **cell}
        used = {other["run"] for other in content["cells"].values()}
        content["runs"] = {key: content["runs"][key] for key in sorted(used)}
        content["cells"] = dict(sorted(content["cells"].items(), key=lambda item: _natural(item[0])))
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".json.part")
        draft.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(draft, path)


def _natural(text: str) -> tuple[tuple[int, str], ...]:
    """Orders M4 before M16."""
    parts, number = [], ""
    for char in text + "\0":
        if char.isdigit():
            number += char
            continue
        if number:
            parts.append((int(number), ""))
            number = ""
        parts.append((-1, char))
    return tuple(parts)
