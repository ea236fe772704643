"""gradient_norm: squares of many gradients, summed in fp64 in the one order that every backend has."""

from __future__ import annotations

import struct

import triton
import triton.language as tl
from torch import Tensor

from peftrt.kernels._launch import on_device

# Of a chunk's sum, and of the sum over chunks; the most elements of a chunk, by lanes.
LANES, FINAL_LANES = tl.constexpr(256), tl.constexpr(1024)
ROWS = tl.constexpr(16)


@triton.jit
def sum_halves(b_sum):
    """The upper half of the lanes is added to the lower, again and again; a sum of two has but one order."""
    HALVINGS: tl.constexpr = 10 if b_sum.shape[0] == FINAL_LANES else 8
    for _ in tl.static_range(HALVINGS - 1):
        b_sum = tl.sum(b_sum.reshape(2, b_sum.shape[0] // 2), axis=0)
    return tl.sum(b_sum, axis=0)


@triton.jit
def square_sums(address, first, count, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """fp64 [LANES]: lane l adds the squares of elements l, l + LANES, ... in turn."""
    p_first = address.to(tl.pointer_type(ELEMENT)) + first
    if ALIGNED:
        p_first = tl.multiple_of(p_first, 4 * (ELEMENT.primitive_bitwidth // 8))
    o_lane = tl.arange(0, LANES)
    b_sum = tl.zeros((LANES,), tl.float64)
    if count == ROWS * LANES:
        # without masks, which would have elements loaded one by one
        for i in tl.static_range(ROWS):
            b_value = tl.load(p_first + i * LANES + o_lane).to(tl.float32).to(tl.float64)
            b_sum += b_value * b_value
    else:
        for i in range(0, count, LANES):
            b_value = tl.load(p_first + i + o_lane, mask=i + o_lane < count, other=0.0).to(tl.float32).to(tl.float64)
            b_sum += b_value * b_value
    return b_sum


@triton.jit(do_not_specialize=["p_addresses", "p_chunks", "p_partials"])
def sum_chunk_kernel(p_addresses, p_chunks, p_partials, ALIGNED: tl.constexpr):
    """The sum of a chunk's squares a program; 0 where there is no gradient."""
    i_chunk = tl.program_id(0).to(tl.int64)
    p_chunk = p_chunks + i_chunk * 3
    i_tensor, first, count = tl.load(p_chunk), tl.load(p_chunk + 1), tl.load(p_chunk + 2).to(tl.int32)
    p_address = p_addresses + i_tensor * 3 + 1
    address, code = tl.load(p_address), tl.load(p_address + 1)
    b_sum = tl.zeros((LANES,), tl.float64)
    if address != 0:
        if code == 0:
            b_sum = square_sums(address, first, count, tl.float32, ALIGNED)
        elif code == 1:
            b_sum = square_sums(address, first, count, tl.bfloat16, ALIGNED)
        else:
            b_sum = square_sums(address, first, count, tl.float16, ALIGNED)
    tl.store(p_partials + i_chunk, sum_halves(b_sum))


@triton.jit(do_not_specialize=["p_partials", "p_out", "C", "max_norm"])
def gradient_norm_kernel(p_partials, p_out, C, max_norm, ROWS: tl.constexpr):
    """Norm and coefficient; ``max_norm``: the bits of an fp64 number, which Triton would take for fp32."""
    o_lane = tl.arange(0, FINAL_LANES)
    b_sum = tl.zeros((FINAL_LANES,), tl.float64)
    for i in range(0, C, ROWS * FINAL_LANES):
        for j in tl.static_range(ROWS):
            o = i + j * FINAL_LANES + o_lane
            b_sum += tl.load(p_partials + o, mask=o < C, other=0.0)
    norm = tl.sqrt(sum_halves(b_sum))
    coefficient = max_norm.to(tl.int64).to(tl.float64, bitcast=True) / (norm + 1e-6)
    tl.store(p_out, norm.to(tl.float32))
    # NaN is kept
    tl.store(p_out + 1, tl.where(coefficient > 1, 1.0, coefficient.to(tl.float32)))


# Of a chunk's 16 rows a thread has four elements each, 16 bytes of fp32. Chosen by compiled code; not measured on a
# device. sm_90's (Triton 3.7.1, November 2026) has 32 registers, so that 32 programs fit a multiprocessor. The final
# sum, of one program, has four rows in flight.
WARPS, FINAL_ROWS, FINAL_WARPS = 2, 4, 8


def gradient_norm(
    addresses: Tensor, chunks: Tensor, partials: Tensor, max_norm: float, out: Tensor, aligned: bool
) -> None:
    """Norm over all gradients, and the coefficient that clips it, in two launches.

    Args:
        addresses: int64 [T, 3], of which the second is of a gradient, 0 where there is none, and the third its dtype: 0
            for fp32, 1 for bf16, 2 for fp16.
        chunks: int64 [C, 3]: tensor, first element, how many, 4096 at most.
        partials: fp64 [C]; written.
        max_norm: above 0.
        out: fp32 [2]; written.
        aligned: chunks begin at multiples of 16 bytes.
    All are contiguous and on one device.
    """
    C = chunks.shape[0]
    with on_device(out):
        if C:
            sum_chunk_kernel[(C,)](
                addresses, chunks, partials, ALIGNED=aligned, num_warps=WARPS, enable_fp_fusion=False
            )
        bits = struct.unpack("<q", struct.pack("<d", max_norm))[0]
        gradient_norm_kernel[(1,)](
            partials, out, C, bits, ROWS=FINAL_ROWS, num_warps=FINAL_WARPS, enable_fp_fusion=False
        )
