"""The rows of a batch by slot, sorted on the device: nothing is read back, and no launch depends on the slots."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from peftrt.kernels._launch import on_device
from peftrt.kernels._slots import is_bad, slots_of


@triton.jit
def load_rows(p_order, first, last, BM: tl.constexpr):
    """Rows of the batch at places ``[first, last)`` of the order, BM at most."""
    o_place = first + tl.arange(0, BM)
    m_m = o_place < last
    return tl.load(p_order + o_place, mask=m_m, other=0).to(tl.int64), m_m


@triton.jit(do_not_specialize=["M"])
def route_kernel(p_slot_ids, p_flag, p_order, p_starts, p_tiles, M, E, BM: tl.constexpr, SIZE: tl.constexpr):
    """Where a group's rows lie: in ``order``, from ``starts``; and the tiles (slot, first, last) that they make.

    Group 0 has the rows without an adapter, group e + 1 those of slot e. A group that begins at s of the order has its
    tiles from ``s // BM + group``: that leaves room for those of the groups before, so that no program needs another's
    result, and one tile between two groups may be empty.
    """
    i_group = tl.program_id(0)
    b_before = tl.zeros((SIZE,), tl.int32)
    b_own = tl.zeros((SIZE,), tl.int32)
    b_bad = tl.zeros((SIZE,), tl.int32)
    for i in range(0, M, SIZE):
        o_m = i + tl.arange(0, SIZE)
        b_id = tl.load(p_slot_ids + o_m, mask=o_m < M, other=-1)
        b_group = slots_of(b_id, E) + 1
        b_before += ((b_group < i_group) & (o_m < M)).to(tl.int32)
        b_own += ((b_group == i_group) & (o_m < M)).to(tl.int32)
        b_bad |= is_bad(b_id, E).to(tl.int32)
    first = tl.sum(b_before)
    last = first + tl.sum(b_own)
    tl.store(p_starts + i_group, first)
    tl.store(p_starts + E + 1, M, mask=i_group == E)
    tl.store(p_flag, 1, mask=(i_group == 0) & (tl.max(b_bad) > 0))
    at = first
    if last > first:
        for i in range(0, M, SIZE):
            o_m = i + tl.arange(0, SIZE)
            b_id = tl.load(p_slot_ids + o_m, mask=o_m < M, other=-1)
            b_mine = ((slots_of(b_id, E) + 1 == i_group) & (o_m < M)).to(tl.int32)
            tl.store(p_order + at + tl.cumsum(b_mine) - 1, o_m, mask=b_mine > 0)
            at += tl.sum(b_mine)
    i_first = first // BM + i_group
    for i in range(i_first, last // BM + i_group + 1, SIZE):
        o_tile = i + tl.arange(0, SIZE)
        m_tile = o_tile < last // BM + i_group + 1
        b_first = first + (o_tile - i_first) * BM
        tl.store(p_tiles + 3 * o_tile, tl.full((SIZE,), 0, tl.int32) + i_group - 1, mask=m_tile)
        tl.store(p_tiles + 3 * o_tile + 1, b_first, mask=m_tile)
        tl.store(p_tiles + 3 * o_tile + 2, tl.minimum(b_first + BM, last), mask=m_tile)


# Rows of a tile: 32, so that mma.sync multiplies (``exact_dot``). Not measured on a device.
TILE_ROWS = 32
ROUTE = {"SIZE": 1024, "num_warps": 4}


class Routes(NamedTuple):
    """The rows by slot, as :func:`route` leaves them on the device."""

    order: Tensor
    starts: Tensor
    tiles: Tensor


def route(slot_ids: Tensor, slots: int, flag: Tensor) -> Routes:
    """Sort rows by slot, those without an adapter first; ids that no slot has set the flag.

    Args:
        slot_ids: int32 [M], contiguous, M > 0.
        slots: E.
        flag: int32 [1] that the device can write.
    """
    M = slot_ids.numel()
    order, starts = slot_ids.new_empty(M), slot_ids.new_empty(slots + 2)
    tiles = slot_ids.new_empty((M // TILE_ROWS + slots + 1, 3))
    with on_device(slot_ids):
        route_kernel[(slots + 1,)](slot_ids, flag, order, starts, tiles, M, slots, BM=TILE_ROWS, **ROUTE)
    return Routes(order, starts, tiles)
