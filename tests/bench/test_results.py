"""Result files: written after each cell, merged with what is there, the same text for the same results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bench import report, results


def test_cells_of_other_runs_stay_with_their_run(tmp_path: Path) -> None:
    old = results.Store(tmp_path, "monday", {"commit": "a"})
    old.put("op", "M4", {"figure": 1})
    old.put("op", "M16", {"figure": 2})
    results.Store(tmp_path, "tuesday", {"commit": "b"}).put("op", "M4", {"figure": 3})
    content = results.read(tmp_path / "op.json")
    assert content["cells"] == {"M4": {"run": "tuesday", "figure": 3}, "M16": {"run": "monday", "figure": 2}}
    assert content["runs"] == {"monday": {"commit": "a"}, "tuesday": {"commit": "b"}}


def test_a_run_of_which_nothing_is_left_goes(tmp_path: Path) -> None:
    for run in ("monday", "tuesday"):
        results.Store(tmp_path, run, {}).put("op", "M4", {})
    assert list(results.read(tmp_path / "op.json")["runs"]) == ["tuesday"]


def test_the_text_does_not_depend_on_the_order_of_measuring(tmp_path: Path) -> None:
    ids = ["dx-4096x4096-M4", "dx-4096x14336-M1", "dx-4096x4096-M16", "dx-4096x4096-M1"]
    texts = []
    for name, order in (("one", ids), ("two", ids[::-1])):
        store = results.Store(tmp_path / name, "run", {})
        for cell_id in order:
            store.put("op", cell_id, {"figure": 1.5})
        texts.append((tmp_path / name / "op.json").read_text())
    assert texts[0] == texts[1]
    assert list(json.loads(texts[0])["cells"]) == [ids[3], ids[0], ids[2], ids[1]]


def test_no_draft_is_left_behind(tmp_path: Path) -> None:
    results.Store(tmp_path, "run", {}).put("op", "M1", {})
    assert [path.name for path in tmp_path.iterdir()] == ["op.json"]
    assert list(results.read_all(tmp_path)) == ["op"]


@pytest.mark.parametrize("device", sorted(path.name for path in results.FOLDER.iterdir() if path.is_dir()))
def test_a_stored_table_is_of_the_results_beside_it(device: str, tmp_path: Path) -> None:
    folder = results.FOLDER / device
    for path in folder.glob("*.json"):
        shutil.copy(path, tmp_path)
    drawn = report.draw(tmp_path, plots=False).splitlines()[1:]  # the first names the folder
    assert (folder / report.TITLE).read_text().splitlines()[1:] == drawn
