"""Tiny models built from configurations, and what tests compare them by."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftrt
from tests.tolerances import assert_same_bits

KINDS = ("llama", "gpt2", "bert")
# and an encoder with a decoder, whose feed-forward part is gated
ALL_KINDS = (*KINDS, "t5")
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "value", "dense"],
    "t5": ["q", "v", "o", "wi_0", "wi_1", "wo"],
}
ONE = {"llama": "q_proj", "gpt2": "c_attn", "bert": "query", "t5": "q"}
# adapters of a batch of three
NAMES = ["de", None, "fr"]
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


@functools.cache
def _model(kind: str, tied: bool) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        if kind == "llama":
            config = transformers.LlamaConfig(
                vocab_size=96,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=32,
                tie_word_embeddings=tied,
            )
            return transformers.LlamaForCausalLM(config).eval()
        if kind == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0
            )
            return transformers.GPT2LMHeadModel(config).eval()
        if kind in ("t5", "mild t5"):
            config = transformers.T5Config(
                vocab_size=96,
                d_model=64,
                d_kv=16,
                d_ff=96,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                decoder_start_token_id=0,
                # logits from 1 on, as trained ones are; the mild ones are of the size of the other models'
                initializer_factor=4.0 if kind == "t5" else 0.1,
                tie_word_embeddings=False,
            )
            return transformers.T5ForConditionalGeneration(config).eval()
        config = transformers.BertConfig(
            vocab_size=96,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            max_position_embeddings=32,
            num_labels=3,
        )
        return transformers.BertForSequenceClassification(config).eval()


def build(kind: str, tied: bool = False) -> Any:
    """A fresh model with the same weights every time; a Llama's head is tied to its embedding only where asked."""
    return copy.deepcopy(_model(kind, tied))


def mild(kind: str) -> Any:
    """As ``build``, a T5 with logits of the size of the others'."""
    return build("mild t5" if kind == "t5" else kind)


def tokens(batch: int = 3, length: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(1, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    ids = tokens() if ids is None else ids
    with torch.no_grad():
        return model(ids, **inputs_of(model, ids)).logits


def inputs_of(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """What a model takes beside its ids: a decoder is given some of its own."""
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return {"decoder_input_ids": ids.flip(1)[:, :4]} if encodes else {}


def config(kind: str, **changes: Any) -> peftrt.LoraConfig:
    """An adapter that changes the output from the start."""
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[kind], "init_lora_weights": False}
    return peftrt.LoraConfig(**{**fields, **changes})


def two_adapters(kind: str = "llama", quantize: str | None = None, **changes: Any) -> Any:
    """A model with the adapters "fr" and, smaller, "de", which is active."""
    model = build(kind)
    peftrt.adapt(model, config(kind, **changes), name="fr", quantize=quantize)
    peftrt.adapt(model, config(kind, r=2, target_modules=TARGETS[kind][:2]), name="de", quantize=quantize)
    return model


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that an error must leave alone: bits, which tensors they are in, flags, classes, modes."""
    found: dict[str, Any] = {f"state {key}": value.clone() for key, value in model.state_dict().items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[f"parameter {name}"] = (id(parameter), parameter.requires_grad)
    for path, module in model.named_modules(remove_duplicate=False):
        found[f"module {path}"] = (id(module), type(module), module.training, len(module._forward_hooks))
    found["adapters"] = (peftrt.adapter_names(model), peftrt.active_adapters(model))
    return found


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    assert list(after) == list(before)
    for key, value in before.items():
        if isinstance(value, Tensor):
            assert_same_bits(after[key], value)
        else:
            assert value == after[key], f"{key} changed: {value} -> {after[key]}"


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """The model is the same after the block as before it."""
    before = state_of(model)
    yield
    assert_unchanged(model, before)


def quiet() -> None:
    """transformers' progress bars and notes do not belong in a test's output."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
