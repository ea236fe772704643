"""NF4 layers laid one below the other: only where their stored bytes are then those of one weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import peftrt
from peftrt.nn.fused import lay_together
from tests.cases import randn
from tests.tolerances import assert_close, assert_same_bits

FORMS = "their weights are of several forms"
BLOCKS = "a weight does not end with a whole block of scales"
ONE_BY_ONE = "they were quantised one by one: adapt with fuse=True quantises them together"
PLAIN = {"double_quant": False}
CASES: list[tuple[int, int, dict[str, Any], dict[str, Any], str | None]] = [
    (128, 6, {"block_size": 64, **PLAIN}, {"block_size": 128, **PLAIN}, FORMS),
    (128, 6, PLAIN, {"double_quant": True}, FORMS),
    (128, 6, {"double_quant": True}, PLAIN, FORMS),
    (100, 3, PLAIN, PLAIN, BLOCKS),
    (32, 3, PLAIN, PLAIN, BLOCKS),
    (128, 6, {}, {}, BLOCKS),
    (128, 128, {}, {}, ONE_BY_ONE),
    (100, 16, PLAIN, PLAIN, None),
    (128, 6, PLAIN, PLAIN, None),
]


@pytest.mark.parametrize(("k", "n", "first", "second", "reason"), CASES)
def test_layers_compute_as_before_together_or_apart(
    k: int, n: int, first: dict[str, Any], second: dict[str, Any], reason: str | None
) -> None:
    torch.manual_seed(k + n)
    layers = [peftrt.QLoRALinear(k, n, r=4, init=False, **options) for options in (first, second)]
    x = randn(3, k)
    before = [layer(x) for layer in layers]
    stored = [dict(layer.weight_parameters()) for layer in layers]
    assert lay_together(layers) == reason
    for layer, result, tensors in zip(layers, before, stored, strict=True):
        if reason is None:
            assert_close(layer(x), result.double())
            assert layer.fused is not None
        else:
            assert_same_bits(layer(x), result)
            assert all(layer.weight_parameters()[name] is tensor for name, tensor in tensors.items())
        for name, tensor in tensors.items():
            assert_same_bits(layer.weight_parameters()[name], tensor)


def test_a_result_is_not_fetched_where_bits_count_if_they_did_not_when_it_was_computed() -> None:
    layers = [peftrt.QLoRALinear(1024, 16, r=4, init=False, **PLAIN) for _ in range(2)]
    assert lay_together(layers) is None
    x = randn(3, 1024)
    plain = [layer(x.clone()) for layer in layers]
    with peftrt.batch_invariant():
        wanted = layers[1](x.clone())
    assert not torch.equal(wanted, plain[1])
    layers[0](x)
    with peftrt.batch_invariant():
        assert_same_bits(layers[1](x), wanted)
