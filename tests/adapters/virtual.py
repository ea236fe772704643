"""Virtual tokens on tiny models, ours and HF peft's, and the batches they are compared on."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftrt
from tests.adapters import tiny
from tests.adapters.tiny import TASKS, inputs_of, quiet, tokens

KINDS = ("llama", "gpt2", "bert", "t5")
GENERATING = ("llama", "gpt2", "t5")
TOKENS = 5
# way -> its configuration's fields, which are peft's too
WAYS: dict[str, dict[str, Any]] = {
    "prefix": {},
    "projected": {"prefix_projection": True, "encoder_hidden_size": 24},
    "prompt": {},
}
SIDES = ("none", "left", "right")
# What the issue of both directions asks for, in fp32.
LIMIT = 1e-6


def build(kind: str) -> Any:
    """As ``tiny.build``; T5's weights are between its two: texts depend on what is in front of them, and fp32 is enough
    to compare them.
    """
    if kind != "t5":
        return tiny.build(kind)
    model = tiny.build("mild t5")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
    return model


def config(way: str, tokens: int = TOKENS, **changes: Any) -> Any:
    kind = peftrt.PromptTuningConfig if way == "prompt" else peftrt.PrefixTuningConfig
    return kind(num_virtual_tokens=tokens, **{**WAYS[way], **changes})


def peft_model(kind: str, way: str, model: nn.Module | None = None) -> Any:
    """HF peft's, with values drawn by peft."""
    peft = pytest.importorskip("peft")
    quiet()
    of_peft = peft.PromptTuningConfig if way == "prompt" else peft.PrefixTuningConfig
    fields = {"num_virtual_tokens": TOKENS, "task_type": TASKS[kind], **WAYS[way]}
    with torch.random.fork_rng(devices=[]), without_warnings():
        torch.manual_seed(11)
        return peft.get_peft_model(build(kind) if model is None else model, of_peft(**fields)).eval()


def loaded_by_peft(kind: str, directory: Path) -> Any:
    peft = pytest.importorskip("peft")
    quiet()
    with without_warnings():
        return peft.PeftModel.from_pretrained(build(kind), directory).eval()


def saved_by_peft(model: Any, directory: Path) -> Path:
    with without_warnings():
        model.save_pretrained(directory)
    return directory


def loaded(kind: str, directory: Path, **options: Any) -> Any:
    """Ours, active."""
    model = build(kind)
    peftrt.load(model, directory, name="p", **options)
    peftrt.set_active(model, "p")
    return model


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def batch(side: str = "none") -> tuple[Tensor, Tensor]:
    """Ids and mask of three texts, two of them shorter where padded."""
    ids = tokens()
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :2] = mask[1, :1] = 0
    if side == "right":
        mask[0, -2:] = mask[1, -1:] = 0
    return ids, mask


@torch.no_grad()
def logits_of(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Those of the real tokens, 0 at padding; peft's models return the virtual tokens' as well."""
    quiet()
    with without_warnings():
        found: Tensor = model(input_ids=ids, attention_mask=mask, **inputs_of(model, ids)).logits
    if found.dim() < 3 or getattr(model.config, "is_encoder_decoder", False):
        return found
    found = found[:, -ids.shape[1] :]
    return found if mask is None else found * mask[..., None]


def without_dropout(model: nn.Module) -> None:
    """So that a model in training computes the same again."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def loss_of(model: Any, side: str = "right") -> Tensor:
    """With labels of the model's task."""
    ids, mask = batch(side)
    labels = ids.masked_fill(mask == 0, -100)
    if "SequenceClassification" in type(getattr(model, "base_model", model)).__name__ or hasattr(model, "classifier"):
        labels = torch.tensor([0, 2, 1])
    found: Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    return found


def text(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """What a model generates, all of the same length."""
    quiet()
    fixed = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    with without_warnings():
        found: Tensor = model.generate(input_ids=ids, attention_mask=mask, **{**fixed, **options})
    return found


def hooks(model: nn.Module) -> int:
    """How many there are."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
