"""Every mistake is one line on stderr and status 2, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from peftrt.cli import main
from tests.cli.tiny import write_jsonl

Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, bert: Path, labelled: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a fine-tuning with other arguments, expects it to fail, and returns what it said."""

    def run(*arguments: object, status: int = 2, **replaced: object) -> str:
        given = {"model": bert, "data": labelled, "task": "classify", "out": tmp_path / "out", "steps": 1} | replaced
        options = [str(part) for name, value in given.items() if value is not None for part in (f"--{name}", value)]
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert main(["finetune", *options, *map(str, arguments)]) == status
        errors = capsys.readouterr().err
        assert errors.startswith("peftrt: error: ")
        assert len(errors.splitlines()) == 1, errors
        assert "Traceback" not in errors
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return errors

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epoch", "3"], "unknown argument --epoch: did you mean --epochs?"),
        (["--learning-rate=3"], "unknown argument --learning-rate=3"),
        (["--lr", "0"], "argument --lr: expected a number above 0, got '0'"),
        (["--lr", "nan"], "argument --lr: expected a number above 0, got 'nan'"),
        (["--r", "8.5"], "argument --r: expected a whole number from 1 on, got '8.5'"),
        (["--r", "0"], "argument --r: expected a whole number from 1 on"),
        (["--lora-dropout", "1"], "argument --lora-dropout: expected a number from 0 to below 1"),
        (["--eval-share", "1.5"], "argument --eval-share: expected a number from 0 to below 1"),
        (["--warmup", "-1"], "argument --warmup"),
        (["--schedule", "cosin"], "argument --schedule: invalid choice: 'cosin'"),
        (["--quantize", "int8"], "argument --quantize: invalid choice: 'int8'"),
        (["--optim", "paged-adam"], "argument --optim: invalid choice: 'paged-adam'"),
        (["--optim-budget", "64MiB"], "--optim-budget needs --optim paged-adamw or paged-adamw-8bit, not adamw"),
        (["--optim", "paged-adamw", "--optim-budget", "64MB"], "--optim-budget must be like 1048576, '512MiB' or"),
        (["--optim", "paged-adamw", "--optim-budget", "-1"], "--optim-budget must not be negative, got '-1'"),
        (["--optim", "paged-adamw", "--optim-budget", "1KiB"], "--optim-budget 1KiB: must be at least "),
        (["--epochs", "2"], "--epochs and --steps exclude each other"),
        (["--eval-data", "x.csv", "--eval-share", "0.5"], "--eval-data and --eval-share exclude each other"),
        (["--device", "cuda:99"], "--device cuda:99: "),
        (["--device", "gpu"], "--device gpu: "),
        (["--max-length", "64"], "--max-length 64: the model takes at most 32 tokens"),
        (["--target-modules", "q_proj"], "q_proj"),
        (["--text-column", "body"], "no column 'body'; there are 'text', 'label'"),
        (["--label-column", "class"], "no column 'class'; there are 'text', 'label' (choose with --label-column)"),
    ],
)
def test_arguments(refused: Refused, arguments: list[str], message: str) -> None:
    assert message in refused(*arguments)


def test_missing_arguments(refused: Refused) -> None:
    assert "missing --task" in refused(task=None)
    assert "missing --model, --data" in refused(model=None, data=None)


def test_model(refused: Refused, tmp_path: Path, bert: Path) -> None:
    assert "--model: no such directory: /nowhere/at/all" in refused(model="/nowhere/at/all")
    assert "has no config.json" in refused(model=tmp_path)
    error = refused(model="nobody/no-such-model")
    assert "cannot load the tokenizer of 'nobody/no-such-model'" in error
    broken = tmp_path / "broken"
    shutil.copytree(bert, broken)
    (broken / "model.safetensors").write_bytes(b"not a checkpoint")
    assert f"cannot load the model of '{broken}'" in refused(model=broken)
    (broken / "model.safetensors").unlink()
    (broken / "pytorch_model.bin").write_bytes(b"a pickle is never opened")
    assert f"cannot load the model of '{broken}'" in refused(model=broken)


def test_a_model_that_is_no_language_model(refused: Refused, prose: Path, gpt2: Path, tmp_path: Path) -> None:
    """The head would be drawn at random."""
    other = tmp_path / "headless"
    shutil.copytree(gpt2, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    error = refused("--max-length", 16, model=other, data=prose, task="causal-lm")
    assert "is not a causal language model: its checkpoint has no lm_head.weight" in error


def test_a_tokenizer_of_another_model(refused: Refused, bert: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(bert, other)
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["apple"] = 1000
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert "makes token 1000, the model has 32 embeddings" in refused(model=other)


def test_data(refused: Refused, tmp_path: Path, prose: Path) -> None:
    assert "--data: no such file" in refused(data=tmp_path / "nothing.csv")
    assert "a .txt file has no labels" in refused(data=prose)
    path = tmp_path / "data.jsonl"
    path.write_text("")
    assert "is empty" in refused(data=path)
    path.write_text("\n \n")
    assert "has not even an example with text" in refused(data=path)
    write_jsonl(path, [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}])
    assert "needs at least two labels, got only 'x'" in refused(data=path)
    path.write_text('{"text": "a", "label": "x"}\n{"text": "b", "label"}\n')
    assert f"{path}:2: bad JSON" in refused(data=path)
    write_jsonl(path, [{"text": "a", "label": "x"}, {"text": "a", "label": "y"}])
    assert "too few different examples to hold some out: use --eval-share 0" in refused(data=path)
    short = tmp_path / "short.txt"
    short.write_text("the apple")
    assert "has not even a block of 16 tokens" in refused("--max-length", 16, data=short, task="causal-lm")


def test_evaluation_data(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    write_jsonl(path, [{"text": "a", "label": "fruit"}, {"text": "b", "label": "furniture"}])
    message = f"{path}:2: unknown label 'furniture'; the training data has 'fruit', 'tools'"
    assert message in refused("--eval-data", path)
    assert "--eval-data: no such file" in refused("--eval-data", tmp_path / "none.jsonl")


def test_output_directory(refused: Refused, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.doc").touch()
    assert "is not empty" in refused(out=full)
    assert "holds no run of peftrt: nothing was removed" in refused("--overwrite", out=full)
    file = tmp_path / "file"
    file.touch()
    assert "is a file" in refused(out=file)
    assert "--resume: no run in" in refused("--resume", model=None, data=None, task=None, out=full)
    assert "Not a directory" in refused(out=file / "inside", status=1)


def test_a_budget_that_is_too_small_replaces_no_run(
    refused: Refused, tmp_path: Path, bert: Path, labelled: Path
) -> None:
    out = tmp_path / "out"
    given = ["--model", bert, "--data", labelled, "--task", "classify", "--out", out, "--steps", 1, "--r", 2]
    assert main(["finetune", *map(str, given)]) == 0
    small = ("--overwrite", "--optim", "paged-adamw-8bit", "--optim-budget", "1KiB")
    assert "--optim-budget 1KiB: must be at least " in refused(*small)
    assert json.loads((out / "run.json").read_text())["finished"]


def test_a_loss_that_is_nan_keeps_the_last_checkpoint(
    tmp_path: Path, bert: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--task", "classify", "--steps", "40", "--lr", "1e20", "--max-grad-norm", "0", "--save-every", "1"]
    out = tmp_path / "out"
    given = ["finetune", "--model", str(bert), "--data", str(labelled), "--out", str(out), *options]
    assert main(given) == 1
    errors = capsys.readouterr().err
    assert "at step" in errors
    assert "try a smaller --lr" in errors
    assert len(errors.splitlines()) == 1
    assert (out / "checkpoint.safetensors").exists()
    assert not (out / "adapter_model.safetensors").exists()


def test_without_the_extra_one_line_says_what_to_install(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "peftrt finetune needs transformers, which is not installed: pip install 'peftrt[hf]'" in refused()
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert "needs rich, which is not installed: pip install 'peftrt[hf]'" in refused()
