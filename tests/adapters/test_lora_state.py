"""Tensors held against their configuration: what does not fit is refused, with module or key in the message."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peftrt.adapters.configs.lora import LoraConfig
from peftrt.adapters.lora_state import validate_lora_tensors
from peftrt.formats.errors import FormatError, UnsupportedError

P = "base_model.model."


def tensors(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    result: dict[str, Any] = {
        f"{P}a.q.lora_A.weight": torch.ones(4, 6),
        f"{P}a.q.lora_B.weight": torch.ones(5, 4),
        f"{P}a.k.lora_A.weight": torch.ones(2, 6),
        f"{P}a.k.lora_B.weight": torch.ones(5, 2),
        f"{P}head.weight": torch.ones(3, 5),
        f"{P}head.bias": torch.ones(3),
    }
    result.update({f"{P}{key}": value for key, value in changes.items()})
    return {key: value for key, value in result.items() if value is not None}


def config(**changes: Any) -> LoraConfig:
    fields = {"r": 4, "target_modules": ["q", "k"], "rank_pattern": {"k": 2}, "modules_to_save": ["head"], **changes}
    return LoraConfig(**fields)


def test_tensors_are_sorted_by_module() -> None:
    given = tensors()
    state = validate_lora_tensors(config(), given)
    assert state.pairs.keys() == {"a.q", "a.k"}
    assert state.pairs["a.k"][0] is given[f"{P}a.k.lora_A.weight"]
    assert state.pairs["a.k"][1] is given[f"{P}a.k.lora_B.weight"]
    assert state.saved.keys() == {"head"}
    assert state.saved["head"].keys() == {"weight", "bias"}


A, B, M = "a.q.lora_A.weight", "a.q.lora_B.weight", "a.q.lora_magnitude_vector"
DORA = {"use_dora": True}
VECTORS = {M: torch.ones(5), "a.k.lora_magnitude_vector": torch.ones(5)}


def test_magnitudes_are_found_by_module() -> None:
    given = tensors(**VECTORS)
    state = validate_lora_tensors(config(use_dora=True), given)
    assert state.magnitudes.keys() == state.pairs.keys()
    assert state.of("a.q") == tuple(given[f"{P}{key}"] for key in (A, B, M))
    plain = validate_lora_tensors(config(), tensors())
    assert plain.of("a.q") == plain.pairs["a.q"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floats_are_accepted(dtype: torch.dtype) -> None:
    assert len(validate_lora_tensors(config(), {key: value.to(dtype) for key, value in tensors().items()}).pairs) == 2


FAULTS: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor | None], str]] = {
    "a_without_b": ({}, {B: None}, "'a.q' has lora_A but no lora_B"),
    "b_without_a": ({}, {A: None}, "'a.q' has lora_B but no lora_A"),
    "ranks_of_a_and_b_differ": ({}, {B: torch.ones(5, 3)}, "'a.q': the ranks"),
    "r_other_than_rows_of_a": ({"r": 8}, {}, "'a.q': lora_A has 4 rows, the configuration says rank 8"),
    "rank_pattern_against_tensors": ({"rank_pattern": {"k": 3}}, {}, "'a.k': lora_A has 2 rows"),
    "rank_pattern_missing": ({"rank_pattern": {}}, {}, "'a.k': lora_A has 2 rows"),
    "int8": ({}, {A: torch.ones(4, 6, dtype=torch.int8)}, "torch.int8"),
    "float64": ({}, {A: torch.ones(4, 6, dtype=torch.float64)}, "torch.float64"),
    "float8": ({}, {A: torch.ones(4, 6).to(torch.float8_e4m3fn)}, "float8"),
    "one_dimension": ({}, {A: torch.ones(24)}, "'base_model.model.a.q.lora_A.weight'"),
    "empty_matrix": ({}, {A: torch.ones(0, 6), B: torch.ones(5, 0)}, "not empty"),
    "module_not_targeted": ({"target_modules": ["q"]}, {}, "'a.k' has tensors"),
    "module_excluded": ({"exclude_modules": ["k"], "rank_pattern": {}}, {}, "'a.k' has tensors"),
    "target_without_tensors": ({"target_modules": ["q", "k", "v_proj"]}, {}, "'v_proj'"),
    "modules_to_save_missing": ({"modules_to_save": None}, {}, "'base_model.model.head.weight'"),
    "dora_key": ({}, {M: torch.ones(5)}, f"'{P}{M}': magnitudes of DoRA"),
    "dora_without_key": ({"use_dora": True}, {}, f"there is no key '{P}{M}'"),
    "dora_of_another_length": (DORA, {**VECTORS, M: torch.ones(4)}, f"'{P}{M}': expected 5 magnitudes"),
    "dora_as_a_matrix": (DORA, {**VECTORS, M: torch.ones(5, 1)}, f"'{P}{M}': expected a vector"),
    "dora_empty": (DORA, {**VECTORS, M: torch.ones(0)}, f"'{P}{M}': expected a vector"),
    "dora_int8": (DORA, {**VECTORS, M: torch.ones(5).to(torch.int8)}, f"'{P}{M}': expected float32"),
    "dora_alone": (DORA, {**VECTORS, A: None, B: None}, "'a.q' has"),
    "embedding_key": ({}, {"e.lora_embedding_A": torch.ones(4, 9)}, "lora_embedding_A"),
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_tensors_that_do_not_fit(fault: str) -> None:
    fields, changes, culprit = FAULTS[fault]
    given = tensors(**changes)
    before = {key: value.clone() for key, value in given.items()}
    with pytest.raises(FormatError, match=r"dir/w\.safetensors") as caught:
        validate_lora_tensors(config(**fields), given, "dir/w.safetensors")
    assert culprit in str(caught.value)
    assert given.keys() == before.keys()


def test_bias_of_lora_b_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"a\.q\.lora_B\.bias"):
        validate_lora_tensors(config(), tensors(**{"a.q.lora_B.bias": torch.ones(5)}))


def test_no_tensors_at_all() -> None:
    with pytest.raises(FormatError, match="no tensor for target_modules entry 'q', 'k'"):
        validate_lora_tensors(config(), {})
    with pytest.raises(FormatError, match="all-linear"):
        validate_lora_tensors(config(target_modules="all-linear"), {})
