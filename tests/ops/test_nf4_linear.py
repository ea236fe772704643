"""nf4_linear and its input gradient against fp64, for every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import peftrt
from peftrt import ops
from peftrt.formats.nf4 import NF4Weight
from peftrt.ops._weight import weight_args
from tests.cases import BACKENDS, FLOATS, LAYOUTS, NATIVE, exact, laid_out, misaligned, nf4, randn, sum_size
from tests.tolerances import assert_close, assert_same_bits


def dx(dy: Tensor, weight: NF4Weight) -> Tensor:
    return torch.ops.peftrt.nf4_linear_dx(dy, *weight_args("nf4_linear_dx", weight))


sizes = st.one_of(st.integers(1, 70), st.sampled_from([96, 127, 128, 192, 257]))
leads = st.one_of(
    st.tuples(), st.tuples(st.integers(0, 40)), st.tuples(st.integers(0, 3), st.integers(1, 9)), st.just((64,))
)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@given(
    lead=leads,
    n=sizes,
    k=sizes,
    block=st.sampled_from([32, 64, 128, 4096]),
    nested=st.booleans(),
    bias=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**20),
)
def test_forward_and_input_gradient_equal_fp64(
    backend: str,
    dtype: torch.dtype,
    lead: tuple[int, ...],
    n: int,
    k: int,
    block: int,
    nested: bool,
    bias: bool,
    layout: str,
    seed: int,
) -> None:
    weight = nf4(n, k, seed=seed, dtype=dtype, block=block, nested=nested)
    x, dy = (laid_out(randn(*lead, size, seed=seed + 1, dtype=dtype), layout) for size in (k, n))
    b = randn(n, seed=seed + 2, dtype=dtype) if bias else None
    wide = exact(weight, dtype)
    with peftrt.backend(nf4_linear=backend, nf4_linear_dx=backend):
        y, grad = ops.nf4_linear(x, weight, b), dx(dy, weight)
    assert y.dtype == grad.dtype == dtype
    assert_close(y, x.double() @ wide.t() + (0 if b is None else b.double()), intermediate=sum_size(x, wide.t(), b))
    assert_close(grad, dy.double() @ wide, intermediate=sum_size(dy, wide))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("n", "k"), [(256, 512), (255, 513), (512, 1), (1, 512), (64, 2048)])
@pytest.mark.parametrize("backend", [NATIVE])
def test_native_equals_the_reference_at_every_kernels_range(backend: str, n: int, k: int, dtype: torch.dtype) -> None:
    weight = nf4(n, k, dtype=dtype)
    for m in (1, 2, 3, 4, 7, 16, 33, 64, 130):
        x, dy, b = randn(m, k, dtype=dtype), randn(m, n, dtype=dtype), randn(n, dtype=dtype)
        with peftrt.backend("reference"):
            expected, expected_dx = ops.nf4_linear(x, weight, b), dx(dy, weight)
        with peftrt.backend(backend):
            assert_close(ops.nf4_linear(x, weight, b), expected)
            assert_close(dx(dy, weight), expected_dx)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("k", [32, 33])
def test_gradients_equal_finite_differences(k: int, bias: bool) -> None:
    weight = nf4(3, k, block=32)
    x = randn(2, 1, k, dtype=torch.float64).requires_grad_()
    b = randn(3, dtype=torch.float64).requires_grad_() if bias else None
    inputs = (x,) if b is None else (x, b)
    dy = randn(2, 1, 3, dtype=torch.float64).requires_grad_()
    for function, values in (
        (lambda x, b=None: ops.nf4_linear(x, weight, b), inputs),
        (lambda dy: dx(dy, weight), (dy,)),
    ):
        assert torch.autograd.gradcheck(function, values)
        assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


@pytest.mark.parametrize(("dtype", "nested"), [(torch.float32, True), (torch.bfloat16, False)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, dtype: torch.dtype, nested: bool) -> None:
    weight = weight_args("nf4_linear", nf4(6, 64, nested=nested))
    for m in (0, 3):
        x, dy, b = (randn(*shape, dtype=dtype).requires_grad_() for shape in ((m, 64), (m, 6), (6,)))
        with peftrt.backend(backend):
            torch.library.opcheck(torch.ops.peftrt.nf4_linear.default, (x, *weight, b))
            torch.library.opcheck(torch.ops.peftrt.nf4_linear_dx.default, (dy, *weight))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_one_row_stays_in_that_row(backend: str, dtype: torch.dtype) -> None:
    weight = nf4(48, 96)
    for m in (3, 9, 40):
        x, dy = randn(m, 96, dtype=dtype), randn(m, 48, dtype=dtype)
        with peftrt.backend(backend):
            clean, clean_dx = ops.nf4_linear(x, weight), dx(dy, weight)
            x[1, 5], dy[1, 7] = math.nan, math.inf
            y, grad = ops.nf4_linear(x, weight), dx(dy, weight)
        others = [row for row in range(m) if row != 1]
        assert y[1].isnan().all()
        assert not grad[1].isfinite().any()
        assert_same_bits(y[others], clean[others])
        assert_same_bits(grad[others], clean_dx[others])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_the_weight_stays_in_its_output(backend: str) -> None:
    values = randn(5, 64)
    values[2, 0] = math.nan
    weight = NF4Weight.quantize(values, 64, double_quant=False)
    with peftrt.backend(backend):
        y = ops.nf4_linear(randn(4, 64), weight)
    assert y[:, 2].isnan().all()
    assert y[:, [0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_all_zero_block_contributes_exact_zero(dtype: torch.dtype, backend: str) -> None:
    values = randn(4, 128)
    values[1] = 0
    weight = NF4Weight.quantize(values)
    with peftrt.backend(backend):
        y = ops.nf4_linear(randn(3, 128, dtype=dtype) * 100, weight)
    assert (y[:, 1] == 0).all()
    assert (y[:, 0] != 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_gives_the_same_bits(backend: str, dtype: torch.dtype) -> None:
    weight = nf4(130, 200)
    for m in (1, 5, 70):
        x, dy = randn(m, 200, dtype=dtype), randn(m, 130, dtype=dtype)
        with peftrt.backend(backend):
            assert_same_bits(ops.nf4_linear(x, weight), ops.nf4_linear(x, weight))
            assert_same_bits(dx(dy, weight), dx(dy, weight))


@pytest.mark.parametrize("m", [0, 1, 3, 17, 64])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.skipif(bool(NATIVE.marks[0].args[0]), reason="native kernels are not built")
def test_native_kernels_write_all_of_the_output_and_nothing_else(dtype: torch.dtype, m: int) -> None:
    """Guard bands of a marker around the result; in between it starts as NaN."""
    n, k, guard = 37, 97, 64
    weight = nf4(n, k)
    args = weight_args("nf4_linear", weight)
    for name, inner, width in (("nf4_linear", k, n), ("nf4_linear_dx", n, k)):
        room = torch.full((2 * guard + m * width,), 7.0, dtype=dtype)
        out = room[guard : guard + m * width].view(m, width)
        out.fill_(math.nan)
        x = misaligned(randn(m, inner, dtype=dtype))
        before = x.clone()
        more = (None,) if name == "nf4_linear" else ()
        getattr(torch.ops.peftrt_cpu, name)(x, *args[:4], args.block_size, *more, out)
        assert (room[:guard] == 7).all()
        assert (room[guard + m * width :] == 7).all()
        wide = exact(weight, dtype)
        assert_close(out, x.double() @ (wide.t() if name == "nf4_linear" else wide))
        assert_same_bits(x, before)


def test_codes_and_scales_of_any_strides_are_read_by_value() -> None:
    weight = nf4(8, 128)
    tensors = {name: torch.stack([tensor, tensor], -1)[..., 0] for name, tensor in weight.tensors().items()}
    assert not tensors["codes"].is_contiguous()
    scattered = NF4Weight(**tensors, shape=weight.shape, dtype=weight.dtype, block_size=64)
    x = randn(3, 128)
    for backend in ("reference", None):
        with peftrt.backend(backend):
            assert_same_bits(ops.nf4_linear(x, scattered), ops.nf4_linear(x, weight))


W = nf4(6, 64)
X = torch.zeros(2, 64)
BAD: dict[str, tuple[Any, tuple[Any, ...], type[Exception], str]] = {
    "x of another width": (X[:, 1:], (), ValueError, r"x must be \[\.\.\., K = 64\].*got float32 \[2, 63\]"),
    "x a scalar": (torch.zeros(()), (), ValueError, r"x must be \[\.\.\., K = 64\].*got float32 \[\]"),
    "x of integers": (X.int(), (), TypeError, r"x must be one of float32.*got int32 \[2, 64\]"),
    "x complex": (X.to(torch.complex64), (), TypeError, r"x must be one of float32.*got complex64"),
    "bias of another length": (X, (torch.zeros(5),), ValueError, r"bias must be \[N\] = \[6\], got float32 \[5\]"),
    "bias of two dimensions": (
        X,
        (torch.zeros(6, 1),),
        ValueError,
        r"bias must be \[N\] = \[6\], got float32 \[6, 1\]",
    ),
    "bias of another dtype": (X, (torch.zeros(6).bfloat16(),), TypeError, r"bias must be of x's dtype.*got bfloat16"),
    "bias elsewhere": (
        X,
        (torch.zeros(6, device="meta"),),
        ValueError,
        r"bias must be on cpu.*got float32 \[6\] on meta",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_named(case: str) -> None:
    x, rest, error, message = BAD[case]
    with pytest.raises(error, match="nf4_linear: " + message):
        ops.nf4_linear(x, W, *rest)


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("codes", W.codes[:5], ValueError, r"weight must be uint8 of 192 bytes.*got uint8 \[5, 32\]"),
        ("codes", W.codes.int(), TypeError, r"weight must be uint8 of 192 bytes, got int32 \[6, 32\]"),
        ("codes", W.codes.to("meta"), ValueError, r"weight must be on cpu.*got uint8 \[6, 32\] on meta"),
        ("absmax", W.absmax[:4], ValueError, r"absmax must be uint8 of 6 bytes.*got uint8 \[4, 1\]"),
        ("absmax", W.absmax.float(), TypeError, r"absmax must be uint8 of 6 bytes, got float32 \[6, 1\]"),
        ("absmax", None, ValueError, r"absmax must be the scales of an NF4 weight, got None"),
        ("nested_absmax", None, ValueError, r"nested_offset must be given with nested_absmax"),
        ("nested_absmax", torch.zeros(8, dtype=torch.uint8), ValueError, r"nested_absmax must be uint8 of 4 bytes"),
        ("nested_offset", torch.zeros(1), TypeError, r"nested_offset must be uint8 of 4 bytes, got float32 \[1\]"),
        ("block_size", 63, ValueError, r"block_size must be one of .*, got 63"),
        ("block_size", 32, ValueError, r"absmax must be uint8 of 12 bytes for 384 weights in blocks of 32"),
        ("shape", (6, 63), ValueError, r"x must be \[\.\.\., K = 63\]"),
        ("shape", (6, 64, 1), ValueError, r"weight must be a matrix \[N, K\], got an NF4Weight of shape \(6, 64, 1\)"),
    ],
)
def test_a_bad_weight_is_named(field: str, value: Any, error: type[Exception], message: str) -> None:
    fields = {**W.__dict__, field: value}
    with pytest.raises(error, match="nf4_linear: " + message):
        ops.nf4_linear(X, NF4Weight(**fields))


def test_a_dense_weight_is_refused() -> None:
    with pytest.raises(TypeError, match="nf4_linear: weight must be an NF4Weight, got Tensor"):
        ops.nf4_linear(X, torch.zeros(6, 64))  # type: ignore[arg-type]


def test_a_bad_gradient_is_named() -> None:
    with pytest.raises(ValueError, match=r"nf4_linear_dx: dy must be \[\.\.\., N = 6\].*got float32 \[2, 64\]"):
        dx(X, W)


def test_errors_show_under_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match="nf4_linear: x must be"):
        ops.nf4_linear(torch.empty(2, 63), W)
