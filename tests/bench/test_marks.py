"""Marks are judged from stored figures, and a figure that is missing never counts as reached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import judging, marks, report
from bench.bench_bottleneck import cells as bottleneck_cells
from bench.bench_ia3_linear import cells as ia3_cells
from bench.bench_lora_linear import cells as lora_cells
from bench.bench_multi_lora_linear import cells as multi_lora_cells
from bench.bench_nf4_dequantize import cells as dequantize_cells
from bench.bench_nf4_linear import cells as linear_cells
from bench.bench_paged_adamw import cells as paged_cells
from bench.bench_train_step import cells as step_cells
from bench.results import OWN

CPU, GPU, H200 = ("perf_counter", "d"), ("cuda graph", "NVIDIA L4"), ("cuda graph", "NVIDIA H200")


def _results(op: str, cell: dict[str, Any], where: tuple[str, str] = CPU) -> dict[str, Any]:
    run = {"timer": where[0], "device": where[1], "threads": 2, "quick": False}
    run |= {"versions": dict.fromkeys(("torch", "bitsandbytes", "peft"), "1")}
    run |= {"ceilings": {"copy_gb_s": 10.0, "matmul_tflop_s": 0.1, "matmul_dtype": "float32"}}
    return {op: {"op": op, "runs": {"r": run}, "cells": {"the cell": {"run": "r", "N": 4096, "K": 4096, **cell}}}}


def _cell(part: str, M: int, own_ms: float, dtype: str = "fp32", **ratios: float) -> dict[str, Any]:
    contenders: dict[str, Any] = {OWN: {"ms": {"p50": own_ms}, "share_of_floor": 0.5}}
    contenders |= {name: {"ms": {"p50": own_ms * ratio}, "ratio": ratio} for name, ratio in ratios.items()}
    return {"part": part, "dtype": dtype, "M": M, "floor_ms": 0.1, "contenders": contenders}


def test_times_as_fast() -> None:
    cell = _cell("forward", 1, 0.65, bitsandbytes=46.2, torch=1.8)
    against_bnb, against_torch = judging.judge(_results("nf4_linear", cell))
    assert (against_bnb.margin, str(against_bnb), against_bnb.got) == (pytest.approx(1.1), "reached", "46.2x")
    assert (against_torch.margin, str(against_torch)) == (pytest.approx(0.5), "missed by 50 %")


@pytest.mark.parametrize(("own_ms", "reached"), [(1.05, True), (1.054, True), (1.056, False)])
def test_a_share_of_the_time_and_some_microseconds(own_ms: float, reached: bool) -> None:
    cell = _cell("nf4-forward", 512, own_ms, base=1 / own_ms)
    (verdict,) = judging.judge(_results("lora_linear", cell))
    assert verdict.reached is reached


def test_a_miss_by_a_hair_is_not_a_miss_by_nothing() -> None:
    cell = _cell("forward", 1, 0.65, bitsandbytes=50.0, torch=3.6 * 0.9999)
    assert str(list(judging.judge(_results("nf4_linear", cell)))[1]) == "missed by 0.1 %"


def test_marks_from_a_size_on_hold_above_it() -> None:
    for M, count in ((256, 0), (512, 1), (2048, 1)):
        assert len(list(judging.judge(_results("lora_linear", _cell("dense-forward", M, 1.0, base=1.0))))) == count


def test_a_skipped_peer_or_a_wrong_result_is_not_reached() -> None:
    cell = _cell("forward", 1, 0.65, torch=9.0)
    cell["contenders"]["bitsandbytes"] = {"skipped": "not here"}
    skipped, _ = judging.judge(_results("nf4_linear", cell))
    assert (skipped.margin, skipped.got, str(skipped)) == (None, "skipped: not here", "not measured")
    del cell["contenders"]
    for verdict in judging.judge(_results("nf4_linear", {**cell, "failed": "wrong result: relative error 1"})):
        assert (verdict.margin, verdict.got) == (None, "wrong result: relative error 1")


def test_marks_without_a_cell_are_named() -> None:
    found = _results("nf4_linear", _cell("forward", 1, 0.65, bitsandbytes=1.0, torch=1.0))
    missing = judging.unmeasured(found)
    assert len(missing) == len(marks.CPU) - 2
    assert {mark.where for mark in missing if mark.op == "lora_linear"} >= {
        "nf4-forward-fp32-M512+",
        "dense-train-fp32",
    }


def test_small_sites_are_not_judged() -> None:
    cell = _cell("forward", 1, 0.65, bitsandbytes=1.0, torch=1.0)
    assert not list(judging.judge(_results("nf4_linear", {**cell, "K": 1024})))


def test_a_device_has_its_own_marks() -> None:
    cell = _cell("forward", 64, 0.01, dtype="bf16", bitsandbytes=1.5, torch=2.5)
    assert not list(judging.judge(_results("nf4_linear", cell, CPU)))
    (never_slower,) = judging.judge(_results("nf4_linear", cell, GPU))
    assert (never_slower.mark.everywhere, str(never_slower)) == (True, "reached")
    verdicts = {str(verdict.mark): str(verdict) for verdict in judging.judge(_results("nf4_linear", cell, H200))}
    assert verdicts == {
        ">= 2x torch": "reached",
        ">= 2x bitsandbytes": "missed by 25 %",
        ">= 1x bitsandbytes": "reached",
    }
    assert set(judging.unmeasured(_results("nf4_linear", cell, GPU))) < set(marks.GPU)


def test_peaks_of_memory_are_judged_by_themselves(tmp_path: Path) -> None:
    cell = {**_cell("llama-8b", 2048, 100.0, dtype="bf16", **{"peft+bitsandbytes": 1.4}), "N": 1703936}
    cell["contenders"][OWN]["peak_mb"] = 20_000.0
    cell["contenders"]["peft+bitsandbytes"] |= {"peak_mb": 21_000.0, "peak_ratio": 1.05}
    found = _results("train_step", cell, H200)
    (run,) = found["train_step"]["runs"].values()
    run |= {"driver": "580.1", "cuda": "13.0", "versions": {**run["versions"], "triton": "3.6.0"}}
    speed, memory = judging.judge(found)
    assert (str(speed.mark), str(speed)) == (">= 1.3x peft+bitsandbytes", "reached")
    assert (str(memory.mark), memory.got) == ("<= 0.9x the memory of peft+bitsandbytes", "0.952x")
    assert memory.margin == pytest.approx(0.9 * 1.05)
    (tmp_path / "train_step.json").write_text(json.dumps(found["train_step"]))
    text = report.draw(tmp_path, plots=False)
    assert "100; 20,480 tokens/s, 20,000 MB" in text
    del cell["contenders"]["peft+bitsandbytes"]["peak_ratio"]
    assert [verdict.got for verdict in judging.judge(found)][1] == "no peak was measured"


def test_a_share_of_the_floor_is_judged_without_a_peer() -> None:
    cell = _cell("out", 0, 0.01, dtype="bf16")
    floor, peer = judging.judge(_results("nf4_dequantize", cell, H200))
    assert (str(floor.mark), floor.got, floor.margin) == (">= 85% of the floor", "50%", pytest.approx(0.5 / 0.85))
    assert (peer.got, peer.margin) == ("skipped: not a contender", None)


@pytest.mark.parametrize(("share", "got", "words"), [(0.8, "1.25x", "missed by 8 %"), (0.9, "1.11x", "reached")])
def test_a_multiple_of_the_floors_time(share: float, got: str, words: str) -> None:
    cell = _cell("8bit-rho0.1", 0, 2.0, dtype="bf16") | {"N": 448, "K": 32768}
    cell["contenders"][OWN]["share_of_floor"] = share
    verdict = _verdict(_results("paged_adamw", cell, H200), "<= 1.15x the floor")
    assert (verdict.got, str(verdict)) == (got, words)
    assert not list(judging.judge(_results("paged_adamw", cell, CPU)))


def test_an_optimizer_is_held_against_torch_in_fp32_alone() -> None:
    for dtype, words in (
        ("fp32", {"<= 0.9x torch", ">= 3x bitsandbytes paged"}),
        ("bf16", {">= 3x bitsandbytes paged"}),
    ):
        cell = _cell("32bit-resident", 0, 1.0, dtype, torch=1.0) | {"N": 448, "K": 32768}
        assert {str(verdict.mark) for verdict in judging.judge(_results("paged_adamw", cell, H200))} == words


def _multi(part: str, M: int, dtype: str = "bf16", **ratios: float) -> dict[str, Any]:
    cell = _cell(part, M, 1.0, dtype=dtype, **ratios)
    return {**cell, "T": 128, "Q": 128}


def _verdict(found: dict[str, Any], words: str) -> judging.Verdict:
    (verdict,) = (verdict for verdict in judging.judge(found) if str(verdict.mark) == words)
    return verdict


@pytest.mark.parametrize(
    ("ours", "theirs", "got", "words"),
    [
        (1.0, 6.0, "0.167x", "reached"),
        (1.0, 4.0, "0.25x", "missed by 20 %"),
        (-0.1, 4.0, "0x", "reached"),
        (1.0, -0.1, "what the peer adds is too little to be seen", "not measured"),
    ],
)
def test_what_is_added_to_a_base_is_judged_without_the_base(ours: float, theirs: float, got: str, words: str) -> None:
    cell = _multi("dense-distinct-r16-e64", 32, "fp32", **{"peft": 1.5, "one adapter": 1.0})
    cell["contenders"][OWN]["added_ms"], cell["contenders"]["peft"]["added_ms"] = ours, theirs
    found = _results("multi_lora_linear", cell)
    verdict = _verdict(found, "<= 0.2x what peft adds")
    assert (verdict.got, str(verdict)) == (got, words)
    assert str(_verdict(found, "<= 1.25x one adapter")) == "reached"
    del cell["contenders"]["peft"]["added_ms"]
    assert _verdict(found, "<= 0.2x what peft adds").got == "a base was not measured"


def test_the_bytes_of_adapters_are_allowed_at_the_measured_bandwidth() -> None:
    cell = _multi("dense-distinct-r16-e8", 8, base=0.8)
    found = _results("multi_lora_linear", cell, H200)
    # 2 * 128 * 8192 bytes at 10 GB/s
    allowed = 1.1 * (0.8 + 2 * 128 * 8192 / 10e9 * 1e3)
    verdict = _verdict(found, "<= 1.1x (base + s*T*(N + K) bytes)")
    assert (verdict.margin, verdict.got) == (pytest.approx(allowed), "1.25x")


def test_the_fastest_of_several_peers_counts() -> None:
    cell = _multi("none-zipf-r64-e8", 32, **{"vllm": 3.0, "sglang csgmv": 0.9, "sglang triton_v2": 2.0})
    found = _results("multi_lora_linear", cell, H200)
    words = ">= 0.95x vllm / sglang triton_v2 / sglang csgmv"
    assert (_verdict(found, words).got, str(_verdict(found, words))) == ("0.9x", "missed by 5.3 %")
    cell["contenders"]["sglang csgmv"] = {"skipped": "not here"}
    assert _verdict(found, words).got == "2x"
    for name in ("vllm", "sglang triton_v2"):
        cell["contenders"][name] = {"skipped": "nor this"}
    assert (_verdict(found, words).got, _verdict(found, words).margin) == ("skipped: nor this", None)


def test_a_geometric_mean_is_one_verdict_on_all_cells() -> None:
    found = _results("multi_lora_linear", _multi("none-zipf-r64-e8", 32, vllm=1.0), H200)
    more = {"second": _multi("none-uniform-r8-e8", 8, vllm=4.0), "third": _multi("none-uniform-r8-e64", 8)}
    found["multi_lora_linear"]["cells"] |= {key: {"run": "r", "N": 1280, "K": 8192, **c} for key, c in more.items()}
    words = ">= 1.5x vllm / sglang triton_v2 / sglang csgmv in the geometric mean"
    verdict = _verdict(found, words)
    assert (verdict.got, verdict.margin) == ("2x over 2 of 3 cells", pytest.approx(2 / 1.5))
    (row,) = (row for row in judging.summary(marks.H200, found, "h200") if row[2] == words)
    assert row[3:] == ["1 of 1", "all: 2x over 2 of 3 cells", "reached"]
    found["multi_lora_linear"]["cells"] = {"third": found["multi_lora_linear"]["cells"]["third"]}
    assert (_verdict(found, words).got, _verdict(found, words).margin) == ("skipped: not a contender", None)


def test_the_report_shows_what_is_added_and_no_more_panels_than_can_be_seen(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(report, "MOST_PANELS", 1)
    found = _results("multi_lora_linear", _multi("dense-distinct-r16-e64", 32, "fp32", base=0.5))
    content = found["multi_lora_linear"]
    content["cells"]["the cell"]["contenders"][OWN]["added_ms"] = 0.5
    content["cells"]["another"] = {**content["cells"]["the cell"], "part": "dense-zipf-r16-e64"}
    (tmp_path / "multi_lora_linear.json").write_text(json.dumps(content))
    text = report.draw(tmp_path)
    assert "| 1; adds 0.5 |" in text
    assert '"Adds": ms beyond its own base' in text
    assert (tmp_path / "multi_lora_linear.png").stat().st_size > 1000


def test_a_floor_that_is_passed_too_soon_is_not_judged() -> None:
    for floor_ms, count in ((0.009, 0), (0.011, 1)):
        found = _results("multi_lora_linear", {**_multi("none-zipf-r64-e8", 32), "floor_ms": floor_ms}, H200)
        words = [str(verdict.mark) for verdict in judging.judge(found)]
        assert words.count(">= 65% of the floor from 10 µs") == count


CELLS = (
    linear_cells,
    dequantize_cells,
    lora_cells,
    ia3_cells,
    bottleneck_cells,
    step_cells,
    multi_lora_cells,
    paged_cells,
)


def test_every_mark_speaks_of_a_cell_that_is_measured() -> None:
    for name, device in (("cpu", "cpu"), ("gpu", "cuda"), ("h200", "cuda")):
        cells = [cell for make in CELLS for cell in make(device, quick=False)]
        for mark in marks.MARKS[name]:
            assert any(mark.covers(cell.op, cell.describe()) for cell in cells), f"{name}: {mark.op} {mark.where}"


def test_narrow_and_large_sites_are_those_that_the_marks_mean() -> None:
    assert [str(site) for site in marks.LARGE] == ["8192x8192"]
    assert [str(site) for site in marks.NARROW] == ["4096x4096", "4096x14336", "1280x8192"]


def test_the_summary_has_a_row_for_every_mark_and_shows_the_worst_cell() -> None:
    found = _results("nf4_linear", _cell("forward", 64, 0.01, dtype="bf16", torch=2.5), H200)
    worse = _cell("forward", 64, 0.01, dtype="bf16", torch=1.5)
    found["nf4_linear"]["cells"]["worse"] = {"run": "r", "N": 8192, "K": 8192, **worse}
    rows = judging.summary(marks.H200, found, "h200")
    assert len(rows) == len(marks.H200)
    by_mark = {(row[1], row[2]): row[3:] for row in rows}
    assert by_mark["forward-bf16-M64", ">= 2x torch"] == ["1 of 2", "worse: 1.5x", "missed by 25 %"]
    skipped = by_mark["forward-bf16-M64", ">= 2x bitsandbytes"]
    assert skipped == ["0 of 2", "the cell", "not measured: skipped: not a contender"]
    assert by_mark["dx-bf16-M2048", ">= 0.9x torch"] == ["", "", "not measured: no cell of it was run"]


def test_the_report_of_a_gpu_names_driver_and_cuda_and_marks_what_was_launched(tmp_path: Path) -> None:
    found = _results("nf4_linear", _cell("forward", 64, 0.01, dtype="bf16", torch=2.5, bitsandbytes=3.0), H200)
    (run,) = found["nf4_linear"]["runs"].values()
    run |= {"driver": "580.1", "cuda": "13.0", "versions": {**run["versions"], "triton": "3.6.0"}}
    found["nf4_linear"]["cells"]["the cell"]["contenders"]["bitsandbytes"]["note"] = "launched call by call"
    (tmp_path / "nf4_linear.json").write_text(json.dumps(found["nf4_linear"]))
    text = report.draw(tmp_path, plots=False)
    assert "NVIDIA H200, driver 580.1, CUDA 13.0, triton 3.6.0; torch 1" in text
    assert "0.03 (3x) launched" in text
    assert "Marks: 3 of 3 reached" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "nf4_linear.json"]


def test_the_report_shows_every_row(tmp_path: Path) -> None:
    found = _results("nf4_linear", _cell("forward", 1, 0.65, bitsandbytes=46.2, torch=1.8))
    cells = found["nf4_linear"]["cells"]
    cells["the cell"]["contenders"]["peer"] = {"skipped": "not here"}
    cells["red"] = {"run": "r", "part": "forward", "dtype": "fp32", "N": 1, "K": 1, "M": 1, "failed": "off by one"}
    (tmp_path / "nf4_linear.json").write_text(json.dumps(found["nf4_linear"]))
    text = report.draw(tmp_path)
    for part in ("30.03 (46.2x)", "skipped: not here", "off by one", "1 of 2 reached", "missed by 50 %"):
        assert part in text
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2
    for block in tables:
        assert len({len(line) for line in block.splitlines()}) == 1
    assert (tmp_path / "nf4_linear.png").stat().st_size > 1000
    assert (tmp_path / report.TITLE).read_text() == text + "\n"
