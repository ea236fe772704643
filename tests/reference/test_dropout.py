"""The dropout mask: the documented integers, and their statistics."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftrt.reference.dropout import dropout, keep_mask
from tests.tolerances import assert_same_bits

WORD = 2**32 - 1


def mix(word: int) -> int:
    """MurmurHash3's 32-bit finaliser, as its author published it, on Python's integers."""
    word ^= word >> 16
    word = word * 0x85EBCA6B & WORD
    word ^= word >> 13
    word = word * 0xC2B2AE35 & WORD
    return word ^ word >> 16


def kept(seed: int, index: int, p: float) -> bool:
    """The docstring's formula: ``mix(mix(lo(j) ^ lo(seed)) ^ mix(hi(j)) ^ key) >= p 2^32``."""
    seed &= 2**64 - 1
    low, high = index & WORD, index >> 32
    key = mix(mix(seed & WORD ^ 0x9E3779B9) ^ seed >> 32)
    return mix(mix(low ^ seed & WORD) ^ mix(high) ^ key) >= round(p * 2**32)


def test_mix_has_the_published_values() -> None:
    assert [mix(value) for value in (0, 1, 0xFFFFFFFF)] == [0, 0x514E28B7, 0x81F16F39]


@given(
    seed=st.one_of(st.integers(0, 100), st.integers(-(2**63), 2**63 - 1)),
    rows=st.integers(1, 20),
    columns=st.integers(1, 40),
    p=st.one_of(st.sampled_from([1e-9, 0.05, 0.5, 0.999]), st.floats(0, 0.999)),
)
def test_mask_is_the_documented_formula(seed: int, rows: int, columns: int, p: float) -> None:
    mask = keep_mask(torch.tensor([seed]), rows, columns, p)
    assert mask.flatten().tolist() == [kept(seed, index, p) for index in range(rows * columns)]


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2**40 + 7])
def test_rate_is_p_in_every_row_and_column(seed: int, p: float) -> None:
    """Within 5 deviations of a binomial count, overall and along either dimension."""
    rows, columns = 512, 1024
    dropped = ~keep_mask(torch.tensor([seed]), rows, columns, p)
    for counts, of in ((dropped.sum(), rows * columns), (dropped.sum(0), rows), (dropped.sum(1), columns)):
        assert ((counts - of * p).abs() <= 5 * math.sqrt(of * p * (1 - p))).all()


@pytest.mark.parametrize("other", [2, 3, 2**20, 2**32, 2**32 + 1, 2**61])
def test_masks_of_distinct_seeds_are_uncorrelated(other: int) -> None:
    """Also along the flat index: with a shift between the two."""
    first, second = (keep_mask(torch.tensor([seed]), 256, 256, 0.5).flatten().double() * 2 - 1 for seed in (1, other))
    for shift in (0, 1, 2, 256, 257):
        correlation = (first * second.roll(shift)).mean().item()
        assert abs(correlation) < 5 / 256, f"shift {shift}"


@pytest.mark.parametrize("shift", [1, 2, 3, 64, 256])
def test_a_mask_is_uncorrelated_with_itself_shifted(shift: int) -> None:
    mask = keep_mask(torch.tensor([11]), 256, 256, 0.5).flatten().double() * 2 - 1
    assert abs((mask * mask.roll(shift)).mean().item()) < 5 / 256


def test_a_rows_mask_does_not_depend_on_the_rows_behind_it() -> None:
    seed = torch.tensor([5])
    assert_same_bits(keep_mask(seed, 9, 33, 0.3)[:4], keep_mask(seed, 4, 33, 0.3))


def test_dropout_scales_what_it_keeps() -> None:
    x, seed = torch.randn(2, 3, 40), torch.tensor([5])
    mask = keep_mask(seed, 6, 40, 0.25).view(2, 3, 40)
    y = dropout(x, seed, 0.25)
    assert_same_bits(y, torch.where(mask, x / 0.75, torch.zeros(())))
    assert (y[~mask] == 0).all()
    assert dropout(x, None, 0.0) is x


def test_dropped_nan_is_gone() -> None:
    """Zero, not NaN times zero."""
    x, seed = torch.full((4, 64), math.nan), torch.tensor([5])
    assert_same_bits(dropout(x, seed, 0.5).isnan(), keep_mask(seed, 4, 64, 0.5))
