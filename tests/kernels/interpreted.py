"""The kernels in Triton's interpreter; test_triton_interpreter.py runs this file, in a process with TRITON_INTERPRET=1.

bf16 is left to compiled code: the interpreter truncates where devices round, and multiplies bf16 wrongly.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import peftrt
from peftrt import NF4Weight
from peftrt.kernels import _schedule
from peftrt.kernels import nf4_dequantize as dequantize_module
from peftrt.kernels import nf4_linear as linear_module
from peftrt.ops import _panels, _paths, _triton
from tests.cases import LAYOUTS, exact, laid_out, nf4, randn
from tests.tolerances import assert_close, assert_same_bits

SHAPES = [(1, 1), (3, 64), (130, 128), (17, 100), (5, 33), (67, 7), (9, 96), (70, 320), (2, 131)]
DTYPES = (torch.float32, torch.float16)


def triton_dx(dy: Tensor, w: NF4Weight) -> Tensor:
    scales = (w.absmax, w.nested_absmax, w.nested_offset)
    with peftrt.backend("triton"):
        return torch.ops.peftrt.nf4_linear_dx(dy, w.codes, *scales, *w.shape, w.block_size)


def triton_linear(x: Tensor, w: NF4Weight, bias: Tensor | None = None) -> Tensor:
    with peftrt.backend("triton"):
        return peftrt.ops.nf4_linear(x, w, bias)


def check_linear(x: Tensor, dy: Tensor, w: NF4Weight, bias: Tensor | None) -> None:
    values = exact(w, x.dtype)
    y = x.double() @ values.t() + (0 if bias is None else bias.double())
    assert_close(triton_linear(x, w, bias), y.to(x.dtype))
    assert_close(triton_dx(dy, w), (dy.double() @ values).to(x.dtype))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("block", [32, 64, 4096])
@pytest.mark.parametrize("shape", [(1,), (31,), (64,), (4097,), (3, 5, 7), (130, 192)])
def test_dequantize_has_the_bits_of_the_reference(shape: tuple[int, ...], block: int, nested: bool) -> None:
    w = NF4Weight.quantize(randn(*shape), block, nested)
    for dtype in DTYPES:
        with peftrt.backend("reference"):
            expected = w.dequantize(dtype)
        with peftrt.backend("triton"):
            assert_same_bits(w.dequantize(dtype), expected)
            out = torch.empty(shape, dtype=dtype)
            peftrt.ops.nf4_dequantize(w, out=out)
        assert_same_bits(out, expected)


def test_dequantize_to_bf16_differs_by_the_rounding_of_the_interpreter_alone() -> None:
    w = nf4(33, 65)
    out = torch.empty(w.shape, dtype=torch.bfloat16)
    dequantize_module.nf4_dequantize(
        *_triton.weight(w.codes, w.absmax, w.nested_absmax, w.nested_offset), w.block_size, out
    )
    truncated = (w.dequantize(torch.float32).view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    assert_same_bits(out, truncated)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("n", "k", "block"), [(3, 64, 64), (70, 320, 64), (5, 1024, 256), (1, 4096, 4096)])
def test_columns_have_the_bits_of_the_whole(n: int, k: int, block: int, nested: bool) -> None:
    w = nf4(n, k, block=block, nested=nested)
    tensors = _triton.weight(w.codes, w.absmax, w.nested_absmax, w.nested_offset)
    for dtype in DTYPES:
        with peftrt.backend("reference"):
            expected = w.dequantize(dtype)
        for first, last in {(0, k), (0, 64), (k - 64, k), (64 * (k // 192), k)}:
            out = torch.empty(n, last - first, dtype=dtype)
            dequantize_module.nf4_dequantize_columns(*tensors, block, k, first, out)
            assert_same_bits(out, expected[:, first:last].contiguous())


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_and_dx_by_panels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device where there are many rows; the linear kernels are not run."""
    monkeypatch.setattr(_paths, "path", lambda direction, x, **_: _paths.PANELS)
    monkeypatch.setattr(_panels, "width", lambda rows, depth, total, step, *_: min(step, total))
    monkeypatch.setattr(linear_module, "_launch", lambda *_: pytest.fail("the fused kernel ran"))
    for n, k, nested in ((300, 192, True), (33, 128, False)):
        w, bias = nf4(n, k, nested=nested), randn(n, seed=4, dtype=dtype)
        check_linear(randn(7, k, seed=2, dtype=dtype), randn(7, n, seed=3, dtype=dtype), w, bias)


def test_where_columns_cannot_be_told_apart_dx_goes_by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_paths, "path", lambda direction, x, **_: _paths.PANELS)
    w = nf4(40, 70)
    check_linear(randn(7, 70, seed=2), randn(7, 40, seed=3), w, None)


def test_every_code_and_every_nested_code_decodes() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(32)
    absmax = torch.arange(256, dtype=torch.uint8)
    nested_absmax = torch.tensor([0.37], dtype=torch.float32).view(torch.uint8)
    nested_offset = torch.tensor([1.3], dtype=torch.float32).view(torch.uint8)
    w = NF4Weight(codes, absmax, nested_absmax, nested_offset, (16384,), torch.float32, 64)
    with peftrt.backend("reference"):
        expected = w.dequantize()
    with peftrt.backend("triton"):
        assert_same_bits(w.dequantize(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_and_dx_in_every_alignment(shape: tuple[int, int], dtype: torch.dtype) -> None:
    n, k = shape
    for rows, block, nested in ((1, 64, True), (19, 32, False), (70 if k % 64 == 0 else 18, 256, True)):
        w = nf4(n, k, block=block, nested=nested)
        bias = randn(n, seed=4, dtype=dtype) if rows != 19 else None
        check_linear(randn(rows, k, seed=2, dtype=dtype), randn(rows, n, seed=3, dtype=dtype), w, bias)


@settings(max_examples=12)
@given(
    rows=st.integers(1, 40),
    n=st.integers(1, 80),
    k=st.integers(1, 200),
    block=st.sampled_from([32, 64, 128]),
    nested=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_linear_and_dx_over_drawn_shapes(
    rows: int, n: int, k: int, block: int, nested: bool, dtype: torch.dtype
) -> None:
    w = nf4(n, k, block=block, nested=nested)
    check_linear(randn(rows, k, seed=2, dtype=dtype), randn(rows, n, seed=3, dtype=dtype), w, None)


@pytest.mark.parametrize(("n", "k"), [(128, 1088), (1088, 128), (70, 1000), (1000, 70)])
def test_a_sum_split_among_programs(n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    sum_splits = _schedule.sum_splits_kernel

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            launched.append(grid)
            return sum_splits[grid]

    monkeypatch.setattr(_schedule, "processors", lambda device: 132)
    monkeypatch.setattr(_schedule, "sum_splits_kernel", Counted())
    w = nf4(n, k)
    bias = randn(n, seed=4, dtype=torch.float16)
    check_linear(randn(3, k, seed=2, dtype=torch.float16), randn(3, n, seed=3, dtype=torch.float16), w, bias)
    assert len(launched) == 1, "the longer sum of the two is split"


def test_the_bits_of_a_row_do_not_depend_on_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_schedule, "processors", lambda device: 132)
    w = nf4(128, 1088)
    x = randn(16, 1088, seed=2, dtype=torch.float16)
    dy = randn(16, 128, seed=3, dtype=torch.float16)
    assert_same_bits(triton_linear(x, w)[5:6], triton_linear(x[5:6], w))
    assert_same_bits(triton_dx(dy, w)[5:6], triton_dx(dy[5:6], w))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    w = nf4(48, 96)
    x, bias = laid_out(randn(4, 96, seed=2), layout), laid_out(randn(48, seed=4), layout)
    check_linear(x, laid_out(randn(4, 48, seed=3), layout), w, bias)


def test_leading_dimensions_and_no_rows() -> None:
    w = nf4(48, 128)
    x = randn(2, 3, 128, seed=2)
    assert_same_bits(triton_linear(x, w), triton_linear(x.view(6, 128), w).view(2, 3, 48))
    assert triton_linear(x[:0], w).shape == (0, 3, 48)
    assert triton_dx(randn(0, 48), w).shape == (0, 128)


def test_gradients_come_from_the_kernels() -> None:
    w = nf4(48, 128)
    x = randn(5, 128, seed=2).requires_grad_()
    bias = randn(48, seed=4).requires_grad_()
    dy = randn(5, 48, seed=3)
    triton_linear(x, w, bias).backward(dy)
    assert_same_bits(x.grad, triton_dx(dy, w))
    assert_close(bias.grad, dy.sum(0))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_an_infinite_scale_stays_in_its_block() -> None:
    """A tile reaches past the end of a row: the weights there are the next row's, whose scale may be anything."""
    w = NF4Weight.quantize(randn(4, 70), 32, False)
    w.absmax.view(torch.float32)[-1] = torch.inf
    y = triton_linear(randn(2, 70, seed=2), w)
    assert y[:, :3].isfinite().all()
    assert not y[:, 3].isfinite().any()


def test_bf16_is_refused_in_the_interpreter() -> None:
    with pytest.raises(peftrt.BackendError, match="cannot be trusted with bf16"):
        triton_linear(randn(1, 64, dtype=torch.bfloat16), nf4(8, 64))


def test_offered_where_forced_only() -> None:
    choice = peftrt.ops._define.OPS["nf4_linear"].choice(
        randn(1, 64), *peftrt.ops._weight.weight_args("nf4_linear", nf4(8, 64)), None
    )
    assert choice.backend is not None
    assert choice.backend.name != "triton"
