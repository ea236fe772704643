"""The state of AdamW as it lies in a page: two moments of many tensors, in fp32 or in 8 bits.

A page of n bytes has room for C elements, a multiple of ``BLOCK``; a tensor begins at a multiple of ``BLOCK``.

====  ==========================================================================  ================
bits  what lies in a page, one behind the other                                   bytes an element
====  ==========================================================================  ================
32    exp_avg fp32 [C], exp_avg_sq fp32 [C]                                       8
8     their codes uint8 [C] and [C], their scales fp32 [C / BLOCK] and [C/BLOCK]  2.03
====  ==========================================================================  ================

An 8-bit moment is ``map[code] * scale``, the scale the largest magnitude of its block: the dynamic maps of Dettmers et
al. 2021, "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861), section 2, as bitsandbytes has them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peftrt.formats.nf4 import DYNAMIC_CODEBOOK, dynamic_decade, midpoints

BLOCK = 256
BITS = (32, 8)


def _unsigned_codebook() -> Tensor:
    """As ``DYNAMIC_CODEBOOK``, without signs: 2^(i + 1) magnitudes in decade i."""
    values = [0.0, 1.0]
    for decade in range(7):
        values += dynamic_decade(decade, 2 ** (decade + 1)).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


EXP_AVG_MAP = DYNAMIC_CODEBOOK
EXP_AVG_SQ_MAP = _unsigned_codebook()


class Moments(NamedTuple):
    """Views into a page; the scales are None for fp32."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_scale: Tensor | None = None
    exp_avg_sq_scale: Tensor | None = None

    def narrow(self, start: int, count: int) -> Moments:
        """Those of ``count`` elements from ``start``, a multiple of ``BLOCK``."""
        first, blocks = start // BLOCK, -(-count // BLOCK)
        scales = (None if s is None else s[first : first + blocks] for s in self[2:])
        return Moments(self.exp_avg[start : start + count], self.exp_avg_sq[start : start + count], *scales)


def block_bytes(bits: int) -> int:
    """What the state of a block takes."""
    return 8 * BLOCK if bits == 32 else 2 * BLOCK + 8


def capacity(page_bytes: int, bits: int) -> int:
    """How many elements a page has room for."""
    return page_bytes // block_bytes(bits) * BLOCK


def moments(page: Tensor, bits: int) -> Moments:
    """A page's parts; ``page`` is uint8 [page_bytes], aligned to 16 bytes."""
    room = capacity(page.numel(), bits)
    if bits == 32:
        floats = page[: 8 * room].view(torch.float32)
        return Moments(floats[:room], floats[room:])
    scales = page[2 * room : 2 * room + room // BLOCK * 8].view(torch.float32)
    return Moments(page[:room], page[room : 2 * room], scales[: room // BLOCK], scales[room // BLOCK :])


def dequantize(codes: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    """uint8 [n] codes and fp32 [ceil(n / BLOCK)] scales -> fp32 [n]: one rounded product each."""
    return codebook.to(codes.device)[codes.int()] * _spread(scale, codes.numel())


def quantize(values: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [n] -> codes uint8 [n] and scales fp32 [ceil(n / BLOCK)].

    The scale is the largest magnitude of the block (NaN where one is), and the code the number of the map's midpoints
    below ``value / scale``: the nearest level, a tie down, NaN at the top. A block of zeros has scale 0 and the codes
    of 0.
    """
    blocks = torch.nn.functional.pad(values.abs(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.amax(dim=1)
    spread = _spread(scale, values.numel())
    scaled = torch.where(spread == 0, 0.0, values / spread)
    return torch.bucketize(scaled, midpoints(codebook).to(values.device)).to(torch.uint8), scale


def _spread(scale: Tensor, count: int) -> Tensor:
    return scale.repeat_interleave(BLOCK)[:count]
