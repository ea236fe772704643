"""nf4_dequantize: its variants and layouts (the values are held against bitsandbytes in tests/formats/test_nf4.py)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peftrt
from peftrt import ops
from peftrt.formats.nf4 import NF4Weight
from tests.cases import BACKENDS, FLOATS, NATIVE, nf4, randn
from tests.tolerances import assert_same_bits


def arguments(weight: NF4Weight) -> tuple[Any, ...]:
    scales = (weight.absmax, weight.nested_absmax, weight.nested_offset)
    return (weight.codes, *scales, list(weight.shape), weight.block_size)


@pytest.mark.parametrize("backend", [NATIVE])
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    block=st.sampled_from([32, 64, 256, 4096]),
    nested=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    spread=st.sampled_from([1e-30, 1e-4, 1.0, 1e4, 1e30]),
    seed=st.integers(0, 2**20),
)
def test_native_equals_the_reference_bit_for_bit(
    backend: str, shape: list[int], block: int, nested: bool, dtype: torch.dtype, spread: float, seed: int
) -> None:
    weight = NF4Weight.quantize(randn(*shape, seed=seed) * spread, block, nested)
    with peftrt.backend("reference"):
        expected = weight.dequantize(dtype)
    with peftrt.backend(backend):
        assert_same_bits(weight.dequantize(dtype), expected)
        assert_same_bits(ops.nf4_dequantize(weight, out=torch.empty(shape, dtype=dtype)), expected)


@pytest.mark.parametrize("backend", [NATIVE])
def test_every_byte_under_every_scale(backend: str) -> None:
    """All 256 code bytes times all 256 nested codes, with offsets of either sign."""
    codes = torch.arange(256, dtype=torch.uint8).repeat_interleave(16).repeat(256)
    absmax = torch.arange(256, dtype=torch.uint8).repeat_interleave(128)
    blocks = absmax.numel()
    for offset in (0.03, -0.5, 0.0):
        bytes_of = [torch.tensor(values).view(torch.uint8) for values in ([0.017] * (blocks // 256), [offset])]
        weight = NF4Weight(codes, absmax, *bytes_of, (blocks * 64,), torch.float32, 64)
        for dtype in FLOATS:
            with peftrt.backend("reference"):
                expected = weight.dequantize(dtype)
            with peftrt.backend(backend):
                assert_same_bits(weight.dequantize(dtype), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("n", "k"), [(16, 128), (7, 33), (1, 1), (5, 64)])
def test_out_is_written_whole_and_nothing_else(n: int, k: int, dtype: torch.dtype, backend: str) -> None:
    weight = nf4(n, k)
    for guard in (64, 1):  # the second is misaligned
        room = torch.full((2 * guard + n * k,), 7.0, dtype=dtype)
        out = room[guard : guard + n * k].view(n, k).fill_(math.nan)
        with peftrt.backend(backend):
            assert ops.nf4_dequantize(weight, out=out) is out
        assert_same_bits(out, weight.dequantize(dtype))
        assert (room[:guard] == 7).all()
        assert (room[guard + n * k :] == 7).all()


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, nested: bool) -> None:
    args = arguments(nf4(6, 64, nested=nested))
    with peftrt.backend(backend):
        for dtype in (torch.float32, torch.bfloat16):
            torch.library.opcheck(torch.ops.peftrt.nf4_dequantize.default, (*args, dtype))
            torch.library.opcheck(torch.ops.peftrt.nf4_dequantize.out, args, {"out": torch.empty(6, 64, dtype=dtype)})


def test_fp64_is_the_fp32_value() -> None:
    weight = nf4(6, 64)
    assert_same_bits(weight.dequantize(torch.float64), weight.dequantize(torch.float32).double())


def test_forcing_a_backend_reaches_the_out_variant() -> None:
    """``backend(nf4_dequantize=...)`` is of the operation, in all its variants."""
    weight = nf4(6, 64)
    with peftrt.backend(nf4_dequantize="triton"), pytest.raises(peftrt.BackendError, match="triton"):
        ops.nf4_dequantize(weight, out=torch.empty(6, 64))


OUT = torch.empty(6, 64)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "out of another shape": (
        {"out": OUT[:5]},
        ValueError,
        r"out must be contiguous of shape \[6, 64\], got float32 \[5, 64\]",
    ),
    "out with gaps": ({"out": torch.empty(6, 128)[:, ::2]}, ValueError, r"out must be contiguous of shape \[6, 64\]"),
    "out of integers": ({"out": OUT.int()}, TypeError, "dtype must be one of"),
    "out and dtype": (
        {"out": OUT, "dtype": torch.float16},
        TypeError,
        "out must be of dtype torch.float16, got float32",
    ),
    "out elsewhere": ({"out": OUT.to("meta")}, ValueError, "out must be on cpu.*on meta"),
    "dtype of integers": ({"dtype": torch.int8}, TypeError, "dtype must be one of .*got torch.int8"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_named(case: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match="nf4_dequantize: " + message):
        ops.nf4_dequantize(nf4(6, 64), **change)


def test_a_bad_weight_is_named() -> None:
    weight = nf4(6, 64)
    with pytest.raises(ValueError, match=r"nf4_dequantize: weight must be uint8 of 192 bytes.*got uint8 \[5, 32\]"):
        NF4Weight(**{**weight.__dict__, "codes": weight.codes[:5]}).dequantize()
    with pytest.raises(ValueError, match="nf4_dequantize: block_size must be one of"):
        NF4Weight(**{**weight.__dict__, "block_size": 0}).dequantize()
    with pytest.raises(ValueError, match="nf4_dequantize: weight must be uint8"):
        NF4Weight(**{**weight.__dict__, "shape": (2**31, 2**31)}).dequantize()
