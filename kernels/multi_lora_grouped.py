"""multi_lora_linear for many rows: rows of one slot share tiles of its A and B on the tensor cores.

The device sorts the rows by slot itself: nothing is read back, and no launch depends on which slots the rows have. A
tile has BM rows of one slot, counted from its first row, in the batch's order, whatever the size of the group. What is
summed has one order, so that a row's bits depend neither on its place in a tile nor on what else is in the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftrt.kernels._launch import on_device
from peftrt.kernels._routes import TILE_ROWS, Routes, load_rows
from peftrt.kernels._schedule import PRECISION, architecture_of
from peftrt.kernels._slots import (
    PAGE,
    Table,
    add_base,
    are_aligned,
    columns_of_part,
    finish,
    load_pages,
    load_ranks,
    load_shrunk,
    part_of_tile,
    product,
    ranks_of_block,
    splits_of,
)


@triton.jit
def shrink_tile(
    p_x,
    p_values,
    b_page,
    o_m,
    m_m,
    o_r,
    m_r,
    i_first,
    i_last,
    width,
    columns,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows ``o_m`` of x [M, columns] times ranks of pages ``width`` long, over steps ``[i_first, i_last)``."""
    b_sum = tl.zeros((BM, BR), tl.float32)
    for i in range(i_first, i_last):
        o_k = i * BK + tl.arange(0, BK)
        m_k = o_k < width
        p_row = p_x + o_m[:, None] * columns + o_k[None, :]
        b_x = tl.load(p_row, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_right = load_ranks(p_values, b_page, o_r, m_r, o_k, m_k, width, ALIGNED)
        b_sum = product(b_x, b_right.T, b_sum, PRECISION)
    return b_sum


@triton.jit(do_not_specialize=["M"])
def shrink_groups_kernel(
    p_x,
    p_values,
    p_ranks,
    p_pages,
    p_order,
    p_tiles,
    p_out,
    sizes,
    M,
    columns,
    P,
    W,
    PARTED: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x A^T of BM rows of a slot, BR ranks of a part, one of SPLITS of K: fp32 [SPLITS, M, P * 8 W].

    Where PARTED, dZ B: the columns are those of the part.
    """
    # neighbouring programs share rows of x
    blocks = tl.cdiv(W * PAGE, BR)
    i_block = tl.program_id(0) % (P * blocks)
    p_tiles += 3 * (tl.program_id(0) // (P * blocks))
    i_slot = tl.load(p_tiles)
    first = tl.load(p_tiles + 1)
    last = tl.load(p_tiles + 2)
    i_part = i_block // blocks
    i_entry = i_slot * P + i_part
    rank = tl.load(p_ranks + i_entry, mask=(i_slot >= 0) & (first < last), other=0)
    i_r = i_block % blocks * BR
    if i_r < rank:
        o_part = 0
        width = columns
        if PARTED:
            o_part, width = columns_of_part(i_part, sizes)
        steps = tl.cdiv(tl.cdiv(width, BK), SPLITS)
        i_first = tl.program_id(1) * steps
        i_last = tl.minimum(i_first + steps, tl.cdiv(width, BK))
        o_m, m_m = load_rows(p_order, first, last, BM)
        o_r = i_r + tl.arange(0, BR)
        m_r = o_r < rank
        b_page = load_pages(p_pages, i_entry, W, o_r, m_r)
        p_x += o_part
        if are_aligned(b_page, width):
            b_sum = shrink_tile(
                p_x, p_values, b_page, o_m, m_m, o_r, m_r, i_first, i_last, width, columns, BM, BR, BK, True, PRECISION
            )
        else:
            b_sum = shrink_tile(
                p_x, p_values, b_page, o_m, m_m, o_r, m_r, i_first, i_last, width, columns, BM, BR, BK, False, PRECISION
            )
        T = P * W * PAGE
        o_out = (tl.program_id(1).to(tl.int64) * M + o_m[:, None]) * T + (i_part * W * PAGE + o_r)[None, :]
        tl.store(p_out + o_out, b_sum, mask=m_m[:, None] & m_r[None, :])


@triton.jit
def expand_tile(
    p_shrunk,
    p_values,
    p_pages,
    i_entry,
    W,
    rank,
    scaling,
    b_sum,
    o_m,
    m_m,
    o_n,
    m_n,
    width,
    M,
    T,
    SPLITS: tl.constexpr,
    BR: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``b_sum`` and the share of a slot's part in columns ``o_n`` of its pages, to the slot's own rank."""
    for i_r in tl.range(0, rank, BR, num_stages=1):
        o_r = i_r + tl.arange(0, BR)
        m_r = o_r < rank
        b_page = load_pages(p_pages, i_entry, W, o_r, m_r)
        b_left = load_shrunk(p_shrunk, o_m, m_m, o_r, m_r, M, T, SPLITS) * scaling
        b_right = load_ranks(p_values, b_page, o_r, m_r, o_n, m_n, width, ALIGNED)
        b_sum = product(b_left, b_right, b_sum, PRECISION)
    return b_sum


@triton.jit
def add_share(
    p_shrunk,
    p_values,
    p_ranks,
    p_pages,
    p_scaling,
    i_slot,
    i_part,
    P,
    W,
    b_sum,
    o_m,
    m_m,
    o_n,
    m_n,
    width,
    M,
    SPLITS: tl.constexpr,
    WP: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``b_sum`` and a part's share."""
    i_entry = i_slot * P + i_part
    rank = tl.load(p_ranks + i_entry, mask=i_slot >= 0, other=0)
    if rank > 0:
        scaling = tl.load(p_scaling + i_entry)
        p_shrunk += i_part * W * PAGE
        T = P * W * PAGE
        o_page = tl.arange(0, WP) * PAGE
        if are_aligned(load_pages(p_pages, i_entry, W, o_page, o_page < rank), width):
            b_sum = expand_tile(
                p_shrunk, p_values, p_pages, i_entry, W, rank, scaling, b_sum, o_m, m_m, o_n, m_n, width, M, T, SPLITS,
                BR, True, PRECISION,
            )  # fmt: skip
        else:
            b_sum = expand_tile(
                p_shrunk, p_values, p_pages, i_entry, W, rank, scaling, b_sum, o_m, m_m, o_n, m_n, width, M, T, SPLITS,
                BR, False, PRECISION,
            )  # fmt: skip
    return b_sum


@triton.jit(do_not_specialize=["M", "tiles"])
def expand_groups_kernel(
    p_base,
    p_shrunk,
    p_values,
    p_ranks,
    p_pages,
    p_scaling,
    p_vectors,
    p_vector_starts,
    p_order,
    p_tiles,
    p_bias,
    p_out,
    sizes,
    tiles,
    M,
    N,
    P,
    W,
    stride_out,
    BASE: tl.constexpr,
    ADD: tl.constexpr,
    PARTED: tl.constexpr,
    VECTORS: tl.constexpr,
    BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    WP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BN columns of BM rows of a slot: the adapter's share, and BASE parts of the base's sums or, where ADD, ``out``.

    Where PARTED the columns are those of one part, as of y; where not, every part adds to all of them, as to dX.
    """
    # neighbouring programs share columns of B
    p_tiles += 3 * (tl.program_id(0) % tiles)
    i_slot = tl.load(p_tiles)
    first = tl.load(p_tiles + 1)
    last = tl.load(p_tiles + 2)
    # what the base has written whole stays as it is
    if (first < last) & ((i_slot >= 0) | (not ADD) | VECTORS | BIAS):
        o_m, m_m = load_rows(p_order, first, last, BM)
        b_sum = tl.zeros((BM, BN), tl.float32)
        if PARTED:
            i_part, o_part, width, i_column = part_of_tile(tl.program_id(0) // tiles, sizes, BN)
            o_n = i_column * BN + tl.arange(0, BN)
            m_n = o_n < width
            b_sum = add_share(
                p_shrunk, p_values, p_ranks, p_pages, p_scaling, i_slot, i_part, P, W, b_sum, o_m, m_m, o_n, m_n, width,
                M, SPLITS, WP, BR, PRECISION,
            )  # fmt: skip
            o_n += o_part
        else:
            o_n = tl.program_id(0) // tiles * BN + tl.arange(0, BN)
            m_n = o_n < N
            for i_part in range(P):
                b_sum = add_share(
                    p_shrunk, p_values, p_ranks, p_pages, p_scaling, i_slot, i_part, P, W, b_sum, o_m, m_m, o_n, m_n, N,
                    M, SPLITS, WP, BR, PRECISION,
                )  # fmt: skip
        p_tile = p_out + o_m[:, None] * stride_out + o_n[None, :]
        m_tile = m_m[:, None] & m_n[None, :]
        if ADD:
            b_sum = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32) + b_sum
        b_sum = add_base(b_sum, p_base, o_m, m_m, o_n, m_n, M, N, BASE)
        b_sum = finish(b_sum, p_vectors, p_vector_starts, p_bias, i_slot, o_n, m_n, VECTORS, BIAS)
        tl.store(p_tile, b_sum.to(p_out.dtype.element_ty), mask=m_tile)


# Not measured on a device.
SHRINK_COLUMNS = 64
# By ranks. With 16, two of four warps would multiply the same; with 32, two spill registers on sm_90.
SHRINK_WARPS = {16: 2, 32: 4}
# The sums over K are split by K alone, and so are those over N: rows on their own have a whole batch's bits.
SHRINK_SPLITS, SHRINK_STAGES = 4, {"sm_90": 3, "sm_80": 3, "hip": 2}
# With more columns, rows that are not aligned would spill registers on sm_90.
EXPAND = {"BN": 64, "BR": 16, "num_warps": 4}


def shrink_groups(x: Tensor, table: Table, routes: Routes, transposed: bool = False) -> Tensor:
    """x A^T of every row and its own ranks, or dZ B where ``transposed``, unscaled: fp32 [splits, M, P * 8 W], parts.

    x: [M, K], or dZ [M, N]; contiguous, fp32, bf16 or fp16.
    """
    (M, columns), (_, P, W) = x.shape, table.shape
    width = max(table.sizes) if transposed else columns
    splits, _ = splits_of(triton.cdiv(width, SHRINK_COLUMNS), SHRINK_SPLITS, least=4)
    out = x.new_empty((splits, M, table.width), dtype=torch.float32)
    if out.numel() == 0:
        return out
    architecture, ranks = architecture_of(x.device), ranks_of_block(W, 32, least=16)
    with on_device(x):
        shrink_groups_kernel[(routes.tiles.shape[0] * P * triton.cdiv(W * PAGE.value, ranks), splits)](
            x,
            table.values,
            table.ranks,
            table.B_pages if transposed else table.A_pages,
            routes.order,
            routes.tiles,
            out,
            table.sizes,
            M,
            columns,
            P,
            W,
            PARTED=transposed,
            SPLITS=splits,
            BM=TILE_ROWS,
            BR=ranks,
            PRECISION=PRECISION[architecture] if x.is_cuda else "ieee",
            BK=SHRINK_COLUMNS,
            num_warps=SHRINK_WARPS[ranks],
            num_stages=SHRINK_STAGES[architecture],
            enable_fp_fusion=False,
        )
    return out


def expand_groups(
    shrunk: Tensor,
    parts: Tensor | None,
    table: Table,
    routes: Routes,
    out: Tensor,
    *,
    add: bool = False,
    bias: Tensor | None = None,
    transposed: bool = False,
) -> None:
    """``out = y_scale (base + scaling shrunk B^T) + bias + bias_e``; ``base + scaling shrunk A`` where ``transposed``.

    Args:
        shrunk: what :func:`shrink_groups` gave; of dZ where ``transposed``.
        parts: fp32 [parts, M, columns], whose sum is the base's share; None where there is none, or where ``add``.
        table, routes: of the adapters and rows.
        out: [M, columns], fp32, bf16 or fp16; columns together.
        add: ``out`` has the base's share, rounded.
        bias: [columns] of ``out``'s dtype, contiguous, or None.
        transposed: dX is wanted, without vectors.
    """
    (M, N), (_, P, W) = out.shape, table.shape
    tiles = routes.tiles.shape[0]
    columns = [N] if transposed else table.sizes
    vectors = None if transposed else table.vectors
    with on_device(out):
        expand_groups_kernel[(tiles * sum(triton.cdiv(size, EXPAND["BN"]) for size in columns),)](
            out if parts is None else parts,
            shrunk,
            table.values,
            table.ranks,
            table.A_pages if transposed else table.B_pages,
            table.scaling,
            shrunk if vectors is None else vectors,
            routes.order if vectors is None else table.vector_starts,
            routes.order,
            routes.tiles,
            out if bias is None else bias,
            out,
            table.sizes,
            tiles,
            M,
            N,
            P,
            W,
            out.stride(0),
            BASE=0 if parts is None else parts.shape[0],
            ADD=add,
            PARTED=not transposed,
            VECTORS=vectors is not None,
            BIAS=bias is not None,
            SPLITS=shrunk.shape[0],
            WP=triton.next_power_of_2(max(W, 1)),
            BM=TILE_ROWS,
            PRECISION=PRECISION[architecture_of(out.device)] if out.is_cuda else "ieee",
            enable_fp_fusion=False,
            **EXPAND,
        )
