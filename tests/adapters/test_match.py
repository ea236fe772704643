"""Target matching, held against peft's own on many paths."""

from __future__ import annotations

import random
from typing import Any

import pytest

from peftrt.adapters.configs.lora import LoraConfig
from peftrt.adapters.match import is_excluded, matches, saves_module, unmatched_patterns, unmatched_targets
from peftrt.formats.errors import ConfigError

PARTS = ["model", "layers", "h", "0", "1", "12", "q_proj", "k_proj", "attn", "mlp", "experts", "head", "lm_head", "²"]


def random_fields(rng: random.Random) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if rng.random() < 0.3:
        fields["target_modules"] = rng.choice(
            [r".*\.(q|k)_proj", r"model\..*", r"(?:.*\.)?attn(\..*)?", "q_proj", r".*\b1\b.*", r"(?!.*mlp).*_proj"]
        )
    else:
        names = ["q_proj", "k_proj", "attn.q_proj", "mlp", "0", "layers.1.mlp", "model.h.0.attn", "head"]
        fields["target_modules"] = rng.sample(names, k=rng.randint(1, 4))
        if rng.random() < 0.5:
            fields["layers_to_transform"] = rng.choice([0, 1, [0, 12], [1], [], [5]])
            fields["layers_pattern"] = rng.choice([None, "layers", ["layers", "h"], "h", "model.layers", ""])
    if rng.random() < 0.3:
        fields["exclude_modules"] = rng.choice([["k_proj"], ["mlp", "model.h.0.attn"], r".*\.12\..*", []])
    if rng.random() < 0.3:
        fields["modules_to_save"] = rng.choice([["head"], ["lm_head", "mlp"], ["attn.q_proj"]])
    return fields


def test_matches_as_peft_does() -> None:
    import peft
    from peft.tuners.tuners_utils import check_target_module_exists

    rng = random.Random(3)
    positive = 0
    for _ in range(400):
        fields = random_fields(rng)
        ours, theirs = LoraConfig(**fields), peft.LoraConfig(**fields)
        for _ in range(25):
            path = ".".join(rng.choices(PARTS, k=rng.randint(1, 6)))
            expected = bool(check_target_module_exists(theirs, path))
            assert matches(path, ours) == expected, (path, fields)
            positive += expected
    assert positive > 500


def test_all_linear_takes_what_is_not_excluded() -> None:
    for spelling in ("all-linear", "All-Linear"):
        config = LoraConfig(target_modules=spelling, exclude_modules=["k_proj"], modules_to_save=["head"])
        assert config.targets_all_linear
        assert matches("model.q_proj", config)
        assert not matches("model.k_proj", config)
        assert not matches("model.head", config)
        assert not matches("model.head.dense", config)
        assert is_excluded("head", config)
        assert saves_module("model.head", config)
        assert not saves_module("model.head.dense", config)


def test_target_that_matches_nothing_is_found() -> None:
    paths = ["a.q", "a.k", "b.c.q"]
    assert unmatched_targets(LoraConfig(target_modules=["q", "v", "c.q", "k.q"]), paths) == ["v", "k.q"]
    assert unmatched_targets(LoraConfig(target_modules=["q", "k"], exclude_modules=["k"]), paths) == []
    assert unmatched_targets(LoraConfig(target_modules=r".*\.v"), paths) == [r".*\.v"]
    assert unmatched_targets(LoraConfig(target_modules=r".*\.q"), paths) == []
    assert unmatched_targets(LoraConfig(target_modules="all-linear"), []) == ["all-linear"]
    assert unmatched_targets(LoraConfig(target_modules=["q"], layers_to_transform=[7]), ["m.layers.1.q"]) == ["q"]


def test_pattern_that_decides_nothing_is_found() -> None:
    config = LoraConfig(target_modules=["q", "k"], rank_pattern={"q": 2, "z": 3}, alpha_pattern={"^a": 2, "b.q": 4})
    assert unmatched_patterns(config, ["a.q", "a.k"]) == [
        "rank_pattern['z']",
        "alpha_pattern['^a']",
        "alpha_pattern['b.q']",
    ]
    assert unmatched_patterns(config, ["b.q", "z", "a"]) == []


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_expression_that_would_run_for_hours_is_bounded(field: str) -> None:
    config = LoraConfig(**{"target_modules": ["q"], field: "(a+)+$"})  # type: ignore[arg-type]
    assert not matches("a" * 100 + "!", config)
    costly = LoraConfig(**{"target_modules": ["q"], field: "(a|aa)+$"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"{field}.*takes over"):
        matches("a" * 200 + "!", costly)
