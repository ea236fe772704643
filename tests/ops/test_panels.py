"""Products by panels on CPU tensors: the algebra, and how wide a panel is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import peftrt
from peftrt.formats.nf4 import NF4Weight
from peftrt.ops import _panels, _scratch
from peftrt.ops._weight import WeightArgs, weight_args
from peftrt.reference import nf4 as reference
from tests.cases import FLOATS, exact, nf4, randn, sum_size
from tests.tolerances import assert_close, assert_same_bits

H200 = _panels.Device(50 << 20, 132)
MARGIN = 1.1


def decode_rows(*args: Any) -> None:
    """What a backend gives: whole rows into ``out``, from contiguous bytes."""
    *weight, block_size, out = args
    assert all(tensor is None or tensor.is_contiguous() for tensor in weight)
    out.copy_(reference.dequantize(*weight, tuple(out.shape), block_size, out.dtype))


def decoded(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    with peftrt.backend("reference"):
        return weight.dequantize(dtype)


def forward(x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    _panels.forward(x, weight_args("nf4_linear", weight), bias, out, decode_rows)
    return out


def grad_input(dy: Tensor, weight: NF4Weight) -> Tensor:
    whole = decoded(weight, dy.dtype)

    def decode(first: int, panel: Tensor) -> None:
        panel.copy_(whole[:, first : first + panel.shape[1]])

    out = torch.empty(dy.shape[0], weight.shape[1], dtype=dy.dtype)
    _panels.grad_input(dy, weight_args("nf4_linear_dx", weight), out, decode)
    return out


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Panels as narrow as they can be, and the widths that were asked for."""
    asked: list[int] = []

    def least(rows: int, depth: int, total: int, step: int, itemsize: int, device: _panels.Device) -> int:
        asked.append(min(step, total))
        return asked[-1]

    monkeypatch.setattr(_panels, "width", least)
    return asked


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(
    m=st.integers(0, 9),
    n=st.integers(1, 700),
    k=st.sampled_from([1, 32, 33, 64, 96, 100, 128, 192]),
    block=st.sampled_from([32, 64, 256]),
    nested=st.booleans(),
    bias=st.booleans(),
)
def test_forward_by_the_narrowest_panels_equals_fp64(
    dtype: torch.dtype, m: int, n: int, k: int, block: int, nested: bool, bias: bool
) -> None:
    """In every alignment: rows that share a byte, a block or a run of nested scales stay in one panel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_panels, "width", lambda rows, depth, total, step, *_: min(step, total))
        weight = nf4(n, k, dtype=dtype, block=block, nested=nested)
        x = randn(m, k, seed=2, dtype=dtype)
        b = randn(n, seed=3, dtype=dtype) if bias else None
        wide = exact(weight, dtype)
        expected = x.double() @ wide.t() + (0 if b is None else b.double())
        assert_close(forward(x, weight, b), expected, intermediate=sum_size(x, wide.t(), b))


@pytest.mark.parametrize("nested", [True, False])
def test_a_panel_has_the_bits_of_the_whole_weight(nested: bool, narrow: list[int]) -> None:
    weight = nf4(1000, 192, nested=nested)
    panels: list[Tensor] = []

    def kept(*args: Any) -> None:
        decode_rows(*args)
        panels.append(args[-1].clone())

    out = torch.empty(2, 1000)
    _panels.forward(randn(2, 192), weight_args("nf4_linear", weight), None, out, kept)
    assert len(panels) == -(-1000 // narrow[0]) > 1
    assert_same_bits(torch.cat(panels), decoded(weight, torch.float32))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_panel_of_everything_has_the_bits_of_decoding_first(dtype: torch.dtype) -> None:
    weight, x, dy, bias = nf4(96, 128), randn(40, 128), randn(40, 96), randn(96)
    x, dy, bias = x.to(dtype), dy.to(dtype), bias.to(dtype)
    whole = decoded(weight, dtype)
    assert_same_bits(forward(x, weight, None), x @ whole.t())
    assert_same_bits(forward(x, weight, bias), torch.addmm(bias, x, whole.t()))
    assert_same_bits(grad_input(dy, weight), dy @ whole)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_errors_are_those_of_decoding_first(dtype: torch.dtype, narrow: list[int]) -> None:
    """Against fp64 over the quantised values: many panels round no more often than one product does."""
    n, k, m = 512, 512, 48
    weight = nf4(n, k)
    values = exact(weight, torch.float32)
    whole = decoded(weight, dtype).float()
    for name in ("forward", "dx"):
        a = randn(m, k if name == "forward" else n, seed=5, dtype=dtype)
        operand = (lambda w: w.t()) if name == "forward" else (lambda w: w)
        truth = a.double() @ operand(values)
        first = (a.float() @ operand(whole)).to(dtype).double()
        got = (forward(a, weight, None) if name == "forward" else grad_input(a, weight)).double()
        assert (got - truth).norm() <= MARGIN * (first - truth).norm()
    assert narrow == [32, 64]


@pytest.mark.parametrize(("n", "k"), [(64, 128), (33, 320), (700, 64)])
def test_input_gradient_by_the_narrowest_panels_equals_fp64(n: int, k: int, narrow: list[int]) -> None:
    for dtype in FLOATS:
        weight, dy = nf4(n, k), randn(5, n, dtype=dtype)
        wide = exact(weight, dtype)
        assert_close(grad_input(dy, weight), dy.double() @ wide, intermediate=sum_size(dy, wide))
    assert set(narrow) == {64}


def test_nothing_is_decoded_for_no_rows() -> None:
    weight = nf4(8, 64)
    assert forward(torch.empty(0, 64), weight, None).shape == (0, 8)
    assert grad_input(torch.empty(0, 8), weight).shape == (0, 64)


def arguments(n: int, k: int, block: int = 64, nested: bool = True) -> WeightArgs:
    nothing = torch.empty(0, dtype=torch.uint8)
    return WeightArgs(nothing, nothing, nothing if nested else None, nothing if nested else None, n, k, block)


@pytest.mark.parametrize(
    ("k", "block", "nested", "step"),
    [
        (4096, 64, True, 4),
        (4096, 64, False, 1),
        (14336, 64, True, 8),
        (4160, 64, True, 256),
        (100, 64, False, 16),
        (101, 64, False, 64),
        (101, 64, True, 16384),
        (32, 64, False, 2),
        (4096, 4096, True, 256),
    ],
)
def test_rows_that_begin_together(k: int, block: int, nested: bool, step: int) -> None:
    assert _panels.row_step(arguments(8, k, block, nested)) == step
    assert step * k % 2 == 0


def test_columns_are_told_apart_in_whole_chunks_alone() -> None:
    assert _panels.column_step(arguments(8, 4096)) == 64
    assert _panels.column_step(arguments(8, 4096, block=32)) is None
    assert _panels.column_step(arguments(8, 100)) is None
    assert not _panels.columns_fit(arguments(8, 100), 2)


@pytest.mark.parametrize(
    ("rows", "depth", "total", "expected"),
    [
        # one wave of 128 tiles on 132 multiprocessors, with 16 rows of tiles
        (2048, 4096, 28672, 2048),
        # a wave is 512 columns; six of them fit half of the L2
        (8192, 4096, 28672, 3072),
        (8192, 14336, 4096, 512),
        # a wave does not fit the L2: it is taken all the same
        (2048, 14336, 4096, 2048),
        (512, 4096, 28672, 8448),
        # the scratch holds less than a wave
        (2048, 65536, 8192, 1024),
        # everything at once
        (2048, 8192, 1280, 1280),
        (1 << 20, 4096, 28672, 3072),
    ],
)
def test_width_of_a_panel(rows: int, depth: int, total: int, expected: int) -> None:
    columns = _panels.width(rows, depth, total, 64, 2, H200)
    assert columns is not None
    assert columns == expected
    assert columns * depth * 2 <= _scratch.LIMIT


@given(
    rows=st.integers(1, 20000),
    depth=st.integers(1, 1 << 21),
    total=st.integers(1, 1 << 18),
    step=st.sampled_from([1, 4, 64, 100, 16384]),
    itemsize=st.sampled_from([2, 4]),
    l2=st.sampled_from([4 << 20, 50 << 20]),
    processors=st.sampled_from([16, 132]),
)
def test_a_panel_fits_the_scratch_and_begins_where_it_may(
    rows: int, depth: int, total: int, step: int, itemsize: int, l2: int, processors: int
) -> None:
    columns = _panels.width(rows, depth, total, step, itemsize, _panels.Device(l2, processors))
    if columns is None:
        assert min(step, total) * depth * itemsize > _scratch.LIMIT
    else:
        assert 0 < columns <= total
        assert columns == total or columns % step == 0
        assert columns * depth * itemsize <= _scratch.LIMIT


def test_whether_panels_fit_does_not_depend_on_the_device() -> None:
    assert _panels.rows_fit(arguments(28672, 4096), 4)
    assert _panels.rows_fit(arguments(100, 1 << 19), 2)
    assert not _panels.rows_fit(arguments(1 << 20, 40001), 2), "16,384 rows begin together, of 1.3 GB"
    assert _panels.columns_fit(arguments(128256, 4096), 4)
    assert not _panels.columns_fit(arguments(1 << 21, 4096), 2)


def test_a_result_with_gaps_is_written_in_place() -> None:
    """Torch takes a slice of columns as ``out`` as it is: no copy of it, and nothing beside it is touched."""
    x, w = randn(6, 32), randn(10, 32)
    y = torch.full((6, 30), 7.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.mm(x, w.t(), out=y[:, 10:20])
    assert not {event.name for event in profile.events()} & {"aten::copy_", "aten::clone", "aten::empty"}
    assert (y[:, :10] == 7).all()
    assert (y[:, 20:] == 7).all()
    assert_close(y[:, 10:20], x.double() @ w.double().t())
