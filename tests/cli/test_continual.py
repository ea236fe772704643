"""``peftrt finetune`` on a second task: from the first one's adapter, with EWC and replay, stopped and gone on with."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import peftrt
from peftrt.cli import main
from peftrt.continual import EWC
from peftrt.finetune.errors import RunError
from peftrt.finetune.examples import Batch, Examples, Mixed, Order
from peftrt.finetune.trainer import Plan, Trainer
from peftrt.formats.safe import read_tensors
from tests.cli.test_resume import CrashError, assert_same_run, losses, wait_for
from tests.cli.tiny import FRUIT, OTHER, TOOLS, write_jsonl

Start = Callable[..., subprocess.Popen[str]]


def read(directory: Path, name: str) -> Any:
    return json.loads((directory / name).read_text())


def run(*arguments: object) -> int:
    return main(["finetune", *map(str, arguments)])


def sentences(path: Path, groups: dict[str, tuple[str, ...]], count: int, seed: int, noise: float = 0.0) -> Path:
    """Sentences of which one word tells the label, but for a share whose label is drawn."""
    rng = random.Random(seed)
    rows = []
    for label, nouns in list(groups.items()) * (count // len(groups)):
        words = [rng.choice(OTHER) for _ in range(rng.randint(1, 4))]
        words.insert(rng.randrange(len(words)), rng.choice(nouns))
        rows.append({"text": " ".join(words), "label": rng.choice(list(groups)) if rng.random() < noise else label})
    return write_jsonl(path, rows)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two files with the same labels: in the second one other words tell them, and the other way round.

    The first one has wrong labels among the right ones: a model that is sure of everything has hardly a Fisher.
    """
    folder = tmp_path_factory.mktemp("tasks")
    first = sentences(folder / "first.jsonl", {"fruit": FRUIT[:2], "tools": TOOLS[:2]}, 240, 1, noise=0.2)
    return first, sentences(folder / "second.jsonl", {"fruit": TOOLS[2:], "tools": FRUIT[2:]}, 160, 2)


@pytest.fixture(scope="module")
def first(bert: Path, tasks: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of the first task."""
    out = tmp_path_factory.mktemp("first") / "out"
    options = ("--r", 4, "--lr", 1e-2, "--epochs", 2, "--lora-dropout", 0)
    assert run("--model", bert, "--data", tasks[0], "--task", "classify", "--out", out, *options) == 0
    assert read(out, "metrics.json")["evaluation"]["accuracy"] > 0.8
    return out


@pytest.fixture(scope="module")
def second(bert: Path, tasks: tuple[Path, Path], first: Path) -> list[object]:
    """Options of the second task's run."""
    options = ["--lr", 1e-2, "--steps", 40, "--save-every", 7]
    return ["--model", bert, "--data", tasks[1], "--task", "classify", "--adapter", first, *options]


@pytest.fixture(scope="module")
def plain(second: list[object], tasks: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second task with nothing done for the first: lambda is 0."""
    out = tmp_path_factory.mktemp("plain") / "out"
    assert run(*second, "--ewc", tasks[0], "--ewc-lambda", 0, "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def both(second: list[object], tasks: tuple[Path, Path]) -> list[object]:
    """Options of the second task's run with both ways of keeping the first."""
    ewc = ["--ewc", tasks[0], "--ewc-lambda", 10]
    return [*second, *ewc, "--replay", tasks[0], "--replay-share", 0.5, "--replay-size", 40]


@pytest.fixture(scope="module")
def kept(both: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second task with both."""
    out = tmp_path_factory.mktemp("kept") / "out"
    assert run(*both, "--out", out) == 0
    return out


def test_an_adapter_goes_on_with_its_head_and_its_labels(first: Path, plain: Path, bert: Path) -> None:
    before, after = (read_tensors(path / "adapter_model.safetensors") for path in (first, plain))
    assert before.keys() == after.keys()
    configs = [read(path, "adapter_config.json") for path in (first, plain)]
    assert configs[0] == configs[1]
    assert read(plain, "labels.json") == ["fruit", "tools"]
    metrics = read(plain, "metrics.json")
    # it begins where the first one ended, on the same examples held out
    assert metrics["former"]["before"] == pytest.approx(_without_step(read(first, "metrics.json")["evaluation"]))
    assert metrics["evaluation"]["accuracy"] > 0.9


def _without_step(evaluation: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in evaluation.items() if name != "step"}


def test_what_is_kept_is_forgotten_less(plain: Path, kept: Path) -> None:
    forgetful, other = (read(path, "metrics.json")["former"] for path in (plain, kept))
    assert forgetful["before"] == other["before"]
    for former in (forgetful, other):
        assert former["eval_examples"] > 10
        assert former["change"]["loss"] == former["after"]["loss"] - former["before"]["loss"]
    assert forgetful["change"]["loss"] > 0.2
    assert other["change"]["loss"] < 0.25 * forgetful["change"]["loss"]
    assert read(kept, "metrics.json")["evaluation"]["accuracy"] > 0.9


def test_ewc_alone_forgets_less(second: list[object], tasks: tuple[Path, Path], plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(*second, "--ewc", tasks[0], "--ewc-samples", 50, "--out", out) == 0
    found, other = (read(path, "metrics.json") for path in (out, plain))
    assert found["ewc"]["samples"] == 50
    assert found["ewc"]["bytes"] > 1 << 16
    penalties = found["ewc"]["penalties"]
    assert len(penalties) == 40
    assert penalties[0] == 0.0, "nothing has moved in the first step"
    assert all(penalty > 0 for penalty in penalties[1:])
    assert other["ewc"]["penalties"] == [0.0] * 40
    # the first step is the same, whatever the penalty is then
    assert found["history"][0]["loss"] == other["history"][0]["loss"]
    assert found["former"]["change"]["loss"] < 0.5 * other["former"]["change"]["loss"]
    assert found["evaluation"]["accuracy"] > 0.9


def test_an_adapter_of_another_method_goes_on(second: list[object], tasks: tuple[Path, Path], tmp_path: Path) -> None:
    """IA3: its configuration and its values come from the directory, and EWC is over its own Parameters."""
    bert, mine, out = second[1], tmp_path / "ia3", tmp_path / "out"
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    targets = ["key", "value", "intermediate.dense"]
    config = peftrt.IA3Config(
        target_modules=targets, feedforward_modules=["intermediate.dense"], modules_to_save=["classifier"]
    )
    peftrt.adapt(model, config)
    peftrt.save(model, mine)
    (mine / "labels.json").write_text('["tools", "fruit"]')
    options = ("--adapter", mine, "--steps", 3, "--ewc", tasks[0], "--ewc-samples", 20)
    assert run(*second, *options, "--out", out) == 0
    before, after = (read_tensors(path / "adapter_model.safetensors") for path in (mine, out))
    assert before.keys() == after.keys()
    assert any(name.endswith("ia3_l") and not torch.equal(before[name], after[name]) for name in before)
    metrics = read(out, "metrics.json")
    # F and the former values of the factors and of the head
    assert metrics["ewc"]["bytes"] == 2 * 4 * sum(tensor.numel() for tensor in after.values())
    assert metrics["ewc"]["penalties"][2] > 0
    # in the order that the head has them
    assert read(out, "labels.json") == ["tools", "fruit"]


def test_a_language_model_keeps_what_its_base_knew(tmp_path: Path, gpt2: Path, prose: Path) -> None:
    """Without an adapter to begin with: EWC over the base's Fisher, and replay of packed blocks."""
    data = tmp_path / "tools.txt"
    rng = random.Random(5)
    data.write_text("".join(f"{rng.choice(TOOLS)} {rng.choice(TOOLS)}\n" for _ in range(300)))
    options = ("--task", "causal-lm", "--max-length", 16, "--r", 4, "--lr", 1e-2, "--steps", 30, "--batch-size", 4)
    changes = {}
    for name, extra in (
        ("plain", ("--ewc", prose, "--ewc-lambda", 0)),
        ("ewc", ("--ewc", prose, "--ewc-lambda", 3)),
        ("replay", ("--replay", prose)),
    ):
        out = tmp_path / name
        assert run("--model", gpt2, "--data", data, "--out", out, *options, *extra) == 0
        metrics = read(out, "metrics.json")
        assert metrics["evaluation"]["perplexity"] < 20
        changes[name] = metrics["former"]["change"]["loss"]
    assert changes["ewc"] < 0.8 * changes["plain"]
    assert changes["replay"] < 0.8 * changes["plain"]


def test_replayed_examples_are_chosen_by_class(tmp_path: Path, bert: Path) -> None:
    """Of 90 and 10 examples 20 are kept, 10 of each class; labels of both files are the head's."""
    rows = [{"text": f"apple {word}", "label": "fruit"} for word in OTHER * 9]
    rows += [{"text": f"saw {word}", "label": "saws"} for word in OTHER]
    former = write_jsonl(tmp_path / "former.jsonl", rows)
    data = sentences(tmp_path / "data.jsonl", {"fruit": FRUIT, "tools": TOOLS}, 40, 3)
    out = tmp_path / "out"
    options = ("--replay-size", 20, "--batch-size", 8, "--epochs", 1, "--eval-share", 0, "--r", 2)
    given = ("--model", bert, "--data", data, "--task", "classify", "--out", out, "--replay", former, *options)
    seen: list[Examples] = []

    def watch(examples: Examples, *rest: Any) -> Any:
        seen.append(examples)
        return _choose(examples, *rest)

    import peftrt.finetune.run as module

    _choose = module.choose_replayed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "choose_replayed", watch)
        assert run(*given) == 0
    assert read(out, "labels.json") == ["fruit", "saws", "tools"]
    metrics = read(out, "metrics.json")
    # six new ones a batch: 40 examples are 7 batches
    assert (metrics["steps"], metrics["train_examples"]) == (7, 40)
    assert "former" not in metrics
    from peftrt.finetune.settings import Settings

    settings = Settings(str(bert), str(data), "classify", str(out), replay=str(former), replay_size=20)
    assert np.bincount(_choose(seen[0], settings).classes).tolist() == [10, 10]


def test_a_mixed_order_is_whole_and_its_own() -> None:
    lengths = np.arange(1, 21)
    mixed, order = Mixed(lengths, 9, 8, 3, seed=4), Order(lengths, 5, seed=4)
    assert mixed.batches_per_epoch == order.batches_per_epoch == 4
    replayed = []
    for number in range(8):
        batch = mixed[number].tolist()
        assert batch[:-3] == order[number].tolist()
        assert len(set(batch[-3:])) == 3
        assert all(20 <= index < 29 for index in batch[-3:])
        replayed.append(batch[-3:])
    assert len({tuple(each) for each in replayed}) == 8
    assert [Mixed(lengths, 9, 8, 3, seed=4)[number].tolist()[-3:] for number in range(8)] == replayed
    assert len(Mixed(lengths, 2, 8, 3, seed=4)[0]) == 7


def test_a_step_takes_the_penalty_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many batches a step has: the gradient is that of the mean loss and of one penalty."""
    examples = Examples.of([[1], [2], [3], [4]], [0, 1, 0, 1], 0)
    value = torch.nn.Parameter(torch.tensor([2.0]))
    plan = Plan(steps=3, lr=0.1, batch_size=1, grad_accum=4, schedule="constant", max_grad_norm=0)
    gradients = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *rest: Any) -> Any:
        assert value.grad is not None
        gradients.append(value.grad.clone())
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)

    def penalty() -> torch.Tensor:
        return 3.0 * (value - 1.0).square().sum()

    def loss(batch: Batch) -> torch.Tensor:
        return 5.0 * value.sum() * len(batch.labels)

    trainer = Trainer({"v": value}, loss, examples, plan, penalty=penalty)
    first = next(iter(trainer))
    assert gradients[0].item() == 5.0 + 6.0
    assert (first.loss, first.penalty) == (10.0, 3.0)
    state = {name: tensor.clone() for name, tensor in trainer.state().items()}
    next(iter(trainer))
    other = Trainer({"v": value}, loss, examples, plan, penalty=penalty)
    other.restore(state)
    assert [s.penalty for s in other.history] == [3.0]
    far = Trainer({"v": value}, lambda batch: value.sum(), examples, plan, penalty=lambda: value.sum() * float("inf"))
    with pytest.raises(RunError, match="the penalty is inf at step 1: try a smaller --ewc-lambda"):
        next(iter(far))


@pytest.mark.parametrize("stopped_after", [1, 17])
def test_a_crash_changes_nothing(
    both: list[object], kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_after: int
) -> None:
    """Before the first checkpoint and after one: what was measured is measured again, to the same bits."""
    advance, out = Trainer._advance, tmp_path / "crashed"

    def crash(trainer: Trainer) -> Any:
        if trainer.step == stopped_after:
            raise CrashError
        return advance(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_advance", crash)
        with pytest.raises(CrashError):
            run(*both, "--out", out)
    assert run("--resume", "--out", out, "--ewc-lambda", 10) == 0
    assert_same_run(out, kept)
    found, expected = (read(path, "metrics.json") for path in (out, kept))
    for name in ("ewc", "former"):
        assert found[name] == expected[name]


def test_ctrl_c(both: list[object], kept: Path, tmp_path: Path, peftrt_process: Start) -> None:
    out = tmp_path / "out"
    process = peftrt_process("finetune", *both, "--out", out)
    wait_for(process, "step 4/")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert {path.name for path in out.iterdir()} == {"run.json", "checkpoint.safetensors"}
    assert run("--resume", "--out", out) == 0
    assert losses(out) == losses(kept)


Refused = Callable[..., str]


@pytest.fixture
def refused(second: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs the second task with other arguments, expects one line of error, and returns it."""

    def call(*arguments: object, without: str | None = None) -> str:
        given = list(second)
        if without is not None:
            del given[given.index(without) : given.index(without) + 2]
        capsys.readouterr()
        assert run(*given, "--out", tmp_path / "refused", *arguments) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("peftrt: error: ")
        assert len(errors.splitlines()) == 1, errors
        assert not (tmp_path / "refused").exists()
        return errors

    return call


def test_options_that_do_not_go_together(refused: Refused, tasks: tuple[Path, Path], tmp_path: Path) -> None:
    assert "--ewc-lambda needs --ewc" in refused("--ewc-lambda", 1)
    assert "--ewc-samples needs --ewc" in refused("--ewc-samples", 1)
    assert "--replay-share needs --replay" in refused("--replay-share", 0.5)
    assert "--replay-size needs --replay" in refused("--replay-size", 5)
    assert "--r comes with --adapter: leave it away" in refused("--r", 4)
    assert "--target-modules comes with --adapter" in refused("--target-modules", "query")
    assert "--ewc needs --adapter to classify" in refused("--ewc", tasks[0], without="--adapter")
    assert "--ewc: no such file" in refused("--ewc", tmp_path / "none.jsonl")
    share = ("--replay", tasks[0], "--batch-size", 4, "--replay-share")
    for bad in (0.05, 0.95):
        assert f"--replay-share {bad} of --batch-size 4 must leave an example" in refused(*share, bad)
    text = tmp_path / "former.txt"
    text.write_text("an apple\n")
    assert "--replay: a .txt file has no labels" in refused("--replay", text)


def test_labels_that_the_head_has_not(refused: Refused, tasks: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": f"a {word}", "label": "chairs"} for word in OTHER])
    message = f"{other}:1: unknown label 'chairs'; the adapter's head has 'fruit', 'tools'"
    assert message in refused("--ewc", other)
    assert message in refused("--replay", other)
    assert message in refused("--data", other)


def test_adapters_that_cannot_go_on(refused: Refused, first: Path, gpt2: Path, prose: Path, tmp_path: Path) -> None:
    assert "--adapter: no such directory" in refused("--adapter", tmp_path / "none")
    broken = tmp_path / "broken"

    def changed(name: str, content: str | None) -> str:
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(first, broken)
        (broken / name).unlink()
        if content is not None:
            (broken / name).write_text(content)
        return refused("--adapter", broken)

    assert "has no adapter_config.json" in changed("adapter_config.json", None)
    assert "has no adapter_model.safetensors" in changed("adapter_model.safetensors", None)
    assert "has no labels.json" in changed("labels.json", None)
    assert "labels.json is damaged" in changed("labels.json", "[")
    assert "must be a list of two or more different labels" in changed("labels.json", '["a", "a"]')
    error = changed("labels.json", '["fruit", "tools", "chairs"]')
    assert "--adapter: " in error
    assert "has shape [2, 64], the model's has [3, 64]" in error
    config = read(first, "adapter_config.json") | {"task_type": "CAUSAL_LM"}
    message = "was trained for CAUSAL_LM, --task classify is SEQ_CLS"
    assert message in changed("adapter_config.json", json.dumps(config))


def test_resume_with_another_adapter_is_refused(
    second: list[object],
    first: Path,
    tasks: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mine, out = tmp_path / "mine", tmp_path / "out"
    shutil.copytree(first, mine)
    former = shutil.copy(tasks[0], tmp_path / "former.jsonl")

    def crash(trainer: Trainer) -> Any:
        raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_advance", crash)
        with pytest.raises(CrashError):
            run(*second, "--adapter", mine, "--ewc", former, "--out", out)

    def refused(message: str, *arguments: object) -> None:
        capsys.readouterr()
        assert run("--resume", "--out", out, *arguments) == 2
        assert message in capsys.readouterr().err

    refused("the run has --ewc-lambda 10000.0, not 5.0", "--ewc-lambda", 5)
    refused("the run has --replay None", "--replay", former)
    text = Path(former).read_text()
    Path(former).write_text(text + text)
    refused("the data has changed since the run began")
    Path(former).write_text(text)
    weights = mine / "adapter_model.safetensors"
    weights.write_bytes((first / "adapter_model.safetensors").read_bytes()[:-1] + b"\0")
    refused("the adapter has changed since the run began")


def test_a_measurement_that_fails_is_the_users_to_see(
    refused: Refused, tasks: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("EWC: a gradient of the weight of query is not finite")

    monkeypatch.setattr(EWC, "consolidate", fail)
    assert "--ewc: a gradient of the weight of query is not finite" in refused("--ewc", tasks[0])
