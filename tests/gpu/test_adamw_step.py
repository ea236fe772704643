"""adamw_step and gradient_norm on a GPU have the bits of the reference on a CPU."""

from __future__ import annotations

import math

import pytest
import torch

import peftrt
from peftrt import ops
from peftrt.ops._adamw_step import STEP
from peftrt.ops._gradient_norm import NORM
from tests.cases import FLOATS
from tests.gpu.places import Place, launches, on_gpu, places
from tests.ops.adamw import SIZES, Case, assert_same

# there is no native kernel for CUDA
KERNELS = pytest.mark.parametrize("place", places(None, "triton"))
EACH_BITS = pytest.mark.parametrize("bits", [32, 8])
EACH_DTYPE = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def _sizes(place: Place) -> tuple[int, ...]:
    return (*SIZES, 1 << 20, 300_001) if place.on_gpu else SIZES


def _blocks(place: Place) -> int:
    return 1000 if place.on_gpu else 19


def _check(place: Place, case: Case, steps: int = 2) -> None:
    got, expected = case.to(place.device), case.to("cpu")
    for _ in range(steps):
        with peftrt.backend("reference"):
            expected.step()
        with peftrt.backend(place.backend):
            got.step()
        got.assert_equals(expected)


@EACH_DTYPE
@EACH_BITS
@KERNELS
def test_steps_have_the_bits_of_the_cpu(place: Place, bits: int, dtype: torch.dtype) -> None:
    for clipped, crooked in ((False, False), (True, False), (True, True)):
        case = Case(_sizes(place), bits, dtype, blocks=_blocks(place), absent={3}, clipped=clipped, crooked=crooked)
        assert len(case.table.pages) > 1
        _check(place, case)


@EACH_DTYPE
@EACH_BITS
@KERNELS
def test_what_is_not_finite_zero_or_extreme(place: Place, bits: int, dtype: torch.dtype) -> None:
    values = [math.inf, -math.inf, math.nan, 0.0, 6e4, 1e-7]
    values += [] if dtype == torch.float16 else [1e-19, 1e-21, 1e-38, 1e19, 1e21]
    for value in values:
        case = Case((2000,), bits, dtype)
        case.memory[0][1, 400:1000:7] = value
        _check(place, case)
        case.state.zero_()
        case.memory[0][1] *= value
        _check(place, case)


@EACH_BITS
@KERNELS
def test_many_steps(place: Place, bits: int) -> None:
    """Errors of a code would grow."""
    case = Case((5000, 300), bits)
    case.state.zero_()
    _check(place, case, steps=20)


@pytest.mark.parametrize("crooked", [False, True])
@EACH_DTYPE
@KERNELS
def test_norms_have_the_bits_of_the_cpu(place: Place, dtype: torch.dtype, crooked: bool) -> None:
    sizes = (*_sizes(place), *((1 << 25,) if place.on_gpu else ()))  # of more chunks than the final sum has lanes
    case = Case(sizes, dtype=dtype, absent={2}, crooked=crooked)
    moved = case.to(place.device)
    for max_norm in (1.0, 1e9, math.inf, 1e-320):
        with peftrt.backend("reference"):
            expected = case.norm(max_norm)
        with peftrt.backend(place.backend):
            got = moved.norm(max_norm)
        for actual, wanted in zip(got, expected, strict=True):
            assert_same(actual, wanted)


@pytest.mark.parametrize("value", [math.inf, math.nan, 3e38, 1e-45, 0.0])
@KERNELS
def test_the_norm_of_what_is_not_finite_or_extreme(place: Place, value: float) -> None:
    case = Case((5000, 300))
    case.memory[1][1] = value
    moved = case.to(place.device)
    for max_norm in (1.0, math.inf):
        with peftrt.backend("reference"):
            expected = case.norm(max_norm)
        with peftrt.backend(place.backend):
            got = moved.norm(max_norm)
        for actual, wanted in zip(got, expected, strict=True):
            assert_same(actual, wanted)


@on_gpu
@EACH_BITS
def test_kernels_are_chosen_and_launched_once(bits: int) -> None:
    case = Case(bits=bits, clipped=True).to("cuda")
    step, norm = case.step_args(), case.norm_args(1.0)
    for op, args in ((STEP, step), (NORM, norm)):
        assert op.choice(*args).backend is not None
        assert op.choice(*args).backend.name == "triton"
    assert launches(lambda: ops.adamw_step(*step)) == 1
    assert launches(lambda: ops.gradient_norm(*norm)) == 2


@on_gpu
@EACH_BITS
def test_a_captured_step_waits_for_nothing_and_has_the_same_bits(bits: int) -> None:
    case, expected = Case(bits=bits, clipped=True).to("cuda"), Case(bits=bits, clipped=True).to("cuda")
    step, norm = case.step_args(), case.norm_args(1.0)
    expected.step()
    wanted = expected.norm(1.0)  # compiles and loads, which may wait
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            ops.adamw_step(*step)
            ops.gradient_norm(*norm)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    torch.cuda.synchronize()
    case.assert_equals(expected)
    assert_same(norm[4], wanted[0])
