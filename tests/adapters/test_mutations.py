"""Tests of the tests: mistakes that are easily made must fail the comparison with HF peft, in either direction."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftrt.adapters.configs import lora as lora_config
from peftrt.adapters.methods import lora
from peftrt.formats import peft_dir
from peftrt.nn import adapter, adapter_linear
from tests.adapters import test_peft as parity

Mutation = Callable[[pytest.MonkeyPatch], None]


def weight_on_the_magnitude_vector(patch: pytest.MonkeyPatch) -> None:
    """The key as peft has it in memory, which is not the one that it writes."""
    suffixes = {key: part for key, part in peft_dir._SUFFIXES.items() if part != "lora_magnitude_vector"}
    patch.setattr(peft_dir, "_SUFFIXES", {**suffixes, ".lora_magnitude_vector.weight": "lora_magnitude_vector"})


def alpha_over_r(patch: pytest.MonkeyPatch) -> None:
    """rsLoRA's root left out."""

    def wrong(rank: int, alpha: float, use_rslora: bool) -> float:
        return alpha / rank

    for module, name in ((adapter, "scaling_of"), (adapter_linear, "scaling_of"), (lora_config, "_scaling")):
        patch.setattr(module, name, wrong)


def alpha_over_root_r(patch: pytest.MonkeyPatch) -> None:
    """rsLoRA's root where it does not belong."""

    def wrong(rank: int, alpha: float, use_rslora: bool) -> float:
        return alpha / math.sqrt(rank)

    for module, name in ((adapter, "scaling_of"), (adapter_linear, "scaling_of"), (lora_config, "_scaling")):
        patch.setattr(module, name, wrong)


def halves_swapped(patch: pytest.MonkeyPatch) -> None:
    """A saved as B and B as A: of square layers even the shapes fit."""
    right = lora.change_of
    patch.setattr(lora, "change_of", lambda layer, name: tuple(half.t() for half in reversed(right(layer, name))))


def rank_pattern_ignored(patch: pytest.MonkeyPatch) -> None:
    """Every module of the rank of the configuration."""
    patch.setattr(lora_config.LoraConfig, "rank_for", lambda config, path: config.r)


MUTATIONS: list[tuple[Mutation, str]] = [
    (weight_on_the_magnitude_vector, "dora"),
    (alpha_over_r, "rslora"),
    (alpha_over_root_r, "plain"),
    (rank_pattern_ignored, "rank pattern"),
]


@pytest.mark.parametrize(("mutation", "variant"), MUTATIONS)
def test_loading_notices(mutation: Mutation, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(parity.test_what_peft_saves_gives_the_same_logits, variant, tmp_path / "right")
    mutation(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        run(parity.test_what_peft_saves_gives_the_same_logits, variant, tmp_path / "wrong")


def test_a_key_that_peft_forgives_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(parity.test_files_and_keys_are_peft_s, "dora", tmp_path / "right")
    weight_on_the_magnitude_vector(monkeypatch)
    with pytest.raises(AssertionError):
        run(parity.test_files_and_keys_are_peft_s, "dora", tmp_path / "wrong")


@pytest.mark.parametrize(("mutation", "variant"), [*MUTATIONS[1:], (halves_swapped, "plain")])
def test_saving_notices(mutation: Mutation, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(parity.test_peft_gives_the_same_logits_for_what_is_saved, variant, tmp_path / "right")
    mutation(monkeypatch)
    with pytest.raises((AssertionError, ValueError, RuntimeError, UserWarning)):
        run(parity.test_peft_gives_the_same_logits_for_what_is_saved, variant, tmp_path / "wrong")


def run(test: Callable[..., Any], variant: str, path: Path) -> None:
    path.mkdir()
    test("llama", variant, path)
