"""The kernels of adamw_step and gradient_norm in Triton's interpreter, bit for bit; run as interpreted.py is."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import peftrt
from peftrt import ops
from peftrt.formats.adamw_state import EXP_AVG_MAP, EXP_AVG_SQ_MAP
from peftrt.formats.nf4 import midpoints
from peftrt.kernels import adamw_step as step_module
from peftrt.kernels import gradient_norm as norm_module
from peftrt.reference import gradient_norm as reference
from tests.cases import randn
from tests.ops.adamw import Case, assert_same

# numbers that overflow, and NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = (torch.float32, torch.float16)
EACH_KIND = pytest.mark.parametrize(
    ("bits", "dtype"), [(bits, dtype) for bits in (32, 8) for dtype in DTYPES], ids=lambda value: str(value)
)


def check(case: Case) -> None:
    """A step by the kernels and one by the reference, from the same bits to the same bits."""
    expected, before = case.to("cpu"), case.to("cpu")
    with peftrt.backend("reference"):
        expected.step()
    with peftrt.backend("triton"):
        case.step()
    case.assert_equals(expected)
    assert not case.state.equal(before.state)
    assert all(case.memory[i].equal(before.memory[i]) for i in case.absent)


@EACH_KIND
@pytest.mark.parametrize("clipped", [False, True])
def test_steps_have_the_bits_of_the_reference(bits: int, dtype: torch.dtype, clipped: bool) -> None:
    case = Case(bits=bits, dtype=dtype, clipped=clipped, absent={3})
    assert len(case.table.pages) > 2
    check(case)
    check(case)


@EACH_KIND
def test_tensors_that_begin_anywhere(bits: int, dtype: torch.dtype) -> None:
    case = Case((300, 5000), bits, dtype, crooked=True, clipped=True)
    assert any(parameter.data_ptr() % 16 for parameter in case.params)
    check(case)


@EACH_KIND
def test_a_first_step_from_nothing(bits: int, dtype: torch.dtype) -> None:
    """Blocks of zeros, and gradients that are zero."""
    case = Case((2000,), bits, dtype)
    case.state.zero_()
    case.memory[0][1, 300:1000] = 0
    check(case)


@EACH_KIND
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 6e4, 1e-7])
def test_gradients_that_are_not_finite_or_extreme(value: float, bits: int, dtype: torch.dtype) -> None:
    case = Case((2000,), bits, dtype)
    case.memory[0][1, 400:1000:7] = value
    check(case)
    check(case)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("size", [1e-18, 1e-20, 1e-38, 1e-42, 1e18, 1e20])
def test_squares_that_leave_the_normal_range(size: float, bits: int) -> None:
    case = Case((2000,), bits)
    case.state.zero_()
    case.memory[0][1] *= size
    check(case)
    check(case)


@settings(max_examples=12)
@given(
    sizes=st.lists(st.integers(1, 1500), min_size=1, max_size=4),
    bits=st.sampled_from([32, 8]),
    dtype=st.sampled_from(DTYPES),
    blocks=st.integers(1, 9),
    clipped=st.booleans(),
    crooked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_drawn_sizes(
    sizes: list[int], bits: int, dtype: torch.dtype, blocks: int, clipped: bool, crooked: bool, seed: int
) -> None:
    absent = {0} if len(sizes) > 2 else ()
    check(Case(sizes, bits, dtype, blocks=blocks, absent=absent, clipped=clipped, crooked=crooked, seed=seed))


def test_without_chunks_nothing_is_launched() -> None:
    case = Case((5,))
    before = case.to("cpu")
    with peftrt.backend("triton"):
        ops.adamw_step(
            case.state, torch.empty(0, 5, dtype=torch.int64), case.gradients(), case.hyper, None, 32, 16, case.dtype
        )
    case.assert_equals(before)


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


def norms(case: Case, max_norm: float) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    with peftrt.backend("reference"):
        expected = case.norm(max_norm)
    with peftrt.backend("triton"):
        return case.norm(max_norm), expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("crooked", [False, True])
def test_the_norm_has_the_bits_of_the_reference(dtype: torch.dtype, crooked: bool) -> None:
    case = Case(dtype=dtype, absent={2}, crooked=crooked)
    for max_norm in (1.0, 1e4, math.inf, 1e-320):
        for actual, expected in zip(*norms(case, max_norm), strict=True):
            assert_same(actual, expected)


def test_the_norm_of_several_dtypes() -> None:
    case = Case((300, 1000, 700, 5000), seed=5)
    case.memory[1], case.memory[2] = case.memory[1].half(), case.memory[2].bfloat16()
    for actual, expected in zip(*norms(case, 1.0), strict=True):
        assert_same(actual, expected)


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
    case = Case((5000, 300))
    case.memory[1][1] = value
    for max_norm in (1.0, math.inf):
        for actual, expected in zip(*norms(case, max_norm), strict=True):
            assert_same(actual, expected)


def test_the_norm_of_nothing() -> None:
    for case in (Case(()), Case((5,), absent={0})):
        actual, expected = norms(case, 2.0)
        assert_same(actual[0], expected[0])
        assert actual[0].tolist() == [0.0, 1.0]


def test_bf16_is_refused_in_the_interpreter() -> None:
    with peftrt.backend("triton"), pytest.raises(peftrt.BackendError, match="cannot be trusted with bf16"):
        Case((5,), dtype=torch.bfloat16).step()
