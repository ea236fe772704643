"""``--optim paged-adamw``: a run that pages against a file in its directory is the run that does not, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftrt.cli import main
from peftrt.finetune.trainer import Trainer
from peftrt.formats.safe import read_tensors
from peftrt.optim import PagedAdamW, paged_adamw
from tests.cli.test_resume import CrashError, assert_same_run

PAGE = 4096


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model's state is then many pages, too."""
    monkeypatch.setattr(paged_adamw, "PAGE_SIZES", (PAGE,))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[PagedAdamW]:
    """The optimizers that a run makes."""
    found: list[PagedAdamW] = []
    start = PagedAdamW.__init__

    def note(self: PagedAdamW, *args: Any, **options: Any) -> None:
        start(self, *args, **options)
        found.append(self)

    monkeypatch.setattr(PagedAdamW, "__init__", note)
    return found


def command(bert: Path, labelled: Path, *more: str) -> list[str]:
    options = ["--r", "64", "--lr", "5e-3", "--steps", "10", "--save-every", "3", "--max-grad-norm", "0.5"]
    return ["finetune", "--model", str(bert), "--data", str(labelled), "--task", "classify", *options, *more]


@pytest.mark.parametrize("name", ["paged-adamw", "paged-adamw-8bit"])
def test_a_run_that_is_resumed_under_another_budget_is_the_run_that_was_not_stopped(
    tmp_path: Path,
    bert: Path,
    labelled: Path,
    name: str,
    made: list[PagedAdamW],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    given = command(bert, labelled, "--optim", name)
    assert main([*given, "--out", str(straight)]) == 0
    advance = Trainer._advance

    def crash(trainer: Trainer) -> Any:
        if trainer.step == 7:
            raise CrashError
        return advance(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_advance", crash)
        with pytest.raises(CrashError):
            main([*given, "--optim-budget", "64KiB", "--out", str(stopped)])
    # the file has no name: nothing but the run is in its directory
    assert {path.name for path in stopped.iterdir()} == {"run.json", "checkpoint.safetensors"}
    saved = read_tensors(stopped / "checkpoint.safetensors")
    assert any(entry.startswith("optimizer.exp_avg_q.") for entry in saved) is (name == "paged-adamw-8bit")
    assert main(["finetune", "--resume", "--out", str(stopped), "--optim-budget", "96KiB"]) == 0
    assert_same_run(stopped, straight)
    whole, first, second = (optimizer.stats() for optimizer in made)
    assert (whole.bytes_in, whole.resident) == (0, whole.pages)
    assert 0 <= first.resident < second.resident < second.pages
    assert min(first.bytes_in, first.bytes_out, second.bytes_in, second.bytes_out) > 0
    for stats, budget in ((first, 64 << 10), (second, 96 << 10)):
        assert stats.device_bytes <= budget
        assert stats.store_bytes == stats.pages * PAGE
    assert json.loads((stopped / "metrics.json").read_text())["optimizer_bytes"] == second.device_bytes
    assert json.loads((stopped / "run.json").read_text())["settings"]["optim_budget"] == "96KiB"
    assert f"{name}: " in capsys.readouterr().out


def test_the_norm_is_clipped_by_the_optimizer(
    tmp_path: Path, bert: Path, labelled: Path, made: list[PagedAdamW], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", None)
    for norm, expected in (("0.5", 0.5), ("0", None)):
        out = tmp_path / norm
        given = command(bert, labelled, "--optim", "paged-adamw", "--out", str(out), "--max-grad-norm", norm)
        assert main(given) == 0
        assert made[-1].max_grad_norm == expected
        assert (made[-1].grad_norm is None) is (expected is None)
