"""``peftrt estimate``: the figures that papers give, and the memory that training takes."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import peftrt
from bench import estimate_peaks
from peftrt.cli import main
from peftrt.estimate.hugging_face import find_shape, shape_of
from peftrt.estimate.memory import Job, estimate, layer_bytes, optimizer_bytes
from peftrt.estimate.methods import METHODS, Sizes, trained
from peftrt.estimate.shapes import PRESETS, llama
from peftrt.finetune.errors import UserError
from peftrt.formats.nf4 import NF4Weight
from peftrt.optim import PagedAdamW

LLAMA_65B = PRESETS["llama-65b"]
# 80 layers of q, k, v, o [8192, 8192] and gate, up, down [22016, 8192]; embedding and head [32000, 8192]; 161 norms
LINEARS = 80 * (4 * 8192 * 8192 + 3 * 22016 * 8192)
PARAMETERS = LINEARS + 2 * 32000 * 8192 + 161 * 8192


def test_the_size_of_65b() -> None:
    assert LLAMA_65B.parameters == PARAMETERS == 65_285_660_672


def test_full_fine_tuning_of_65b_takes_780_gb() -> None:
    """12 bytes a parameter: weight 2, gradient 2, two moments of 4 (Dettmers et al. 2023, section 1)."""
    found = estimate(LLAMA_65B, Job("full", gradient_checkpointing=True))
    assert found.weights == found.gradients == 2 * PARAMETERS
    assert found.optimizer == 8 * PARAMETERS
    assert found.weights + found.gradients + found.optimizer == 12 * PARAMETERS
    assert found.peak / 1e9 == pytest.approx(780, rel=0.01)


def test_a_master_copy_makes_it_16_bytes_a_parameter() -> None:
    """2 + 2 + 4 + 4 + 4 (Rajbhandari et al. 2020, section 3.1)."""
    found = estimate(LLAMA_65B, Job("full", dtype="mixed"))
    assert found.weights + found.gradients + found.optimizer == 16 * PARAMETERS


def test_lora_of_65b_takes_160_gb() -> None:
    """Weights in bf16; A and B of rank 64 on every linear module in fp32, each with a gradient and two moments."""
    adapter = 80 * 64 * (4 * (8192 + 8192) + 3 * (22016 + 8192))
    found = estimate(LLAMA_65B, Job("lora", Sizes(r=64)))
    assert found.trainable == adapter
    assert (found.weights, found.adapter, found.gradients) == (2 * PARAMETERS, 4 * adapter, 4 * adapter)
    assert found.optimizer == 8 * adapter
    # 512 tokens, all activations kept
    assert found.peak / 1e9 == pytest.approx(160, rel=0.05)


def test_qlora_of_65b_takes_48_gb() -> None:
    """Linear modules in NF4 with nested scales, the rest in bf16 (Dettmers et al. 2023, abstract)."""
    found = estimate(LLAMA_65B, Job("qlora", Sizes(r=64), gradient_checkpointing=True))
    bits = 4 + 8 / 64 + 32 / (64 * 256)
    assert bits == pytest.approx(4.127, abs=1e-3)
    assert found.weights == int(LINEARS * bits / 8) + 2 * (PARAMETERS - LINEARS)
    assert found.peak / 1e9 == pytest.approx(48, rel=0.03)
    # the paper's point: one GPU of 48 GB
    assert found.peak < 48e9


def test_activations_of_a_llama_layer_by_hand() -> None:
    """A layer's bytes a token in bf16, LoRA of rank 64 on all seven maps; and what there is beside the layers."""
    h, f = 8192, 22016
    norms, attention, inside = 2 * 4 * h, 2 * 4 * h + 4 * 64, 2 * 3 * f
    inputs, adapters = 2 * (h + h + f), 4 * 7 * 64
    job = Job("lora", Sizes(r=64))
    assert layer_bytes(LLAMA_65B, job, trained(LLAMA_65B, "lora", job.sizes)) == (
        norms + attention + inside + inputs + adapters
    )
    # the logits' 12 bytes are more than the temporaries of a layer are
    every = 80 * (norms + attention + inside + inputs + adapters) + 12 * 32000
    assert estimate(LLAMA_65B, job).activations == 512 * every


def test_checkpointing_keeps_a_layers_input() -> None:
    kept = estimate(LLAMA_65B, Job("lora")).activations
    again = estimate(LLAMA_65B, Job("lora", gradient_checkpointing=True)).activations
    assert 80 * 512 * 8192 * 2 < again < kept / 10
    # twice the tokens, twice the activations, and nothing else
    longer = estimate(LLAMA_65B, Job("lora", max_length=1024))
    assert longer.activations == 2 * kept
    assert estimate(LLAMA_65B, Job("lora", batch_size=2)) == longer


def test_several_batches_a_step_keep_gradients_and_activations() -> None:
    one, two = (estimate(LLAMA_65B, Job("lora", grad_accum=n)) for n in (1, 2))
    assert two.peak - one.peak == min(one.gradients, one.activations)


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("llama-7b", 6.74e9), ("llama-13b", 13.02e9), ("llama-33b", 32.53e9), ("llama-3.1-8b", 8.03e9)],
)
def test_presets_are_as_large_as_released(size: str, parameters: float) -> None:
    assert PRESETS[size].parameters == pytest.approx(parameters, rel=1e-3)


def test_a_preset_is_what_transformers_builds() -> None:
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert shape_of(model, config, "tiny", 0) == llama("tiny", 64, 3, 4, 160, kv_heads=2, vocabulary=96)


def test_a_directory(bert: Path, gpt2: Path) -> None:
    classifier = find_shape(str(bert), None, 5)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=5)
    assert classifier.parameters == sum(p.numel() for p in model.parameters())
    assert (classifier.classes, classifier.head) == (5, 5 * 64 + 5)
    assert (classifier.gated, classifier.fp32_norms, classifier.intermediate) == (False, False, 128)
    language = find_shape(str(gpt2))
    # tied to the embedding
    assert (language.classes, language.head, language.intermediate) == (0, 0, 256)
    assert {(linear.n, linear.k) for linear in language.linears} == {(192, 64), (64, 64), (256, 64), (64, 256)}


def test_counts_are_those_of_adapt(bert: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=5)
    config = peftrt.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    report = peftrt.adapt(model, config, quantize="nf4")
    job = Job("qlora", Sizes(r=4, target_modules=("query", "value")), dtype="fp32")
    found = estimate(find_shape(str(bert), None, 5), job)
    assert found.trainable == report.trainable
    # a block of scales is never half: 32 matrices of 64 x 64 have few blocks
    assert found.weights + found.adapter == pytest.approx(report.bytes_after, rel=0.03)


def test_bits_are_those_of_a_weight() -> None:
    weight = NF4Weight.quantize(torch.randn(512, 512))
    shape = llama("one", 512, 1, 8, 512, vocabulary=1)
    found = estimate(shape, Job("qlora"))
    dense = 2 * (shape.parameters - 7 * 512 * 512)
    assert found.weights - dense == pytest.approx(7 * weight.nbytes, rel=1e-3)


def test_the_optimizers_state_is_what_one_holds() -> None:
    parameter = torch.nn.Parameter(torch.zeros(100_000))
    for name, bits in (("paged-adamw", 32), ("paged-adamw-8bit", 8)):
        optimizer = PagedAdamW([parameter], bits=bits)
        said = optimizer_bytes(parameter.numel(), Job("full", optim=name))
        assert said == pytest.approx(optimizer.stats().device_bytes, rel=0.1)
    assert optimizer_bytes(2560, Job("full", optim="paged-adamw-8bit")) == 10 * (2 * 256 + 8)
    held = Job("full", optim="paged-adamw", optim_budget="1MiB")
    assert optimizer_bytes(10**9, held) == 1 << 20


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str) -> None:
    found = estimate(LLAMA_65B, Job(method))
    assert 0 < found.trainable <= found.total
    full = estimate(LLAMA_65B, Job("full"))
    assert found.peak <= full.peak
    assert found.peak >= found.weights


def test_counts_of_other_methods_by_hand() -> None:
    h, f, layers = 8192, 22016, 80
    counts = {method: trained(LLAMA_65B, method, Sizes()).added for method in METHODS}
    adapter = 2 * h * (h // 16) + h // 16 + h
    assert counts["houlsby"] == 2 * counts["pfeiffer"] == 2 * layers * adapter
    assert counts["parallel"] == layers * (2 * h * (h // 2) + h // 2 + h)
    assert counts["prefix"] == 20 * 2 * layers * 8192
    assert counts["prompt"] == 20 * 8192
    assert counts["ia3"] == layers * (8192 + 8192 + f)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("method", estimate_peaks.METHODS)
def test_a_real_runs_peak(method: str) -> None:
    """In a process of its own: within a sixth of what it took."""
    found = estimate_peaks.measure(method, estimate_peaks.MODELS["encoder"])
    assert found["estimate"]["peak"] == pytest.approx(found["measured"], rel=1 / 6), found


def run(*arguments: object) -> int:
    return main(["estimate", *map(str, arguments)])


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert run("--model", "llama-65b", "--r", 64, "--gradient-checkpointing") == 0
    text = capsys.readouterr().out
    peak = next(line.split() for line in text.splitlines() if "peak " in line and "." in line)
    assert [float(cell) for cell in peak[1:]] == pytest.approx([783.5, 143.4, 47.4], abs=0.1)
    assert "65.3 B parameters; 1 x 512 tokens a batch in bf16, gradient checkpointing" in text


def test_json(bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", bert, "--method", "qlora", "full", "--r", 4, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in found["estimates"]] == ["qlora", "full"]
    expected: Any = estimate(find_shape(str(bert)), Job("qlora", Sizes(r=4)))
    assert dataclasses.asdict(expected).items() <= found["estimates"][0].items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "llama-66b"], "neither a directory with a config.json nor one of llama-7b"),
        (["--model", "llama-7b", "--task", "classify"], "llama-7b is a language model"),
        (["--model", "llama-7b", "--target-modules", "qproj"], "llama-7b has no 'qproj'; it has q_proj"),
        (["--model", "llama-7b", "--method", "full", "--quantize", "nf4"], "4-bit ones cannot be trained"),
        (["--model", "llama-7b", "--optim-budget", "1MiB"], "--optim-budget needs --optim paged-adamw"),
        (["--model", "llama-7b", "--optim", "paged-adamw", "--optim-budget", "1MX"], "must be like 1048576"),
        (["--model", "llama-7b", "--method", "lota"], "invalid choice: 'lota'"),
        (["--method", "lora"], "the following arguments are required: --model"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert main(["estimate", *options]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.splitlines()) == 1


def test_a_configuration_of_no_transformer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(UserError, match="it has no"):
        find_shape(str(tmp_path))
