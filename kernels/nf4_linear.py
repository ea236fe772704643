"""nf4_linear: y = x W^T + b, and dX = dY W, with NF4 weights decoded tile by tile on the way to the tensor cores."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftrt.kernels._launch import on_device, processors
from peftrt.kernels._nf4 import (
    CHUNKS,
    alignment,
    codebook,
    decode_scales,
    levels,
    load_chunk_scales,
    scale_chunks,
    straddling_tile,
)


@triton.jit
def nf4_linear_kernel(
    p_x,
    p_codes,
    p_absmax,
    p_nested_absmax,
    p_nested_offset,
    p_tables,
    p_bias,
    p_out,
    M,
    N,
    K,
    row_bytes,
    steps,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    NESTED: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile [BM, BN] of y. Where SPLIT, a sum over ``steps`` steps of K only, without bias: fp32 [splits, M, N].

    The weight is the operand in shared memory: as the one in registers, Triton would overwrite it while wgmma still
    reads (triton #9433).
    """
    # neighbouring programs share a tile of W
    i_m = tl.program_id(0) % tl.cdiv(M, BM)
    i_n = tl.program_id(0) // tl.cdiv(M, BM)
    i_first = tl.program_id(1) * steps
    i_last = tl.minimum(i_first + steps, tl.cdiv(K, BK))
    o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)
    o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    m_m = o_m < M
    m_n = o_n < N
    p_scales = (p_absmax, p_nested_absmax, p_nested_offset)
    b_codebook = codebook(p_tables, BN)
    b_sum = tl.zeros((BM, BN), tl.float32)
    if ALIGNMENT == CHUNKS:
        # scales are loaded a step ahead: behind a nested one is a chain of loads
        b_absmax, b_step = load_chunk_scales(p_scales, o_n * K, m_n, i_first * BK, K, BLOCK, BK, NESTED)
    for i in range(i_first, i_last):
        o_k = i * BK + tl.arange(0, BK)
        m_k = o_k < K
        b_x = tl.load(p_x + o_m[:, None] * K + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        if ALIGNMENT == CHUNKS:
            o_byte = i * (BK // 2) + tl.arange(0, BK // 2)
            p_byte = p_codes + o_n[:, None] * row_bytes + o_byte[None, :]
            b_codes = tl.load(p_byte, mask=m_n[:, None] & (o_byte < row_bytes)[None, :], other=0)
            b_scale = decode_scales(b_absmax, b_step, p_scales, p_tables, NESTED)
            b_absmax, b_step = load_chunk_scales(p_scales, o_n * K, m_n, (i + 1) * BK, K, BLOCK, BK, NESTED)
            b_w = scale_chunks(levels(b_codes, b_codebook), b_scale)
        else:
            b_w = straddling_tile(
                p_codes, p_scales, p_tables, b_codebook, o_n * K, m_n, i * BK, K, BLOCK, BK, ALIGNMENT, NESTED
            )
        b_sum = tl.dot(b_x, b_w.to(b_x.dtype).T, b_sum, input_precision=PRECISION)
    if BIAS:
        b_sum += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if SPLIT:
        p_out += tl.program_id(1).to(tl.int64) * M * N
    p_tile = p_out + o_m[:, None] * N + o_n[None, :]
    tl.store(p_tile, b_sum.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def nf4_linear_dx_kernel(
    p_dy,
    p_codes,
    p_absmax,
    p_nested_absmax,
    p_nested_offset,
    p_tables,
    p_out,
    M,
    N,
    K,
    row_bytes,
    steps,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    NESTED: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile [BM, BK] of dX. Where SPLIT, a sum over ``steps`` steps of N only: fp32 [splits, M, K]."""
    i_m = tl.program_id(0) % tl.cdiv(M, BM)
    i_k = tl.program_id(0) // tl.cdiv(M, BM) * BK
    i_first = tl.program_id(1) * steps
    i_last = tl.minimum(i_first + steps, tl.cdiv(N, BN))
    o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)
    m_m = o_m < M
    p_scales = (p_absmax, p_nested_absmax, p_nested_offset)
    b_codebook = codebook(p_tables, BN)
    b_sum = tl.zeros((BM, BK), tl.float32)
    if ALIGNMENT == CHUNKS:
        o_next = (i_first * BN + tl.arange(0, BN)).to(tl.int64)
        b_absmax, b_step = load_chunk_scales(p_scales, o_next * K, o_next < N, i_k, K, BLOCK, BK, NESTED)
    for i in range(i_first, i_last):
        o_n = (i * BN + tl.arange(0, BN)).to(tl.int64)
        m_n = o_n < N
        b_dy = tl.load(p_dy + o_m[:, None] * N + o_n[None, :], mask=m_m[:, None] & m_n[None, :], other=0.0)
        if ALIGNMENT == CHUNKS:
            o_byte = i_k // 2 + tl.arange(0, BK // 2)
            p_byte = p_codes + o_n[:, None] * row_bytes + o_byte[None, :]
            b_codes = tl.load(p_byte, mask=m_n[:, None] & (o_byte < row_bytes)[None, :], other=0)
            b_scale = decode_scales(b_absmax, b_step, p_scales, p_tables, NESTED)
            o_next = o_n + BN
            b_absmax, b_step = load_chunk_scales(p_scales, o_next * K, o_next < N, i_k, K, BLOCK, BK, NESTED)
            b_w = scale_chunks(levels(b_codes, b_codebook), b_scale)
        else:
            b_w = straddling_tile(
                p_codes, p_scales, p_tables, b_codebook, o_n * K, m_n, i_k, K, BLOCK, BK, ALIGNMENT, NESTED
            )
        b_sum = tl.dot(b_dy, b_w.to(b_dy.dtype), b_sum, input_precision=PRECISION)
    if SPLIT:
        p_out += tl.program_id(1).to(tl.int64) * M * K
    o_k = i_k + tl.arange(0, BK)
    p_tile = p_out + o_m[:, None] * K + o_k[None, :]
    tl.store(p_tile, b_sum.to(p_out.dtype.element_ty), mask=m_m[:, None] & (o_k < K)[None, :])


@triton.jit
def sum_splits_kernel(p_parts, p_bias, p_out, numel, columns, splits, BIAS: tl.constexpr, SIZE: tl.constexpr):
    """out = the parts of all splits, summed in their order, + bias: the same bits in every run."""
    o = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    m = o < numel
    b_sum = tl.zeros((SIZE,), tl.float32)
    p_part = p_parts + o
    for _ in range(splits):
        b_sum += tl.load(p_part, mask=m, other=0.0)
        p_part += numel
    if BIAS:
        b_sum += tl.load(p_bias + o % columns, mask=m, other=0.0).to(tl.float32)
    tl.store(p_out + o, b_sum.to(p_out.dtype.element_ty), mask=m)


@dataclass(frozen=True)
class Config:
    """A tile and its schedule, for calls of up to ``rows`` rows.

    The sum runs over BK in the forward pass and over BN in dX. ``split`` shares it among programs where the tiles of
    the fewest rows that come here would not fill the device.
    """

    rows: int
    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    split: bool = False


MANY = 1 << 62


def _ranges(rows: tuple[int, ...], *tile: int, **schedule: Any) -> tuple[Config, ...]:
    """One tile for several ranges of rows, each of which splits its sums for itself."""
    return tuple(Config(most, *tile, **schedule) for most in rows)


# For whole chunks, by architecture (sm_90 and up, sm_8x, AMD), pass and bytes of an element. Chosen by compiled code
# alone: instructions a weight, no spills, shared memory under 99 KB (64 KB on AMD). Not measured on a device. At
# least 64 weights a thread, so that each scale of a tile is decoded once; BM under 64 for fp32, so that mma.sync is
# chosen and not wgmma from registers. From 65 rows on sm_90 tiles are small enough for two programs a multiprocessor,
# one of which decodes while the other multiplies. Hundreds of rows are the most that come here (peftrt/ops/_paths.py),
# except where blocks straddle rows; ranges end where a tile of rows begins, so that sums are split no more than needed.
CONFIGS: dict[tuple[str, str, int], tuple[Config, ...]] = {
    ("sm_90", "forward", 2): (
        Config(16, 16, 128, 64, warps=4, stages=4, split=True),
        Config(64, 64, 128, 64, warps=4, stages=3, split=True),
        *_ranges((128, 256, MANY), 128, 128, 64, warps=4, stages=3, split=True),
    ),
    ("sm_90", "dx", 2): (
        Config(16, 16, 64, 128, warps=4, stages=4, split=True),
        Config(64, 64, 64, 128, warps=4, stages=4, split=True),
        *_ranges((128, 256, MANY), 128, 64, 128, warps=4, stages=3, split=True),
    ),
    ("sm_90", "forward", 4): _ranges((32, MANY), 32, 128, 64, warps=8, stages=2, split=True),
    ("sm_90", "dx", 4): _ranges((32, MANY), 32, 64, 128, warps=8, stages=2, split=True),
    # mma.sync takes both operands from registers: larger tiles spill
    ("sm_80", "forward", 2): (
        Config(16, 16, 128, 64, warps=4, stages=4, split=True),
        *_ranges((64, 128, MANY), 64, 128, 64, warps=4, stages=3, split=True),
    ),
    ("sm_80", "dx", 2): (
        Config(16, 16, 64, 128, warps=4, stages=4, split=True),
        *_ranges((64, 128, MANY), 64, 64, 128, warps=4, stages=4, split=True),
    ),
    ("sm_80", "forward", 4): _ranges((32, MANY), 32, 128, 64, warps=8, stages=2, split=True),
    ("sm_80", "dx", 4): _ranges((32, MANY), 32, 64, 128, warps=8, stages=2, split=True),
    ("hip", "forward", 2): (
        Config(16, 16, 128, 64, warps=4, stages=2, split=True),
        *_ranges((128, MANY), 128, 128, 64, warps=4, stages=2, split=True),
    ),
    ("hip", "dx", 2): (
        Config(16, 16, 64, 128, warps=4, stages=2, split=True),
        *_ranges((128, MANY), 128, 64, 128, warps=4, stages=2, split=True),
    ),
    ("hip", "forward", 4): _ranges((32, MANY), 32, 64, 64, warps=4, stages=2, split=True),
    ("hip", "dx", 4): _ranges((32, MANY), 32, 64, 64, warps=4, stages=2, split=True),
}
# Where blocks straddle rows, on every device and in both passes, by bytes of an element. Gradients of any number of
# rows come here: columns cannot be decoded apart.
STRADDLING_CONFIGS: dict[int, tuple[Config, ...]] = {
    2: (
        Config(16, 16, 64, 64, warps=4, stages=2, split=True),
        *_ranges((128, 512), 128, 64, 64, warps=8, stages=2, split=True),
        Config(MANY, 128, 64, 64, warps=8, stages=2),
    ),
    4: (
        *_ranges((32, 128), 32, 64, 64, warps=8, stages=1, split=True),
        Config(MANY, 32, 64, 64, warps=8, stages=1),
    ),
}
# Products of fp32: three of TF32 on NVIDIA's tensor cores (errors near 1e-6), plain fp32 on AMD and in the interpreter.
PRECISION = {"sm_90": "tf32x3", "sm_80": "tf32x3", "hip": "ieee"}
LEAST_STEPS = 4
SUM_SIZE = 1024


def configs(architecture: str, dx: bool, itemsize: int, align: int) -> tuple[Config, ...]:
    """The configurations of a kernel by rows; ``align`` is what ``alignment`` says."""
    if align != CHUNKS.value:
        return STRADDLING_CONFIGS[itemsize]
    return CONFIGS[architecture, "dx" if dx else "forward", itemsize]


@functools.cache
def architecture_of(device: torch.device) -> str:
    """The part of the table for a device; the interpreter takes the largest."""
    if torch.version.hip:
        return "hip"
    return "sm_80" if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0) else "sm_90"


def nf4_linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    tables: Tensor,
    block_size: int,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """``out = x W^T + bias``, with W rounded to x's dtype and sums in fp32.

    Args:
        x: [M, K], fp32, bf16 or fp16.
        codes, absmax, nested_absmax, nested_offset, tables, block_size: as of ``nf4_dequantize``, for W [N, K].
        bias: [N] in x's dtype, or None.
        out: [M, N] in x's dtype.
    All are contiguous, on one device, and of the sizes said: the operation has checked them.
    """
    _launch(x, codes, absmax, nested_absmax, nested_offset, tables, block_size, bias, out, dx=False)


def nf4_linear_dx(
    dy: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    tables: Tensor,
    block_size: int,
    out: Tensor,
) -> None:
    """``out = dy W``, dy [M, N], out [M, K]; the rest as of :func:`nf4_linear`."""
    _launch(dy, codes, absmax, nested_absmax, nested_offset, tables, block_size, None, out, dx=True)


def _launch(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    tables: Tensor,
    block_size: int,
    bias: Tensor | None,
    out: Tensor,
    dx: bool,
) -> None:
    if out.numel() == 0:
        return
    M = x.shape[0]
    N, K = (x.shape[1], out.shape[1]) if dx else (out.shape[1], x.shape[1])
    architecture = architecture_of(x.device)
    align = alignment(K, block_size)
    config, fewest = _config(configs(architecture, dx, x.element_size(), align), M)
    tiles = triton.cdiv(K, config.BK) if dx else triton.cdiv(N, config.BN)
    total = triton.cdiv(N, config.BN) if dx else triton.cdiv(K, config.BK)
    steps = _steps(config, tiles * triton.cdiv(fewest, config.BM), total, x.device)
    splits = triton.cdiv(total, steps)
    parts = out if splits == 1 else out.new_empty((splits, M, out.shape[1]), dtype=torch.float32)
    nested = nested_absmax is not None
    scales = (absmax, nested_absmax, nested_offset) if nested else (absmax, absmax, absmax)
    constants = {"BLOCK": block_size, "ALIGNMENT": align, "NESTED": nested, "SPLIT": splits > 1}
    constants |= {"BM": config.BM, "BN": config.BN, "BK": config.BK}
    constants["PRECISION"] = PRECISION[architecture] if x.is_cuda else "ieee"
    constants |= {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": False}
    grid = (triton.cdiv(M, config.BM) * tiles, splits)
    with on_device(x):
        if dx:
            nf4_linear_dx_kernel[grid](x, codes, *scales, tables, parts, M, N, K, K // 2, steps, **constants)
        else:
            constants["BIAS"] = bias is not None and splits == 1
            addend = x if bias is None else bias
            nf4_linear_kernel[grid](x, codes, *scales, tables, addend, parts, M, N, K, K // 2, steps, **constants)
        if splits > 1:
            sum_splits_kernel[(triton.cdiv(out.numel(), SUM_SIZE),)](
                parts,
                out if bias is None else bias,
                out,
                out.numel(),
                out.shape[1],
                splits,
                BIAS=bias is not None,
                SIZE=SUM_SIZE,
            )


def _config(ranges: tuple[Config, ...], M: int) -> tuple[Config, int]:
    """The configuration for M rows, and the fewest rows that it serves."""
    fewest = 1
    for config in ranges:
        if config.rows >= M:
            break
        fewest = config.rows + 1
    return config, fewest


def _steps(config: Config, tiles: int, total: int, device: torch.device) -> int:
    """Steps of the sum that a program takes, so that ``tiles`` and their splits are two programs a multiprocessor.

    Never more, which would wait for a second round. ``tiles`` are those of the fewest rows of the configuration's
    range: M has no say, so that a row's bits depend on its own values within the range.
    """
    if not config.split:
        return max(total, 1)
    splits = min(2 * processors(device) // tiles, total // LEAST_STEPS)
    return triton.cdiv(total, max(splits, 1))
