"""Hugging Face's generate under a pool and under rows: prompts of several lengths, another adapter for each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftrt
from tests.adapters.tiny import build, config, quiet, tokens

PROMPTS = [[5, 17, 3, 88, 41, 9, 60], [7, 2], [31, 64, 12, 90], [7, 2]]
NAMES = ["fr", "de", None, "it"]
NEW = 8
PAD = 0


def saved(kind: str, folder: Path) -> dict[str, Path]:
    """Adapters of several ranks that change what is generated, one DoRA's."""
    quiet()
    paths = {}
    for seed, (name, changes) in enumerate({"fr": {"r": 3}, "de": {"r": 12}, "it": {"use_dora": True}}.items()):
        torch.manual_seed(seed)
        model = build(kind)
        peftrt.adapt(model, config(kind, lora_alpha=48, **changes), name=name)
        paths[name] = folder / name
        peftrt.save(model, paths[name])
    return paths


def generate(model: Any, prompts: list[list[int]], **options: Any) -> Tensor:
    """New tokens only; shorter prompts are padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    fixed: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, **fixed, **options)[:, longest:]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("beams", [1, 3])
def test_each_row_is_generated_as_if_alone(kind: str, beams: int, tmp_path: Path) -> None:
    paths = saved(kind, tmp_path)
    single = build(kind)
    for name, path in paths.items():
        peftrt.load(single, path, name=name)
    alone = []
    for name, prompt in zip(NAMES, PROMPTS, strict=True):
        peftrt.set_active(single, name)
        alone.append(generate(single, [prompt], num_beams=beams)[0])
    assert len({tuple(row.tolist()) for row in alone}) == len(NAMES), "the adapters are not to be told apart"

    model = build(kind)
    pool = peftrt.serving.AdapterPool(model, device_budget="4MiB", host_budget="4MiB")
    for name, path in paths.items():
        pool.load(name, path)
    ways: dict[str, tuple[Any, Callable[..., AbstractContextManager[None]]]] = {
        "pool": (model, pool.batch),
        "rows": (single, lambda names, expand: peftrt.rows(single, names, expand)),
    }
    for way, (served, batch) in ways.items():
        with batch(NAMES, expand=beams):
            together = generate(served, PROMPTS, num_beams=beams)
        for row, wanted, name in zip(together, alone, NAMES, strict=True):
            assert row.tolist() == wanted.tolist(), f"{way}: {name}"


def test_beams_of_an_encoder_with_a_decoder(tmp_path: Path) -> None:
    """The encoder is given each prompt once, the decoder as often as there are beams."""
    paths = saved("t5", tmp_path)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "num_beams": 3}
    rows, pooled, ids = build("t5"), build("t5"), tokens(len(NAMES))
    for name, path in paths.items():
        peftrt.load(rows, path, name=name)
    with torch.no_grad(), peftrt.rows(rows, NAMES, expand=3):
        expected = rows.generate(ids, **options)
    assert len({tuple(row.tolist()) for row in expected}) == len(NAMES), "the adapters are not to be told apart"
    pool = peftrt.serving.AdapterPool(pooled, device_budget="4MiB", host_budget="4MiB")
    for name, path in paths.items():
        pool.load(name, path)
    with torch.no_grad(), pool.batch(NAMES, expand=3):
        assert torch.equal(pooled.generate(ids, **options), expected)
