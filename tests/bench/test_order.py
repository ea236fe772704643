"""Cells that marks name come first, and of those what earlier results missed."""

from __future__ import annotations

from typing import Any

import torch

from bench import judging, marks, order
from bench.bench_multi_lora_linear import cells as multi_lora_cells
from bench.bench_nf4_dequantize import cells as dequantize_cells
from bench.bench_nf4_linear import cells as linear_cells
from bench.cells import Cell
from bench.results import OWN
from bench.shapes import GPU_ROWS, GPU_SITES

CELLS = [*linear_cells("cuda", quick=False), *dequantize_cells("cuda", quick=False)]


def _ordered(known: dict[str, Any] | None = None) -> list[Cell]:
    return order.by_marks(CELLS, marks.H200, known or {})


def test_every_cell_is_there_once() -> None:
    assert len(CELLS) == len(GPU_SITES) * (2 * len(GPU_ROWS) + 2)
    assert sorted(_ordered(), key=lambda cell: (cell.op, cell.id)) == sorted(CELLS, key=lambda c: (c.op, c.id))


def test_the_first_cells_are_one_of_each_mark() -> None:
    ordered = _ordered()
    assert ordered[0].id == "forward-bf16-8192x8192-M1"
    wanted = [mark for mark in marks.H200 if not mark.everywhere and mark.op.startswith("nf4")]
    for mark in wanted:
        assert any(mark.covers(cell.op, cell.describe()) for cell in ordered[: len(wanted)]), mark.where


def test_cells_without_a_mark_come_last() -> None:
    flags = [order.named(cell, marks.H200) for cell in _ordered()]
    assert flags == sorted(flags, reverse=True)
    assert True in flags
    assert False in flags


def test_what_was_missed_before_comes_first() -> None:
    def stored(**ratios: float) -> dict[str, Any]:
        contenders: dict[str, Any] = {OWN: {"ms": {"p50": 1.0}, "share_of_floor": 0.5}}
        return {"contenders": contenders | {name: {"ratio": ratio} for name, ratio in ratios.items()}}

    by_id = {cell.id: cell for cell in CELLS if cell.op == "nf4_linear"}
    reached, missed, failed = (f"forward-bf16-{site}-M64" for site in ("6144x4096", "8192x3584", "28672x4096"))
    results = {reached: stored(torch=9.0, bitsandbytes=9.0), missed: stored(torch=1.0, bitsandbytes=9.0)}
    results[failed] = {"failed": "wrong result"}
    run = {"timer": "cuda graph", "device": "NVIDIA H200"}
    cells = {key: {"run": "r", **by_id[key].describe(), **value} for key, value in results.items()}
    known = {"nf4_linear": {"runs": {"r": run}, "cells": cells}}
    assert {str(verdict) for verdict in judging.judge(known)} >= {"reached", "missed by 50 %", "not measured"}
    ids = [cell.id for cell in _ordered(known)]
    assert ids[0] == failed
    of_m64 = [key for key in ids if key.startswith("forward") and key.endswith("-M64")]
    assert of_m64.index(failed) < of_m64.index(missed) < of_m64.index(reached)


def test_a_mean_over_cells_is_no_cells_miss() -> None:
    (cell,) = (cell for cell in multi_lora_cells("cuda", quick=False) if cell.id == "none-zipf-r8-e8-bf16-4096x4096-M8")
    contenders: dict[str, Any] = {OWN: {"ms": {"p50": 1.0}, "share_of_floor": 0.5}, "vllm": {"ratio": 1.2}}
    run = {"timer": "cuda graph", "device": "NVIDIA H200", "ceilings": {"copy_gb_s": 4000.0}}
    content = {"runs": {"r": run}, "cells": {cell.id: {"run": "r", **cell.describe(), "contenders": contenders}}}
    assert "missed by 20 %" in {str(verdict) for verdict in judging.judge({cell.op: content})}
    assert order.by_marks([cell], marks.H200, {cell.op: content}) == [cell]


def test_quick_cells_are_not_named() -> None:
    quick = linear_cells("cuda", quick=True)
    assert all(cell.dtype == torch.bfloat16 for cell in quick)
    assert order.by_marks(quick, marks.H200, {}) == quick
