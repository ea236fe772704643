"""AdapterHub's tensors held against its configuration and the model, and adapters that it has no words for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftrt
from peftrt.adapters.adapterhub import read_from_hub, to_hub
from peftrt.adapters.adapterhub.places import Base
from peftrt.formats.adapterhub_dir import read_adapterhub_dir
from peftrt.formats.errors import UnsupportedError
from tests.adapters.test_adapterhub import FIXTURES, expected
from tests.adapters.test_adapterhub_fields import edited, refused
from tests.fixtures.adapterhub.models import build, logits

pytest.importorskip("transformers")

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every key once more, as a model without a head has it."""
    return tensors | {key.removeprefix("model."): tensor.clone() for key, tensor in tensors.items()}


def without(part: str) -> Change:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if part not in key}


def renamed(old: str, new: str) -> Change:
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def changed(part: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: {key: change(t).contiguous() if part in key else t for key, t in tensors.items()}


TENSORS: list[tuple[str, Change, str]] = [
    ("llama/lora", without("layers.1.mlp.up_proj"), "no tensors for 'model.layers.1.mlp.up_proj'"),
    ("llama/lora", without("layers.0.self_attn.q_proj.loras.fixture.lora_A"), "has lora_B but no lora_A"),
    ("llama/lora", without("lora"), "has no tensors"),
    ("llama/lora", renamed("fixture", "other"), "key '.*loras.other.lora_A' is not supported"),
    ("llama/lora", renamed("layers.1.", "layers.2."), "no module 'model.layers.2"),
    ("llama/lora", renamed("v_proj", "o_proj"), "o_proj': what AdapterHub calls it is not known"),
    ("llama/lora", renamed("v_proj", "k_proj"), "no tensors for 'model.layers.0.self_attn.v_proj'|k_proj' has tensors"),
    ("llama/lora", renamed("lora_A", "lora_C"), "tensor 'lora_C'.*expected lora_A and lora_B"),
    ("llama/lora", changed("v_proj.loras.fixture.lora_B", lambda b: b[:-1]), "v_proj.*the model's is"),
    ("llama/lora", changed("v_proj.loras.fixture.lora_A", lambda a: a[:-1]), "v_proj.*ranks of lora_A .3, 32"),
    ("llama/lora", changed("lora_A", lambda a: a.reshape(-1)), "expected a matrix that is not empty"),
    ("llama/lora", changed("lora_A", lambda a: a.double()), "expected float32, bfloat16 or float16"),
    ("llama/lora", changed("lora_A", lambda a: a * torch.nan), "holds NaN"),
    ("llama/lora", doubled, "is there with a prefix and without"),
    ("llama/seq_bn", doubled, "is there with a prefix and without"),
    ("gpt2/lora", changed("c_attn.loras.fixture.lora_A", lambda a: a[:-1]), "c_attn.*are not 2 pairs of one rank"),
    ("gpt2/lora", changed("c_attn.loras.fixture.lora_B", lambda b: b[:-1]), "c_attn.*are not 2 pairs of one rank"),
    ("llama/ia3_attention", changed("k_proj", lambda b: b.repeat(1, 2)), "k_proj.*expected one column"),
    ("gpt2/ia3_attention", changed("c_attn", lambda b: b[:-1]), "63 factors are not 2 times as many"),
    ("llama/seq_bn", without("adapter_up.bias"), "up.bias"),
    ("llama/seq_bn", without("layers.1."), "model.layers.1.mlp"),
    ("llama/seq_bn", renamed("output_adapters.adapters", "attention_adapters.adapters"), "self_attn"),
    ("llama/seq_bn", renamed("adapter_up", "adapter_norm"), "'adapter_norm.*is not supported"),
    ("llama/seq_bn", renamed("output_adapters.", "mid_adapters."), "no place 'model.layers.0.mid_adapters'"),
    ("llama/seq_bn", changed("adapter_down.0.weight", lambda w: w[:-1]), "model.layers.0.mlp"),
    ("llama/prefix_flat", renamed("self_prefix", "cross_prefix"), "cross_prefix: prefixes of an encoder-decoder"),
    ("llama/prefix_flat", changed("model.prefix_tuning", lambda p: p + 1), "differs from another layer's"),
    ("llama/prefix_flat", changed("control", lambda p: p[:-1]), "is .191., the configuration and the model say .192."),
    ("llama/prefix_flat", renamed("prefix_tuning.prefix", "other.prefix"), "is no part of a prefix"),
    ("llama/prefix_mlp", without("wte"), "'self_prefix.wte.weight' is missing"),
    ("llama/prefix_mlp", changed("trans.2.bias", lambda b: b[:-1]), "control_trans.2.bias' is .63."),
]


@pytest.mark.parametrize(("case", "change", "message"), TENSORS)
def test_tensors_that_do_not_answer(tmp_path: Path, case: str, change: Change, message: str) -> None:
    refused(case.partition("/")[0], edited(tmp_path, case, change=change), message)


@pytest.mark.parametrize("missing", [".pool.", "model.prefix_tuning", "layers.1."])
def test_a_prefix_may_be_there_once(tmp_path: Path, missing: str) -> None:
    model = build("llama")
    alone = read_from_hub(model, edited(tmp_path, "llama/prefix_flat", change=without(missing)))
    whole = read_from_hub(model, FIXTURES / "llama" / "prefix_flat")
    assert alone[0] == whole[0]
    assert torch.equal(alone[1]["prompt_embeddings"], whole[1]["prompt_embeddings"])


@pytest.mark.parametrize(("kind", "case"), [("gpt2", "llama/lora"), ("bert", "t5/seq_bn"), ("t5", "bert/lora")])
def test_an_adapter_of_another_base(kind: str, case: str) -> None:
    refused(kind, FIXTURES / case, "made for another base")


def test_a_head_beside_the_adapter_is_told_of(tmp_path: Path) -> None:
    path = edited(tmp_path, "bert/lora")
    (path / "pytorch_model_head.bin").write_bytes(b"never opened")
    with pytest.warns(UserWarning, match=r"pytorch_model_head\.bin is not read") as caught:
        peftrt.load(build("bert"), path)
    assert caught[0].filename == __file__


def test_subfolders_as_save_all_adapters_makes_them(tmp_path: Path) -> None:
    edited(tmp_path, "llama/lora").rename(tmp_path / "fixture")
    edited(tmp_path, "llama/seq_bn").rename(tmp_path / "other")
    config = peftrt.load(build("llama"), tmp_path, name="fixture")
    assert config.peft_type == "LORA"
    assert peftrt.load(build("llama"), tmp_path, subfolder="other").peft_type == "BOTTLENECK"


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_bottlenecks_of_some_layers(tmp_path: Path, kind: str) -> None:
    gone, layers = ("encoder.block.1.", [1]) if kind == "t5" else ("layers.0.", [0])
    path = edited(tmp_path, f"{kind}/double_seq_bn", {"leave_out": layers}, without(gone))
    model = build(kind)
    peftrt.load(model, path, name="fixture")
    peftrt.set_active(model, "fixture")
    # as if the bottlenecks of that layer added nothing
    whole = build(kind)
    zero = changed(gone, lambda tensor: torch.zeros_like(tensor))
    peftrt.load(whole, edited(tmp_path / "zero", f"{kind}/double_seq_bn", change=zero))
    peftrt.set_active(whole, "default")
    assert torch.allclose(logits(model, kind), logits(whole, kind), atol=1e-6, rtol=0)
    peftrt.save(model, tmp_path / "again", format="adapterhub")
    ours, theirs = read_adapterhub_dir(tmp_path / "again"), read_adapterhub_dir(path)
    assert ours[0] == theirs[0]
    assert ours[1].keys() == theirs[1].keys()


def adapted(kind: str, **fields: Any) -> nn.Module:
    """A model with a LoRA of random values."""
    model = build(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peftrt.adapt(model, peftrt.LoraConfig(init_lora_weights=False, **fields), name="fixture")
    return model


def test_one_pair_over_queries_keys_and_values_is_three(tmp_path: Path) -> None:
    model = adapted("gpt2", r=3, lora_alpha=4, target_modules=["c_attn"])
    peftrt.save(model, tmp_path, format="adapterhub")
    values, tensors = read_adapterhub_dir(tmp_path)
    assert values["config"]["attn_matrices"] == ["q", "k", "v"]
    assert (values["config"]["r"], values["config"]["alpha"]) == (3, 4)
    assert tensors["transformer.h.0.attn.c_attn.loras.fixture.lora_A"].shape == (9, 32)
    again = build("gpt2")
    peftrt.load(again, tmp_path)
    peftrt.set_active(again, "default")
    assert torch.allclose(logits(again, "gpt2"), logits(model, "gpt2"), atol=1e-6, rtol=0)


def test_rslora_is_another_alpha(tmp_path: Path) -> None:
    model = adapted("llama", r=4, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "down_proj"])
    peftrt.save(model, tmp_path, format="adapterhub")
    config = read_adapterhub_dir(tmp_path)[0]["config"]
    assert config["alpha"] == 8
    # AdapterHub's name of a Llama's projection down
    assert (config["attn_matrices"], config["intermediate_lora"], config["output_lora"]) == (["q"], True, False)


SAVES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"target_modules": ["o_proj"]}, "no LoRA at model.layers.0.self_attn.o_proj"),
    ("llama", {"target_modules": ["embed_tokens"]}, "lora_embedding_A"),
    ("llama", {"target_modules": ["q_proj"], "use_dora": True}, "use_dora"),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 4}}, "q_proj has r 8.*v_proj r 4"),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 4}}, "one r and one alpha"),
    ("llama", {"target_modules": r".*1\.self_attn\.q_proj|.*v_proj"}, "no adapter at model.layers.0.self_attn.q_proj"),
    ("t5", {"target_modules": ["SelfAttention.q"]}, "no adapter at decoder.block.0.layer.1.EncDecAttention.q"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), SAVES)
def test_what_adapterhub_has_no_words_for(tmp_path: Path, kind: str, fields: dict[str, Any], message: str) -> None:
    model = adapted(kind, **fields)
    with pytest.raises(UnsupportedError, match=message):
        peftrt.save(model, tmp_path / "new", format="adapterhub")
    assert not (tmp_path / "new").exists()


def test_a_form_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format must be one of 'peft', 'adapterhub', got 'hub'"):
        peftrt.save(adapted("llama", target_modules=["q_proj"]), tmp_path, format="hub")


def test_a_prefix_whose_positions_are_shifted() -> None:
    model = build("llama")
    values, tensors = read_from_hub(model, FIXTURES / "llama" / "prefix_flat")
    assert values["shift_positions"] is False
    for shifted in ({"shift_positions": True}, {}):
        rest = {name: value for name, value in values.items() if name != "shift_positions"}
        with pytest.raises(UnsupportedError, match="shift_positions"):
            to_hub(model, "x", {**rest, **shifted}, tensors)


def test_ia3_of_a_feed_forwards_input() -> None:
    values = {"peft_type": "IA3", "target_modules": ["down_proj"], "feedforward_modules": ["down_proj"]}
    tensors = {"base_model.model.model.layers.0.mlp.down_proj.ia3_l": torch.ones(1, 48)}
    with pytest.raises(UnsupportedError, match="scales the input of a feed-forward module, AdapterHub's the output"):
        to_hub(build("llama"), "x", values, tensors)


def test_a_kind_that_adapterhub_has_not() -> None:
    with pytest.raises(UnsupportedError, match="no form for peft_type 'PROMPT_TUNING'"):
        to_hub(build("llama"), "x", {"peft_type": "PROMPT_TUNING"}, {})


def test_names_of_layers_go_on_from_encoder_to_decoder() -> None:
    base = Base(build("t5"))
    assert base.layers == {"encoder.block.0": 0, "encoder.block.1": 1, "decoder.block.0": 2, "decoder.block.1": 3}
    assert base.own_prefix == ""
    assert Base(build("bert")).own_prefix == "bert."
    assert Base(build("bert", headless=True)).own_prefix == ""


def test_an_adapter_over_4_bits(tmp_path: Path) -> None:
    """The same directory goes over a quantised base, and comes back as it was."""
    model = build("llama")
    peftrt.adapt(model, peftrt.LoraConfig(target_modules=["q_proj"]), name="first", quantize="nf4")
    peftrt.load(model, FIXTURES / "llama" / "lora_qkv", name="fixture")
    peftrt.save(model, tmp_path, name="fixture", format="adapterhub")
    ours, theirs = read_adapterhub_dir(tmp_path)[1], read_adapterhub_dir(FIXTURES / "llama" / "lora_qkv")[1]
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert len(ours) == len(theirs)


def test_several_adapters_of_both_libraries_in_one_batch(tmp_path: Path) -> None:
    model = build("llama")
    peftrt.load(model, FIXTURES / "llama" / "lora", name="hub")
    peftrt.save(model, tmp_path, name="hub")
    peftrt.load(model, tmp_path, name="peft")
    with peftrt.rows(model, ["hub", None, "peft"]):
        mixed = logits(model, "llama")
    wanted = [expected("llama")[case] for case in ("lora", "base", "lora")]
    lengths = [8, 5, 5]
    for part, rows, first in zip(mixed.split(lengths), wanted, (0, 8, 13), strict=True):
        assert torch.allclose(part, rows[first : first + len(part)], atol=1e-6, rtol=0)
