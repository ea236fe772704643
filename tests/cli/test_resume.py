"""Runs that are stopped: by Ctrl-C, by a crash, by a kill. What goes on is what would have gone on, bit for bit."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftrt.cli import main
from peftrt.finetune.errors import RunError
from peftrt.finetune.run import Run
from peftrt.finetune.trainer import Trainer
from peftrt.formats.safe import write_tensors

Start = Callable[..., subprocess.Popen[str]]


def losses(directory: Path) -> list[float]:
    return [step["loss"] for step in json.loads((directory / "metrics.json").read_text())["history"]]


def evaluations(directory: Path) -> Any:
    return json.loads((directory / "metrics.json").read_text())["evaluations"]


def assert_same_run(ours: Path, expected: Path) -> None:
    assert losses(ours) == losses(expected)
    assert evaluations(ours) == evaluations(expected)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (ours / name).read_bytes() == (expected / name).read_bytes(), name
    assert {path.name for path in ours.iterdir()} == {path.name for path in expected.iterdir()}


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"ended without {text!r}: {process.stderr.read() if process.stderr else ''}")


@pytest.fixture(scope="module")
def bert_run(bert: Path, labelled: Path) -> list[str]:
    """Dropout of the base's own and of the adapter's, accumulated batches, three epochs of 14 steps."""
    options = ["--r", "4", "--lr", "5e-3", "--epochs", "3", "--batch-size", "8", "--grad-accum", "2"]
    options += ["--lora-dropout", "0.1", "--save-every", "7"]
    return ["finetune", "--model", str(bert), "--data", str(labelled), "--task", "classify", *options]


@pytest.fixture(scope="module")
def straight(bert_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, not stopped."""
    out = tmp_path_factory.mktemp("straight") / "out"
    assert main([*bert_run, "--out", str(out)]) == 0
    assert len(losses(out)) == 42
    return out


def test_ctrl_c_saves_and_the_command_that_is_shown_goes_on(
    tmp_path: Path, bert_run: list[str], straight: Path, peftrt_process: Start
) -> None:
    out = tmp_path / "out dir"
    process = peftrt_process(*bert_run, "--out", out)
    wait_for(process, "step 4/")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert {path.name for path in out.iterdir()} == {"run.json", "checkpoint.safetensors"}
    lines = errors.strip().splitlines()
    assert lines[-2].startswith("peftrt: stopped after step")
    assert lines[-1].startswith("go on with: peftrt finetune --resume --out ")
    resumed = peftrt_process(*shlex.split(lines[-1].removeprefix("go on with: peftrt")))
    output, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    assert "step 4/" not in output, "it began again"
    assert_same_run(out, straight)


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    tmp_path: Path, gpt2: Path, prose: Path, peftrt_process: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--max-length", "16", "--r", "4", "--lr", "5e-3", "--steps", "40", "--batch-size", "4"]
    arguments = ["finetune", "--model", str(gpt2), "--data", str(prose), "--task", "causal-lm", *options]
    arguments += ["--save-every", "3", "--out"]
    out = tmp_path / "killed"
    process = peftrt_process(*arguments, out)
    wait_for(process, "step 10/")
    process.kill()
    process.communicate(timeout=120)
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == {
        "run.json",
        "checkpoint.safetensors",
    }
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert main([*arguments, str(tmp_path / "straight")]) == 0
    assert_same_run(out, tmp_path / "straight")
    capsys.readouterr()
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert "the run is finished; nothing to do" in capsys.readouterr().out


class CrashError(Exception):
    """Stands for whatever may end a process."""


@pytest.mark.parametrize("stopped_after", [1, 14, 20])
def test_a_crash_after_any_step(
    tmp_path: Path, bert_run: list[str], straight: Path, monkeypatch: pytest.MonkeyPatch, stopped_after: int
) -> None:
    """Before the first checkpoint, where an epoch has ended, and in between."""
    advance = Trainer._advance

    def crash(trainer: Trainer) -> Any:
        if trainer.step == stopped_after:
            raise CrashError
        return advance(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_advance", crash)
        with pytest.raises(CrashError):
            main([*bert_run, "--out", str(tmp_path / "crashed")])
    assert main(["finetune", "--resume", "--out", str(tmp_path / "crashed")]) == 0
    assert_same_run(tmp_path / "crashed", straight)


def test_a_crash_while_the_results_are_written(
    tmp_path: Path, bert_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("peftrt.finetune.run.plot_run", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        assert main([*bert_run[: bert_run.index("--epochs")], "--steps", "6", "--out", str(out)]) == 1
    assert (out / "checkpoint.safetensors").exists()
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert (out / "loss.png").exists()
    assert not (out / "checkpoint.safetensors").exists()


@pytest.fixture
def stopped(tmp_path: Path, bert_run: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a run that was stopped after its first checkpoint."""
    out = tmp_path / "stopped"
    advance = Trainer._advance
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_advance", lambda self: self.history[8] if self.step == 9 else advance(self))
        patch.setattr(Run, "stop_if_asked", lambda self: _raise() if self.trainer.step == 8 else None)
        assert main([*bert_run, "--out", str(out)]) == 1
    return out


def _raise() -> None:
    raise RunError("stopped by the test")


def test_resume_takes_no_other_settings(
    stopped: Path, labelled: Path, bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    for arguments, message in (
        (["--lr", "1"], "the run has --lr 0.005, not 1.0: leave --lr away"),
        (["--steps", "9"], "the run has --steps None, not 9"),
        (["--optim", "paged-adamw"], "the run has --optim adamw, not paged-adamw"),
        (["--optim-budget", "64MiB"], "--optim-budget needs --optim paged-adamw or paged-adamw-8bit, not adamw"),
        (["--task", "causal-lm"], "the run has --task classify, not causal-lm"),
        (["--overwrite"], "--resume and --overwrite exclude each other"),
    ):
        assert main(["finetune", "--resume", "--out", str(stopped), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == before
    # the same settings, and those that change nothing, are no contradiction
    same = ["--model", str(bert), "--data", str(labelled), "--lr", "5e-3", "--save-every", "2"]
    assert main(["finetune", "--resume", "--out", str(stopped), *same]) == 0


def test_resume_refuses_what_has_changed(
    stopped: Path, bert: Path, labelled: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = json.loads((stopped / "run.json").read_text())

    def refused(message: str) -> None:
        assert main(["finetune", "--resume", "--out", str(stopped)]) == 2
        errors = capsys.readouterr().err
        assert message in errors
        assert len(errors.splitlines()) == 1

    def write(**changes: Any) -> None:
        (stopped / "run.json").write_text(json.dumps({**run, **changes}))

    write(data={"data": "0" * 64})
    refused("the data has changed since the run began")
    write(base="0" * 64)
    refused("has changed since the run began")
    write(settings={**run["settings"], "new_option": 1})
    refused("another version of peftrt: it has 'new_option'")
    (stopped / "run.json").write_text("{")
    refused("run.json is damaged")
    write()
    whole = (stopped / "checkpoint.safetensors").read_bytes()
    (stopped / "checkpoint.safetensors").write_bytes(whole[: len(whole) // 2])
    refused("the checkpoint cannot be read")
    write_tensors(stopped / "checkpoint.safetensors", {"history": torch.zeros(0, 4), "random.cpu": torch.zeros(1)})
    refused("is not in the checkpoint")
    (stopped / "run.json").unlink()
    refused("no run in")
