"""bottleneck's kernels in Triton's interpreter; run as interpreted.py is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import peftrt
from peftrt.kernels import _schedule
from peftrt.kernels import bottleneck as module
from peftrt.ops._invariant import set_invariant
from tests.cases import randn
from tests.ops.test_bottleneck import ACTIVATIONS, check, operands
from tests.tolerances import assert_close, assert_same_bits

DTYPES = (torch.float32, torch.float16)
# one row, odd sizes, more than one tile of rows, of ranks, of columns and of depth
SHAPES = [(1, 48, 16), (37, 130, 3), (5, 70, 40)]


@pytest.fixture(params=[False, True], ids=["a program's rows", "shared"])
def shared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the kernels of few rows are taken: in the interpreter any rows fill the device."""
    launched: list[str] = []
    for name in ("bottleneck_kernel", "bottleneck_up_kernel"):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, _Noted(kernel, launched, name))
    monkeypatch.setattr(module, "processors", lambda device: 1 << 30 if request.param else 1)
    yield request.param
    assert set(launched) == {"bottleneck_up_kernel" if request.param else "bottleneck_kernel"}


class _Noted:
    def __init__(self, kernel: object, launched: list[str], name: str) -> None:
        self.kernel, self.launched, self.name = kernel, launched, name

    def __getitem__(self, grid: object) -> object:
        self.launched.append(self.name)
        return self.kernel[grid]  # type: ignore[index]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_and_gradients_equal_fp64(dtype: torch.dtype, shared: bool) -> None:
    for i, (m, k, r) in enumerate(SHAPES):
        with peftrt.backend("triton"):
            check(operands((m,), k, r, dtype, DTYPES[i % 2]), ("gelu", "silu", "relu")[i])


def test_the_names_are_those_of_the_operation() -> None:
    assert set(module.ACTIVATIONS) == set(ACTIVATIONS)


@settings(max_examples=10)
@given(
    m=st.integers(0, 40),
    k=st.integers(1, 140),
    r=st.integers(0, 40),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    dtype=st.sampled_from(DTYPES),
)
def test_drawn_shapes(m: int, k: int, r: int, activation: str, dtype: torch.dtype) -> None:
    with peftrt.backend("triton"):
        check(operands((m,), k, r, dtype, torch.float32), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_their_range(activation: str) -> None:
    values = torch.cat([torch.linspace(-30, 30, 121), torch.tensor([math.nan, 1e3, -1e3])])
    x, one, zero = values[:, None], torch.ones(1, 1), torch.zeros(1)
    with peftrt.backend("triton"):
        y = peftrt.ops.bottleneck(x, torch.zeros_like(x), one, zero, one, zero, 1.0, activation)
    assert_close(y[:, 0], ACTIVATIONS[activation](values.double()), intermediate=2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    x, residual, *adapter = operands((70,), 150, 20, dtype, torch.float32)

    def last(m: int) -> Tensor:
        with peftrt.backend("triton"), set_invariant(True):
            return peftrt.ops.bottleneck(x[70 - m :], residual[70 - m :], *adapter, 0.5, "gelu")[m - 1]

    for m in (2, 33, 70):
        assert_same_bits(last(m), last(1))


def test_few_rows_split_their_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "processors", lambda device: 132)
    monkeypatch.setattr(_schedule, "processors", lambda device: 132)
    with peftrt.backend("triton"):
        check(operands((3,), 600, 20, torch.float32, torch.float32), "silu")


def test_nan_in_one_row_stays_in_that_row(shared: bool) -> None:
    inputs = operands((40,), 70, 9, torch.float32, torch.float32)
    with peftrt.backend("triton"):
        clean = peftrt.ops.bottleneck(*inputs, 0.5, "gelu")
        inputs[0][7, 0] = math.nan
        y = peftrt.ops.bottleneck(*inputs, 0.5, "gelu")
    others = torch.arange(40) != 7
    assert y[7].isnan().all()
    assert_same_bits(y[others], clean[others])


def test_strided_operands() -> None:
    x, residual, down, down_bias, up, up_bias = operands((12,), 40, 6, torch.float32, torch.float32)
    wide = randn(12, 80)
    inputs = [wide[:, ::2], residual, down.t().contiguous().t(), down_bias, up.t().contiguous().t(), up_bias]
    inputs[0].copy_(x)
    with peftrt.backend("triton"):
        check(inputs, "relu")
