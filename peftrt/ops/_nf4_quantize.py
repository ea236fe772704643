"""nf4_quantize: a float tensor to NF4 codes and scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftrt.formats.nf4 import (
    BLOCK_SIZES,
    FLOAT_DTYPES,
    NESTED_BLOCK_SIZE,
    NF4Weight,
    bytes_float,
    float_bytes,
    stored_sizes,
)
from peftrt.ops import _native
from peftrt.ops._define import Backend, define, reference_backend
from peftrt.ops._weight import check_float, expect
from peftrt.reference import nf4 as reference


def nf4_quantize(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
    """Quantise a tensor to NF4, in blocks of its flattened elements.

    ``code = argmin_c |nf4[c] - w / absmax|`` with ``absmax`` the largest magnitude of the block; a tie goes to the
    lower level. The native backends write the reference's bytes, also where values are not finite: a block with a
    NaN has the scale NaN, one with an infinity the scale infinity, and no other block is touched by either.

    Args:
        weight: any shape; fp32, bf16 or fp16; quantised on its device. A weight that is not contiguous is copied whole
            first; beside that the native backend makes no temporary of the weight's size.
        block_size: weights that share a scale; a power of two in 32 ... 4096.
        double_quant: store the scales in 8 bits with an fp32 scale for every 256 of them: 4.127 bits a weight instead
            of 4.5.

    Raises:
        TypeError: ``weight`` is not fp32, bf16 or fp16.
        ValueError: another block size, or no elements.

    Source: QLoRA, Dettmers et al. 2023 (arXiv:2305.14314), section 3; the bytes are bitsandbytes'. Codes of the nested
    scales are the nearest levels; bitsandbytes' CPU build takes a neighbour for about 2 in 1,000, closer than 1e-5 to
    the midpoint. The offset of nested scales is summed in fp64; bitsandbytes' fp32 sum depends on the thread count.
    """
    return NF4Weight.quantize(weight, block_size, double_quant)


def _check(weight: Tensor, block_size: int, double_quant: bool) -> None:
    check_float("nf4_quantize", "weight", weight, FLOAT_DTYPES)
    expect(block_size in BLOCK_SIZES, "nf4_quantize", "block_size", f"one of {BLOCK_SIZES}", block_size)
    expect(weight.numel() > 0, "nf4_quantize", "weight", "non-empty", weight)


def _fake(weight: Tensor, block_size: int, double_quant: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = {"nested_absmax": 0, "nested_offset": 0, **stored_sizes(weight.numel(), block_size, double_quant)}
    codes, absmax, nested_absmax, nested_offset = (
        weight.new_empty(sizes[field], dtype=torch.uint8)
        for field in ("codes", "absmax", "nested_absmax", "nested_offset")
    )
    return codes, absmax, nested_absmax, nested_offset


def _native_run(weight: Tensor, block_size: int, double_quant: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, absmax, *nothing = _fake(weight, block_size, double_quant=False)
    library = _native.library(weight)
    library.nf4_quantize(weight.contiguous(), block_size, codes, absmax)
    if not double_quant:
        return codes, absmax, nothing[0], nothing[1]
    offset = float_bytes(reference.mean(bytes_float(absmax)))
    blocks = absmax.numel() // 4
    nested_codes, nested_absmax = absmax.new_empty(blocks), absmax.new_empty(4 * -(-blocks // NESTED_BLOCK_SIZE))
    library.nf4_quantize_scales(absmax, offset, nested_codes, nested_absmax)
    return codes, nested_codes, nested_absmax, offset


def _native_unsupported(weight: Tensor, *_: Any) -> str | None:
    return _native.unsupported_anywhere(weight, weight.dtype)


define(
    "nf4_quantize(Tensor weight, int block_size, bool double_quant) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check,
    fake=_fake,
    backends=(
        Backend("native", _native_run, _native_unsupported, ("cpu", "cuda")),
        reference_backend(reference.quantize),
    ),
)
