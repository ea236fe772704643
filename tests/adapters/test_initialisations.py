"""Adapters that begin with the base weight, on whole models: adapt, switch off, save for HF peft's plain base, load."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import peftrt
from peftrt.formats.errors import ConfigError, FormatError, UnsupportedError
from tests.adapters.test_peft import peft_load, scramble
from tests.adapters.tiny import NAMES, ONE, build, config, logits, unchanged
from tests.tolerances import assert_same_bits

# fp32 through two layers of a tiny model: what leaves the weight and comes back is rounded on the way
LIMIT = 1e-5


def adapted(kind: str = "llama", quantize: str | None = None, train: bool = True, **changes: Any) -> Any:
    model = build(kind)
    fields = {"init_lora_weights": "pissa", "lora_alpha": 6, **changes}
    peftrt.adapt(model, config(kind, **fields), name="fr", quantize=quantize)
    if train:
        scramble(model)
    return model


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "orthogonal"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_nothing_changes_until_it_is_trained(kind: str, init: str) -> None:
    model = adapted(kind, train=False, init_lora_weights=init)
    assert (logits(model) - logits(build(kind))).abs().max() <= LIMIT
    scramble(model)
    assert (logits(model) - logits(build(kind))).abs().max() > 100 * LIMIT
    peftrt.set_active(model, None)
    assert (logits(model) - logits(build(kind))).abs().max() <= LIMIT


def test_rows_and_other_adapters_are_over_the_original(tmp_path: Path) -> None:
    model, plain = adapted("llama"), build("llama")
    peftrt.adapt(model, config("llama", target_modules=["q_proj", "up_proj"]), name="de")
    peftrt.save(model, tmp_path, name="de")
    peftrt.load(plain, tmp_path, name="de")
    peftrt.set_active(plain, "de")
    assert (logits(model) - logits(plain)).abs().max() <= LIMIT
    alone = {}
    for name in ("de", "fr", None):
        peftrt.set_active(model, name)
        alone[name] = logits(model)
    with peftrt.rows(model, NAMES):
        mixed = logits(model)
    for i, name in enumerate(NAMES):
        assert (mixed[i] - alone[name][i]).abs().max() <= LIMIT
    # layers without a share of what is merged stay whole
    peftrt.merge(model, "de")
    assert (logits(model) - alone["de"]).abs().max() <= LIMIT


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_quantised_from_the_weight_as_it_was(quantize: str | None) -> None:
    """The principal part is of the dense weight, and the base is nf4 of what is left: nothing is quantised twice."""
    model, plain = adapted("llama", quantize, train=False), build("llama")
    path = "model.layers.0.self_attn.q_proj"
    layer, weight = model.get_submodule(path), plain.get_submodule(path).weight.detach()
    adapter = layer.adapter("fr")
    left = weight - adapter.scaling * (adapter.lora_B @ adapter.lora_A).detach()
    assert torch.linalg.svdvals(left)[:-4] == pytest.approx(torch.linalg.svdvals(weight)[4:], abs=1e-5)
    base = layer.base_weight()
    if quantize is None:
        assert (base - left).abs().max() <= 1e-6
    else:
        assert_same_bits(base.dequantize(), peftrt.NF4Weight.quantize(left).dequantize())
    peftrt.adapt(plain, config("llama", init_lora_weights=True), quantize=quantize)
    error = (layer.adapted_weight({"fr": 1.0}) - weight).norm()
    assert quantize is None or error < 0.97 * (plain.get_submodule(path).adapted_weight({}) - weight).norm()


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_from_a_checkpoint_as_from_memory(init: str, tmp_path: Path) -> None:
    expected = build("llama")
    expected.save_pretrained(tmp_path, max_shard_size="50KB")
    with peftrt.empty_weights():
        model = type(expected)(expected.config).eval()
    for each, arguments in ((expected, {}), (model, {"checkpoint": tmp_path})):
        peftrt.adapt(each, config("llama", init_lora_weights=init), name="fr", quantize="nf4", **arguments)
    assert model.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert_same_bits(model.state_dict()[key], value)
    assert_same_bits(logits(model), logits(expected))


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"q_proj": 5}},
    "patterns, rslora": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
    "all-linear": {"target_modules": "all-linear"},
    "randomised": {"init_lora_weights": "pissa_niter_3"},
    "dora": {"use_dora": True},
}
CASES = [("llama", variant) for variant in VARIANTS] + [("gpt2", "plain"), ("bert", "plain")]


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_saved_for_the_plain_base(kind: str, variant: str, tmp_path: Path) -> None:
    model = adapted(kind, **VARIANTS[variant])
    peftrt.save(model, tmp_path, name="fr")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["r"], written["init_lora_weights"]) == (8, True)
    expected = logits(model)
    assert (expected - logits(build(kind))).abs().max() > 100 * LIMIT
    assert (logits(peft_load(kind, tmp_path)) - expected).abs().max() <= LIMIT
    again = build(kind)
    peftrt.load(again, tmp_path, name="it")
    peftrt.set_active(again, "it")
    assert (logits(again) - expected).abs().max() <= LIMIT
    # and in the place of the one that it was saved from
    peftrt.load(model, tmp_path, name="fr", replace=True)
    assert (logits(model) - expected).abs().max() <= 2 * LIMIT


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_merge_export_and_remove(quantize: str | None, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = adapted("gpt2", quantize)
    limit = LIMIT if quantize is None else 2e-3
    active = logits(model)
    peftrt.export(model, tmp_path / "fr", dtype=torch.float32)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fr").eval()
    assert (logits(exported) - active).abs().max() <= LIMIT
    peftrt.set_active(model, None)
    bare = logits(model)
    peftrt.export(model, tmp_path / "bare", name={}, dtype=torch.float32)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bare").eval()
    assert (logits(exported) - bare).abs().max() <= LIMIT
    if quantize is None:
        peftrt.merge(model, "fr")
        assert (logits(model) - active).abs().max() <= LIMIT
        peftrt.unmerge(model)
        peftrt.set_active(model, None)
        assert_same_bits(logits(model), bare)
    peftrt.remove(model, "fr")
    assert (logits(model) - bare).abs().max() <= limit
    peftrt.adapt(model, config("gpt2", init_lora_weights=True), name="fr", quantize=quantize)
    assert (logits(model) - bare).abs().max() <= limit


def test_explain_knows_what_is_left_to_do() -> None:
    model = adapted("llama")
    peftrt.set_active(model, None)
    sites = peftrt.explain(model).sites
    assert {choice.op for path, choice in sites.items()} == {"lora_linear"}


def test_over_layers_that_are_nf4_already() -> None:
    model = build("llama")
    peftrt.adapt(model, config("llama", init_lora_weights=True), name="de", quantize="nf4")
    before = logits(model)
    with pytest.warns(
        UserWarning, match="'pissa' begins with the dequantised weight of 12 layers that are NF4 already"
    ):
        peftrt.adapt(model, config("llama", init_lora_weights="pissa"), name="fr", quantize="nf4")
    after = logits(model)
    assert 0 < (after - before).abs().max() < 0.2
    peftrt.set_active(model, None)
    assert (logits(model) - after).abs().max() <= LIMIT
    with (
        unchanged(model),
        pytest.raises(UnsupportedError, match=r"'loftq' needs the weight as it was before .* NF4 already"),
    ):
        peftrt.adapt(model, config("llama", init_lora_weights="loftq"), name="it", quantize="nf4")


REFUSED: dict[str, tuple[str, dict[str, Any], str | None, type[Exception], str]] = {
    "loftq, dense": ("llama", {"init_lora_weights": "loftq"}, None, UnsupportedError, "pass quantize='nf4'"),
    "rank": ("llama", {"r": 33}, None, ConfigError, r"k_proj: .*at most 32 over a weight of \[32, 64\], got r = 33"),
    "odd": ("llama", {"r": 3, "init_lora_weights": "orthogonal"}, None, ConfigError, "even rank, got r = 3"),
    "scaling": ("llama", {"lora_alpha": -1}, "nf4", ConfigError, "a scaling above 0"),
    "tied": ("gpt2", {"target_modules": ["lm_head"]}, None, UnsupportedError, "change lm_head, but its weight is also"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_changed(case: str) -> None:
    kind, changes, quantize, error, message = REFUSED[case]
    model = build(kind)
    with unchanged(model), pytest.raises(error, match=message):
        peftrt.adapt(model, config(kind, **{"init_lora_weights": "pissa", **changes}), quantize=quantize)


def test_a_failure_while_quantising_leaves_no_half_of_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = build("llama"), []
    from peftrt.adapters import attach

    def fail(*args: Any) -> None:
        calls.append(args)
        raise MemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(attach, "activate", fail)
        with pytest.raises(MemoryError):
            peftrt.adapt(model, config("llama", init_lora_weights="pissa"), name="fr", quantize="nf4")
    assert calls
    assert peftrt.adapter_names(model) == ()
    assert not any("lora_A@" in name for name, _ in model.named_parameters())
    assert (logits(model) - logits(build("llama"))).abs().max() < 0.2
    with pytest.warns(UserWarning, match="NF4 already"):
        peftrt.adapt(model, config("llama", init_lora_weights="pissa"), name="fr", quantize="nf4")


class TestLoftQ:
    def model(self, **changes: Any) -> Any:
        model = build("llama", **changes)
        fields = {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 3}}
        targets = ["q_proj", "down_proj", *(["lm_head"] if changes else [])]
        peftrt.adapt(model, config("llama", target_modules=targets, **fields), name="fr", quantize="nf4")
        return model

    def test_it_is_closer_to_the_dense_model(self) -> None:
        model, plain, dense = self.model(), build("llama"), build("llama")
        peftrt.adapt(
            plain, config("llama", target_modules=["q_proj", "down_proj"], init_lora_weights=True), quantize="nf4"
        )
        for path, layer in model.named_modules():
            if isinstance(layer, peftrt.QLoRALinear):
                weight = dense.get_submodule(path).weight
                error = (layer.adapted_weight({"fr": 1.0}) - weight).norm()
                assert error < 0.95 * (plain.get_submodule(path).adapted_weight({}) - weight).norm()
        wrong = (logits(model) - logits(dense)).norm()
        assert wrong < (logits(plain) - logits(dense)).norm()

    def test_saved_as_it_is_with_a_warning(self, tmp_path: Path) -> None:
        model = self.model()
        scramble(model)
        expected = logits(model)
        with pytest.warns(UserWarning, match="'fr' began with LoftQ: it belongs to the NF4 base that was made with it"):
            peftrt.save(model, tmp_path, name="fr")
        written = json.loads((tmp_path / "adapter_config.json").read_text())
        assert (written["init_lora_weights"], written["r"]) == ("loftq", 4)
        assert written["loftq_config"] == {"loftq_bits": 4, "loftq_iter": 3}
        # made again, the base is the same
        again = self.model()
        for key, value in model.state_dict().items():
            if "lora_" not in key:
                assert_same_bits(again.state_dict()[key], value)
        with pytest.warns(UserWarning, match="belongs to the NF4 base that was made with it"):
            peftrt.load(again, tmp_path, name="it")
        peftrt.set_active(again, "it")
        assert (logits(again) - expected).abs().max() <= LIMIT

    def test_a_weight_that_stays_dense_begins_with_zero(self) -> None:
        model = self.model(tied=True)
        assert isinstance(model.lm_head, peftrt.LoRALinear)
        assert model.lm_head.adapter("fr").lora_B.abs().max() == 0
        assert model.model.layers[0].self_attn.q_proj.adapter("fr").lora_B.abs().max() > 0


def test_peft_s_own_conversion_is_read_and_its_raw_form_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fields = {"r": 4, "target_modules": [ONE["llama"]], "init_lora_weights": "pissa"}
        theirs = peft.get_peft_model(build("llama"), peft.LoraConfig(**fields)).eval()
        theirs.save_pretrained(tmp_path / "start")
        scramble(theirs)
        theirs.save_pretrained(tmp_path / "raw")
        expected = logits(theirs)
    model = build("llama")
    with unchanged(model), pytest.raises(FormatError, match="init_lora_weights 'pissa' is not supported in a file"):
        peftrt.load(model, tmp_path / "raw")
    # as peft's documentation has it: the start is written with init True, then the difference is
    theirs.peft_config["default"].init_lora_weights = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "start_plain")
        start = json.loads((tmp_path / "start" / "adapter_config.json").read_text())
        (tmp_path / "start" / "adapter_config.json").write_text(json.dumps({**start, "init_lora_weights": True}))
        theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    peftrt.load(model, tmp_path / "converted")
    peftrt.set_active(model, "default")
    assert (logits(model) - expected).abs().max() <= LIMIT
