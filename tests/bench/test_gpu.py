"""The unattended run, tried on a CPU: what it writes, what is left when it is stopped, how it goes on after a crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, results, run_cells, steps
from bench.cells import Cell
from bench.harness import Runner
from bench.steps import Ended

ROOT = Path(__file__).resolve().parents[2]
FACTS = {"device": "NVIDIA H200", "commit": "0123456789abcdef", "dirty": False, "slug": "h200"}
FACTS |= {"versions": {"torch": "2", "triton": "3"}}


def _command(out: Path, *arguments: str) -> list[str]:
    # a budget that no slow machine spends: these cells end by themselves
    command = [sys.executable, "-m", "bench.gpu", "--out", str(out), "--device", "cpu", "--quick", "--budget", "2000"]
    return [*command, *arguments]


def _only(paths: Any) -> Path:
    (path,) = paths
    return path


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, "-m", "bench.gpu", "--out", "/nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "finds no CUDA device here" in done.stdout


def test_a_run_writes_cells_log_outcomes_and_a_table(tmp_path: Path) -> None:
    command = _command(tmp_path, "--only", "kernels", "bench", "nf4_dequantize", "--commit", "said-so")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = _only(tmp_path.iterdir())
    content = results.read(folder / "nf4_dequantize.json")
    assert set(content["cells"]) == {f"{p}-{d}-512x1024" for p in ("new", "out") for d in ("bf16", "fp32")}
    ((key, run),) = content["runs"].items()
    log = (folder / run["log"]).read_text()
    assert log == done.stdout.replace("\r", ""), "the log is what was printed"
    record = json.loads(_only((folder / "logs").glob("*.json")).read_text())
    assert record["key"] == key
    assert [(step["name"], step["status"]) for step in record["steps"]] == [
        ("device", "ok"),
        ("kernels", "ok"),
        ("bench", "ok"),
    ]
    assert ", 0 failed" in record["steps"][1]["detail"]
    assert "; 0 wrong" in log
    table = log[log.index("## Marks of") :]
    assert "nf4_dequantize | out-fp32 | >= 8x bitsandbytes" in table
    assert "not measured: no cell of it was run" in table
    assert all(len(path.name.split("/")) == 1 for path in folder.glob("logs/*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_has_lost_nothing(tmp_path: Path, number: int) -> None:
    command = _command(tmp_path, "--only", "bench")
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
        assert run.stdout is not None
        heard = []
        for line in run.stdout:
            heard.append(line)
            # the third cell has begun: two are stored
            if sum(line.startswith(steps.STARTED) for line in heard) == 3:
                break
        os.kill(run.pid, number)
        heard += run.stdout
        assert run.wait(60) == 128 + number
    folder = _only(tmp_path.iterdir())
    begun = [line.split()[2] for line in heard if line.startswith(steps.STARTED)]
    stored = results.read(folder / "nf4_linear.json")["cells"]
    assert set(stored) >= set(begun[:2])
    assert all("ms" in stored[key]["contenders"][results.OWN] for key in begun[:2])
    record = json.loads(_only((folder / "logs").glob("*.json")).read_text())
    assert record["steps"][-1]["status"] == "stopped"
    assert record["steps"][-1]["detail"] == f"by {signal.Signals(number).name}, in step bench"
    assert "## Marks of" in "".join(heard)


class Cells:
    """Stands in for the process that measures: what it does on each start, and the commands it was started with."""

    def __init__(self, *endings: tuple[str, Ended]) -> None:
        self.endings, self.commands = list(endings), []

    def __call__(self, command: list[str], seconds: float, hear: Any = None, **_: Any) -> Ended:
        self.commands.append(command)
        cell, ended = self.endings.pop(0)
        hear(f"{steps.STARTED}nf4_linear {cell}")
        return ended


def _bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cells: Cells) -> gpu.Run:
    options = gpu.options_of(["--out", str(tmp_path), "--only", "bench", "nf4_linear"])
    run = gpu.Run(options, steps.Log(), tmp_path)
    run.facts = dict(FACTS)
    run.key, run.folder = results.run_key(run.facts), tmp_path
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(run, "process", cells)
    gpu.bench(run)
    return run


def test_the_benchmarks_go_on_behind_a_cell_that_lost_the_device(tmp_path: Path, monkeypatch) -> None:
    lost, killed = Ended(steps.DEVICE_LOST, "", "CUDA error", 1.0), Ended(-11, "", "", 1.0)
    hung, good = Ended(None, "stalled", "", 1.0), Ended(0, "", "", 1.0)
    cells = Cells(("a", lost), ("b", killed), ("c", hung), ("d", good))
    run = _bench(tmp_path, monkeypatch, cells)
    assert [command.count("--failed") for command in cells.commands] == [0, 1, 2, 3]
    last = cells.commands[-1]
    assert last[last.index("c") - 1 : last.index("c") + 2] == ["nf4_linear", "c", "never ended"]
    (outcome,) = run.outcomes
    assert outcome.status == "failed"
    assert "nf4_linear a: lost the device, or its process: CUDA error" in outcome.detail
    assert run.failed


def test_wrong_results_fail_the_run_and_start_nothing_again(tmp_path: Path, monkeypatch) -> None:
    cells = Cells(("a", Ended(steps.CELLS_FAILED, "", "", 1.0)))
    assert _bench(tmp_path, monkeypatch, cells).failed
    assert len(cells.commands) == 1


def test_a_device_that_is_lost_again_and_again_is_given_up(tmp_path: Path, monkeypatch) -> None:
    cells = Cells(*((str(i), Ended(steps.DEVICE_LOST, "", "", 1.0)) for i in range(20)))
    assert _bench(tmp_path, monkeypatch, cells).failed
    assert len(cells.commands) == gpu.RESTARTS + 1


def _measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: Any, *arguments: str) -> tuple[int, dict]:
    make = run_cells.BENCHES["nf4_quantize"][0]
    monkeypatch.setitem(run_cells.BENCHES, "nf4_quantize", (make, bench))
    command = ["--folder", str(tmp_path), "--key", "k", "--op", "nf4_quantize", "--quick", "--device", "cpu"]
    status = run_cells.main([*command, *arguments])
    path = tmp_path / "nf4_quantize.json"
    return status, results.read(path)["cells"] if path.exists() else {}


def test_a_cell_that_raises_is_stored_and_the_others_are_measured(tmp_path: Path, monkeypatch, capsys) -> None:
    original = run_cells.BENCHES["nf4_quantize"][1]

    def bench(cell: Cell, runner: Runner) -> None:
        if cell.id == "plain-bf16-512x1024":
            raise RuntimeError("no such kernel\nand a long story")
        original(cell, runner)

    status, cells = _measured(tmp_path, monkeypatch, bench)
    assert status == steps.CELLS_FAILED
    assert cells.pop("plain-bf16-512x1024")["failed"] == "RuntimeError: no such kernel"
    assert len(cells) == 3
    assert all("contenders" in cell for cell in cells.values())


def test_a_lost_device_ends_the_process_and_the_next_one_goes_on(tmp_path: Path, monkeypatch, capsys) -> None:
    done: list[str] = []

    def bench(cell: Cell, runner: Runner) -> None:
        if len(done) == 1:
            raise RuntimeError("an illegal memory access was encountered")
        done.append(cell.id)
        runner._session.store.put(cell.op, cell.id, {})

    monkeypatch.setattr(run_cells, "_alive", lambda device: False)
    status, cells = _measured(tmp_path, monkeypatch, bench)
    assert status == steps.DEVICE_LOST
    assert list(cells) == done
    begun = [line.split()[2] for line in capsys.readouterr().out.splitlines() if line.startswith(steps.STARTED)]
    done.clear()
    monkeypatch.setattr(run_cells, "_alive", lambda device: pytest.fail("asked without a reason"))
    again = lambda cell, runner: done.append(cell.id)  # noqa: E731
    status, cells = _measured(tmp_path, monkeypatch, again, "--failed", "nf4_quantize", begun[-1], "lost")
    assert (status, cells[begun[-1]]["failed"]) == (0, "lost")
    assert not set(done) & set(begun), "neither what is stored nor what failed is measured again"
    assert len(done) == 2


def test_no_cell_begins_when_the_time_is_spent(tmp_path: Path, monkeypatch, capsys) -> None:
    status, cells = _measured(tmp_path, monkeypatch, pytest.fail, "--budget", "0")
    assert (status, cells) == (0, {})
    assert "out of time: 4 of 4 cells are left out" in capsys.readouterr().out


def test_the_names_of_steps_and_operations_choose() -> None:
    def run(*only: str) -> gpu.Run:
        return gpu.Run(gpu.options_of(["--out", ".", *(("--only", *only) if only else ())]), steps.Log(), Path())

    assert [run().wants(step) for step in gpu.STEPS] == [True] * len(gpu.STEPS)
    assert run("nf4_linear").wants("tests")
    assert run("nf4_linear", "bench").ops == ["nf4_linear"]
    assert not run("nf4_linear", "bench").wants("tests")
    assert tuple(run("bench").ops) == gpu.OPS == tuple(run_cells.BENCHES)


def test_shares_leave_time_for_the_benchmarks() -> None:
    assert sum(gpu.SHARES.values()) < 0.8
    assert gpu.BUDGET < 8 * 60
