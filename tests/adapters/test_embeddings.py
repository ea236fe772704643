"""Embeddings and output heads as targets: whole models, tied or not, and HF peft's files both ways."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftrt
from peftrt.formats.errors import FormatError, UnsupportedError
from tests.adapters.test_peft import peft_load, scramble
from tests.adapters.tiny import NAMES, build, config, logits, quiet, tokens, unchanged
from tests.tolerances import assert_same_bits

LIMIT = 1e-6
TARGETS = {"llama": ["embed_tokens", "q_proj"], "gpt2": ["wte", "c_attn"], "bert": ["word_embeddings", "query"]}
TABLES = {"llama": "model.embed_tokens", "gpt2": "transformer.wte", "bert": "bert.embeddings.word_embeddings"}
KINDS = list(TARGETS)


def adapted(kind: str, quantize: str | None = None, tied: bool = False, **changes: Any) -> Any:
    model = build(kind, tied)
    peftrt.adapt(model, config(kind, **{"target_modules": TARGETS[kind], **changes}), name="fr", quantize=quantize)
    return model


def peft_model(kind: str, tied: bool = False, **changes: Any) -> Any:
    peft = pytest.importorskip("peft")
    quiet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fields = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[kind], "init_lora_weights": False, **changes}
        model = peft.get_peft_model(build(kind, tied), peft.LoraConfig(**fields)).eval()
    scramble(model)
    return model


def peft_save(model: Any, path: Path, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it sets save_embedding_layers to
        model.save_pretrained(str(path), **options)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapt_trains_and_reports_it(kind: str, quantize: str | None) -> None:
    model = build(kind)
    fields = {"target_modules": TARGETS[kind], "init_lora_weights": True}
    report = peftrt.adapt(model, config(kind, **fields), name="fr", quantize=quantize)
    site = report.sites[0]
    assert (site.path, site.in_features, site.out_features, site.storage) == (TABLES[kind], 96, 64, "float32")
    assert (site.choice.op, site.choice.backend) == ("embedding", "torch")
    assert str(report).count("embedding by torch") == 1
    assert ("dense: " + TABLES[kind] in str(report)) == (quantize == "nf4")
    if quantize is None:
        assert_same_bits(logits(model), logits(build(kind)))
    model.train()(tokens()).logits.square().sum().backward()
    layer = model.get_submodule(TABLES[kind])
    assert layer.adapter("fr").lora_A.grad.abs().max() > 0
    assert layer.weight.grad is None


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_tied_head_keeps_its_weight(kind: str) -> None:
    """The head computes with the plain table: as if it were untied and only the embedding had changed."""
    model, plain = adapted(kind, tied=True, target_modules=TARGETS[kind][:1]), build(kind, tied=True)
    table = model.get_submodule(TABLES[kind])
    assert model.lm_head.weight is table.weight
    delta = table.delta_weight().t()
    plain.lm_head.weight = nn.Parameter(plain.lm_head.weight.detach().clone())
    with torch.no_grad():
        plain.get_submodule(TABLES[kind]).weight.add_(delta)
    expected = logits(plain)
    assert (expected - logits(build(kind, tied=True))).abs().max() > 100 * LIMIT
    assert (logits(model) - expected).abs().max() <= LIMIT
    weight = model.lm_head.weight
    peftrt.merge(model)
    assert model.lm_head.weight is weight
    assert (logits(model) - expected).abs().max() <= LIMIT
    peftrt.unmerge(model)
    assert model.lm_head.weight is table.weight


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_tied_model_is_exported_as_two_weights(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = adapted(kind, tied=True)
    peftrt.export(model, tmp_path, dtype=torch.float32)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not again.config.tie_word_embeddings
    assert (logits(again) - logits(model)).abs().max() <= LIMIT


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_sums(kind: str) -> None:
    model = adapted(kind)
    peftrt.adapt(model, config(kind, r=2, target_modules=TARGETS[kind][:1]), name="de")
    alone = {}
    for name in ("de", "fr", None):
        peftrt.set_active(model, name)
        alone[name] = logits(model)
    assert_same_bits(alone[None], logits(build(kind)))
    with peftrt.rows(model, NAMES):
        mixed = logits(model)
    for i, name in enumerate(NAMES):
        assert (mixed[i] - alone[name][i]).abs().max() <= LIMIT
    peftrt.set_active(model, {"fr": 0.5, "de": 2.0})
    summed = logits(model)
    peftrt.merge(model)
    assert (logits(model) - summed).abs().max() <= LIMIT
    peftrt.unmerge(model)
    assert_same_bits(logits(model), summed)
    peftrt.remove(model, "fr")
    peftrt.remove(model, "de")
    assert_same_bits(logits(model), alone[None])


@pytest.mark.parametrize(
    "variant", [{}, {"use_rslora": True}, {"rank_pattern": {"embed_tokens|wte|word_embeddings": 2}}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saves_gives_the_same_logits(kind: str, variant: dict[str, Any], tmp_path: Path) -> None:
    theirs = peft_model(kind, **variant)
    peft_save(theirs, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    # it writes the whole table along where its name is one that it knows
    assert any("base_layer" in key for key in keys) == (kind == "llama")
    ours = build(kind)
    peftrt.load(ours, tmp_path, name="fr")
    peftrt.set_active(ours, "fr")
    assert (logits(theirs) - logits(build(kind))).abs().max() > 100 * LIMIT
    assert (logits(ours) - logits(theirs)).abs().max() <= LIMIT


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"modules_to_save": ["norm", "ln_f", "classifier"]}])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_gives_the_same_logits_for_what_is_saved(kind: str, variant: dict[str, Any], tmp_path: Path) -> None:
    if "modules_to_save" in variant:
        variant = {"modules_to_save": [{"llama": "model.norm", "gpt2": "ln_f", "bert": "classifier"}[kind]]}
    ours = adapted(kind, **variant)
    scramble(ours)
    peftrt.save(ours, tmp_path, name="fr")
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert not any("base_layer" in key for key in keys)
    assert f"base_model.model.{TABLES[kind]}.lora_embedding_A" in keys
    assert (logits(peft_load(kind, tmp_path)) - logits(ours)).abs().max() <= LIMIT
    again = build(kind)
    peftrt.load(again, tmp_path)
    peftrt.set_active(again, "default")
    assert_same_bits(logits(again), logits(ours))


def changed(path: Path, change: Any) -> None:
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


TABLE = "base_model.model.model.embed_tokens.base_layer.weight"
A = "base_model.model.model.embed_tokens.lora_embedding_A"


def test_another_table_in_the_file_is_never_used(tmp_path: Path) -> None:
    """peft would load it over the model's own."""
    theirs = peft_model("llama")
    peft_save(theirs, tmp_path)
    expected = logits(theirs)
    ours = build("llama")
    # the same in 16 bits is the same
    changed(tmp_path, lambda tensors: tensors.update({TABLE: tensors[TABLE].bfloat16()}))
    peftrt.load(ours, tmp_path, name="rounded")
    changed(tmp_path, lambda tensors: tensors.update({TABLE: tensors[TABLE] + 1}))
    with pytest.warns(UserWarning, match=r"holds another model.embed_tokens.weight than the model's, which is kept"):
        peftrt.load(ours, tmp_path, name="fr")
    peftrt.set_active(ours, "fr")
    assert (logits(ours) - expected).abs().max() <= LIMIT


def rename(old: str, new: str) -> Any:
    return lambda tensors: [
        tensors.update({key.replace(old, new): tensors.pop(key)}) for key in list(tensors) if old in key
    ]


BAD: dict[str, tuple[Any, str]] = {
    "A alone": (lambda t: t.pop(A.replace("_A", "_B")), "has lora_embedding_A but no lora_embedding_B"),
    "both kinds": (
        lambda t: t.update({A.replace("embedding_A", "A.weight"): torch.ones(4, 96)}),
        "linear layer and of an",
    ),
    "another vocabulary": (lambda t: t.update({A: torch.ones(4, 100)}), r"of \[64, 100\]; the model's is \[64, 96\]"),
    "a table and no adapter": (
        lambda t: [t.pop(A), t.pop(A.replace("_A", "_B"))],
        "tensors of its own, but no adapter",
    ),
    "a linear layer's": (
        rename("q_proj.lora_A.weight", "q_proj.lora_embedding_A"),
        "has lora_B, lora_embedding_A but no",
    ),
    "not an embedding": (
        lambda t: [rename(f"q_proj.lora_{h}.weight", f"q_proj.lora_embedding_{h}")(t) for h in "AB"],
        "the tensors are of an embedding, the module is Linear",
    ),
    "not linear": (
        lambda t: [rename(f"lora_embedding_{h}", f"lora_{h}.weight")(t) for h in "AB"],
        "the tensors are of a linear layer, the module is an embedding",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused(case: str, tmp_path: Path) -> None:
    change, message = BAD[case]
    peft_save(peft_model("llama"), tmp_path)
    changed(tmp_path, change)
    model = build("llama")
    with unchanged(model), pytest.raises(FormatError, match=message):
        peftrt.load(model, tmp_path)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("llama", True), ("gpt2", True)])
def test_the_output_head_is_a_target_like_any_other(
    kind: str, tied: bool, quantize: str | None, tmp_path: Path
) -> None:
    model = adapted(kind, quantize, tied, target_modules=["lm_head"])
    assert isinstance(model.lm_head, peftrt.LoRALinear if tied or not quantize else peftrt.QLoRALinear)
    assert (model.lm_head.weight is model.get_submodule(TABLES[kind]).weight) == tied
    ids = tokens()
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state
        weight: Tensor = model.lm_head.adapted_weight({"fr": 1.0})
        assert (logits(model) - hidden @ weight.t()).abs().max() <= LIMIT
        assert (
            model.base_model(ids).last_hidden_state - build(kind, tied).base_model(ids).last_hidden_state
        ).abs().max() == 0
    scramble(model)
    peftrt.save(model, tmp_path / "ours", name="fr")
    if quantize is None:
        peft = pytest.importorskip("peft")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.PeftModel.from_pretrained(build(kind, tied), str(tmp_path / "ours")).eval()
        assert (logits(theirs) - logits(model)).abs().max() <= LIMIT
        peft_save(theirs, tmp_path / "theirs")
        again = build(kind, tied)
        peftrt.load(again, tmp_path / "theirs")
        peftrt.set_active(again, "default")
        assert (logits(again) - logits(model)).abs().max() <= LIMIT


def test_head_and_table_of_one_weight_together() -> None:
    model = adapted("gpt2", "nf4", target_modules=["wte", "lm_head", "c_fc"])
    assert isinstance(model.lm_head, peftrt.LoRALinear)
    assert isinstance(model.transformer.wte, peftrt.LoRAEmbedding)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert isinstance(model.transformer.h[0].mlp.c_fc, peftrt.QLoRALinear)


def test_all_linear_leaves_heads_and_embeddings_out() -> None:
    model = adapted("llama", target_modules=["embed_tokens"])
    report = peftrt.adapt(model, config("llama", target_modules="all-linear"), name="de")
    assert report.left_out["lm_head"] == "the output head"
    assert "model.embed_tokens" not in {*report.matched, *report.left_out}
    # and is loaded and saved so
    assert model.model.embed_tokens.adapter_names == ("fr",)


def test_from_a_checkpoint(tmp_path: Path) -> None:
    expected = build("gpt2")
    expected.save_pretrained(tmp_path)
    with peftrt.empty_weights():
        model = type(expected)(expected.config).eval()
    fields = {"target_modules": ["wte", "c_attn"], "init_lora_weights": True}
    for each, arguments in ((expected, {}), (model, {"checkpoint": tmp_path})):
        peftrt.adapt(each, config("gpt2", **fields), quantize="nf4", **arguments)
    assert isinstance(model.transformer.wte, peftrt.LoRAEmbedding)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert_same_bits(logits(model), logits(expected))


def test_pissa_is_not_an_embedding_s(tmp_path: Path) -> None:
    model = build("llama")
    fields = {"target_modules": TARGETS["llama"], "init_lora_weights": "pissa"}
    with (
        unchanged(model),
        pytest.raises(UnsupportedError, match=r"model\.embed_tokens: an embedding's adapter begins with"),
    ):
        peftrt.adapt(model, config("llama", **fields))
    # LoftQ makes up for what quantisation loses, which is nothing here
    peftrt.adapt(model, config("llama", **{**fields, "init_lora_weights": "loftq"}), quantize="nf4")
    assert model.model.embed_tokens.adapter("default").lora_A.abs().max() == 0


def test_dora_is_not_an_embedding_s(tmp_path: Path) -> None:
    model = build("llama")
    with (
        unchanged(model),
        pytest.raises(UnsupportedError, match=r"use_dora: model\.embed_tokens: DoRA .* of an embedding"),
    ):
        peftrt.adapt(model, config("llama", target_modules=TARGETS["llama"], use_dora=True))
    peft_save(peft_model("llama", use_dora=True), tmp_path)
    with unchanged(model), pytest.raises(UnsupportedError, match=r"DoRA \(use_dora\) of an embedding is not supported"):
        peftrt.load(model, tmp_path)
    with pytest.raises(ValueError, match="of an embedding is not supported"):
        peftrt.LoRAEmbedding.from_embedding(nn.Embedding(4, 2), use_dora=True)


def test_a_table_with_max_norm_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(8, 4, max_norm=1.0), nn.Linear(4, 4))
    with unchanged(model), pytest.raises(UnsupportedError, match="0 cannot be adapted: Embedding has max_norm"):
        peftrt.adapt(model, peftrt.LoraConfig(target_modules=["0"]))


def test_gradient_checkpointing_with_inputs_that_require_gradients() -> None:
    """transformers marks the output of the input embedding, whatever kind of module that is."""
    model = adapted("llama", init_lora_weights=True).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model(tokens()).logits.square().sum().backward()
    checkpointed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    plain = adapted("llama", init_lora_weights=True).train()
    plain.load_state_dict(model.state_dict())
    plain(tokens()).logits.square().sum().backward()
    grads = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert checkpointed.keys() == grads.keys()
    for name, grad in grads.items():
        assert (checkpointed[name] - grad).abs().max() <= 1e-5 * (1 + grad.abs().max())
