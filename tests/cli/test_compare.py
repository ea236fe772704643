"""``peftrt compare`` on a tiny model: what it measures, what it writes, and how it goes on."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftrt.cli import main
from peftrt.compare import run as running
from peftrt.compare import worker
from peftrt.compare.cells import Cell, plan
from peftrt.compare.data import prepare, read_tasks
from peftrt.compare.forgetting import forget
from peftrt.compare.methods import BODY, METHODS
from peftrt.compare.report import markdown
from peftrt.compare.settings import Settings
from peftrt.compare.subject import Classifier, Subject
from peftrt.compare.training import train
from tests.cli.tiny import FRUIT, TOOLS, sentence, write_jsonl

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def two_labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 sentences about fruit or tools, and whether one of a few words is in them."""
    rng = random.Random(5)
    rows = []
    for label in ["fruit", "tools"] * 80:
        text = sentence(rng, label)
        own = next(word for word in text.split() if word in (*FRUIT, *TOOLS))
        rows.append({"text": text, "label": label, "half": "a" if own in (*FRUIT[:2], *TOOLS[:2]) else "b"})
    return write_jsonl(tmp_path_factory.mktemp("data") / "two.jsonl", rows)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trainings do not get a process of their own; the names of those that ran."""
    ran: list[str] = []

    def here(out: Path, cell: Cell, settings: Settings, title: str, terminal: Any) -> None:
        assert worker.main(out, cell.name) == 0
        ran.append(cell.name)

    monkeypatch.setattr(running, "_run", here)
    return ran


def settings_of(bert: Path, two_labels: Path, **changes: Any) -> Settings:
    given = {"model": str(bert), "data": str(two_labels), "second_label_column": "half", "steps": 3, "batch_size": 4}
    return Settings.of({**given, "device": "cpu", **changes})


def run(out: Path, bert: Path, two_labels: Path, *arguments: object) -> int:
    data = ("--model", bert, "--data", two_labels, "--steps", 3, "--batch-size", 4, "--seeds", 1, "--device", "cpu")
    return main(["compare", "--out", str(out), *map(str, (*data, *arguments))])


def test_a_comparison_goes_on_with_what_is_missing(
    tmp_path: Path, bert: Path, two_labels: Path, in_this_process: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(out, bert, two_labels, "--methods", "lora-4,output-layer") == 0
    assert in_this_process == ["output-layer.0", "lora-4.0"] or in_this_process == ["lora-4.0", "output-layer.0"]
    found = json.loads((out / "compare.json").read_text())
    rows = {row["method"]: row for row in found["methods"]}
    assert rows.keys() == {"lora-4", "output-layer"}
    for row in rows.values():
        assert 0 <= row["accuracy"] <= 1
        assert row["steps"] == 3
        assert min(row["peak_bytes"], row["steps_per_second"], row["file_bytes"], row["base_ms"]) > 0
    # two linear maps of 64 x 2 and their biases against those and every linear layer's A and B
    assert rows["output-layer"]["trainable"] == 2 * 64 + 2
    layer = 4 * (4 * (64 + 64)) + 2 * (4 * (64 + 128))
    assert rows["lora-4"]["trainable"] == 2 * layer + 4 * (64 + 64) + 2 * 64 + 2
    assert (out / "compare.png").read_bytes().startswith(PNG)
    assert "| lora-4 " in (out / "compare.md").read_text()
    before = (out / "trainings" / "lora-4.0.json").read_bytes()
    capsys.readouterr()
    # one more method and seed: what is done stays
    assert run(out, bert, two_labels, "--methods", "lora-4,output-layer,full", "--seeds", 2) == 0
    assert sorted(in_this_process[2:]) == ["full.0", "full.1", "lora-4.1", "output-layer.1"]
    assert (out / "trainings" / "lora-4.0.json").read_bytes() == before
    assert "2 of 6 trainings are done already" in capsys.readouterr().out
    found = json.loads((out / "compare.json").read_text())
    assert {row["seeds"] for row in found["methods"]} == {2}
    full = next(row for row in found["methods"] if row["method"] == "full")
    assert full["trainable_share"] == 1.0
    own = [t["accuracy"] for t in found["trainings"] if t["method"] == "full"]
    assert full["accuracy"] == pytest.approx(sum(own) / 2)
    assert full["accuracy_spread"] == pytest.approx(abs(own[0] - own[1]) / 2**0.5)


def test_other_settings_are_refused(
    tmp_path: Path, bert: Path, two_labels: Path, in_this_process: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(out, bert, two_labels, "--methods", "output-layer") == 0
    assert run(out, bert, two_labels, "--methods", "output-layer", "--steps", 5) == 2
    assert "holds trainings with --steps 3, not 5" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert run(tmp_path / "other", bert, two_labels) == 2
    assert "is not empty, and holds no comparison" in capsys.readouterr().err
    (out / "trainings" / "output-layer.0.json").write_text("{")
    assert run(out, bert, two_labels, "--methods", "output-layer") == 1
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_its_own_part(name: str, tmp_path: Path, bert: Path, two_labels: Path) -> None:
    settings = settings_of(bert, two_labels)
    prepare(settings, tmp_path)
    tasks = read_tasks(tmp_path)
    method = METHODS[name]
    torch.manual_seed(0)
    subject = Subject.load(settings, tasks[0].labels)
    subject.adapt(method)
    trained = subject.trained()
    assert any("classifier" in path for path in trained), "the head is trained along"
    assert method.place == BODY or "copy@" in next(iter(trained)) or len(trained) > 20
    found = train(settings, method, 0, tasks, lambda step: None)
    assert found["trainable"] == sum(parameter.numel() for parameter in trained.values())
    assert len(found["losses"]) == settings.steps
    # what is stored is what is trained, in fp32, and a little to describe it
    assert 0 <= found["file_bytes"] - 4 * found["trainable"] < 8192 + (64 << 10) * (name == "full")


def test_the_same_seed_gives_the_same_figures(tmp_path: Path, bert: Path, two_labels: Path) -> None:
    settings = settings_of(bert, two_labels)
    prepare(settings, tmp_path)
    tasks = read_tasks(tmp_path)
    one, two, other = (
        train(settings, METHODS["lora-4"], seed, tasks, lambda step: None)["losses"] for seed in (1, 1, 2)
    )
    assert one == two
    assert one != other


def test_the_same_texts_have_two_tasks(tmp_path: Path, bert: Path, two_labels: Path) -> None:
    prepare(settings_of(bert, two_labels), tmp_path)
    first, second = read_tasks(tmp_path)
    assert (first.labels, second.labels) == (("fruit", "tools"), ("a", "b"))
    for part in ("train", "held_out"):
        one, two = (getattr(task, part).arrays() for task in (first, second))
        assert (one["tokens"] == two["tokens"]).all()
        assert (one["lengths"] == two["lengths"]).all()
        assert (one["classes"] != two["classes"]).any()


@pytest.mark.parametrize("name", ["full", "lora-16"])
def test_what_is_forgotten(name: str, tmp_path: Path, bert: Path, two_labels: Path) -> None:
    """After many steps of a second task the first is worse; its head is the one it was learnt with."""
    settings = settings_of(bert, two_labels, steps=40, batch_size=8)
    prepare(settings, tmp_path)
    tasks = read_tasks(tmp_path)
    found = forget(settings, replace(METHODS[name], lr=1e-2), "plain", 0, tasks, lambda step: None)
    assert found["forgotten"] == found["before"] - found["after"]
    assert found["before"] > 0.8
    assert found["after"] < found["before"]


@pytest.mark.parametrize("variant", ["ewc", "replay"])
def test_what_is_kept(variant: str, tmp_path: Path, bert: Path, two_labels: Path) -> None:
    settings = settings_of(bert, two_labels, steps=40, batch_size=8)
    prepare(settings, tmp_path)
    tasks = read_tasks(tmp_path)
    method = replace(METHODS["lora-16"], lr=1e-2)
    plain, kept = (forget(settings, method, each, 0, tasks, lambda step: None) for each in ("plain", variant))
    assert kept["before"] == plain["before"]
    assert kept["after"] > plain["after"]


def test_a_second_task_needs_a_body_that_changes() -> None:
    cells = plan([METHODS["lora-4"], METHODS["output-layer"]], 1, ("lora-4", "output-layer"))
    assert [cell.name for cell in cells] == [
        "lora-4.0",
        "output-layer.0",
        "lora-4.0.plain",
        "lora-4.0.ewc",
        "lora-4.0.replay",
    ]
    assert [Cell.of(cell.name) for cell in cells] == cells


def test_the_demos_head_reads_the_mean_of_the_tokens() -> None:
    class Encoder(nn.Module):
        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            states = torch.nn.functional.one_hot(input_ids, 4).float()
            return type("Output", (), {"last_hidden_state": states})()

    model = Classifier(Encoder(), 4, 2)
    found = model.sentence(torch.tensor([[1, 3, 0]]), torch.tensor([[1, 1, 0]]))
    assert found.tolist() == [[0.0, 0.5, 0.0, 0.5]]


def test_the_page() -> None:
    row = {
        "method": "lora-4",
        "accuracy": 0.9,
        "accuracy_spread": 0.01,
        "trainable_share": 0.0123,
        "peak_bytes": 2 << 20,
        "steps_per_second": 2.5,
        "file_bytes": 1024,
        "added_latency": 0.1,
        "lr": 1e-3,
        "seeds": 3,
    }
    names = ("before", "after", "forgotten", "second")
    lost = {"method": "lora-4", "variant": "ewc", **dict.fromkeys(names, 0.5)}
    lost |= {f"{name}_spread": 0.0 for name in names}
    settings = {"model": None, "data": None, "steps": 10, "batch_size": 8}
    text = markdown({"settings": settings, "methods": [row], "forgetting": [lost], "threads": 2, "torch": "2"})
    cells = [cell.strip() for cell in next(line for line in text.splitlines() if "0.010" in line).split("|")[1:-1]]
    assert cells == ["lora-4", "0.900 ± 0.010", "1.23%", "2.0 MiB", "2.50", "1.0 KiB", "+10%", "0.001"]
    assert "| lora-4 | ewc  | 0.500" in text
    assert "the demo's encoder on docstrings: 10 steps of 8 examples, 3 seeds, 2 threads" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "lora-5"], "no method 'lora-5'; there are full, output-layer"),
        (["--methods", ","], "expected names with commas between"),
        (["--model", "somewhere"], "--model and --data go together"),
        (["--second-label-column", "b"], "--second-label-column needs --model and --data"),
        (["--model", "/nowhere", "--data", "/nowhere.csv"], "--model: cannot load the tokenizer of '/nowhere'"),
        (["--seeds", "0"], "expected a whole number from 1 on"),
        (["--task", "causal-lm"], "invalid choice: 'causal-lm'"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str) -> None:
    assert main(["compare", "--out", str(tmp_path / "out"), *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_stopped_and_gone_on_with(
    tmp_path: Path,
    bert: Path,
    two_labels: Path,
    peftrt_process: Callable[..., subprocess.Popen[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C in the second training keeps the first; the command that is printed goes on."""
    out = tmp_path / "out"
    data = ("--model", bert, "--data", two_labels, "--batch-size", 4, "--seeds", 1, "--device", "cpu", "--steps", 150)
    process = peftrt_process("compare", "--out", out, *data, "--methods", "output-layer,lora-4", "--threads", 1)
    first = out / "trainings" / "output-layer.0.json"
    end = time.monotonic() + 120
    while not first.is_file() and time.monotonic() < end and process.poll() is None:
        time.sleep(0.1)
    assert first.is_file(), process.communicate()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopped; 1 of 2 trainings are kept" in errors
    assert "go on with: peftrt compare --out" in errors
    assert sorted(path.name for path in (out / "trainings").iterdir()) == ["output-layer.0.json"]
    kept = first.read_bytes()
    again = ("compare", "--out", out, *data, "--methods", "output-layer,lora-4", "--threads", 1)
    assert main([str(word) for word in again]) == 0
    assert "1 of 2 trainings are done already" in capsys.readouterr().out
    assert first.read_bytes() == kept
    assert len(json.loads((out / "compare.json").read_text())["methods"]) == 2
