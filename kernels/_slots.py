"""What the kernels of many adapters share: a row's slot, the pages of an adapter, the end of a row.

An adapter lies in pages of 8 ranks wherever there was room (``AdapterTable``). Where a page begins at a multiple of 16
elements and its rows are as long, its values are loaded 16 bytes at a time; the compiler cannot know, so that every
loop over pages stands twice in a kernel, and what it is told of the one is a division and a product by 16.

A size that is 1 is a constant to the compiler, and so has no ``.to``. Of the number of rows it is told nothing: the
program is the same for all batches, and so is the order of a sum.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from peftrt.kernels._adapter import exact_dot

# Ranks of a page.
PAGE = tl.constexpr(8)


class Table(NamedTuple):
    """The adapters of a site as the kernels take them: ``AdapterTable``'s tensors, contiguous, and its parts' sizes."""

    values: Tensor
    ranks: Tensor
    A_pages: Tensor
    B_pages: Tensor
    scaling: Tensor
    vectors: Tensor | None
    vector_starts: Tensor | None
    sizes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """E slots, P parts, W pages."""
        E, P, W = self.A_pages.shape
        return E, P, W

    @property
    def width(self) -> int:
        """Sums that are kept for a row: one for each rank that a page has room for."""
        _, P, W = self.shape
        return P * W * PAGE.value


@triton.jit
def slots_of(b_id, E):
    """Slots of ids; -1 where the row has no adapter, or an id that no slot has."""
    return tl.where((b_id >= 0) & (b_id < E), b_id, -1)


@triton.jit
def is_bad(b_id, E):
    """Ids that are neither a slot's nor -1."""
    return (b_id < -1) | (b_id >= E)


@triton.jit
def part_of_tile(i_tile, sizes, SIZE: tl.constexpr):
    """The part that a tile of SIZE columns is of, where that part begins, its size, and which of its tiles it is.

    Every part begins a tile of its own. ``sizes``: the tuple of the parts' columns.
    """
    i_part = 0
    o_part = 0
    size = sizes[0]
    i_first = 0
    o_next = 0
    i_next = 0
    for p in tl.static_range(len(sizes)):
        here = i_tile >= i_next
        i_part = tl.where(here, p, i_part)
        o_part = tl.where(here, o_next, o_part)
        size = tl.where(here, sizes[p], size)
        i_first = tl.where(here, i_next, i_first)
        o_next += sizes[p]
        i_next += tl.cdiv(sizes[p], SIZE)
    return i_part, o_part, size, i_tile - i_first


@triton.jit
def columns_of_part(i_part, sizes):
    """Where a part's columns begin, and how many they are."""
    o_part = 0
    size = sizes[0]
    o_next = 0
    for p in tl.static_range(len(sizes)):
        o_part = tl.where(i_part == p, o_next, o_part)
        size = tl.where(i_part == p, sizes[p], size)
        o_next += sizes[p]
    return o_part, size


@triton.jit
def whole(value, ALIGNED: tl.constexpr):
    """The value; where ALIGNED, what the compiler sees is a multiple of 16."""
    if ALIGNED:
        return value // 16 * 16
    else:
        return value


@triton.jit
def load_pages(p_pages, i_entry, W, o_r, m_r):
    """Where the pages of ranks ``o_r`` of an entry (slot, part) begin; behind its rank the table holds anything."""
    return tl.load(p_pages + i_entry.to(tl.int64) * W + o_r // PAGE, mask=m_r, other=0)


@triton.jit
def are_aligned(b_page, width):
    """Whether pages, and rows of ``width`` in them, begin at multiples of 16 elements."""
    return (tl.max(b_page & 15) == 0) & (width % 16 == 0)


@triton.jit
def load_ranks(p_values, b_page, o_r, m_r, o_column, m_column, width, ALIGNED: tl.constexpr):
    """Values [ranks, columns] of pages whose rows are ``width`` long; zeros behind the masks, where NaN may lie."""
    o_row = whole(b_page, ALIGNED) + (o_r % PAGE).to(tl.int64) * whole(width, ALIGNED)
    p_tile = p_values + o_row[:, None] + o_column[None, :]
    return tl.load(p_tile, mask=m_r[:, None] & m_column[None, :], other=0.0)


@triton.jit
def load_shrunk(p_shrunk, o_m, m_m, o_t, m_t, M, T, SPLITS: tl.constexpr):
    """Rows ``o_m`` and columns ``o_t`` of fp32 [SPLITS, M, T], the splits added in their order."""
    p_tile = p_shrunk + o_m[:, None] * T + o_t[None, :]
    m = m_m[:, None] & m_t[None, :]
    b_sum = tl.load(p_tile, mask=m, other=0.0)
    for _ in tl.static_range(SPLITS - 1):
        p_tile += tl.cast(M, tl.int64) * T
        b_sum += tl.load(p_tile, mask=m, other=0.0)
    return b_sum


@triton.jit
def product(b_left, b_right, b_sum, PRECISION: tl.constexpr):
    """``b_sum + b_left b_right``: of two in the same half precision as they are, of others as ``exact_dot`` does."""
    if (b_left.dtype == b_right.dtype) and (b_left.dtype != tl.float32):
        return tl.dot(b_left, b_right, b_sum)
    return exact_dot(b_left, b_right, b_sum, PRECISION)


@triton.jit
def add_base(b_sum, p_base, o_m, m_m, o_n, m_n, M, N, BASE: tl.constexpr):
    """``b_sum`` and BASE parts of the base's sums, fp32 [BASE, M, N], added in their order."""
    p_tile = p_base + o_m[:, None] * N + o_n[None, :]
    m = m_m[:, None] & m_n[None, :]
    if BASE > 0:
        b_base = tl.load(p_tile, mask=m, other=0.0)
        for _ in tl.static_range(BASE - 1):
            p_tile += tl.cast(M, tl.int64) * N
            b_base += tl.load(p_tile, mask=m, other=0.0)
        b_sum = b_base + b_sum
    return b_sum


@triton.jit
def finish(b_sum, p_vectors, p_starts, p_bias, i_slot, o_n, m_n, VECTORS: tl.constexpr, BIAS: tl.constexpr):
    """``y_scale b_sum + bias + bias_e`` of rows of one slot: [rows, columns]."""
    if VECTORS:
        start = tl.load(p_starts + i_slot * 3 + 1, mask=i_slot >= 0, other=-1)
        b_sum *= tl.load(p_vectors + start + o_n, mask=m_n & (start >= 0), other=1.0)[None, :]
    if BIAS:
        b_sum += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if VECTORS:
        start = tl.load(p_starts + i_slot * 3 + 2, mask=i_slot >= 0, other=-1)
        b_sum += tl.load(p_vectors + start + o_n, mask=m_n & (start >= 0), other=0.0)[None, :]
    return b_sum


def splits_of(total: int, most: int, least: int = 2) -> tuple[int, int]:
    """Splits of so many steps, ``most`` at most and of ``least`` steps at least, and the steps of one."""
    steps = max(triton.cdiv(total, max(min(most, total // least), 1)), 1)
    return max(triton.cdiv(total, steps), 1), steps


def ranks_of_block(W: int, most: int, least: int = PAGE.value) -> int:
    """Ranks that a program takes at a time: those of W pages, in powers of two up to ``most``."""
    return min(max(triton.next_power_of_2(W * PAGE.value), least), most)
