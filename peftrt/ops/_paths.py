"""Which way a product with a base weight goes on a GPU: one table, by device class, pass, size of an element and rows.

``DECODE``: native CUDA, codes into the tensor cores without a decoded copy. ``TILE``: Triton, tiles of W decoded on the
way to the tensor cores. ``PANELS``: part of W decoded into a scratch, multiplied by cuBLAS, and so on part by part; it
belongs to whichever backend decodes.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from peftrt.ops._invariant import invariant

DECODE, TILE, PANELS = "decode", "tile", "panels"
# Rows of bf16 and fp16 that the CUDA library multiplies itself: on any device and of any weight; and where the device
# has warpgroups, of weights whose K is a multiple of CHUNK.
NATIVE_ROWS, WIDE_ROWS = 64, 512
CHUNK = 32


class Limits(NamedTuple):
    """The largest number of rows that goes by DECODE where that can be, and by TILE where not; more go by PANELS."""

    decode: int
    tile: int


# **Nothing here is measured on a device**: the limits lie where shares of the tensor cores' peak cross, counted from
# compiled code (Triton 3.7.1 for sm_90, nested scales) and data sheets, November 2026.
# - TILE decodes a weight in 7.3 instructions for 128 rows, 6.8 for 64, with 128 issued a clock and multiprocessor. If
#   nothing overlapped, products would get 52 % of the time on sm_90 (128 rows, 2048 products a clock), 54 % on sm_80
#   (64 rows, 1024 a clock), 35 % on sm_100 (4096 a clock); two programs a multiprocessor overlap in part.
# - PANELS reads half a byte and writes two for each weight before cuBLAS starts, the time of so many rows of products:
#   253 on an H200 (4.8 TB/s, 989 TFLOP/s), 203 on an A100, 351 on a B200, 308 on an MI300X. Of M rows' time that leaves
#   M / (M + 253) on an H200: 50 % at 256, 67 % at 512, 89 % at 2048.
# - DECODE has two kernels. That for 32 rows and fewer (64, where there is no other) is bound by shared memory, or by
#   HBM. The other needs warpgroups, so sm_90a; it is bound by shared memory too, which leaves the tensor cores 84 % for
#   128 rows (csrc/cuda/wide_kernel.h has the counts), where TILE leaves them 52 % and what overlaps, and PANELS 67 % at
#   512 rows.
# - fp32: decoding first costs the time of some 28 rows, and cuBLAS multiplies in fp32, where a tile of Triton's takes
#   three products of TF32.
# - lora, y and dX over NF4: as above, but the adapter's share costs PANELS a write and a read more of the result: on an
#   H200 412 / K of the products' time, a tenth at K = 4096 (306 / K on an A100, 562 on a B200, 493 on an MI300X). In a
#   tile it is nothing to speak of. Limits are higher where a tenth matters.
# - lora and many adapters by DECODE: the base's kernel for 64 rows and fewer and a launch before it, of forward passes
#   without dropout. At 28672 x 4096 and R = 16 some 16 us are counted for it, 27 for a tile of Triton's
#   (csrc/cuda/adapter_share.h).
# - lora_dense, over a dense base: up to some 206 rows on an H200 both ways are bound by reading W, and TILE passes over
#   y once. With more, a tile of 128 x 128 takes 67 bytes a clock from the L2 at the tensor cores' peak, more than the
#   64 that a multiprocessor is given; cuBLAS shares them in clusters.
TABLE: dict[str, dict[tuple[str, int], Limits]] = {
    "sm_80": {
        ("forward", 2): Limits(NATIVE_ROWS, 255),
        ("dx", 2): Limits(0, 255),
        ("forward", 4): Limits(0, 127),
        ("dx", 4): Limits(0, 127),
        ("lora", 2): Limits(NATIVE_ROWS, 255),
        ("lora", 4): Limits(0, 127),
        ("lora_dense", 2): Limits(0, 255),
        ("lora_dense", 4): Limits(0, 127),
    },
    "sm_90": {
        ("forward", 2): Limits(WIDE_ROWS, 511),
        ("dx", 2): Limits(0, 511),
        ("forward", 4): Limits(0, 127),
        ("dx", 4): Limits(0, 127),
        ("lora", 2): Limits(NATIVE_ROWS, 639),
        ("lora", 4): Limits(0, 127),
        ("lora_dense", 2): Limits(0, 255),
        ("lora_dense", 4): Limits(0, 127),
    },
    "sm_100": {
        ("forward", 2): Limits(NATIVE_ROWS, 255),
        ("dx", 2): Limits(0, 255),
        ("forward", 4): Limits(0, 127),
        ("dx", 4): Limits(0, 127),
        ("lora", 2): Limits(NATIVE_ROWS, 255),
        ("lora", 4): Limits(0, 127),
        ("lora_dense", 2): Limits(0, 255),
        ("lora_dense", 4): Limits(0, 127),
    },
    "hip": {
        ("forward", 2): Limits(0, 511),
        ("dx", 2): Limits(0, 511),
        ("forward", 4): Limits(0, 255),
        ("dx", 4): Limits(0, 255),
        ("lora", 2): Limits(0, 639),
        ("lora", 4): Limits(0, 255),
        ("lora_dense", 2): Limits(0, 255),
        ("lora_dense", 4): Limits(0, 255),
    },
}
# Rows up to which multi_lora_linear takes each by itself, in fp32, and not in tiles of 32 rows of a slot: so few that
# most slots of a batch have one or two of them. Not measured on a device.
MULTI_LORA_ROWS = 64
_LEAST_CAPABILITY = {"sm_100": (10, 0), "sm_90": (9, 0), "sm_80": (0, 0)}


def rows_of(x: Tensor) -> int:
    """M of ``x [..., K]``."""
    return math.prod(x.shape[:-1])


def nearest(capability: tuple[int, int]) -> str:
    """The newest class of the table that is not newer than the device, or the oldest."""
    return next(name for name, least in _LEAST_CAPABILITY.items() if capability >= least)


@functools.cache
def device_class(device: torch.device) -> str:
    """The part of the table for a GPU; a device of another class takes the nearest one's."""
    return "hip" if torch.version.hip else nearest(torch.cuda.get_device_capability(device))


def path(direction: str, x: Tensor, *, decodes: bool = True) -> str | None:
    """DECODE, TILE or PANELS for ``x [..., K]``, or for a gradient ``dy [..., N]``.

    ``direction`` is ``"forward"`` or ``"dx"``; with an adapter ``"lora"`` or ``"lora_dense"`` for both. ``decodes`` is
    whether the call can go by DECODE. None where x is on no GPU, or of a dtype that is not in the table. Under
    :func:`peftrt.batch_invariant` all go by TILE.
    """
    if x.device.type != "cuda":
        return None
    limits = TABLE[device_class(x.device)].get((direction, x.element_size()))
    if limits is None:
        return None
    if invariant():
        return TILE
    rows = rows_of(x)
    if decodes and rows <= limits.decode:
        return DECODE
    return TILE if rows <= limits.tile else PANELS
