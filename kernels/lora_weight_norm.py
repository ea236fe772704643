"""lora_weight_norm: the norms of the rows of W + s B A, of which no more than a tile is ever held."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftrt.kernels._adapter import RANKS, exact_dot
from peftrt.kernels._launch import on_device
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
from peftrt.kernels._schedule import PRECISION, architecture_of, split_steps
from peftrt.kernels.lora_linear import Weight, stored


@triton.jit
def lora_weight_norm_kernel(
    p_weight,
    p_absmax,
    p_nested_absmax,
    p_nested_offset,
    p_tables,
    p_a,
    p_b,
    p_out,
    N,
    K,
    R,
    row_bytes,
    stride_n,
    stride_k,
    steps,
    scaling,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    NESTED: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums of squares of BM rows over ``steps`` steps of K: fp32 [splits, N]. W is fp32 here, not rounded."""
    i_first = tl.program_id(1) * steps
    i_last = tl.minimum(i_first + steps, tl.cdiv(K, BK))
    o_n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_n = o_n < N
    p_scales = (p_absmax, p_nested_absmax, p_nested_offset)
    if not DENSE:
        b_codebook = codebook(p_tables, BM)
    b_squares = tl.zeros((BM,), tl.float32)
    for i in range(i_first, i_last):
        o_k = (i * BK + tl.arange(0, BK)).to(tl.int64)
        m_k = o_k < K
        if DENSE:
            p_tile = p_weight + o_n[:, None] * stride_n + o_k[None, :] * stride_k
            b_w = tl.load(p_tile, mask=m_n[:, None] & m_k[None, :], other=0.0).to(tl.float32)
        elif ALIGNMENT == CHUNKS:
            o_byte = i * (BK // 2) + tl.arange(0, BK // 2)
            p_byte = p_weight + o_n[:, None] * row_bytes + o_byte[None, :]
            b_codes = tl.load(p_byte, mask=m_n[:, None] & (o_byte < row_bytes)[None, :], other=0)
            b_absmax, b_step = load_chunk_scales(p_scales, o_n * K, m_n, i * BK, K, BLOCK, BK, NESTED)
            # what lies past a row's end has the scale of nothing, which nesting decodes to the offset
            b_scale = decode_scales(b_absmax, b_step, p_scales, p_tables, NESTED)
            b_w = tl.where(m_n[:, None] & m_k[None, :], scale_chunks(levels(b_codes, b_codebook), b_scale), 0.0)
        else:
            b_w = straddling_tile(
                p_weight, p_scales, p_tables, b_codebook, o_n * K, m_n, i * BK, K, BLOCK, BK, ALIGNMENT, NESTED
            )
        for i_r in tl.range(0, R, BR, num_stages=1):
            o_r = i_r + tl.arange(0, BR)
            m_r = o_r < R
            p_row = p_b + o_n[:, None] * R + o_r[None, :]
            b_b = tl.load(p_row, mask=m_n[:, None] & m_r[None, :], other=0.0).to(tl.float32) * scaling
            p_column = p_a + o_r.to(tl.int64)[:, None] * K + o_k[None, :]
            b_a = tl.load(p_column, mask=m_r[:, None] & m_k[None, :], other=0.0).to(tl.float32)
            b_w = exact_dot(b_b, b_a, b_w, PRECISION)
        b_squares += tl.sum(b_w * b_w, axis=1)
    tl.store(p_out + tl.program_id(1).to(tl.int64) * N + o_n, b_squares, mask=m_n)


# 32 rows: mma.sync, whose operands may come from registers. Chosen by compiled code; not measured on a device.
ROWS, COLUMNS, WARPS, STAGES = 32, 128, 4, 2


def lora_weight_norm(weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float, out: Tensor) -> None:
    """``out[n] = || W[n] + scaling B[n] A ||_2`` with W in fp32: code times scale, or a dense weight's values.

    Args:
        weight: W [N, K], NF4 or dense (fp32, bf16 or fp16; any strides).
        lora_A: [R, K], fp32, bf16 or fp16, contiguous.
        lora_B: [N, R], fp32, bf16 or fp16, contiguous.
        scaling: s.
        out: fp32 [N].
    """
    (N, R), K = lora_B.shape, lora_A.shape[1]
    if N == 0:
        return
    dense = isinstance(weight, Tensor)
    base, *scales, tables, block_size = (weight, out, None, None, out, 1) if dense else weight
    architecture, total = architecture_of(out.device), triton.cdiv(K, COLUMNS)
    tiles = triton.cdiv(N, ROWS)
    steps = split_steps(tiles, total, out.device)
    parts = torch.empty((max(triton.cdiv(total, steps), 1), N), dtype=torch.float32, device=out.device)
    with on_device(out):
        lora_weight_norm_kernel[(tiles, parts.shape[0])](
            base,
            *stored(scales),
            tables,
            lora_A,
            lora_B,
            parts,
            N,
            K,
            R,
            K // 2,
            *(base.stride() if dense else (0, 0)),
            steps,
            scaling,
            DENSE=dense,
            BLOCK=block_size,
            ALIGNMENT=CHUNKS.value if dense else alignment(K, block_size),
            NESTED=scales[1] is not None,
            BM=ROWS,
            BK=COLUMNS,
            BR=RANKS,
            PRECISION=PRECISION[architecture] if out.is_cuda else "ieee",
            num_warps=WARPS,
            num_stages=STAGES,
            enable_fp_fusion=False,
        )
        torch.sum(parts, 0, out=out).sqrt_()
