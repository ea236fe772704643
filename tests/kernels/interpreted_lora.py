"""lora_linear's kernels in Triton's interpreter; run as interpreted.py is."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import peftrt
from peftrt import NF4Weight
from peftrt.kernels import _schedule, lora_linear_dense, lora_weight_norm, low_rank
from peftrt.kernels import lora_linear as linear_module
from peftrt.kernels._adapter import exact_dot
from peftrt.ops import _panels, _paths
from peftrt.ops._weight import weight_args
from peftrt.reference.dropout import keep_mask
from tests.cases import LAYOUTS, exact, laid_out, nf4, randn
from tests.tolerances import assert_close, assert_same_bits

DTYPES = (torch.float32, torch.float16)
BASES = ("nf4", "plain", "dense", "transposed")
SCALING = 0.75
# Dropout's seeds: any 64 bits.
SEEDS = (7, -1, 2**62 + 5)


def base(kind: str, n: int, k: int, dtype: torch.dtype) -> Tensor | NF4Weight:
    if kind in ("nf4", "plain"):
        return nf4(n, k, nested=kind == "nf4")
    dense = randn(n, k, seed=1, dtype=dtype)
    return dense if kind == "dense" else dense.t().contiguous().t()


class Case:
    """A call's operands, and what is true of it in fp64; ``squared``: the sums of its terms' squares."""

    def __init__(
        self,
        m: int,
        n: int,
        k: int,
        r: int,
        dtype: torch.dtype,
        kind: str = "nf4",
        p: float = 0.0,
        seed: int = SEEDS[0],
        scaled: bool = False,
        adapter: torch.dtype = torch.float32,
    ) -> None:
        self.weight, self.dtype, self.p = base(kind, n, k, dtype), dtype, p
        self.x, self.dy = randn(m, k, seed=2, dtype=dtype), randn(m, n, seed=3, dtype=dtype)
        self.A, self.B = randn(r, k, seed=4, dtype=adapter), randn(n, r, seed=5, dtype=adapter)
        self.bias = randn(n, seed=6, dtype=dtype)
        self.row_scale = randn(n, seed=7).abs() + 0.5 if scaled else None
        self.seed = torch.tensor([seed]) if p else None
        self.keep = keep_mask(torch.tensor([seed]), m, k, p) / (1 - p)

    def truth(self, power: int = 1) -> dict[str, Tensor]:
        x, dy, W, A, B, b, keep = (
            t.double().pow(power)
            for t in (self.x, self.dy, exact(self.weight, self.dtype), self.A, self.B, self.bias, self.keep)
        )
        c = torch.ones(()) if self.row_scale is None else self.row_scale.double().pow(power)
        s = SCALING**power
        xa, g = (x * keep) @ A.t(), s * (dy * c) @ B
        return {
            "xa": xa,
            "g": g,
            "y": c * (x @ W.t() + s * xa @ B.t()) + b,
            "dx": (dy * c) @ W + g @ A * keep,
            "dA": g.t() @ (x * keep),
            "dB": s * (dy * c).t() @ xa,
        }

    def check(self, roundings: int = 1, **got: Tensor) -> None:
        true, squares = self.truth(), self.truth(2)
        for name, tensor in got.items():
            size = squares[name].max().sqrt().item() if tensor.numel() else 0.0
            assert_close(tensor, true[name], roundings=roundings, intermediate=size)

    def forward(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        args = (*weight_args("lora_linear", self.weight), self.A, self.B, SCALING, self.bias, self.p)
        with peftrt.backend("triton"):
            return torch.ops.peftrt.lora_linear(self.x if x is None else x, *args, self.seed, self.row_scale, [])

    def backward(self, xa: Tensor, *needs: bool, **other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        args = (*weight_args("lora_linear", self.weight), self.A, self.B, SCALING, self.p)
        with peftrt.backend("triton"):
            dy, x = other.get("dy", self.dy), other.get("x", self.x)
            needs = needs or (True, True, True)
            return torch.ops.peftrt.lora_linear_backward(dy, x, xa, *args, self.seed, self.row_scale, *needs, [])

    def check_all(self, roundings: int = 1) -> None:
        y, xa = self.forward()
        dx, dA, dB = self.backward(xa)
        assert dA.dtype == self.A.dtype
        assert dB.dtype == self.B.dtype
        self.check(roundings, y=y, xa=xa, dx=dx, dA=dA, dB=dB)


# one row, odd sizes, whole chunks, more than one tile
SHAPES = [(1, 48, 128, 16), (37, 70, 130, 3), (17, 33, 97, 1), (33, 70, 128, 64), (5, 9, 33, 20)]


@pytest.mark.parametrize("kind", BASES)
def test_forward_and_gradients_equal_fp64(kind: str) -> None:
    """Each shape with and without dropout in one dtype of x and the other; fp32 adapters, and some in x's dtype."""
    for i, shape in enumerate(SHAPES):
        for dtype, p in zip(DTYPES, (0.3, 0.0) if (i + BASES.index(kind)) % 2 else (0.0, 0.3), strict=True):
            adapter = dtype if i % 3 == 2 else torch.float32
            Case(*shape, dtype, kind, p, SEEDS[i % 3], adapter=adapter).check_all()


def test_rank_256() -> None:
    Case(5, 40, 64, 256, torch.float16, p=0.5).check_all()


@settings(max_examples=10)
@given(
    m=st.integers(0, 40),
    n=st.integers(1, 80),
    k=st.integers(1, 140),
    r=st.integers(1, 40),
    kind=st.sampled_from(BASES),
    p=st.sampled_from([0.0, 0.2]),
    dtype=st.sampled_from(DTYPES),
)
def test_drawn_shapes(m: int, n: int, k: int, r: int, kind: str, p: float, dtype: torch.dtype) -> None:
    Case(m, n, k, r, dtype, kind, p).check_all()


@pytest.mark.parametrize(("kind", "dtype"), zip(BASES, (*DTYPES, *DTYPES), strict=True))
def test_row_scale(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one program and in split sums. In dX rows of W are scaled before they are rounded, or rounded again."""
    for processors, shape in ((1, (19, 70, 130, 5)), (132, (3, 64, 576, 16)), (132, (3, 512, 64, 16))):
        monkeypatch.setattr(_schedule, "processors", lambda device, count=processors: count)
        case = Case(*shape, dtype, kind, 0.3, scaled=True)
        y, xa = case.forward()
        dx, dA, dB = case.backward(xa)
        case.check(xa=xa, y=y, dA=dA, dB=dB)
        case.check(2, dx=dx)


@pytest.mark.parametrize("p", [1e-12, 0.1, 0.9, 1 - 2.0**-40])
@pytest.mark.parametrize("seed", [0, *SEEDS])
def test_the_mask_is_the_references_bit_by_bit(seed: int, p: float) -> None:
    """x of ones and A of ones: a row of the narrow product counts what is kept; dX of a weight of zeros shows it."""
    m, k = 3, 70
    case = Case(m, 4, k, 1, torch.float32, "dense", p, seed)
    out = torch.empty(m, k)
    ones = torch.ones(m, 1)
    linear_module.lora_linear_dx(
        torch.zeros(m, 4), case.weight, ones, torch.ones(1, k), torch.tensor([seed]), p, None, out
    )
    assert_same_bits(out != 0, case.keep != 0)
    left = torch.eye(m)
    low_rank.low_rank_gradient(left, torch.ones(m, k), out, seed=torch.tensor([seed]), dropout_p=p)
    assert_same_bits(out != 0, case.keep != 0)
    narrow = torch.empty(m, k)
    low_rank.low_rank(torch.ones(m, k), torch.eye(k), narrow, seed=torch.tensor([seed]), dropout_p=p)
    assert_same_bits(narrow != 0, case.keep != 0)


def test_indices_of_more_than_32_bits() -> None:
    """The share's columns lie anywhere in a result: here beyond the 2^32nd element, in the mask's own arithmetic."""
    seed, p, columns, first = torch.tensor([11]), 0.5, 2**33, 2**32 - 5
    out = torch.empty(2, 40)
    lora_linear_dense.adapter_share(
        torch.ones(2, 1), torch.ones(1, 40), out, seed=seed, dropout_p=p, first=first, columns=columns
    )
    index = torch.arange(2)[:, None] * columns + first + torch.arange(40)
    assert_same_bits(out != 0, _keep_at(seed, index, p))


def _keep_at(seed: Tensor, index: Tensor, p: float) -> Tensor:
    """The definition of :mod:`peftrt.reference.dropout`, at some indices."""
    from peftrt.reference.dropout import _LOW, _mix

    low, high = seed & _LOW, (seed >> 32) & _LOW
    word = _mix((index & _LOW) ^ low) ^ _mix(index >> 32) ^ _mix(_mix(low ^ 0x9E3779B9) ^ high)
    return _mix(word) >= round(p * 2**32)


@triton.jit
def products_kernel(p_left, p_right, p_out, SIDE: tl.constexpr, PRECISION: tl.constexpr):
    o = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    b_sum = tl.zeros((SIDE, SIDE), tl.float32)
    tl.store(p_out + o, exact_dot(tl.load(p_left + o), tl.load(p_right + o), b_sum, PRECISION))


@pytest.mark.parametrize("right", DTYPES, ids=str)
@pytest.mark.parametrize("left", DTYPES, ids=str)
def test_the_parts_of_a_product_are_all_of_it(left: torch.dtype, right: torch.dtype) -> None:
    """As on a tensor core, but for its rounding: the interpreter multiplies TF32 in fp32."""
    a, b, out = randn(16, 16, seed=1, dtype=left), randn(16, 16, seed=2, dtype=right), torch.empty(16, 16)
    products_kernel[(1,)](a, b, out, SIDE=16, PRECISION="tf32x3")
    assert_close(out, a.double() @ b.double())


def test_a_value_is_the_two_parts_that_tf32_holds_but_for_two_bits() -> None:
    """What ``exact_dot`` relies on, as integers: a tensor core ignores the last 13 bits of a factor."""
    values = randn(1 << 14, seed=3)

    def held(value: Tensor) -> Tensor:
        return (value.view(torch.int32) & -8192).view(torch.float32)

    high = held(values)
    lost = (values.double() - high.double() - held(values - high).double()).abs()
    last_place = 2.0 ** (values.double().abs().log2().floor() - 23)
    assert (lost <= 3 * last_place).all()
    assert (lost > 0).any()


@pytest.mark.parametrize(("kind", "side"), [("nf4", 520), ("dense", 1030)])
def test_split_sums(kind: str, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device of many processors: every sum is split, and its parts are added in order."""
    monkeypatch.setattr(_schedule, "processors", lambda device: 132)
    launched: list[tuple[int, ...]] = []
    sum_splits = _schedule.sum_splits_kernel

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launched.append(grid)
            return sum_splits[grid]

    monkeypatch.setattr(_schedule, "sum_splits_kernel", Counted())
    Case(260, 40, 64, 16, torch.float16, kind, 0.4).check_all()
    assert len(launched) == 2, "the gradients of A and B"
    launched.clear()
    Case(3, side, side, 16, torch.float16, kind, 0.4).check_all()
    assert len(launched) == 4, "xa, g, y and dX"


def test_the_bits_of_a_row_do_not_depend_on_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_schedule, "processors", lambda device: 132)
    for kind in ("nf4", "dense"):
        case = Case(16, 64, 1088, 16, torch.float16, kind)
        y, xa = case.forward()
        dx, _, _ = case.backward(xa)
        case.x, case.dy = case.x[5:6], case.dy[5:6]
        y5, xa5 = case.forward()
        assert_same_bits(xa5, xa[5:6])
        assert_same_bits(y5, y[5:6])
        assert_same_bits(case.backward(xa5)[0], dx[5:6])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["nf4", "dense"])
def test_by_panels(kind: str, p: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device where there are many rows: the share is written, and the base's products are added to it."""
    monkeypatch.setattr(_paths, "path", lambda direction, x: _paths.PANELS)
    monkeypatch.setattr(_panels, "width", lambda rows, depth, total, step, *_: min(step, total))
    for name in ("lora_linear", "lora_linear_dx"):
        monkeypatch.setattr(linear_module, name, lambda *_: pytest.fail("the fused kernel ran"))
    for n, k, scaled in ((300, 192, False), (33, 128, True)):
        Case(7, n, k, 5, dtype, kind, p, scaled=scaled).check_all(roundings=2)


def test_where_columns_cannot_be_told_apart_dx_goes_by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_paths, "path", lambda direction, x: _paths.PANELS)
    Case(7, 40, 70, 5, torch.float32, p=0.3).check_all()


def test_only_the_gradients_that_are_wanted_are_computed() -> None:
    for kind in ("nf4", "dense"):
        case = Case(9, 40, 128, 5, torch.float32, kind, 0.3)
        _, xa = case.forward()
        whole = case.backward(xa)
        for wanted in itertools.product((True, False), repeat=3):
            for got, all_of_it, want in zip(case.backward(xa, *wanted), whole, wanted, strict=True):
                if want:
                    assert_same_bits(got, all_of_it)
                else:
                    assert got.numel() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    case = Case(6, 40, 96, 5, torch.float32, p=0.3)
    case.x, case.dy, case.A, case.B, case.bias = (
        laid_out(t, layout) for t in (case.x, case.dy, case.A, case.B, case.bias)
    )
    case.check_all()


def test_leading_dimensions_and_no_rows() -> None:
    for kind in ("nf4", "dense"):
        case = Case(6, 40, 128, 5, torch.float32, kind)
        y, xa = case.forward()
        dx, dA, dB = case.backward(xa)
        wide_y, wide_xa = case.forward(case.x.view(2, 3, 128))
        got = case.backward(wide_xa, x=case.x.view(2, 3, 128), dy=case.dy.view(2, 3, 40))
        for wide, flat in zip((wide_y, wide_xa, *got), (y, xa, dx, dA, dB), strict=True):
            assert_same_bits(wide.reshape(flat.shape), flat)
        assert wide_y.shape == (2, 3, 40)
        none, none_xa = case.forward(case.x.view(2, 3, 128)[:0])
        assert none.shape == (0, 3, 40)
        grads = case.backward(none_xa, x=case.x.view(2, 3, 128)[:0], dy=case.dy.view(2, 3, 40)[:0])
        assert grads[0].shape == (0, 3, 128)
        assert [grad.shape for grad in grads[1:]] == [case.A.shape, case.B.shape]
        assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["nf4", "dense"])
def test_gradients_through_autograd(kind: str, p: float) -> None:
    """The whole function, with a dense weight's and a bias' gradients; the results can be written to."""
    case = Case(9, 40, 128, 5, torch.float32, kind, p)
    leaves = [t.requires_grad_() for t in (case.x, case.A, case.B, case.bias)]
    with peftrt.backend("triton"):
        y = peftrt.ops.lora_linear(
            case.x, case.weight, case.A, case.B, SCALING, case.bias, dropout_p=p, seed=SEEDS[0] if p else None
        )
    y *= 1.0
    dx, dA, dB, db = torch.autograd.grad(y, leaves, case.dy)
    case.x, case.A, case.B, case.bias = (leaf.detach() for leaf in leaves)
    case.check(y=y.detach(), dx=dx, dA=dA, dB=dB)
    assert_close(db, case.dy.double().sum(0))


def test_adapters_in_fp64_are_computed_in_fp32() -> None:
    case = Case(5, 24, 64, 3, torch.float32)
    y, xa = case.forward()
    case.A, case.B = case.A.double(), case.B.double()
    assert_same_bits(case.forward()[0], y)
    assert {grad.dtype for grad in case.backward(xa)[1:]} == {torch.float64}


@pytest.mark.parametrize("kind", [*BASES, "straddling", "odd"])
def test_norms_of_the_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"straddling": (40, 70), "odd": (33, 67)}
    monkeypatch.setattr(_schedule, "processors", lambda device: 132)
    for r in (3, 40):
        n, k = shapes.get(kind, (70, 1216))
        case = Case(1, n, k, r, torch.float32, kind if kind in BASES else "nf4")
        with peftrt.backend("triton"):
            got = peftrt.ops.lora_weight_norm(case.weight, case.A, case.B, SCALING)
        whole = exact(case.weight, torch.float32) + SCALING * case.B.double() @ case.A.double()
        assert_close(got, whole.norm(dim=1))


def test_norms_of_no_columns_are_zero() -> None:
    out = torch.empty(3)
    lora_weight_norm.lora_weight_norm(torch.empty(3, 0), torch.empty(2, 0), torch.ones(3, 2), 1.0, out)
    assert not out.any()


def test_the_base_may_be_of_any_strides() -> None:
    dense = randn(40, 130, seed=1)
    case = Case(7, 20, 65, 4, torch.float32, "dense", 0.3)
    case.weight = dense[::2, ::2]
    case.check_all()
