"""The kernels of adamw_step and gradient_norm in Triton's interpreter, bit for bit; run as interpreted.py is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

import peftrt
from peftrt.formats.adamw_state import EXP_AVG_MAP, EXP_AVG_SQ_MAP
from peftrt.formats.nf4 import midpoints
from peftrt.kernels import adamw_step as step_module
from peftrt.kernels import gradient_norm as norm_module
from peftrt.reference import gradient_norm as reference
from tests.cases import randn
from tests.ops.many_tensors import ManyTensors, assert_same, guarded

# numbers that overflow, and NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = (torch.float32, torch.float16)
EACH_KIND = pytest.mark.parametrize(
    ("bits", "dtype"), [(bits, dtype) for bits in (32, 8) for dtype in DTYPES], ids=lambda value: str(value)
)


def check(many: ManyTensors) -> None:
    """A step by the kernels and one by the reference, from the same bits to the same bits."""
    expected, before = many.copy(), many.copy()
    many.step("triton").assert_equals(expected.step("reference"))
    assert not many.state.equal(before.state)
    for t in many.absent:
        assert many.param_rooms[t].memory.equal(before.param_rooms[t].memory)
        assert many.grad_rooms[t].memory.equal(before.grad_rooms[t].memory)


@EACH_KIND
@pytest.mark.parametrize("coefficient", [None, 0.37])
def test_steps_have_the_bits_of_the_reference(bits: int, dtype: torch.dtype, coefficient: float | None) -> None:
    many = ManyTensors(bits=bits, dtype=dtype, coefficient=coefficient, absent={9}, aligned=True)
    assert len(many.table.pages) > 2
    check(many)
    check(many)


@EACH_KIND
def test_tensors_that_begin_anywhere(bits: int, dtype: torch.dtype) -> None:
    many = ManyTensors((300, 5000), bits, dtype, coefficient=0.37)
    for tensor in (*many.params, *many.grads):
        assert tensor is not None
        assert tensor.data_ptr() % 16
    check(many)


@EACH_KIND
def test_a_first_step_from_nothing(bits: int, dtype: torch.dtype) -> None:
    """Blocks of zeros, and gradients that are zero."""
    many = ManyTensors((2000,), bits, dtype, aligned=True)
    many.state.zero_()
    many.grad(0)[236:936] = 0
    check(many)


@EACH_KIND
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 6e4, 1e-7])
def test_gradients_that_are_not_finite_or_extreme(value: float, bits: int, dtype: torch.dtype) -> None:
    many = ManyTensors((2000,), bits, dtype, aligned=True)
    many.grad(0)[336:936:7] = value
    check(many)
    check(many)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("size", [1e-18, 1e-20, 1e-38, 1e-42, 1e18, 1e20])
def test_squares_that_leave_the_normal_range(size: float, bits: int) -> None:
    many = ManyTensors((2000,), bits, aligned=True)
    many.state.zero_()
    many.grad(0).mul_(size)
    check(many)
    check(many)


@settings(max_examples=12)
@given(
    sizes=st.lists(st.integers(1, 1500), min_size=1, max_size=4),
    bits=st.sampled_from([32, 8]),
    dtype=st.sampled_from(DTYPES),
    blocks=st.integers(1, 9),
    coefficient=st.sampled_from([None, 0.37]),
    aligned=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_drawn_sizes(sizes: list[int], dtype: torch.dtype, **drawn: Any) -> None:
    check(ManyTensors(sizes, dtype=dtype, absent={0} if len(sizes) > 2 else (), **drawn))


def test_without_chunks_nothing_is_launched() -> None:
    many = ManyTensors((5,))
    before = many.copy()
    many.chunks = many.chunks[:0]
    many.step("triton").assert_equals(before)


@triton.jit
def codes_kernel(p_x, p_midpoints, p_out, numel, SIGNED: tl.constexpr, SIZE: tl.constexpr):
    o = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    b_x = tl.load(p_x + o, mask=o < numel, other=0.0)
    tl.store(p_out + o, step_module.midpoints_below(b_x, p_midpoints, SIGNED).to(tl.uint8), mask=o < numel)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_exact_for_every_number(signed: bool) -> None:
    """Right at both ends of every interval between midpoints, the guess, which never falls, is right within it."""
    edges = midpoints(EXP_AVG_MAP if signed else EXP_AVG_SQ_MAP)
    points = torch.cat([edges, EXP_AVG_MAP, EXP_AVG_SQ_MAP, 10.0 ** torch.arange(-9.0, 1), torch.zeros(1)])
    beside = [points]
    for limit in (2.0, -2.0):
        beside.append(beside[0].nextafter(torch.tensor(limit)))
        beside.append(beside[-1].nextafter(torch.tensor(limit)))
    draw = torch.Generator().manual_seed(1)
    spread = 10 ** (-9 * torch.rand(200_000, generator=draw))
    x = torch.cat([*beside, torch.rand(200_000, generator=draw), spread, torch.tensor([1e-45, 1e-38])])
    x = x[x.abs() <= 1]
    x = torch.cat([x, -x, torch.tensor([torch.nan])])
    x = x if signed else x[(x >= 0) | x.isnan()]
    out = torch.empty(x.shape, dtype=torch.uint8)
    codes_kernel[(triton.cdiv(x.numel(), 65536),)](x, edges, out, x.numel(), SIGNED=signed, SIZE=65536)
    assert out.equal(torch.bucketize(x, edges).to(torch.uint8))
    assert out.unique().numel() == 256


def check_norm(many: ManyTensors, *max_norms: float) -> None:
    for max_norm in max_norms:
        for actual, expected in zip(many.norm(max_norm, "triton"), many.norm(max_norm, "reference"), strict=True):
            assert_same(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("aligned", [False, True])
def test_the_norm_has_the_bits_of_the_reference(dtype: torch.dtype, aligned: bool) -> None:
    check_norm(ManyTensors(dtype=dtype, absent={3}, aligned=aligned), 1.0, 1e4, math.inf, 1e-320)


def test_the_norm_of_several_dtypes() -> None:
    many = ManyTensors((300, 1000, 700, 5000), seed=5, aligned=True)
    for t, dtype in ((1, torch.float16), (2, torch.bfloat16)):
        many.param_rooms[t] = guarded(many.params[t].to(dtype), 0, t)
        many.grad_rooms[t] = guarded(many.grad(t).to(dtype), 0, t)
    check_norm(many, 1.0)


@pytest.mark.parametrize("count", [1, 1023, 1025, 4096, 5000, 9000])
def test_the_sum_over_chunks(count: int) -> None:
    """Fewer than it has lanes, and more than it takes in one round."""
    partials, out = randn(count, dtype=torch.float64).square(), torch.empty(2)
    rows = norm_module.FINAL_ROWS
    norm_module.gradient_norm_kernel[(1,)](partials, out, count, 4607182418800017408, ROWS=rows)
    norm = math.sqrt(reference._sum(partials, reference.FINAL_LANES))
    assert_same(out, torch.tensor([norm, min(1.0, 1.0 / (norm + 1e-6))], dtype=torch.float64).float())


@pytest.mark.parametrize("value", [math.inf, math.nan, 3e38, 1e-45, 0.0])
def test_the_norm_of_what_is_not_finite_or_extreme(value: float) -> None:
    many = ManyTensors((5000, 300), aligned=True)
    many.grad(0).fill_(value)
    check_norm(many, 1.0, math.inf)


def test_the_norm_of_nothing() -> None:
    for many in (ManyTensors(()), ManyTensors((5,), absent={0})):
        check_norm(many, 2.0)
        assert many.norm(2.0, "triton")[0].tolist() == [0.0, 1.0]


def test_bf16_is_refused_in_the_interpreter() -> None:
    with pytest.raises(peftrt.BackendError, match="cannot be trusted with bf16"):
        ManyTensors((5,), dtype=torch.bfloat16).step("triton")
