"""Products with an NF4 weight of which a panel is decoded at a time: into a scratch that fits the L2, then cuBLAS.

The forward pass takes rows of W and writes columns of y, the input gradient takes columns of W and writes columns of
dX: either way an element of the result is summed by one product, in fp32, and rounded once. Panels of rows would be
simpler to decode for dX too, but each of them would add to all of dX: kept in fp32, as it must be to round once, that
is 8 bytes read and written for each element and panel. At M = 2048 over 28672 x 4096 with panels of 3072 rows these are
67 MB a panel: by data sheet 14 µs of an H200's memory beside 52 µs of its tensor cores. Columns only need a decoder
that leaves the rest of a row out.

A slice of columns is what cuBLAS takes as a result with a leading dimension: torch copies neither it nor the panel
(``prepare_matrix_for_cublas`` in ATen's cuda/Blas.cpp). A bias is first copied into the slice, then the product is
added to it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from peftrt.formats.nf4 import NESTED_BLOCK_SIZE
from peftrt.ops._scratch import LIMIT, scratch
from peftrt.ops._weight import WeightArgs

# What cuBLAS computes at a time, as far as the width of a panel is concerned: rows and columns of a tile on a
# multiprocessor.
TILE_ROWS, TILE_COLUMNS = 128, 256
# Of the L2; the rest is for x and y.
L2_SHARE = 0.5
# Columns of a panel of dX start at a multiple of this many weights, which share a scale.
CHUNK = 64

# codes, absmax, nested_absmax, nested_offset (contiguous bytes), block_size, out [rows, K]
DecodeRows = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, int, Tensor], None]
# first column, out [N, columns]
DecodeColumns = Callable[[int, Tensor], None]
# first column, columns of the result: writes what the product is added to
Begin = Callable[[int, Tensor], None]


class Device(NamedTuple):
    """What the width of a panel depends on."""

    l2_bytes: int
    processors: int


@functools.cache
def device_of(device: torch.device) -> Device:
    """Of a GPU; for a CPU, where tests multiply panels, those of a small one."""
    if device.type != "cuda":
        return Device(1 << 20, 8)
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.L2_cache_size, properties.multi_processor_count)


def row_step(weight: WeightArgs) -> int:
    """The least number of rows of W [N, K] after which a block, a run of nested scales and a byte begin together."""
    unit = weight.block_size * (1 if weight.nested_absmax is None else NESTED_BLOCK_SIZE)
    return unit // math.gcd(unit, weight.k)


def column_step(weight: WeightArgs) -> int | None:
    """The same of columns; None where a row does not hold whole chunks, so that columns cannot be told apart."""
    return CHUNK if weight.k % CHUNK == 0 and weight.block_size % CHUNK == 0 else None


def width(rows: int, depth: int, total: int, step: int, itemsize: int, device: Device) -> int | None:
    """Columns of the result that a panel serves; None where not even ``step`` of them fit the scratch.

    As many as fill the multiprocessors in whole waves of tiles and fit a share of the L2, one wave at least: a wave
    left half empty costs more than a panel read from memory (at M = 2048, 3072 columns would take two waves of 132
    multiprocessors, and leave 27 % of them idle; 2048 take one and leave 3 %).

    Args:
        rows: M.
        depth: length of the sums, so that a column takes ``depth * itemsize`` bytes of the scratch.
        total: columns of the whole result.
        step: what the panels' first columns are multiples of.
        itemsize: bytes of an element.
        device: its L2 and multiprocessors.
    """
    limit = LIMIT // (depth * itemsize)
    if total <= limit and total <= step:
        return total
    if limit < step:
        return None
    wave = max(device.processors // -(-rows // TILE_ROWS), 1) * TILE_COLUMNS
    fitting = int(device.l2_bytes * L2_SHARE) // (depth * itemsize)
    columns = min(wave * max(fitting // wave, 1), limit, total)
    return total if columns == total else max(columns // step * step, step)


def rows_fit(weight: WeightArgs, itemsize: int) -> bool:
    """Whether panels of rows of W can be decoded apart, in the scratch."""
    return width(1, weight.k, weight.n, row_step(weight), itemsize, Device(0, 1)) is not None


def columns_fit(weight: WeightArgs, itemsize: int) -> bool:
    """Whether panels of columns of W can be decoded apart, in the scratch."""
    step = column_step(weight)
    return step is not None and width(1, weight.n, weight.k, step, itemsize, Device(0, 1)) is not None


def forward(
    x: Tensor,
    weight: WeightArgs,
    addend: Tensor | Begin | None,
    out: Tensor,
    decode: DecodeRows,
    row_scale: Tensor | None = None,
) -> None:
    """``out = x (row_scale W)^T + addend`` with x [M, K] and out [M, N] contiguous, where ``rows_fit``.

    ``addend`` is a bias [N], or writes what is added to columns of the result. ``row_scale``: fp32 [N], or None; a
    panel that it scales is rounded a second time, which moves fewer bytes than scaling the result.
    """
    if out.numel() == 0:
        return
    step = row_step(weight)
    rows = width(x.shape[0], weight.k, weight.n, step, x.element_size(), device_of(x.device))
    assert rows is not None
    with scratch(x, (rows, weight.k)) as room:
        for first, last in _spans(weight.n, rows):
            panel = room[: last - first]
            decode(*_rows_of(weight, first, last), weight.block_size, panel)
            if row_scale is not None:
                panel.mul_(row_scale[first:last, None])
            if isinstance(addend, Tensor):
                torch.addmm(addend[first:last], x, panel.t(), out=out[:, first:last])
            else:
                _multiply(x, panel.t(), first, addend, out[:, first:last])


def _multiply(x: Tensor, panel: Tensor, first: int, begin: Begin | None, out: Tensor) -> None:
    if begin is None:
        torch.mm(x, panel, out=out)
    else:
        begin(first, out)
        out.addmm_(x, panel)


def grad_input(
    dy: Tensor,
    weight: WeightArgs,
    out: Tensor,
    decode: DecodeColumns,
    begin: Begin | None = None,
    row_scale: Tensor | None = None,
) -> None:
    """``out = dy (row_scale W)`` (+ what ``begin`` writes), dy [M, N] and out [M, K] contiguous, where ``columns_fit``.

    ``row_scale`` as of :func:`forward`.
    """
    if out.numel() == 0:
        return
    step = column_step(weight)
    assert step is not None
    columns = width(dy.shape[0], weight.n, weight.k, step, dy.element_size(), device_of(dy.device))
    assert columns is not None
    with scratch(dy, (weight.n, columns)) as room:
        flat = room.view(-1)
        for first, last in _spans(weight.k, columns):
            panel = flat[: weight.n * (last - first)].view(weight.n, last - first)
            decode(first, panel)
            if row_scale is not None:
                panel.mul_(row_scale[:, None])
            _multiply(dy, panel, first, begin, out[:, first:last])


def _spans(total: int, size: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + size, total)) for first in range(0, total, size))


def _rows_of(weight: WeightArgs, first: int, last: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Bytes of rows ``[first, last)``, as a weight of their own; ``first`` is a multiple of ``row_step``."""
    begin, end = first * weight.k, last * weight.k
    blocks = begin // weight.block_size, -(-end // weight.block_size)
    codes = _flat(weight.weight)[begin // 2 : (end + 1) // 2]
    assert weight.absmax is not None
    if weight.nested_absmax is None:
        return codes, _flat(weight.absmax)[4 * blocks[0] : 4 * blocks[1]], None, None
    runs = blocks[0] // NESTED_BLOCK_SIZE, -(-blocks[1] // NESTED_BLOCK_SIZE)
    nested = _flat(weight.nested_absmax)[4 * runs[0] : 4 * runs[1]]
    return codes, _flat(weight.absmax)[blocks[0] : blocks[1]], nested, weight.nested_offset


def _flat(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1)
