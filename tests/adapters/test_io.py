"""save and load: what is refused, what is warned about, and that a failure changes nothing."""

from __future__ import annotations

import json
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftrt
from peftrt.adapters.saved import SavedModule
from peftrt.formats.errors import (
    AdapterNameError,
    ConfigError,
    FormatError,
    MissingFileError,
    NonFiniteError,
    UnsafeFileError,
    UnsupportedError,
)
from peftrt.nn import AdapterLinear
from tests.adapters.tiny import KINDS, build, config, logits, tokens, unchanged
from tests.tolerances import assert_close, assert_same_bits

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q_PROJ = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An adapter of the tiny Llama, r = 4, on three projections."""
    model = build("llama")
    peftrt.adapt(model, config("llama", target_modules=["q_proj", "k_proj", "down_proj"]), name="fr")
    peftrt.save(model, tmp_path / "fr", name="fr")
    return tmp_path / "fr"


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, directory / WEIGHTS, {"format": "pt"})


def change_config(directory: Path, **fields: Any) -> None:
    values = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**values, **fields}))


MODELS = {"dense": {}, "wrapped": {"quantize": None}, "nf4": {"quantize": "nf4"}}


def prepared(how: str) -> Any:
    """A model that was never adapted, or has an adapter over a dense or an NF4 base."""
    model = build("llama")
    if how != "dense":
        peftrt.adapt(model, config("llama", target_modules=["q_proj", "up_proj"]), name="mine", **MODELS[how])
    return model


BAD: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "unknown module": (
        lambda d: change_tensors(
            d, lambda t: t.update({key.replace("layers.1", "layers.7"): t.pop(key) for key in [*t]})
        ),
        FormatError,
        r"no module 'model\.layers\.7",
    ),
    "other in features": (
        lambda d: change_tensors(d, lambda t: t.update({f"{Q_PROJ}.lora_A.weight": torch.zeros(4, 65)})),
        FormatError,
        r"'model\.layers\.1\.self_attn\.q_proj'.*\[64, 65\].*\[64, 64\]",
    ),
    "other out features": (
        lambda d: change_tensors(d, lambda t: t.update({f"{Q_PROJ}.lora_B.weight": torch.zeros(32, 4)})),
        FormatError,
        r"'model\.layers\.1\.self_attn\.q_proj'.*\[32, 64\].*\[64, 64\]",
    ),
    "A without B": (
        lambda d: change_tensors(d, lambda t: t.pop(f"{Q_PROJ}.lora_B.weight")),
        FormatError,
        r"q_proj' has lora_A but no lora_B",
    ),
    "rank other than r": (lambda d: change_config(d, r=8), FormatError, r"lora_A has 4 rows, .* rank 8"),
    "rank pattern other than the tensors": (
        lambda d: change_config(d, rank_pattern={"q_proj": 2}),
        FormatError,
        r"lora_A has 4 rows, .* rank 2",
    ),
    "a layer is missing": (
        lambda d: change_tensors(d, lambda t: [t.pop(key) for key in [*t] if key.startswith(Q_PROJ)]),
        FormatError,
        r"no tensors for 'model\.layers\.1\.self_attn\.q_proj'",
    ),
    "not among the targets": (
        lambda d: change_config(d, target_modules=["k_proj", "down_proj"]),
        FormatError,
        r"q_proj' has tensors, but the configuration does not target it",
    ),
    "no r": (lambda d: change_config(d, r=None), ConfigError, "r is missing"),
    "dora without vectors": (
        lambda d: change_config(d, use_dora=True),
        FormatError,
        r"use_dora is true, but there is no key '.*\.lora_magnitude_vector'",
    ),
    "bias": (lambda d: change_config(d, bias="all"), UnsupportedError, "bias"),
    "another method": (lambda d: change_config(d, peft_type="LOHA"), UnsupportedError, "LOHA"),
    "factors of IA3": (
        lambda d: change_tensors(d, lambda t: t.update({f"{Q_PROJ}.ia3_l": torch.ones(64, 1)})),
        FormatError,
        "factors of IA3, but peft_type is 'LORA'",
    ),
    "vectors without dora": (
        lambda d: change_tensors(d, lambda t: t.update({f"{Q_PROJ}.lora_magnitude_vector": torch.zeros(64)})),
        FormatError,
        rf"'{Q_PROJ}\.lora_magnitude_vector': magnitudes of DoRA, but the configuration's use_dora is not true",
    ),
    "unknown key": (
        lambda d: change_tensors(d, lambda t: t.update({f"{Q_PROJ}.lora_E": torch.zeros(4, 1)})),
        FormatError,
        "lora_E",
    ),
    "int8": (
        lambda d: change_tensors(
            d, lambda t: t.update({f"{Q_PROJ}.lora_A.weight": torch.ones(4, 64, dtype=torch.int8)})
        ),
        FormatError,
        "int8",
    ),
    "NaN": (
        lambda d: change_tensors(d, lambda t: t[f"{Q_PROJ}.lora_A.weight"].fill_(torch.nan)),
        NonFiniteError,
        "allow_nonfinite",
    ),
    "a whole module that LoRA is on": (
        lambda d: (
            change_config(d, modules_to_save=["up_proj"]),
            change_tensors(
                d, lambda t: t.update({"base_model.model.model.layers.0.mlp.up_proj.weight": torch.zeros(9, 64)})
            ),
        ),
        FormatError,
        r"up_proj",
    ),
    "truncated": (lambda d: os.truncate(d / WEIGHTS, 2000), FormatError, WEIGHTS),
    "pickle": (lambda d: (d / WEIGHTS).rename(d / "adapter_model.bin"), UnsafeFileError, "adapter_model.bin"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), MissingFileError, WEIGHTS),
    "no configuration": (lambda d: (d / CONFIG).unlink(), MissingFileError, CONFIG),
}


@pytest.mark.parametrize("how", MODELS)
@pytest.mark.parametrize("case", BAD)
def test_what_is_bad_is_refused_and_changes_nothing(case: str, how: str, directory: Path) -> None:
    spoil, error, message = BAD[case]
    spoil(directory)
    model = prepared(how)
    with unchanged(model), pytest.raises(error, match=message):
        peftrt.load(model, directory, name="fr")


@pytest.mark.parametrize("how", MODELS)
def test_loading_does_not_activate(how: str, directory: Path) -> None:
    model = prepared(how)
    before, active = logits(model), peftrt.active_adapters(model)
    quantised_before = sum(isinstance(module, peftrt.QLoRALinear) for module in model.modules())
    found = peftrt.load(model, directory, name="fr")
    assert found.r == 4
    assert set(found.target_modules) == {"q_proj", "k_proj", "down_proj"}
    assert peftrt.active_adapters(model) == active
    assert_same_bits(logits(model), before)
    assert sum(isinstance(module, peftrt.QLoRALinear) for module in model.modules()) == quantised_before
    peftrt.set_active(model, "fr")
    assert not torch.equal(logits(model), before)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith("@fr"))
    mine = [p.requires_grad for name, p in model.named_parameters() if name.endswith("@mine")]
    assert all(mine)


def test_trainable(directory: Path) -> None:
    model = build("llama")
    peftrt.load(model, directory, name="fr", trainable=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 12
    assert all(name.endswith("@fr") for name in trained)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_there_and_back(kind: str, quantize: str | None, tmp_path: Path) -> None:
    """The bits of an adapter survive: with patterns, rsLoRA, and modules trained whole."""
    changes: dict[str, Any] = {"use_rslora": True, "lora_dropout": 0.25}
    if kind == "bert":
        changes |= {"modules_to_save": ["classifier"], "rank_pattern": {"query": 2}}
    model = build(kind)
    peftrt.adapt(model, config(kind, **changes), name="fr", quantize=quantize)
    if kind == "bert":
        model.classifier.chosen.weight.data.mul_(2.0)
    peftrt.save(model, tmp_path / "fr")
    other = build(kind)
    peftrt.adapt(other, config(kind), name="it", quantize=quantize)
    found = peftrt.load(other, tmp_path / "fr", name="fr")
    peftrt.set_active(other, "fr")
    assert_same_bits(logits(other), logits(model))
    assert found.lora_dropout == 0.25
    peftrt.save(other, tmp_path / "again", name="fr")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "fr" / WEIGHTS).read_bytes()
    assert json.loads((tmp_path / "again" / CONFIG).read_text()) == json.loads((tmp_path / "fr" / CONFIG).read_text())


def test_names(directory: Path) -> None:
    model = prepared("wrapped")
    for name, message in (("mine", "already in use"), ("Mine", "differs from 'mine'"), ("a@b", "'@'"), ("a/b", "'/'")):
        with unchanged(model), pytest.raises(AdapterNameError, match=message):
            peftrt.load(model, directory, name=name)


class TestReplace:
    def test_takes_the_place(self, directory: Path) -> None:
        model = prepared("nf4")
        peftrt.load(model, directory, name="fr")
        peftrt.set_active(model, "fr")
        expected = logits(model)
        assert peftrt.active_adapters(model) == {"fr": 1.0}
        other = prepared("nf4")
        peftrt.load(other, directory, name="mine", replace=True)
        # it was active and stays so; up_proj had the old one, and has none of the new
        assert peftrt.active_adapters(other) == {"mine": 1.0}
        assert_same_bits(logits(other), expected)
        assert other.model.layers[0].mlp.up_proj.adapter_names == ()

    def test_keeps_the_old_one_if_it_fails(self, directory: Path) -> None:
        model = prepared("nf4")
        change_tensors(directory, lambda t: t.update({f"{Q_PROJ}.lora_A.weight": torch.zeros(4, 65)}))
        with unchanged(model), pytest.raises(FormatError):
            peftrt.load(model, directory, name="mine", replace=True)


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("how", MODELS)
@pytest.mark.parametrize("replace", [False, True])
def test_failure_in_the_middle(
    how: str, at: int, replace: bool, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepared(how)
    with torch.no_grad():
        before = logits(model)
    add, calls = AdapterLinear.add_adapter, []

    def failing(self: AdapterLinear, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        if len(calls) > at:
            raise MemoryError("no more")
        return add(self, *args, **kwargs)

    monkeypatch.setattr(AdapterLinear, "add_adapter", failing)
    name = "mine" if replace and how != "dense" else "fr"
    with unchanged(model), pytest.raises(MemoryError):
        peftrt.load(model, directory, name=name, replace=replace)
    monkeypatch.undo()
    assert_same_bits(logits(model), before)
    peftrt.load(model, directory, name=name, replace=replace)


def test_failure_in_a_whole_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("bert")
    peftrt.adapt(model, config("bert", modules_to_save=["classifier", "pooler"]), name="fr")
    peftrt.save(model, tmp_path)
    model = build("bert")
    add = SavedModule.add_copy

    def failing(self: SavedModule, *args: Any) -> nn.Module:
        add(self, *args)
        if isinstance(self.base, nn.Linear):
            raise MemoryError("no more")
        return self.base

    monkeypatch.setattr(SavedModule, "add_copy", failing)
    with unchanged(model), pytest.raises(MemoryError):
        peftrt.load(model, tmp_path)


@pytest.mark.parametrize(
    ("leaf", "value", "message"),
    [
        ("weight", torch.zeros(5, 64), r"classifier.*\[5, 64\].*\[3, 64\]"),
        ("weight", torch.zeros(3, 64, dtype=torch.int8), "int8"),
        ("extra", torch.zeros(3), "'extra' is not a tensor of Linear"),
        ("bias", None, "'bias' is missing"),
    ],
)
def test_whole_modules_must_fit(leaf: str, value: torch.Tensor | None, message: str, tmp_path: Path) -> None:
    model = build("bert")
    peftrt.adapt(model, config("bert", modules_to_save=["classifier"]), name="fr")
    peftrt.save(model, tmp_path)
    key = f"base_model.model.classifier.{leaf}"
    change_tensors(tmp_path, lambda t: t.pop(key) if value is None else t.update({key: value}))
    for name in ("it", "fr"):
        with unchanged(model), pytest.raises(FormatError, match=message):
            peftrt.load(model, tmp_path, name=name, replace=True)


def test_nonfinite_values_where_they_are_wanted(directory: Path) -> None:
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"  # attention would swallow NaN
    change_tensors(directory, lambda t: t[key].fill_(torch.nan))
    model = build("llama")
    peftrt.load(model, directory, name="fr", allow_nonfinite=True)
    with peftrt.rows(model, ["fr", None, "fr"]):
        out = logits(model)
    assert out[0].isnan().all()
    assert_close(out[1:2], logits(build("llama"), tokens()[1:2]))  # NaN stays in its row


def test_another_base_is_a_warning(directory: Path) -> None:
    change_config(directory, base_model_name_or_path="someone/else")
    model = build("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peftrt.load(model, directory, name="unnamed")  # this model does not know what it is called
    model.config._name_or_path = "me/mine"
    with pytest.warns(UserWarning, match=r"made for the base 'someone/else', the model is 'me/mine'"):
        peftrt.load(model, directory, name="fr")
    peftrt.save(model, directory, name="fr")
    assert json.loads((directory / CONFIG).read_text())["base_model_name_or_path"] == "me/mine"


def test_merged_and_empty_models_take_none(directory: Path) -> None:
    model = prepared("wrapped")
    peftrt.merge(model)
    with unchanged(model), pytest.raises(ValueError, match=r"'mine'.*unmerge"):
        peftrt.load(model, directory, name="fr")
    with peftrt.empty_weights():
        empty = type(model)(model.config)
    with pytest.raises(ValueError, match="meta device"):
        peftrt.load(empty, directory, name="fr")
    assert not any(isinstance(module, AdapterLinear) for module in empty.modules())


def test_save_needs_to_know_which(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapters"):
        peftrt.save(build("llama"), tmp_path)
    model = prepared("wrapped")
    with pytest.raises(ValueError, match=r"no adapter 'it'.*'mine'"):
        peftrt.save(model, tmp_path, name="it")
    peftrt.adapt(model, config("llama"), name="fr")
    peftrt.save(model, tmp_path / "active")
    assert set(json.loads((tmp_path / "active" / CONFIG).read_text())["target_modules"]) > {"v_proj"}
    peftrt.set_active(model, None)
    with pytest.raises(ValueError, match="say which adapter with name=; there are: 'mine', 'fr'"):
        peftrt.save(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_failed_save_leaves_the_old_adapter(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    model = build("llama")
    peftrt.load(model, directory, name="fr")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.adapter("fr").lora_A.add_(1)
    replace_file, calls = os.replace, []

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:  # the new weights are in place, the configuration is not
            raise OSError(28, "No space left on device")
        replace_file(*args)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="No space left"):
        peftrt.save(model, directory, name="fr")
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert stat.S_IMODE((directory / WEIGHTS).stat().st_mode) & 0o400
