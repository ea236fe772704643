"""Prefixes and prompts go both ways between HF peft and peftrt: same files, same logits, same texts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import peftrt
from peftrt.nn.prefix import Prefix, PrefixedCache, PrefixTuning
from peftrt.nn.prompt import Prompt
from tests.adapters.tiny import TASKS, tokens
from tests.adapters.virtual import (
    GENERATING,
    KINDS,
    LIMIT,
    SIDES,
    TOKENS,
    WAYS,
    batch,
    build,
    config,
    loaded,
    loaded_by_peft,
    logits_of,
    loss_of,
    peft_model,
    saved_by_peft,
    text,
    without_dropout,
    without_warnings,
)
from tests.tolerances import assert_close

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def distance(ours: Any, theirs: Any, side: str = "none", masked: bool = True) -> float:
    """The largest difference of two models' logits; relative where these are beyond 1, as T5's are."""
    ids, mask = batch(side)
    pair = [logits_of(model, ids, mask if masked else None) for model in (ours, theirs)]
    return float((pair[0] - pair[1]).abs().max() / pair[1].abs().max().clamp(min=1))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
class TestParity:
    def test_of_peft_here(self, kind: str, way: str, tmp_path: Path) -> None:
        theirs = peft_model(kind, way)
        ours = loaded(kind, saved_by_peft(theirs, tmp_path))
        plain = build(kind)
        for attention in ("sdpa", "eager"):
            for model in (ours, theirs, plain):
                getattr(model, "base_model", model).config._attn_implementation = attention
                model.set_attn_implementation(attention)
            for side in SIDES:
                assert distance(ours, theirs, side) <= LIMIT
            assert distance(ours, theirs, masked=False) <= LIMIT
            # and the adapter does something
            assert distance(ours, plain) > 1e-3

    def test_of_ours_there(self, kind: str, way: str, tmp_path: Path) -> None:
        ours = build(kind)
        peftrt.adapt(ours, config(way, task_type=TASKS[kind]), name="fr")
        ours.eval()
        peftrt.save(ours, tmp_path)
        theirs = loaded_by_peft(kind, tmp_path)
        for side in SIDES:
            assert distance(ours, theirs, side) <= LIMIT

    def test_files_are_peft_s(self, kind: str, way: str, tmp_path: Path) -> None:
        saved_by_peft(peft_model(kind, way), tmp_path / "theirs")
        ours = build(kind)
        peftrt.load(ours, tmp_path / "theirs", name="p")
        peftrt.save(ours, tmp_path / "ours")
        expected, found = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), key
        expected, found = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("theirs", "ours"))
        if kind == "bert":
            # peft names every head that it knows, and those of its model classes twice
            assert set(found.pop("modules_to_save")) == set(expected.pop("modules_to_save"))
        notes = {"auto_mapping", "peft_version"}
        assert {key: expected[key] for key in expected.keys() - notes} == found

    def test_gradients(self, kind: str, way: str, tmp_path: Path) -> None:
        theirs = peft_model(kind, way)
        ours = build(kind)
        peftrt.adapt(ours, config(way), name="fr")
        prefix = next(module for module in ours.modules() if isinstance(module, Prefix | Prompt))
        pairs = take_values(prefix, theirs.prompt_encoder["default"])
        if kind == "bert":
            ours.classifier.load_state_dict(theirs.base_model.classifier.modules_to_save["default"].state_dict())
        for model in (ours, theirs):
            model.train()
            without_dropout(model)
        mine, their = loss_of(ours), peft_loss(theirs, kind, way)
        mine.backward()
        their.backward()
        assert abs(mine.item() - their.item()) <= LIMIT
        for parameter, expected in pairs:
            # a part of peft's tensor that its model does not look at has zeros there
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert_close(grad, expected())
        assert any(parameter.grad is not None and parameter.grad.abs().max() > 1e-6 for parameter, _ in pairs)


def peft_loss(model: Any, kind: str, way: str) -> Tensor:
    """Of the real tokens: peft's own has the first of them as a target, too, where a prompt is in front."""
    with without_warnings():
        if way != "prompt" or kind not in ("llama", "gpt2"):
            return loss_of(model)
        ids, mask = batch("right")
        logits = model(input_ids=ids, attention_mask=mask).logits[:, TOKENS:-1]
        labels = ids.masked_fill(mask == 0, -100)[:, 1:]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def take_values(ours: Any, theirs: Any) -> list[tuple[torch.nn.Parameter, Any]]:
    """Give ours peft's values; pairs of a Parameter and what peft's gradient for it is."""
    if isinstance(ours, Prompt):
        pairs = [(ours.weight, theirs.embedding.weight, slice(None), 0)]
    elif ours.embedding is None:
        width = 2 * ours.token_dim
        places = [slice(width * layer, width * (layer + 1)) for layer in range(ours.num_layers)]
        pairs = [(own, theirs.embedding.weight, place, 1) for own, place in zip(ours.layers, places, strict=True)]
    else:
        first, _, last = theirs.transform
        pairs = [(ours.embedding.weight, theirs.embedding.weight, slice(None), 0)]
        pairs += [(ours.hidden.weight, first.weight, slice(None), 0), (ours.hidden.bias, first.bias, slice(None), 0)]
        width = 2 * ours.token_dim
        for layer, out in enumerate(ours.out):
            place = slice(width * layer, width * (layer + 1))
            pairs += [(out.weight, last.weight, place, 0), (out.bias, last.bias, place, 0)]

    def part(tensor: Tensor, place: slice, dim: int) -> Tensor:
        return tensor[place] if dim == 0 else tensor[:, place]

    with torch.no_grad():
        for own, their, place, dim in pairs:
            own.copy_(part(their, place, dim))
    return [(own, lambda t=their, p=place, d=dim: part(t.grad, p, d)) for own, their, place, dim in pairs]


SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
BART = {"d_model": 64, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": 96, "max_position_embeddings": 64}
BART |= {
    f"{part}_{what}": count
    for part in ("encoder", "decoder")
    for what, count in (("layers", 2), ("attention_heads", 4))
}
# each with something of its own: attention through a window, a head that looks past the base model, tables that count
# positions by themselves, one head of keys for all of queries, a classifier that looks at the first place
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mistral": ("MistralForCausalLM", "CAUSAL_LM", {**SIZES, "sliding_window": 8, "num_key_value_heads": 2}),
    "qwen2": (
        "Qwen2ForCausalLM",
        "CAUSAL_LM",
        {**SIZES, "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1, "num_key_value_heads": 2},
    ),
    "opt": ("OPTForCausalLM", "CAUSAL_LM", {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "falcon": ("FalconForCausalLM", "CAUSAL_LM", SIZES),
    "bart": ("BartForConditionalGeneration", "SEQ_2_SEQ_LM", BART),
    "roberta": ("RobertaForSequenceClassification", "SEQ_CLS", {**SIZES, "num_labels": 3}),
    "tokens": ("RobertaForTokenClassification", "TOKEN_CLS", {**SIZES, "num_labels": 3}),
}


@pytest.mark.parametrize("way", ["prefix", "prompt"])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_models(kind: str, way: str, tmp_path: Path) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    name, task, sizes = OTHERS[kind]
    model_type = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        plain = model_type(model_type.config_class(**sizes)).eval()
    for parameter in plain.parameters():
        parameter.data.mul_(3.0 if parameter.dim() > 1 else 1.0)
    for attention in ("sdpa", "eager"):
        plain.set_attn_implementation(attention)
        ours = copy.deepcopy(plain)
        peftrt.adapt(ours, config(way, task_type=task))
        ours.eval()
        peftrt.save(ours, tmp_path)
        with without_warnings():
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
        for length in (2, 6, 14):
            ids = tokens(length=length)
            found = logits_of(ours, ids)
            assert (found - logits_of(theirs, ids)).abs().max() <= LIMIT
            assert (found - logits_of(plain, ids)).abs().max() > 1e-3
        if "CLS" not in task:
            ids, mask = batch()
            found = text(ours, ids, mask)
            assert torch.equal(found, text(theirs, ids, mask))
            assert torch.equal(found, text(ours, ids, mask, use_cache=False))


def test_positions_of_another_part() -> None:
    """A model of several parts: only where the attentions are, positions are shifted."""

    class Parts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.images = torch.nn.ModuleDict({"position_embedding": torch.nn.Embedding(8, 4)})
            self.text = build("llama")
            self.config = self.text.config

    model = Parts()
    peftrt.adapt(model, config("prefix"))
    assert "prefix_tuning" in model.text.model._modules
    assert not model.images["position_embedding"]._forward_pre_hooks
    assert model.text.model.rotary_emb._forward_pre_hooks


class TestTeeth:
    """A wrong implementation does not pass for peft's."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_positions_that_are_not_shifted(self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        theirs = peft_model(kind, "prefix")
        ours = loaded(kind, saved_by_peft(theirs, tmp_path))
        assert distance(ours, theirs) <= LIMIT
        if kind == "t5":  # which counts distances
            monkeypatch.setattr(PrefixedCache, "get_seq_length", lambda self, *args: 0)
        else:
            monkeypatch.setattr(PrefixTuning, "_shift", lambda self, device: None)
        assert distance(ours, theirs) > 100 * LIMIT

    @pytest.mark.parametrize("kind", KINDS)
    def test_values_for_keys(self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        theirs = peft_model(kind, "prefix")
        ours = loaded(kind, saved_by_peft(theirs, tmp_path))
        swapped = Prefix.keys_values
        monkeypatch.setattr(Prefix, "keys_values", lambda self, layer: swapped(self, layer)[::-1])
        assert distance(ours, theirs) > 100 * LIMIT

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_prompt_in_another_order(self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        theirs = peft_model(kind, "prompt")
        ours = loaded(kind, saved_by_peft(theirs, tmp_path))
        monkeypatch.setattr(Prompt, "forward", lambda self: self.weight[: self.num_virtual_tokens].flip(0))
        assert distance(ours, theirs) > 100 * LIMIT


@pytest.mark.parametrize("kind", GENERATING)
class TestGenerate:
    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
    @pytest.mark.parametrize("way", ["prefix", "prompt"])
    def test_as_peft_does(self, kind: str, way: str, options: dict[str, Any], tmp_path: Path) -> None:
        theirs = peft_model(kind, way)
        ours = loaded(kind, saved_by_peft(theirs, tmp_path))
        ids, mask = batch()
        plain = text(build(kind), ids, mask, **options)
        found = text(ours, ids, mask, **options)
        assert torch.equal(found, text(theirs, ids, mask, **options))
        assert not torch.equal(found, plain)
        ids, mask = batch("left")
        found = text(ours, ids, mask, **options)
        if way == "prefix":
            assert torch.equal(found, text(theirs, ids, mask, **options))
        for row, (of_row, seen) in enumerate(zip(ids, mask, strict=True)):
            # peft ignores positions in front of a prompt: its texts are right where nothing is padded
            alone = of_row[seen == 1][None]
            expected = text(theirs, alone, torch.ones_like(alone), **options)
            assert torch.equal(found[row, -7:], expected[0, -7:])

    @pytest.mark.parametrize("way", ["prefix", "prompt"])
    def test_whatever_the_cache(self, kind: str, way: str) -> None:
        model = build(kind)
        peftrt.adapt(model, config(way))
        model.eval()
        for side in ("none", "left"):
            ids, mask = batch(side)
            expected = text(model, ids, mask)
            assert torch.equal(text(model, ids, mask, use_cache=False), expected)
            if way == "prefix":
                assert torch.equal(text(model, ids, mask, cache_implementation="static"), expected)
        ids, mask = batch()
        expected = text(model, ids[:1], mask[:1])
        assert torch.equal(text(model, ids[:1], mask[:1], prompt_lookup_num_tokens=3), expected)

    def test_a_cache_of_a_fixed_size_has_no_room_for_a_prompt(self, kind: str) -> None:
        model = build(kind)
        peftrt.adapt(model, config("prompt"))
        model.eval()
        ids, mask = batch()
        if kind == "t5":  # whose encoder has none
            expected = text(model, ids, mask)
            assert torch.equal(text(model, ids, mask, cache_implementation="static"), expected)
            return
        with pytest.raises(TypeError, match="fixed size"):
            text(model, ids, mask, cache_implementation="static")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_cache_that_was_filled_without_the_prompt(kind: str) -> None:
    model = build(kind)
    peftrt.adapt(model, config("prompt"))
    model.eval()
    ids, mask = batch()
    peftrt.set_active(model, None)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        peftrt.set_active(model, "default")
        more = torch.cat([mask, mask[:, :1]], dim=1)
        with pytest.raises(ValueError, match="another prompt"):
            model(ids[:, :1], attention_mask=more, past_key_values=cache)
