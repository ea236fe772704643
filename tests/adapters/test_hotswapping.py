"""hotswap: new values at the old addresses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import peftrt
from peftrt.formats.errors import FormatError
from tests.adapters.tiny import TARGETS, build, config, logits, tokens, unchanged
from tests.tolerances import assert_same_bits


def made(path: Path, seed: int, kind: str = "llama", **changes: Any) -> Any:
    """An adapter's directory, and the logits it gives."""
    model = build(kind)
    torch.manual_seed(seed)
    peftrt.adapt(model, config(kind, **changes), name="x")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    peftrt.save(model, path)
    return logits(model)


@pytest.mark.parametrize(
    ("before", "after", "exact"),
    [
        ({}, {}, True),
        ({"r": 4, "lora_alpha": 8}, {"r": 2, "lora_alpha": 16}, True),  # scalings 2 and 8
        ({"r": 4, "lora_alpha": 6}, {"r": 3, "lora_alpha": 5}, False),
        ({"use_dora": True}, {"use_dora": True}, True),
        ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]}, True),
        ({"r": 4, "rank_pattern": {"q_proj": 8}}, {"r": 2, "rank_pattern": {"q_proj": 4}}, True),
    ],
)
def test_values_change_and_nothing_else(before: Any, after: Any, exact: bool, tmp_path: Path) -> None:
    made(tmp_path / "a", 1, **before)
    expected = made(tmp_path / "b", 2, **after)
    model = build("llama")
    peftrt.load(model, tmp_path / "a", name="fr")
    peftrt.set_active(model, "fr")
    first = logits(model)
    addresses = {name: (id(p), p.data_ptr(), p.shape) for name, p in model.named_parameters()}
    peftrt.hotswap(model, tmp_path / "b", name="fr")
    assert addresses == {name: (id(p), p.data_ptr(), p.shape) for name, p in model.named_parameters()}
    assert (first - expected).abs().max() > 1e-3
    assert (logits(model) - expected).abs().max() < (1e-6 if exact else 3e-6)
    peftrt.hotswap(model, tmp_path / "a", name="fr")
    assert_same_bits(logits(model), first)
    peftrt.hotswap(model, tmp_path / "b", name="fr")
    peftrt.save(model, tmp_path / "c")
    other = build("llama")
    peftrt.load(other, tmp_path / "c")
    peftrt.set_active(other, "default")
    assert (logits(other) - expected).abs().max() < 3e-6


def test_nothing_is_compiled_again(tmp_path: Path) -> None:
    made(tmp_path / "a", 1)
    expected = made(tmp_path / "b", 2, r=2, lora_alpha=2)
    model = build("llama")
    peftrt.load(model, tmp_path / "a", name="fr")
    peftrt.set_active(model, "fr")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        first = compiled(tokens(), use_cache=False).logits
        before = counter.frame_count
        peftrt.hotswap(compiled, tmp_path / "b", name="fr")
        second = compiled(tokens(), use_cache=False).logits
    assert counter.frame_count == before > 0
    assert (first - second).abs().max() > 1e-3
    assert (second - expected).abs().max() < 1e-6


def test_rows_of_a_batch_see_it(tmp_path: Path) -> None:
    """What is stacked for the rows is remembered between calls, and forgotten here."""
    made(tmp_path / "a", 1)
    expected = made(tmp_path / "b", 2)
    model = build("llama")
    for name in ("fr", "de"):
        peftrt.load(model, tmp_path / "a", name=name)
    with torch.no_grad(), peftrt.rows(model, ["fr", None, "de"]):
        before = logits(model)
        peftrt.hotswap(model, tmp_path / "b", name="de")
        after = logits(model)
    assert_same_bits(after[:2], before[:2])
    assert (after[2] - expected[2]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 5}, "has rank 5, the model's adapter 'fr' has 4"),
        ({"target_modules": TARGETS["llama"][:2]}, "the file has none; use load with replace=True"),
        ({"target_modules": "all-linear"}, "the model's adapter has none; use load with replace=True"),
        ({"use_dora": True}, "DoRA cannot take the place of LoRA"),
        ({"modules_to_save": ["lm_head"]}, "module 'lm_head': the model's adapter has none"),
    ],
)
def test_what_does_not_fit_is_refused(changes: Any, message: str, tmp_path: Path) -> None:
    made(tmp_path / "a", 1)
    made(tmp_path / "b", 2, **changes)
    model = build("llama")
    peftrt.load(model, tmp_path / "a", name="fr")
    with unchanged(model), pytest.raises(FormatError, match=message):
        peftrt.hotswap(model, tmp_path / "b", name="fr")


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    made(tmp_path / "a", 1)
    model = build("llama")
    peftrt.adapt(model, peftrt.BottleneckConfig(), name="bn")
    peftrt.save(model, tmp_path / "bn")
    with unchanged(model), pytest.raises(ValueError, match=r"'bn' \(BottleneckConfig\) is not LoRA"):
        peftrt.hotswap(model, tmp_path / "a", name="bn")
    peftrt.load(model, tmp_path / "a", name="fr")
    with unchanged(model):
        with pytest.raises(FormatError, match="BOTTLENECK cannot take the place of LoRA"):
            peftrt.hotswap(model, tmp_path / "bn", name="fr")
        with pytest.raises(ValueError, match="no adapter 'xx'"):
            peftrt.hotswap(model, tmp_path / "a", name="xx")
