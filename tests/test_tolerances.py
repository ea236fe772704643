"""The helpers that every other test relies on can fail, and the memory that tests see is poisoned."""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import assert_close, assert_same_bits


def test_failure_names_first_and_worst_mismatch() -> None:
    expected = torch.ones(3, 4)
    actual = expected.clone()
    actual[1, 2], actual[2, 3] = 1.5, 3.0
    with pytest.raises(AssertionError) as failure:
        assert_close(actual, expected)
    message = str(failure.value)
    assert "2 of 12 elements differ (float32)" in message
    assert "first at (1, 2): got 1.5, expected 1.0" in message
    assert "worst at (2, 3): got 3.0, expected 1.0" in message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_rounding_passes_and_two_units_do_not(dtype: torch.dtype) -> None:
    truth = torch.rand(1000, dtype=torch.float64) + 1.0
    rounded = truth.to(dtype)
    assert_close(rounded, truth)
    assert_close(rounded + torch.finfo(dtype).eps, rounded)
    with pytest.raises(AssertionError):
        assert_close(rounded + 1.5 * torch.finfo(dtype).eps, truth)
    with pytest.raises(AssertionError):
        assert_close(rounded * (1 + 4 * torch.finfo(dtype).eps), rounded)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sums_may_be_reordered_but_not_computed_in_less(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 1024, dtype=torch.float64)
    assert_close((a * b).to(dtype).sum()[None], (a * b).sum()[None])
    less = {torch.float64: torch.float32, torch.float32: torch.bfloat16}[dtype]
    with pytest.raises(AssertionError):
        assert_close((a.to(less) * b.to(less)).to(dtype).sum()[None], (a * b).sum()[None])


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ([1.0, float("nan")], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, float("nan")]),
        ([1.0, float("inf")], [1.0, 2.0]),
        ([1.0, float("-inf")], [1.0, float("inf")]),
        ([float("nan"), float("nan")], [float("inf"), float("nan")]),
    ],
)
def test_nonfinite_values_must_be_at_the_same_places(actual: list[float], expected: list[float]) -> None:
    with pytest.raises(AssertionError):
        assert_close(torch.tensor(actual), torch.tensor(expected))


def test_nonfinite_values_in_the_same_places_are_close() -> None:
    values = torch.tensor([1.0, float("nan"), float("inf"), float("-inf")])
    assert_close(values, values.clone())


def test_shapes_and_dtypes_are_compared() -> None:
    with pytest.raises(AssertionError, match=r"shape \[2, 1\], expected \[2\]"):
        assert_close(torch.zeros(2, 1), torch.zeros(2))
    with pytest.raises(AssertionError, match="dtype"):
        assert_same_bits(torch.zeros(2), torch.zeros(2).double())


def test_same_bits_tells_zeros_apart() -> None:
    with pytest.raises(AssertionError, match="first at"):
        assert_same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert_same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))


def test_empty_memory_is_poisoned(device: torch.device) -> None:
    like = torch.ones(3, device=device)
    makers = (
        lambda dtype: torch.empty(5, dtype=dtype, device=device),
        lambda dtype: torch.empty_like(like, dtype=dtype),
        lambda dtype: like.new_empty(5, dtype=dtype),
        lambda dtype: torch.empty_strided((2, 3), (1, 2), dtype=dtype, device=device),
        lambda dtype: torch.zeros(1, dtype=dtype, device=device).resize_(9)[1:],
    )
    for make in makers:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            assert make(dtype).isnan().all()
        for dtype in (torch.uint8, torch.int32, torch.int64):
            assert (make(dtype) == torch.iinfo(dtype).max).all()
