"""The gradients of the pages of many adapters: G^T x' for A and (x' A^T)^T dZ for B, over each slot's rows.

A program has some ranks of one slot and adds up the slot's rows in the batch's order, a fixed number at a time from the
first on: the bits are those of a batch of these rows alone. Slots may share pages. Then the first of them that has rows
adds those of all of them, slot by slot: a first kernel says for every page which entry of the table is the next one
with the same page, so that none is written twice, and nothing is added by atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from peftrt.kernels._adapter import exact_dot
from peftrt.kernels._launch import on_device
from peftrt.kernels._routes import Routes, load_rows
from peftrt.kernels._schedule import PRECISION, architecture_of
from peftrt.kernels._slots import PAGE, Table, columns_of_part, load_shrunk, ranks_of_block


@triton.jit
def live_pages(p_pages, p_ranks, p_starts, o_entry, entries, P, W):
    """Where entries' pages begin; a number of its own for an entry that holds no rank, or whose slot has no rows."""
    m = o_entry < entries
    i_pair = o_entry // W
    rank = tl.load(p_ranks + i_pair, mask=m, other=0)
    # group e + 1 has the rows of slot e
    first = tl.load(p_starts + i_pair // P + 1, mask=m, other=0)
    last = tl.load(p_starts + i_pair // P + 2, mask=m, other=0)
    m_live = m & (o_entry % W * PAGE < rank) & (first < last)
    b_page = tl.load(p_pages + o_entry, mask=m_live, other=0)
    return tl.where(m_live, b_page, -1 - o_entry), m_live


@triton.jit
def page_chain_kernel(p_pages, p_ranks, p_starts, p_chain, entries, P, W, SIZE: tl.constexpr):
    """For each entry (slot, part, page) of a table: whether it is the first with its page, and which one is the next.

    int32 [2, entries], -1 for no next one. Entries that nothing is added to are not the first.
    """
    o_entry = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    b_page, m_live = live_pages(p_pages, p_ranks, p_starts, o_entry, entries, P, W)
    b_next = tl.full((SIZE,), 0x7FFFFFFF, tl.int32)
    b_first = m_live.to(tl.int32)
    for i in range(0, entries, SIZE):
        o_other = i + tl.arange(0, SIZE)
        b_other, _ = live_pages(p_pages, p_ranks, p_starts, o_other, entries, P, W)
        m_same = b_page[:, None] == b_other[None, :]
        m_before = m_same & (o_other[None, :] < o_entry[:, None])
        m_behind = m_same & (o_other[None, :] > o_entry[:, None])
        b_first = tl.minimum(b_first, 1 - tl.max(m_before.to(tl.int32), axis=1))
        b_next = tl.minimum(b_next, tl.min(tl.where(m_behind, o_other[None, :], 0x7FFFFFFF), axis=1))
    m = o_entry < entries
    tl.store(p_chain + o_entry, b_first, mask=m)
    tl.store(p_chain + entries + o_entry, tl.where(b_next == 0x7FFFFFFF, -1, b_next), mask=m)


@triton.jit
def add_rows(
    p_left,
    p_x,
    p_ranks,
    p_scaling,
    p_order,
    p_starts,
    sizes,
    i_pair,
    o_rank,
    m_rank,
    b_sum,
    o_c,
    m_c,
    M,
    columns,
    P,
    T,
    PARTED: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``b_sum`` and left^T x over the rows of a slot: ranks ``o_rank`` of its part i_pair, columns ``o_c``."""
    i_slot = i_pair // P
    i_part = i_pair % P
    scaling = tl.load(p_scaling + i_pair)
    first = tl.load(p_starts + i_slot + 1)
    last = tl.load(p_starts + i_slot + 2)
    if PARTED:
        o_part, _ = columns_of_part(i_part, sizes)
        p_x += o_part
    p_left += i_part * (T // P)
    for i in range(first, last, BM):
        o_m, m_m = load_rows(p_order, i, last, BM)
        b_left = load_shrunk(p_left, o_m, m_m, o_rank, m_rank, M, T, SPLITS) * scaling
        b_x = tl.load(p_x + o_m[:, None] * columns + o_c[None, :], mask=m_m[:, None] & m_c[None, :], other=0.0)
        b_sum = exact_dot(b_left.T, b_x, b_sum, PRECISION)
    return b_sum


@triton.jit(do_not_specialize=["M"])
def page_gradient_kernel(
    p_left,
    p_x,
    p_ranks,
    p_pages,
    p_scaling,
    p_order,
    p_starts,
    p_chain,
    p_out,
    sizes,
    M,
    columns,
    E,
    P,
    W,
    PARTED: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BC columns of BR ranks of a slot's part: ``scaling left^T x`` in the pages that this slot is the first to have.

    Where PARTED, the columns are those of the part, as of dB; else all of them, as of dA.
    """
    blocks = tl.cdiv(W * PAGE, BR)
    i_pair = tl.program_id(2) * P + tl.program_id(1) // blocks
    o_r = tl.program_id(1) % blocks * BR + tl.arange(0, BR)
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    width = columns
    if PARTED:
        _, width = columns_of_part(i_pair % P, sizes)
    m_c = o_c < width
    T = P * W * PAGE
    entries = E * P * W
    o_entry = i_pair * W + o_r // PAGE
    m_page = o_r < W * PAGE
    m_first = tl.load(p_chain + o_entry, mask=m_page, other=0) > 0
    if (tl.max(m_first.to(tl.int32)) > 0) & (tl.program_id(0) * BC < width):
        b_page = tl.load(p_pages + o_entry, mask=m_first, other=0)
        b_next = tl.load(p_chain + entries + o_entry, mask=m_first, other=-1)
        b_sum = tl.zeros((BR, BC), tl.float32)
        m_rank = m_first & (o_r < tl.load(p_ranks + i_pair))
        m_out = m_rank
        b_sum = add_rows(
            p_left, p_x, p_ranks, p_scaling, p_order, p_starts, sizes, i_pair, o_r, m_rank, b_sum, o_c, m_c, M, columns,
            P, T, PARTED, SPLITS, BM, PRECISION,
        )  # fmt: skip
        while tl.max(b_next) >= 0:
            # of the pages' next entries the one of the earliest slot, with all pages that it has here
            i_next = tl.min(tl.where(b_next >= 0, b_next // W, 0x7FFFFFFF))
            m_next = (b_next >= 0) & (b_next // W == i_next)
            o_rank = b_next % W * PAGE + o_r % PAGE
            m_rank = m_next & (o_rank < tl.load(p_ranks + i_next))
            m_out |= m_rank
            b_sum = add_rows(
                p_left, p_x, p_ranks, p_scaling, p_order, p_starts, sizes, i_next, o_rank, m_rank, b_sum, o_c, m_c, M,
                columns, P, T, PARTED, SPLITS, BM, PRECISION,
            )  # fmt: skip
            b_next = tl.where(m_next, tl.load(p_chain + entries + b_next, mask=m_next, other=-1), b_next)
        o_row = b_page + (o_r % PAGE).to(tl.int64) * width
        p_tile = p_out + o_row[:, None] + o_c[None, :]
        tl.store(p_tile, b_sum.to(p_out.dtype.element_ty), mask=m_out[:, None] & m_c[None, :])


# Rows at a time: 32, as in a tile of the forward pass (``exact_dot``). With more columns, or with fewer warps for fp32,
# registers would spill on sm_90. Not measured on a device.
GRADIENT = {"BM": 32, "BC": 64, "num_warps": 8, "num_stages": 2}
CHAIN = {"SIZE": 64, "num_warps": 4}


def page_gradients(g: Tensor, xa: Tensor, dz: Tensor, x: Tensor, table: Table, routes: Routes, out: Tensor) -> None:
    """The gradients of all pages of slots that have rows, into ``out``; the rest of it is left as it is.

    Args:
        g: ``shrink_groups`` of dZ: fp32 [splits, M, P * 8 W].
        xa: ``shrink_groups`` of x'.
        dz: [M, N], fp32, bf16 or fp16, contiguous.
        x: x' [M, K] in dz's dtype, contiguous.
        table, routes: of the adapters and rows.
        out: [S] in the dtype of the table's values, zeros.
    """
    if table.width and out.numel():
        _gradients(g, x, table.A_pages, False, table, routes, out)
        _gradients(xa, dz, table.B_pages, True, table, routes, out)


def _gradients(left: Tensor, x: Tensor, pages: Tensor, parted: bool, table: Table, routes: Routes, out: Tensor) -> None:
    (M, columns), (E, P, W) = x.shape, table.shape
    entries, ranks, width = pages.numel(), ranks_of_block(W, 32, least=16), max(table.sizes) if parted else columns
    chain = routes.order.new_empty((2, entries))
    blocks = P * triton.cdiv(W * PAGE.value, ranks)
    with on_device(x):
        page_chain_kernel[(triton.cdiv(entries, CHAIN["SIZE"]),)](
            pages, table.ranks, routes.starts, chain, entries, P, W, **CHAIN
        )
        page_gradient_kernel[(triton.cdiv(width, GRADIENT["BC"]), blocks, E)](
            left,
            x,
            table.ranks,
            pages,
            table.scaling,
            routes.order,
            routes.starts,
            chain,
            out,
            table.sizes,
            M,
            columns,
            E,
            P,
            W,
            PARTED=parted,
            SPLITS=left.shape[0],
            BR=ranks,
            PRECISION=PRECISION[architecture_of(x.device)] if x.is_cuda else "ieee",
            enable_fp_fusion=False,
            **GRADIENT,
        )
