"""Adapters go both ways between HF peft and peftrt: same files, same logits."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import peftrt
from peftrt.formats.errors import FormatError
from tests.adapters.tiny import ALL_KINDS, ONE, TARGETS, TASKS, build, config, logits, mild, quiet, tokens

peft = pytest.importorskip("peft")

# What the issue of both directions asks for, in fp32.
LIMIT = 1e-6

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "one target": {"targets": "one"},
    "regex": {"targets": "regex"},
    "all-linear": {"target_modules": "all-linear"},
    "rank pattern": {"rank_pattern": {"one": 2}, "alpha_pattern": {"one": 16}},
    "full path pattern": {"rank_pattern": {r"^.*0.*one": 3}},
    "layers": {"layers_to_transform": [1]},
    "exclude": {"exclude_modules": "exclude"},
    "task": {"task": True, "target_modules": "all-linear"},
}

CASES = [("llama", variant) for variant in VARIANTS]
CASES += [
    (kind, variant)
    for kind in ALL_KINDS
    for variant in ("plain", "rslora", "dora", "rank pattern", "task")
    if kind != "llama"
]


def fields(kind: str, variant: str) -> dict[str, Any]:
    """A variant's fields for a model; they are the same for peft and peftrt."""
    changes = dict(VARIANTS[variant])
    result: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[kind], "init_lora_weights": False}
    if changes.pop("task", False):
        result["task_type"] = TASKS[kind]
    targets = changes.pop("targets", None)
    if targets == "one":
        result["target_modules"] = [ONE[kind]]
    elif targets == "regex":
        result["target_modules"] = rf".*\.[01]\..*{ONE[kind]}"
    if "exclude_modules" in changes:
        changes["exclude_modules"] = [ONE[kind]]
    for name in ("rank_pattern", "alpha_pattern"):
        if name in changes:
            changes[name] = {key.replace("one", ONE[kind]): value for key, value in changes[name].items()}
    return {**result, **changes}


def scramble(model: Any) -> None:
    """Give what is trained values of its own, as training would."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.1 * noise)


def peft_model(kind: str, values: dict[str, Any], name: str = "default") -> Any:
    quiet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's remark on fan_in_fan_out
        model = peft.get_peft_model(mild(kind), peft.LoraConfig(**values), adapter_name=name).eval()
    scramble(model)
    return model


def peft_load(kind: str, path: Path) -> Any:
    quiet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")  # not an error there
        return peft.PeftModel.from_pretrained(mild(kind), str(path)).eval()


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_what_peft_saves_gives_the_same_logits(kind: str, variant: str, tmp_path: Path) -> None:
    theirs = peft_model(kind, fields(kind, variant))
    theirs.save_pretrained(str(tmp_path))
    ours = mild(kind)
    base = logits(ours)
    peftrt.load(ours, tmp_path, name="fr")
    assert torch.equal(logits(ours), base)  # loading does not activate
    peftrt.set_active(ours, "fr")
    expected = logits(theirs)
    assert (expected - base).abs().max() > 20 * LIMIT
    assert (logits(ours) - expected).abs().max() <= LIMIT


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_peft_gives_the_same_logits_for_what_is_saved(kind: str, variant: str, tmp_path: Path) -> None:
    ours = mild(kind)
    base = logits(ours)
    peftrt.adapt(ours, peftrt.LoraConfig(**fields(kind, variant)), name="fr")
    scramble(ours)
    peftrt.save(ours, tmp_path, name="fr")
    expected = logits(ours)
    assert (expected - base).abs().max() > 20 * LIMIT
    assert (logits(peft_load(kind, tmp_path)) - expected).abs().max() <= LIMIT


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_the_same_modules_are_adapted(kind: str, variant: str) -> None:
    values = fields(kind, variant)
    theirs = peft_model(kind, values)
    ours = mild(kind)
    report = peftrt.adapt(ours, peftrt.LoraConfig(**values))
    layer = peft.tuners.lora.LoraLayer
    expected = [path.removeprefix("base_model.model.") for path, m in theirs.named_modules() if isinstance(m, layer)]
    assert list(report.matched) == expected
    theirs_trainable = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert report.trainable == theirs_trainable


@pytest.mark.parametrize(("kind", "variant"), [("bert", "task"), ("llama", "dora"), ("gpt2", "rank pattern")])
def test_files_and_keys_are_peft_s(kind: str, variant: str, tmp_path: Path) -> None:
    """The same adapter, saved by both: the same keys, and the same values in every field that both have."""
    values = fields(kind, variant)
    peft_model(kind, values).save_pretrained(str(tmp_path / "theirs"))
    ours = mild(kind)
    peftrt.adapt(ours, peftrt.LoraConfig(**values))
    peftrt.save(ours, tmp_path / "ours")
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    from safetensors import safe_open

    keys = {}
    for who in ("ours", "theirs"):
        with safe_open(tmp_path / who / "adapter_model.safetensors", "pt") as file:
            keys[who] = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
            assert file.metadata() == {"format": "pt"}
    assert keys["ours"] == keys["theirs"]
    written = {who: json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in keys}
    for field, value in written["ours"].items():
        theirs = written["theirs"][field]
        if field in ("target_modules", "modules_to_save"):
            # peft shortens the list, and names heads that are not there
            assert set(theirs or ()) - {"score"} <= set(value or ()) or field == "target_modules"
        elif field != "base_model_name_or_path":
            assert value == theirs or (not value and not theirs), field


def test_several_adapters_of_one_directory(tmp_path: Path) -> None:
    """peft puts adapters that are not called "default" in subfolders."""
    theirs = peft_model("llama", fields("llama", "plain"), name="fr")
    theirs.add_adapter("de", peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    theirs.save_pretrained(str(tmp_path / "both"))
    theirs.save_pretrained(str(tmp_path / "one"), selected_adapters=["fr"])
    ours = build("llama")
    peftrt.load(ours, tmp_path / "one", name="only")  # the one subfolder
    peftrt.load(ours, tmp_path / "both", name="de")  # the one of that name
    peftrt.load(ours, tmp_path / "both", name="other", subfolder="fr")
    with pytest.raises(FormatError, match="several adapters"):
        peftrt.load(ours, tmp_path / "both", name="it")
    for name, expected in (("only", "fr"), ("de", "de"), ("other", "fr")):
        theirs.set_adapter(expected)
        peftrt.set_active(ours, name)
        assert (logits(ours) - logits(theirs)).abs().max() <= LIMIT


def test_over_a_quantised_base(tmp_path: Path) -> None:
    """An adapter of a dense model on an NF4 base: peft over the same dequantised weights is the truth."""
    theirs = peft_model("llama", fields("llama", "plain"))
    theirs.save_pretrained(str(tmp_path))
    ours = build("llama")
    peftrt.adapt(ours, config("llama", r=2), name="mine", quantize="nf4")
    peftrt.load(ours, tmp_path, name="fr")
    for path, module in ours.named_modules():
        if isinstance(module, peftrt.QLoRALinear):
            theirs.get_submodule(f"base_model.model.{path}").base_layer.weight.data = module.nf4_weight().dequantize()
    peftrt.set_active(ours, "fr")
    assert (logits(ours) - logits(theirs)).abs().max() <= LIMIT


def test_sixteen_bit_files_are_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    theirs = peft_model("llama", fields("llama", "plain"))
    theirs.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    half = {key: value.bfloat16() for key, value in load_file(file).items()}
    save_file(half, file, metadata={"format": "pt"})
    ours = build("llama")
    peftrt.load(ours, tmp_path)
    peftrt.set_active(ours, "default")
    assert ours.model.layers[0].self_attn.q_proj.lora_A.dtype == torch.float32
    assert (logits(ours) - logits(peft_load("llama", tmp_path))).abs().max() <= LIMIT


def test_rows_equal_peft_s_mixed_batch(tmp_path: Path) -> None:
    """peft's own mixed batches (``adapter_names=``) give what rows gives."""
    theirs = peft_model("gpt2", fields("gpt2", "plain"), name="fr")
    theirs.add_adapter(
        "de", peft.LoraConfig(r=2, target_modules=["c_fc"], init_lora_weights=False, fan_in_fan_out=True)
    )
    theirs.save_pretrained(str(tmp_path))
    ours = build("gpt2")
    for name in ("fr", "de"):
        peftrt.load(ours, tmp_path, name=name)
    with torch.no_grad():
        expected = theirs(tokens(), adapter_names=["de", "__base__", "fr"]).logits
    with peftrt.rows(ours, ["de", None, "fr"]):
        assert (logits(ours) - expected).abs().max() <= LIMIT
