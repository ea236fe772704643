"""DoRA on whole models: attached, trained like peft's, saved, merged, exported, explained; what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftrt
from peftrt.formats.errors import ConfigError, FormatError
from peftrt.nn import AdapterLinear
from tests.adapters.test_peft import fields, peft_model, scramble
from tests.adapters.tiny import KINDS, TARGETS, build, config, logits, tokens, unchanged
from tests.tolerances import assert_close, assert_same_bits

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
kinds = pytest.mark.parametrize("kind", KINDS)
both = pytest.mark.parametrize("quantize", [None, "nf4"])


def dora(kind: str, quantize: str | None = None, **changes: Any) -> Any:
    """A model with the DoRA adapter "fr", whose magnitudes are not the norms."""
    model = build(kind)
    peftrt.adapt(model, config(kind, use_dora=True, **changes), name="fr", quantize=quantize)
    scramble(model)
    return model


@kinds
@both
def test_a_new_adapter_changes_nothing_and_trains_its_magnitudes(kind: str, quantize: str | None) -> None:
    model, plain = build(kind), build(kind)
    report = peftrt.adapt(model, config(kind, use_dora=True, init_lora_weights=True), quantize=quantize)
    without = peftrt.adapt(plain, config(kind, init_lora_weights=True), quantize=quantize)
    assert_close(logits(model), logits(plain), roundings=4, intermediate=1.0)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum("lora_magnitude" in name for name in trained) == len(report.sites) == len(trained) / 3
    assert report.trainable == without.trainable + sum(site.out_features for site in report.sites)


@kinds
@both
def test_every_site_is_on_the_fast_path_with_dropout(kind: str, quantize: str | None) -> None:
    model = dora(kind, quantize, lora_dropout=0.1).train()
    found = peftrt.explain(model)
    assert len(found.sites) == len([m for m in model.modules() if isinstance(m, AdapterLinear)])
    backend = "reference" if peftrt.ops._native.load() else "native"
    for site in found.sites.values():
        assert (site.op, site.backend) == ("lora_linear", backend)
        assert site.first is not None
        assert (site.first.op, site.first.backend) == ("lora_weight_norm", backend)
    assert "lora_linear by" in str(found)
    assert f"after lora_weight_norm by {backend}" in str(found)


@kinds
def test_training_follows_peft_s_losses(kind: str) -> None:
    """100 steps in fp32 from the same adapter, without dropout."""
    values = fields(kind, "dora")
    theirs = peft_model(kind, values)
    ours = build(kind)
    peftrt.adapt(ours, peftrt.LoraConfig(**values))
    scramble(ours)
    inner = theirs.base_model.model
    with torch.no_grad():
        for path, layer in ours.named_modules():
            if isinstance(layer, AdapterLinear):
                other = inner.get_submodule(path)
                layer.lora_A.copy_(other.lora_A["default"].weight)
                layer.lora_B.copy_(other.lora_B["default"].weight)
                layer.lora_magnitude.copy_(other.lora_magnitude_vector["default"].weight)
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        found = []
        for step in range(100):
            ids = tokens(seed=step % 5)
            targets = ids.sum(1) % 3 if kind == "bert" else ids
            loss = model(ids, labels=targets).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(torch.tensor(found))
    assert losses[1][-5:].mean() < 0.97 * losses[1][:5].mean()
    assert (losses[0] - losses[1]).abs().max() <= 1e-5


@kinds
@both
def test_there_and_back(kind: str, quantize: str | None, tmp_path: Path) -> None:
    model = dora(kind, quantize)
    peftrt.save(model, tmp_path / "fr")
    assert json.loads((tmp_path / "fr" / CONFIG).read_text())["use_dora"] is True
    keys = load_file(tmp_path / "fr" / WEIGHTS)
    vectors = [key for key in keys if key.endswith(".lora_magnitude_vector")]
    assert len(vectors) == len(keys) / 3
    assert all(keys[key].dim() == 1 for key in vectors)
    other = build(kind)
    if quantize:
        peftrt.adapt(other, config(kind), name="it", quantize=quantize)
    found = peftrt.load(other, tmp_path / "fr", name="fr", trainable=True)
    assert found.use_dora
    assert any("lora_magnitude@fr" in name and p.requires_grad for name, p in other.named_parameters())
    peftrt.set_active(other, "fr")
    assert_same_bits(logits(other), logits(model))
    peftrt.save(other, tmp_path / "again", name="fr")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "fr" / WEIGHTS).read_bytes()
    peftrt.remove(other, "fr")
    assert not any("lora_magnitude" in name for name, _ in other.named_parameters())


def test_a_lora_config_with_null_is_lora(tmp_path: Path) -> None:
    """Older files say null."""
    model = build("llama")
    peftrt.adapt(model, config("llama"))
    peftrt.save(model, tmp_path)
    text = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**text, "use_dora": None}))
    assert peftrt.load(build("llama"), tmp_path).use_dora is False
    with pytest.raises(ConfigError, match="use_dora: expected true or false, got 1"):
        config("llama", use_dora=1)


@both
def test_a_vector_that_is_missing_or_does_not_fit_leaves_the_model_alone(quantize: str | None, tmp_path: Path) -> None:
    peftrt.save(dora("llama", quantize), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = "base_model.model.model.layers.1.self_attn.k_proj.lora_magnitude_vector"
    model = dora("llama", quantize)
    for bad, message in ((None, f"no key '{key}'"), (torch.ones(64), f"'{key}': expected 32 magnitudes")):
        changed = {name: value for name, value in tensors.items() if name != key}
        if bad is not None:
            changed[key] = bad
        save_file(changed, tmp_path / WEIGHTS, metadata={"format": "pt"})
        with unchanged(model), pytest.raises(FormatError, match=message):
            peftrt.load(model, tmp_path, name="de")


@kinds
def test_merge_unmerge_and_export(kind: str, tmp_path: Path) -> None:
    model = dora(kind).eval()
    expected, before = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    peftrt.export(model, tmp_path, dtype=torch.float32)
    exported = type(model).from_pretrained(tmp_path).eval()
    assert (logits(exported) - expected).abs().max() <= 2e-6
    peftrt.merge(model)
    assert (logits(model) - expected).abs().max() <= 2e-6
    peftrt.unmerge(model)
    for key, value in model.state_dict().items():
        assert_same_bits(value, before[key])
    assert_same_bits(logits(model), expected)


def test_export_over_nf4_is_of_the_sum(tmp_path: Path) -> None:
    model = dora("llama", "nf4").eval()
    peftrt.export(model, tmp_path, dtype=torch.float32)
    exported = type(model).from_pretrained(tmp_path).eval()
    assert (logits(exported) - logits(model)).abs().max() <= 2e-6
    with unchanged(model), pytest.raises(ValueError, match=r"would lose \d+\.\d% of the change that 'fr' makes"):
        peftrt.merge(model)


def test_sums_are_refused_by_name_and_rows_are_not(tmp_path: Path) -> None:
    model = dora("llama").eval()
    peftrt.adapt(model, config("llama", r=2, target_modules=TARGETS["llama"][:2]), name="de")
    peftrt.adapt(model, config("llama", r=2, target_modules=["gate_proj"]), name="it")
    peftrt.set_active(model, "fr")
    expected = logits(model)
    for names in ({"fr": 1.0, "de": 1.0}, {"fr": 0.5}):
        for call in (
            peftrt.set_active,
            peftrt.merge,
            lambda model, names: peftrt.export(model, tmp_path / "x", name=names),
        ):
            with unchanged(model), pytest.raises(ValueError, match=r"'fr' of DoRA .* cannot be summed"):
                call(model, names)
    assert not (tmp_path / "x").exists()
    assert_same_bits(logits(model), expected)
    names, ids = ["fr", "de", None, "it"], tokens(4)
    with peftrt.rows(model, names):
        mixed = logits(model, ids)
    for i, name in enumerate(names):
        peftrt.set_active(model, name)
        assert (logits(model, ids)[i] - mixed[i]).abs().max() <= 2e-6


def test_adapters_on_other_layers_go_together() -> None:
    """What cannot be summed is on one layer."""
    model = build("llama")
    peftrt.adapt(model, config("llama", use_dora=True, target_modules=["q_proj"]), name="fr")
    peftrt.adapt(model, config("llama", target_modules=["v_proj"]), name="de")
    scramble(model)
    peftrt.set_active(model, {"fr": 1.0, "de": 0.5})
    together = logits(model)
    peftrt.merge(model)
    assert (logits(model) - together).abs().max() <= 2e-6
