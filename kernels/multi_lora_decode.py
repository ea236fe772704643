"""multi_lora_linear for a few rows: every row reads its own adapter, whose products are multiplied and added in fp32.

Nothing is sorted and nothing shared, so that a row's bits are its own: not the tensor cores but memory is what a few
rows wait for, and rows of one adapter find its pages in the L2. Two launches around that of the base: x A^T, then B, of
which the programs also add up the parts of the base's sums, and round once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftrt.kernels._launch import on_device
from peftrt.kernels._slots import (
    PAGE,
    Table,
    add_base,
    are_aligned,
    finish,
    is_bad,
    load_pages,
    load_ranks,
    part_of_tile,
    ranks_of_block,
    slots_of,
    splits_of,
)


@triton.jit
def scale_rows_kernel(p_x, p_vectors, p_starts, p_slot_ids, p_out, K, E, SIZE: tl.constexpr):
    """x' = x * x_scale of the row's slot, rounded to x's dtype; x itself where the slot has none."""
    i_row = tl.program_id(0) // tl.cdiv(K, SIZE)
    o_k = tl.program_id(0) % tl.cdiv(K, SIZE) * SIZE + tl.arange(0, SIZE)
    m_k = o_k < K
    i_slot = slots_of(tl.load(p_slot_ids + i_row), E)
    start = tl.load(p_starts + i_slot * 3, mask=i_slot >= 0, other=-1)
    o_x = i_row.to(tl.int64) * K + o_k
    b_x = tl.load(p_x + o_x, mask=m_k, other=0.0).to(tl.float32)
    b_x *= tl.load(p_vectors + start + o_k, mask=m_k & (start >= 0), other=1.0)
    tl.store(p_out + o_x, b_x.to(p_out.dtype.element_ty), mask=m_k)


@triton.jit
def shrink_row(
    p_x, p_values, b_page, o_r, m_r, i_first, i_last, K, BR: tl.constexpr, BK: tl.constexpr, ALIGNED: tl.constexpr
):
    """Products of a row of x with ranks of A over steps ``[i_first, i_last)`` of K, summed by place: [BR, BK]."""
    b_sum = tl.zeros((BR, BK), tl.float32)
    for i in range(i_first, i_last):
        o_k = i * BK + tl.arange(0, BK)
        m_k = o_k < K
        b_x = tl.load(p_x + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_sum += load_ranks(p_values, b_page, o_r, m_r, o_k, m_k, K, ALIGNED).to(tl.float32) * b_x[None, :]
    return b_sum


@triton.jit(do_not_specialize=["M"])
def shrink_rows_kernel(
    p_x,
    p_values,
    p_ranks,
    p_pages,
    p_slot_ids,
    p_flag,
    p_out,
    M,
    K,
    E,
    P,
    W,
    steps,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """x A^T of a row, BR ranks of a part, a split of K: fp32 [splits, M, P * 8 W], only the slot's own ranks."""
    i_row = tl.program_id(0)
    blocks = tl.maximum(tl.cdiv(W * PAGE, BR), 1)
    i_part = tl.program_id(1) // blocks
    o_r = tl.program_id(1) % blocks * BR + tl.arange(0, BR)
    b_id = tl.load(p_slot_ids + i_row)
    tl.store(p_flag, 1, mask=is_bad(b_id, E))
    i_slot = slots_of(b_id, E)
    i_entry = i_slot * P + i_part
    rank = tl.load(p_ranks + i_entry, mask=i_slot >= 0, other=0)
    if tl.program_id(1) % blocks * BR < rank:
        i_first = tl.program_id(2) * steps
        i_last = tl.minimum(i_first + steps, tl.cdiv(K, BK))
        m_r = o_r < rank
        b_page = load_pages(p_pages, i_entry, W, o_r, m_r)
        p_row = p_x + i_row.to(tl.int64) * K
        # the places are added up behind both branches, in one order
        if are_aligned(b_page, K):
            b_sum = shrink_row(p_row, p_values, b_page, o_r, m_r, i_first, i_last, K, BR, BK, True)
        else:
            b_sum = shrink_row(p_row, p_values, b_page, o_r, m_r, i_first, i_last, K, BR, BK, False)
        o_out = (tl.program_id(2).to(tl.int64) * M + i_row) * (P * W * PAGE) + i_part * W * PAGE + o_r
        tl.store(p_out + o_out, tl.sum(b_sum, axis=1), mask=m_r)


@triton.jit
def expand_row(
    p_shrunk,
    o_split,
    p_values,
    p_pages,
    i_entry,
    W,
    rank,
    scaling,
    o_n,
    m_n,
    size,
    SPLITS: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A row's share of the columns ``o_n`` of a part, summed by rank modulo BR: [BR, BN]."""
    b_sum = tl.zeros((BR, BN), tl.float32)
    for i_r in range(0, rank, BR):
        o_r = i_r + tl.arange(0, BR)
        m_r = o_r < rank
        b_page = load_pages(p_pages, i_entry, W, o_r, m_r)
        p_rank = p_shrunk + o_r
        b_xa = tl.load(p_rank, mask=m_r, other=0.0)
        for _ in tl.static_range(SPLITS - 1):
            p_rank += o_split
            b_xa += tl.load(p_rank, mask=m_r, other=0.0)
        b_b = load_ranks(p_values, b_page, o_r, m_r, o_n, m_n, size, ALIGNED).to(tl.float32)
        b_sum += b_b * (b_xa * scaling)[:, None]
    return b_sum


@triton.jit(do_not_specialize=["M"])
def expand_rows_kernel(
    p_base,
    p_shrunk,
    p_values,
    p_ranks,
    p_pages,
    p_scaling,
    p_vectors,
    p_starts,
    p_slot_ids,
    p_bias,
    p_out,
    sizes,
    M,
    N,
    E,
    P,
    W,
    stride_out,
    BASE: tl.constexpr,
    SPLITS: tl.constexpr,
    VECTORS: tl.constexpr,
    BIAS: tl.constexpr,
    WP: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
):
    """BN columns of y of a row: the parts of the base's sums, the adapter's share, scale and biases; rounded once."""
    i_row = tl.program_id(1)
    i_part, o_part, size, i_tile = part_of_tile(tl.program_id(0), sizes, BN)
    o_n = i_tile * BN + tl.arange(0, BN)
    m_n = o_n < size
    o_m = i_row.to(tl.int64) + tl.arange(0, 1)
    i_slot = slots_of(tl.load(p_slot_ids + i_row), E)
    i_entry = i_slot * P + i_part
    rank = tl.load(p_ranks + i_entry, mask=i_slot >= 0, other=0)
    b_share = tl.zeros((BR, BN), tl.float32)
    if rank > 0:
        scaling = tl.load(p_scaling + i_entry)
        p_own = p_shrunk + o_m * (P * W * PAGE) + i_part * W * PAGE
        o_split = tl.cast(M, tl.int64) * (P * W * PAGE)
        o_page = tl.arange(0, WP)
        b_page = load_pages(p_pages, i_entry, W, o_page * PAGE, o_page * PAGE < rank)
        if are_aligned(b_page, size):
            b_share = expand_row(
                p_own, o_split, p_values, p_pages, i_entry, W, rank, scaling, o_n, m_n, size, SPLITS, BR, BN, True
            )
        else:
            b_share = expand_row(
                p_own, o_split, p_values, p_pages, i_entry, W, rank, scaling, o_n, m_n, size, SPLITS, BR, BN, False
            )
    b_sum = tl.sum(b_share, axis=0)[None, :]
    b_sum = add_base(b_sum, p_base, o_m, o_m < M, o_part + o_n, m_n, M, N, BASE)
    b_sum = finish(b_sum, p_vectors, p_starts, p_bias, i_slot, o_part + o_n, m_n, VECTORS, BIAS)
    p_row = p_out + o_m[:, None] * stride_out + (o_part + o_n)[None, :]
    tl.store(p_row, b_sum.to(p_out.dtype.element_ty), mask=m_n[None, :])


# Chosen by compiled code; not measured on a device. For sm_90 (Triton 3.7.1, bf16, 16 ranks, November 2026) the loop
# of x A^T has 5.1 instructions for a value of A (6.2 where pages are not aligned), that of B 11 (13), most of them once
# for a round of ranks. With R = 16 and K = N = 4096, 64 rows issue in 4200 clocks of an H200's multiprocessors.
# Places of K that a program sums for itself, and the most splits: K alone decides, so that a row's bits are its own.
SHRINK_COLUMNS, SHRINK_SPLITS, SHRINK_WARPS = 256, 8, 4
# Ranks of a round: with 32, pages that are not aligned would spill registers on sm_90.
RANKS = 16
EXPAND_COLUMNS, EXPAND_WARPS = 128, 4
SCALE_COLUMNS = 1024


def scale_rows(x: Tensor, table: Table, slot_ids: Tensor) -> Tensor:
    """x * x_scale of each row's slot, in x's dtype; x: [M, K], contiguous."""
    out = torch.empty_like(x)
    if x.numel():
        K = x.shape[1]
        with on_device(x):
            scale_rows_kernel[(x.shape[0] * triton.cdiv(K, SCALE_COLUMNS),)](
                x, table.vectors, table.vector_starts, slot_ids, out, K, table.shape[0], SIZE=SCALE_COLUMNS
            )
    return out


def multi_lora_decode(
    x: Tensor,
    parts: Tensor | None,
    table: Table,
    slot_ids: Tensor,
    flag: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """``out = y_scale (base + scaling (x A^T) B^T) + bias + bias_e``, each row with its slot's adapter.

    Args:
        x: [M, K], fp32, bf16 or fp16, contiguous, M less than 65536; scaled before.
        parts: fp32 [parts, M, N], whose sum is the base's share; None where there is no base.
        table: of the adapters.
        slot_ids: int32 [M], contiguous; ids that no slot has, -1 aside, set the flag.
        flag: int32 [1] that the device can write.
        bias: [N] in x's dtype, contiguous, or None.
        out: [M, N] in x's dtype; columns together.
    """
    if out.numel() == 0:
        return
    (M, K), N, (E, P, W) = x.shape, out.shape[1], table.shape
    splits, steps = splits_of(triton.cdiv(K, SHRINK_COLUMNS), SHRINK_SPLITS)
    shrunk = x.new_empty((splits, M, max(table.width, 1)), dtype=torch.float32)
    vectors = x if table.vectors is None else table.vectors
    with on_device(x):
        ranks = ranks_of_block(W, RANKS)
        # without pages too: the flag is set there
        shrink_rows_kernel[(M, P * max(triton.cdiv(W * PAGE.value, ranks), 1), splits)](
            x,
            table.values,
            table.ranks,
            table.A_pages,
            slot_ids,
            flag,
            shrunk,
            M,
            K,
            E,
            P,
            W,
            steps,
            BR=ranks,
            BK=SHRINK_COLUMNS,
            num_warps=SHRINK_WARPS,
            enable_fp_fusion=False,
        )
        tiles = sum(triton.cdiv(size, EXPAND_COLUMNS) for size in table.sizes)
        expand_rows_kernel[(tiles, M)](
            x if parts is None else parts,
            shrunk,
            table.values,
            table.ranks,
            table.B_pages,
            table.scaling,
            vectors,
            slot_ids if table.vector_starts is None else table.vector_starts,
            slot_ids,
            x if bias is None else bias,
            out,
            table.sizes,
            M,
            N,
            E,
            P,
            W,
            out.stride(0),
            BASE=0 if parts is None else parts.shape[0],
            SPLITS=splits,
            VECTORS=table.vectors is not None,
            BIAS=bias is not None,
            WP=triton.next_power_of_2(max(W, 1)),
            BR=ranks,
            BN=EXPAND_COLUMNS,
            num_warps=EXPAND_WARPS,
            enable_fp_fusion=False,
        )
