"""``peftrt finetune`` from a file to a directory, and that directory in HF peft."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import peftrt
from peftrt.cli import main
from peftrt.formats.safe import read_tensors
from tests.cli.tiny import make_tokenizer, sentence, write_jsonl
from tests.tolerances import assert_close

PNG = b"\x89PNG\r\n\x1a\n"
TEXTS = ["the red apple is on my table", "a hammer", "old saw and new drill", "my plum is red"]


def run(*arguments: object) -> int:
    return main(["finetune", *map(str, arguments)])


def read(directory: Path, name: str) -> Any:
    return json.loads((directory / name).read_text())


def losses(directory: Path) -> list[float]:
    return [step["loss"] for step in read(directory, "metrics.json")["history"]]


def tokens(directory: Path) -> dict[str, torch.Tensor]:
    return transformers.AutoTokenizer.from_pretrained(directory)(TEXTS, padding=True, return_tensors="pt")


@pytest.fixture(scope="module")
def classifier(bert: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over a base in full precision, which HF peft can repeat to the last digits."""
    out = tmp_path_factory.mktemp("runs") / "classifier"
    options = ("--r", 8, "--lora-dropout", 0, "--lr", 1e-2, "--epochs", 3, "--quantize", "none", "--eval-share", 0.25)
    assert run("--model", bert, "--data", labelled, "--task", "classify", "--out", out, *options) == 0
    return out


def test_classify_learns_and_writes_everything(classifier: Path) -> None:
    metrics, history = read(classifier, "metrics.json"), losses(classifier)
    assert metrics["steps"] == len(history) == 3 * -(-metrics["train_examples"] // 8)
    assert metrics["train_examples"] + metrics["eval_examples"] == 240
    assert metrics["evaluation"]["accuracy"] > 0.8
    assert 0.7 < metrics["evaluation"]["macro_f1"] <= 1
    assert sum(history[-5:]) < 0.7 * sum(history[:5])
    assert [e["step"] for e in metrics["evaluations"]] == [metrics["steps"] * i // 3 for i in (1, 2, 3)]
    assert metrics["peak_memory_bytes"] > 1 << 20
    assert (classifier / "loss.png").read_bytes().startswith(PNG)
    assert read(classifier, "labels.json") == ["fruit", "tools"]
    assert read(classifier, "run.json")["finished"]
    assert not list(classifier.glob(".*"))
    assert not list(classifier.glob("checkpoint*"))


def test_hf_peft_loads_a_classifier(classifier: Path, bert: Path) -> None:
    peft = pytest.importorskip("peft")
    batch = tokens(classifier)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    theirs = peft.PeftModel.from_pretrained(base, classifier).eval()
    ours = transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2).eval()
    peftrt.load(ours, classifier)
    peftrt.set_active(ours, "default")
    with torch.no_grad():
        expected = theirs(**batch).logits
        assert_close(ours(**batch).logits, expected)
    # the head came with the adapter: what was trained tells the classes apart
    assert expected.argmax(1).tolist() == [0, 1, 1, 0]
    saved = read_tensors(classifier / "adapter_model.safetensors")
    assert "base_model.model.classifier.weight" in saved
    assert read(classifier, "adapter_config.json")["modules_to_save"] == ["classifier"]


def test_a_head_that_the_checkpoint_lacks_is_trained_and_saved_whole(
    tmp_path: Path, bert: Path, labelled: Path
) -> None:
    """A BERT without a pooler: one is drawn at random, and without it the adapter would mean nothing."""
    base = tmp_path / "base"
    model = transformers.BertModel.from_pretrained(bert, add_pooling_layer=False)
    model.save_pretrained(base)
    make_tokenizer(base, bert=True)
    out = tmp_path / "out"
    assert run("--model", base, "--data", labelled, "--task", "classify", "--out", out, "--steps", 2, "--r", 2) == 0
    saved = set(read_tensors(out / "adapter_model.safetensors"))
    assert {"base_model.model.bert.pooler.dense.weight", "base_model.model.classifier.bias"} <= saved
    assert not any("pooler.dense.lora" in name for name in saved)


def test_language_model_on_packed_text(tmp_path: Path, gpt2: Path, prose: Path) -> None:
    out = tmp_path / "out"
    options = ("--r", 4, "--lr", 1e-2, "--steps", 30, "--max-length", 32, "--quantize", "none", "--batch-size", 4)
    assert run("--model", gpt2, "--data", prose, "--task", "causal-lm", "--out", out, *options) == 0
    metrics = read(out, "metrics.json")
    history = metrics["history"]
    # every block is full, so every batch of an epoch but the last holds 4 x 32 tokens
    assert {step["tokens"] for step in history} <= {32 * n for n in (1, 2, 3, 4)}
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    assert metrics["evaluation"]["perplexity"] < 30  # 32 words: less than by chance
    peft = pytest.importorskip("peft")
    batch = tokens(out)
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(gpt2), out).eval()
    ours = transformers.AutoModelForCausalLM.from_pretrained(gpt2).eval()
    peftrt.load(ours, out)
    peftrt.set_active(ours, "default")
    with torch.no_grad():
        assert_close(ours(**batch).logits, theirs(**batch).logits)


def test_four_bits_and_every_option_together(tmp_path: Path, gpt2: Path) -> None:
    """Examples from a CSV with other columns, an evaluation file, NF4, bf16, accumulation, checkpointed layers."""
    rng = random.Random(5)
    for name, count in (("train", 40), ("test", 8)):
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([["n", "body"], *([i, sentence(rng, "fruit")] for i in range(count))])
    out = tmp_path / "out"
    options = ("--text-column", "body", "--r", 4, "--alpha", 4, "--rslora", "--target-modules", "c_attn,c_proj")
    training = ("--grad-accum", 2, "--batch-size", 4, "--epochs", 2, "--warmup", 2, "--schedule", "linear")
    extra = ("--gradient-checkpointing", "--dtype", "bf16", "--weight-decay", 0.1, "--seed", 3, "--max-grad-norm", 0)
    data = ("--data", tmp_path / "train.csv", "--eval-data", tmp_path / "test.csv", "--max-length", 16)
    training += ("--loraplus-ratio", 8)
    assert run("--model", gpt2, "--task", "causal-lm", "--out", out, *data, *options, *training, *extra) == 0
    metrics, config = read(out, "metrics.json"), read(out, "adapter_config.json")
    assert (metrics["train_examples"], metrics["eval_examples"], metrics["steps"]) == (40, 8, 10)
    rates = [2e-4 * eighths / 8 for eighths in (4, 8, 8, 7, 6, 5, 4, 3, 2, 1)]
    assert [step["lr"] for step in metrics["history"]] == pytest.approx(rates)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, True)
    saved = read_tensors(out / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in saved} == {"c_attn", "c_proj"}
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())


def test_a_seed_gives_the_same_bits_and_another_does_not(tmp_path: Path, bert: Path, labelled: Path) -> None:
    base = ("--model", bert, "--data", labelled, "--task", "classify", "--steps", 4, "--r", 2)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(*base, "--out", tmp_path / name, "--seed", seed) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab")
    assert first == second


def test_labels_that_are_numbers_are_in_their_order(tmp_path: Path, bert: Path) -> None:
    rows = [{"text": sentence(random.Random(i), "fruit"), "label": [2, 10, 9][i % 3]} for i in range(30)]
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    out = tmp_path / "out"
    options = ("--steps", 1, "--r", 2, "--eval-share", 0)
    assert run("--model", bert, "--data", data, "--task", "classify", "--out", out, *options) == 0
    assert read(out, "labels.json") == ["2", "9", "10"]
    assert read(out, "metrics.json")["evaluation"] is None


def test_overwrite_replaces_a_run_and_nothing_else(
    tmp_path: Path, bert: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ("--model", bert, "--data", labelled, "--task", "classify", "--out", out, "--steps", 2, "--r", 2)
    assert run(*arguments) == 0
    (out / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert run(*arguments) == 2
    assert "is not empty: --resume goes on with the run in it, --overwrite replaces it" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run(*arguments, "--overwrite", "--seed", 9) == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "adapter_model.safetensors").read_bytes() != before["adapter_model.safetensors"]
