"""Marks are judged from stored figures, and a figure that is missing never counts as reached."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench import marks, report
from bench.results import OWN


def _results(op: str, cell: dict[str, Any], timer: str = "perf_counter") -> dict[str, Any]:
    run = {"timer": timer, "device": "d", "threads": 2, "quick": False}
    run |= {"versions": dict.fromkeys(("torch", "bitsandbytes", "peft"), "1")}
    run |= {"ceilings": {"copy_gb_s": 10.0, "matmul_tflop_s": 0.1, "matmul_dtype": "float32"}}
    return {op: {"op": op, "runs": {"r": run}, "cells": {"the cell": {"run": "r", "N": 4096, "K": 4096, **cell}}}}


def _cell(part: str, M: int, own_ms: float, **ratios: float) -> dict[str, Any]:
    contenders: dict[str, Any] = {OWN: {"ms": {"p50": own_ms}, "share_of_floor": 0.5}}
    contenders |= {name: {"ms": {"p50": own_ms * ratio}, "ratio": ratio} for name, ratio in ratios.items()}
    return {"part": part, "dtype": "fp32", "M": M, "floor_ms": 0.1, "contenders": contenders}


def test_times_as_fast() -> None:
    cell = _cell("forward", 1, 0.65, bitsandbytes=46.2, torch=1.8)
    against_bnb, against_torch = marks.judge(_results("nf4_linear", cell))
    assert (against_bnb.margin, str(against_bnb), against_bnb.got) == (pytest.approx(1.1), "reached", "46.2x")
    assert (against_torch.margin, str(against_torch)) == (pytest.approx(0.5), "missed by 50 %")


@pytest.mark.parametrize(("own_ms", "reached"), [(1.05, True), (1.054, True), (1.056, False)])
def test_a_share_of_the_time_and_some_microseconds(own_ms: float, reached: bool) -> None:
    cell = _cell("nf4-forward", 512, own_ms, base=1 / own_ms)
    (verdict,) = marks.judge(_results("lora_linear", cell))
    assert (verdict.margin is not None and verdict.margin >= 1) is reached


def test_marks_from_a_size_on_hold_above_it() -> None:
    for M, count in ((256, 0), (512, 1), (2048, 1)):
        assert len(list(marks.judge(_results("lora_linear", _cell("dense-forward", M, 1.0, base=1.0))))) == count


def test_a_skipped_peer_or_a_wrong_result_is_not_reached() -> None:
    cell = _cell("forward", 1, 0.65, torch=9.0)
    cell["contenders"]["bitsandbytes"] = {"skipped": "not here"}
    skipped, _ = marks.judge(_results("nf4_linear", cell))
    assert (skipped.margin, skipped.got, str(skipped)) == (None, "skipped: not here", "not measured")
    del cell["contenders"]
    for verdict in marks.judge(_results("nf4_linear", {**cell, "failed": "relative error 1"})):
        assert (verdict.margin, verdict.got) == (None, "wrong result: relative error 1")


def test_marks_without_a_cell_are_named() -> None:
    found = _results("nf4_linear", _cell("forward", 1, 0.65, bitsandbytes=1.0, torch=1.0))
    missing = marks.unmeasured(found)
    assert len(missing) == len(marks.CPU_MARKS) - 2
    assert {mark.where for mark in missing if mark.op == "lora_linear"} >= {
        "nf4-forward-fp32-M512+",
        "dense-train-fp32",
    }


def test_small_sites_and_other_devices_are_not_judged() -> None:
    cell = _cell("forward", 1, 0.65, bitsandbytes=1.0, torch=1.0)
    assert not list(marks.judge(_results("nf4_linear", cell, timer="cuda graph")))
    assert not list(marks.judge(_results("nf4_linear", {**cell, "K": 1024})))


def test_the_report_shows_every_row(tmp_path) -> None:
    found = _results("nf4_linear", _cell("forward", 1, 0.65, bitsandbytes=46.2, torch=1.8))
    cells = found["nf4_linear"]["cells"]
    cells["the cell"]["contenders"]["peer"] = {"skipped": "not here"}
    cells["red"] = {"run": "r", "part": "forward", "dtype": "fp32", "N": 1, "K": 1, "M": 1, "failed": "off by one"}
    (tmp_path / "nf4_linear.json").write_text(json.dumps(found["nf4_linear"]))
    text = report.draw(tmp_path)
    for part in ("30.03 (46.2x)", "skipped: not here", "wrong result: off by one", "1 of 2 reached", "missed by 50 %"):
        assert part in text
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2
    for block in tables:
        assert len({len(line) for line in block.splitlines()}) == 1
    assert (tmp_path / "nf4_linear.png").stat().st_size > 1000
    assert (tmp_path / report.TITLE).read_text() == text + "\n"
