"""nf4_quantize: the native kernel's bytes are the reference's (tests/formats/test_nf4.py: against bitsandbytes)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import peftrt
from peftrt import ops
from peftrt.formats.nf4 import BLOCK_SIZES, DYNAMIC_CODEBOOK, NF4_CODEBOOK, NF4Weight, bytes_float, midpoints
from peftrt.reference import nf4 as reference
from tests.cases import BACKENDS, FLOATS, LAYOUTS, NATIVE, laid_out, randn
from tests.tolerances import assert_same_bits

THRESHOLDS = midpoints(NF4_CODEBOOK)


def quantize(weight: Tensor, block: int, nested: bool, backend: str) -> tuple[Tensor, ...]:
    with peftrt.backend(backend):
        return torch.ops.peftrt.nf4_quantize(weight, block, nested)


def assert_equals_reference(weight: Tensor, block: int = 64, nested: bool = False) -> None:
    expected = quantize(weight, block, nested, "reference")
    for made, wanted in zip(quantize(weight, block, nested, "native"), expected, strict=True):
        assert_same_bits(made, wanted)


def levels(weight: Tensor, block: int = 64, backend: str = "native") -> Tensor:
    codes = quantize(weight, block, False, backend)[0]
    return torch.stack([codes >> 4, codes & 15], 1).reshape(-1)


def scales(weight: Tensor, block: int = 64, backend: str = "native") -> Tensor:
    return bytes_float(quantize(weight, block, False, backend)[1])


@pytest.mark.parametrize("backend", [NATIVE])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_native_equals_the_reference_for_every_block_size(
    block: int, dtype: torch.dtype, nested: bool, backend: str
) -> None:
    for shape in ((1,), (block - 1,), (block,), (block + 1,), (3, 5), (33, 129), (7, 4097), (150, 300)):
        assert_equals_reference(randn(*shape, seed=block, dtype=dtype), block, nested)


@pytest.mark.parametrize("backend", [NATIVE])
@given(
    numel=st.integers(1, 40_000),
    block=st.sampled_from(BLOCK_SIZES),
    nested=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    spread=st.sampled_from([1e-42, 1e-38, 1e-30, 1e-4, 1.0, 1e4, 1e30, 3e38]),
    wild=st.sampled_from([0.0, 1e-3, 1.0]),
    seed=st.integers(0, 2**20),
)
def test_native_equals_the_reference_for_any_bits(
    backend: str, numel: int, block: int, nested: bool, dtype: torch.dtype, spread: float, wild: float, seed: int
) -> None:
    """``wild`` is the share of elements that are any bits at all: NaN, infinities, subnormals, huge values."""
    generator = torch.Generator().manual_seed(seed)
    weight = (randn(numel, seed=seed) * spread).to(dtype)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(integer)
    any_bits = torch.randint(info.min, info.max, (numel,), generator=generator, dtype=torch.int64).to(integer)
    chosen = torch.rand(numel, generator=generator) < wild
    assert_equals_reference(weight.where(~chosen, any_bits.view(dtype)), block, nested)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tie_goes_to_the_lower_level(backend: str) -> None:
    """Every threshold exactly, and its neighbours in fp32; the largest magnitude is 1, so nothing is rounded."""
    above = torch.nextafter(THRESHOLDS, torch.tensor(2.0))
    below = torch.nextafter(THRESHOLDS, torch.tensor(-2.0))
    weight = torch.cat([torch.stack([below, THRESHOLDS, above], 1).reshape(-1), torch.tensor([1.0])])
    expected = torch.arange(15).repeat_interleave(3) + torch.tensor([0, 0, 1]).repeat(15)
    assert levels(weight, 64, backend).tolist() == [*expected.tolist(), 15]


@pytest.mark.parametrize("backend", [NATIVE])
@pytest.mark.parametrize("scale", [1.0, -1.0, 1.7, 2.0**-126, 2.0**-140, 3.4e38], ids=str)
def test_around_every_threshold_under_every_scale(scale: float, backend: str) -> None:
    """Some ulps to either side of the thresholds, and a sweep between them, under scales that round."""
    near = THRESHOLDS.view(torch.int32)[:, None] + torch.arange(-40, 41, dtype=torch.int32)
    values = torch.cat([near.view(torch.float32).reshape(-1), torch.linspace(-1, 1, 100_003)])
    weight = (
        torch.cat(
            [
                torch.ones(-(-values.numel() // 63), 1),
                torch.nn.functional.pad(values, (0, -values.numel() % 63)).view(-1, 63),
            ],
            1,
        )
        * scale
    )
    assert_equals_reference(weight)


@pytest.mark.parametrize("backend", [NATIVE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_two_bytes(dtype: torch.dtype, backend: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    assert_equals_reference(every)  # each among its neighbours
    beside_one = torch.ones(2**16, 32, dtype=dtype)
    beside_one[:, ::2] = every[:, None]
    assert_equals_reference(beside_one, 32)


@pytest.mark.parametrize("backend", [NATIVE])
def test_nested_scales_on_every_threshold(backend: str) -> None:
    """Scales whose differences from an offset of 2 are the 8-bit levels' thresholds, or an ulp beside them."""
    thresholds = midpoints(DYNAMIC_CODEBOOK)
    near = thresholds.view(torch.int32)[:, None] + torch.arange(-2, 3, dtype=torch.int32)
    values = torch.cat([near.view(torch.float32).reshape(-1), torch.linspace(-1, 1, 5000), DYNAMIC_CODEBOOK])
    values = torch.nn.functional.pad(values, (0, -values.numel() % 255)).view(-1, 255)
    runs = torch.cat([torch.ones(values.shape[0], 1), values], 1).reshape(-1)[:-100]  # the last run is short
    for offset, scale in ((0.0, 1.0), (2.0, 1.0), (0.03, 1e-2), (1e30, 1e33)):
        absmax = runs * scale + offset
        at, codes = torch.tensor([offset]), torch.empty(runs.numel(), dtype=torch.uint8)
        nested = codes.new_empty(4 * -(-runs.numel() // 256))
        torch.ops.peftrt_cpu.nf4_quantize_scales(absmax.view(torch.uint8), at.view(torch.uint8), codes, nested)
        expected = reference._quantize_blocks(absmax - at, 256, thresholds)
        assert_same_bits(codes, expected[0])
        assert_same_bits(bytes_float(nested), expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nothing_but_zeros(dtype: torch.dtype, backend: str) -> None:
    for zeros in (torch.zeros(130, dtype=dtype), -torch.zeros(129, dtype=dtype)):
        assert (levels(zeros, 64, backend) == 7).all()
        assert_same_bits(scales(zeros, 64, backend), torch.zeros(3))
        assert (NF4Weight.quantize(zeros).dequantize() == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_that_are_not_finite_stay_in_their_block(dtype: torch.dtype, backend: str) -> None:
    weight = randn(5 * 64 + 33, dtype=dtype)
    finite = levels(weight, 64, backend), scales(weight, 64, backend)
    for odd in (math.nan, -math.nan, math.inf, -math.inf):
        for block, at in ((1, 64), (2, 191), (5, 352)):
            changed = weight.clone()
            changed[at] = odd
            got = levels(changed, 64, backend), scales(changed, 64, backend)
            inside = torch.arange(weight.numel()) // 64 == block
            assert torch.equal(got[0][:353][~inside], finite[0][:353][~inside])
            assert got[0][353] == 7  # the half byte that no weight has
            others = torch.arange(6) != block
            assert torch.equal(got[1][others], finite[1][others])
            if math.isnan(odd):
                assert (got[0][:353][inside] == 15).all()
                assert_same_bits(got[1][block], torch.tensor(math.nan))
            else:
                assert got[0][at] == 15
                assert (got[0][:353][inside & (torch.arange(353) != at)] == 7).all()
                assert got[1][block] == math.inf


@pytest.mark.parametrize("backend", [NATIVE])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, dtype: torch.dtype, nested: bool, backend: str) -> None:
    for shape in ((37, 96), (5, 7, 9), (64,)):
        weight = randn(*shape, dtype=dtype)
        given = laid_out(weight, layout)
        assert_equals_reference(given, 32, nested)
        expected = quantize(given.contiguous(), 32, nested, "reference")
        for made, wanted in zip(quantize(given, 32, nested, backend), expected, strict=True):
            assert_same_bits(made, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_thread_count_changes_no_bit(backend: str) -> None:
    """Of so many scales that torch spreads their sum over threads."""
    before = torch.get_num_threads()
    weight = torch.randn(2047, 1027)
    try:
        for block in (32, 4096):
            torch.set_num_threads(1)
            alone = quantize(weight, block, True, backend)
            for threads in (2, 3):
                torch.set_num_threads(threads)
                for one, other in zip(quantize(weight, block, True, backend), alone, strict=True):
                    assert_same_bits(one, other)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", [NATIVE])
def test_a_weight_that_needs_a_gradient(backend: str) -> None:
    made = quantize(torch.nn.Parameter(randn(6, 64)), 64, True, backend)
    assert not any(tensor.requires_grad for tensor in made)
    for one, other in zip(made, quantize(randn(6, 64), 64, True, "reference"), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("double_quant", "shape"), [(True, (6, 64)), (False, (6, 64)), (True, (3, 5, 7))])
def test_opcheck(double_quant: bool, shape: tuple[int, ...], backend: str) -> None:
    with peftrt.backend(backend):
        torch.library.opcheck(torch.ops.peftrt.nf4_quantize.default, (randn(*shape), 64, double_quant))


@pytest.mark.parametrize("backend", [NATIVE])
def test_native_is_what_runs_on_a_cpu(backend: str) -> None:
    choice = ops._define.OPS["nf4_quantize"].choice(randn(4, 64), 64, True)
    assert choice.backend is not None
    assert choice.backend.name == backend


@pytest.mark.parametrize("backend", [NATIVE])
def test_the_raw_function_refuses_what_does_not_fit(backend: str) -> None:
    weight, codes, absmax = torch.ones(130), torch.zeros(65, dtype=torch.uint8), torch.zeros(12, dtype=torch.uint8)
    for message, args in (
        ("weight must be a contiguous", (torch.ones(260)[::2], 64, codes, absmax)),
        ("weight must be float32", (weight.double(), 64, codes, absmax)),
        ("block_size must be a power of two", (weight, 48, codes, absmax)),
        ("block_size must be a power of two", (weight, 16, codes, absmax)),
        ("block_size must be a power of two", (weight, -64, codes, absmax)),
        ("codes must have 65 bytes, got 64", (weight, 64, codes[1:], absmax)),
        ("codes must be uint8", (weight, 64, codes.view(torch.int8), absmax)),
        ("absmax must have 12 bytes, got 8", (weight, 64, codes, absmax[4:])),
        ("absmax must have 20 bytes, got 12", (weight, 32, codes, absmax)),
    ):
        with pytest.raises(RuntimeError, match=f"nf4_quantize: {message}"):
            torch.ops.peftrt_cpu.nf4_quantize(*args)
    offset, nested = absmax[:4], absmax[4:8]
    for message, args in (
        ("absmax must have 12 bytes, got 8", (absmax[:8], offset, codes[:3], nested)),
        ("offset must have 4 bytes, got 12", (absmax, absmax, codes[:3], nested)),
        ("nested_absmax must have 4 bytes, got 8", (absmax, offset, codes[:3], absmax[4:])),
        ("codes must be uint8", (absmax, offset, codes[:3].view(torch.int8), nested)),
        ("codes must be a contiguous", (absmax, offset, codes[:6:2], nested)),
    ):
        with pytest.raises(RuntimeError, match=f"nf4_quantize_scales: {message}"):
            torch.ops.peftrt_cpu.nf4_quantize_scales(*args)
    assert not codes.any()
    assert not absmax.any()
    torch.ops.peftrt_cpu.nf4_quantize(weight, 64, codes, absmax)
    assert codes.all()
    torch.ops.peftrt_cpu.nf4_quantize(weight[:0], 64, codes[:0], absmax[:0])  # nothing, and no complaint
