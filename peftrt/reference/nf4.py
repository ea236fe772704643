"""NF4 quantisation and dequantisation, equal to bitsandbytes 0.50 bit for bit where it decodes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peftrt.formats.nf4 import (
    DYNAMIC_CODEBOOK,
    NESTED_BLOCK_SIZE,
    NF4_CODEBOOK,
    bytes_float,
    float_bytes,
    midpoints,
)

# Weights quantised at a time: bounds the fp32 temporaries to 32 MB each, and every index to 32 bits. Whole blocks.
CHUNK = 1 << 23
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # its reciprocal is finite, so that zeros stay zeros


def quantize(weight: Tensor, block_size: int, double_quant: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes uint8 [ceil(numel/2)], absmax (codes, or fp32 bytes), nested_absmax and nested_offset bytes (or empty)."""
    flat = weight.detach().reshape(-1)
    chunks = [_quantize_blocks(part, block_size, midpoints(NF4_CODEBOOK)) for part in flat.split(CHUNK)]
    codes = torch.cat([_pack(levels) for levels, _ in chunks])
    absmax = torch.cat([scales for _, scales in chunks])
    if not double_quant:
        empty = codes.new_empty(0)
        return codes, float_bytes(absmax), empty, empty.clone()
    offset = mean(absmax)
    nested_codes, nested_absmax = _quantize_blocks(absmax - offset, NESTED_BLOCK_SIZE, midpoints(DYNAMIC_CODEBOOK))
    return codes, nested_codes, float_bytes(nested_absmax), float_bytes(offset)


def mean(scales: Tensor) -> Tensor:
    """The offset of nested scales, fp32 [1]. Summed by rows: a sum of all would depend on the number of threads."""
    sums = scales.double()
    while sums.numel() > 1:
        sums = torch.nn.functional.pad(sums, (0, -sums.numel() % 256)).view(-1, 256).sum(dim=1)
    return (sums / scales.numel()).float()


def _quantize_blocks(values: Tensor, block_size: int, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest level of every value, uint8 [numel] (ties go down), and the blocks' largest magnitudes, fp32 [blocks].

    A block with a NaN has the magnitude NaN and the highest level throughout; one with an infinity has that level where
    a value is infinite, and the level of zero elsewhere.
    """
    numel = values.numel()
    padded = torch.nn.functional.pad(values.float(), (0, -numel % block_size)).view(-1, block_size)
    absmax = padded.abs().amax(dim=1)
    absmax = absmax.where(~absmax.isnan(), math.nan)  # one NaN for all, whatever a reduction makes of their bits
    # by the reciprocal, as bitsandbytes scales: a division would round a few values to the other side of a threshold
    scaled = padded * (1.0 / absmax.clamp(min=SMALLEST_SCALE)).unsqueeze(1)
    levels = torch.bucketize(scaled, thresholds.to(values.device), out_int32=True)
    return levels.to(torch.uint8).view(-1)[:numel], absmax


def _pack(levels: Tensor) -> Tensor:
    """Two levels a byte, the first in the high nibble; an odd count is filled up with the level of zero."""
    if levels.numel() % 2:
        levels = torch.nn.functional.pad(levels, (0, 1), value=7)
    return (levels[::2] << 4) | levels[1::2]


def block_scales(absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None) -> Tensor:
    """fp32 scale of every block: ``dynamic[absmax] * nested_absmax``, rounded, ``+ nested_offset``, rounded."""
    if nested_absmax is None or nested_offset is None:
        return bytes_float(absmax)
    codes = absmax.reshape(-1)
    steps = bytes_float(nested_absmax).repeat_interleave(NESTED_BLOCK_SIZE)[: codes.numel()]
    return DYNAMIC_CODEBOOK.to(codes.device)[codes.int()] * steps + bytes_float(nested_offset)


def dequantize(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight of ``shape`` in ``dtype``: ``round(nf4[code] * scale)``; fp64 holds the fp32 value."""
    packed = codes.reshape(-1)
    levels = torch.stack([packed >> 4, packed & 0xF], dim=1).view(-1)[: math.prod(shape)]
    scales = block_scales(absmax, nested_absmax, nested_offset).repeat_interleave(block_size)[: levels.numel()]
    return (NF4_CODEBOOK.to(packed.device)[levels.int()] * scales).to(dtype).view(*shape)
