"""adamw_step and gradient_norm on a GPU have the bits of the reference on a CPU."""

from __future__ import annotations

import math

import pytest
import torch

from peftrt import ops
from peftrt.ops._adamw_step import STEP
from peftrt.ops._gradient_norm import NORM
from tests.cases import FLOATS
from tests.gpu.places import Place, launches, on_gpu, places
from tests.ops.many_tensors import SIZES, ManyTensors, assert_same

# there is no native kernel for CUDA
KERNELS = pytest.mark.parametrize("place", places(None, "triton"))
EACH_BITS = pytest.mark.parametrize("bits", [32, 8])
EACH_DTYPE = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def _sizes(place: Place) -> tuple[int, ...]:
    return (*SIZES, 1 << 20, 300_001) if place.on_gpu else SIZES


def _blocks(place: Place) -> int:
    return 1000 if place.on_gpu else 19


def _check(place: Place, many: ManyTensors, steps: int = 2) -> None:
    got, expected = many.to(place.device), many.copy()
    for _ in range(steps):
        got.step(place.backend).assert_equals(expected.step("reference"))


def _check_norms(place: Place, many: ManyTensors, *max_norms: float) -> None:
    moved = many.to(place.device)
    for max_norm in max_norms:
        got, expected = moved.norm(max_norm, place.backend), many.norm(max_norm, "reference")
        for actual, wanted in zip(got, expected, strict=True):
            assert_same(actual, wanted)


@EACH_DTYPE
@EACH_BITS
@KERNELS
def test_steps_have_the_bits_of_the_cpu(place: Place, bits: int, dtype: torch.dtype) -> None:
    sizes, blocks = _sizes(place), _blocks(place)
    for coefficient, aligned in ((None, True), (0.37, True), (0.37, False)):
        many = ManyTensors(sizes, bits, dtype, blocks=blocks, absent={9}, coefficient=coefficient, aligned=aligned)
        assert len(many.table.pages) > 1
        _check(place, many)


@EACH_DTYPE
@EACH_BITS
@KERNELS
def test_what_is_not_finite_zero_or_extreme(place: Place, bits: int, dtype: torch.dtype) -> None:
    values = [math.inf, -math.inf, math.nan, 0.0, 6e4, 1e-7]
    values += [] if dtype == torch.float16 else [1e-19, 1e-21, 1e-38, 1e19, 1e21]
    for value in values:
        many = ManyTensors((2000,), bits, dtype, aligned=True)
        many.grad(0)[336:936:7] = value
        _check(place, many)
        many.state.zero_()
        many.grad(0).mul_(value)
        _check(place, many)


@EACH_BITS
@KERNELS
def test_many_steps(place: Place, bits: int) -> None:
    """Errors of a code would grow."""
    many = ManyTensors((5000, 300), bits, aligned=True)
    many.state.zero_()
    _check(place, many, steps=20)


@pytest.mark.parametrize("aligned", [True, False])
@EACH_DTYPE
@KERNELS
def test_norms_have_the_bits_of_the_cpu(place: Place, dtype: torch.dtype, aligned: bool) -> None:
    sizes = (*_sizes(place), *((1 << 25,) if place.on_gpu else ()))  # of more chunks than the final sum has lanes
    _check_norms(place, ManyTensors(sizes, dtype=dtype, absent={3}, aligned=aligned), 1.0, 1e9, math.inf, 1e-320)


@pytest.mark.parametrize("value", [math.inf, math.nan, 3e38, 1e-45, 0.0])
@KERNELS
def test_the_norm_of_what_is_not_finite_or_extreme(place: Place, value: float) -> None:
    many = ManyTensors((5000, 300), aligned=True)
    many.grad(0).fill_(value)
    _check_norms(place, many, 1.0, math.inf)


@on_gpu
@EACH_BITS
def test_kernels_are_chosen_and_launched_once(bits: int) -> None:
    many = ManyTensors(bits=bits, coefficient=0.37, aligned=True).to("cuda")
    step, norm = many.step_args(), many.norm_args(1.0)
    for op, args in ((STEP, step), (NORM, norm)):
        assert op.choice(*args).backend is not None
        assert op.choice(*args).backend.name == "triton"
    assert launches(lambda: ops.adamw_step(*step)) == 1
    assert launches(lambda: ops.gradient_norm(*norm)) == 2


@on_gpu
@EACH_BITS
def test_a_captured_step_waits_for_nothing_and_has_the_same_bits(bits: int) -> None:
    many = ManyTensors(bits=bits, coefficient=0.37, aligned=True).to("cuda")
    expected = many.copy()
    step, norm = many.step_args(), many.norm_args(1.0)
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
    many.assert_equals(expected)
    assert_same(norm[4], wanted[0])
