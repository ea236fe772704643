"""y_i = c_e * (x'_i W^T + s_e (x'_i A_e^T) B_e^T) + b + b_e with e = slot_ids[i] and x'_i = x_i * u_e.

Punica, Chen et al. 2023 (arXiv:2310.18547), for s_e and the pair; peftrt/ops/_adapter_table.py says how A and B lie in
pages of ``values``, and c, u and b_e in ``vectors``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftrt.formats.pages import BIAS, PAGE, X_SCALE, Y_SCALE
from peftrt.reference._weight import accumulator, dense_weight


class Pairs(NamedTuple):
    """The low-rank pairs of a table, as they stand in the schema."""

    values: Tensor
    ranks: Tensor
    A_pages: Tensor
    B_pages: Tensor
    scaling: Tensor


class _Pair(NamedTuple):
    """One slot's pair for one part, which has rows in the batch."""

    rows: Tensor
    outputs: slice
    in_A: Tensor
    in_B: Tensor
    rank: int
    scale: float


def places(pages: Tensor, rank: int, width: int) -> Tensor:
    """Where in ``values`` the first ``rank`` rows of ``width`` elements of these pages lie: [rank * width]."""
    starts = pages[: -(-rank // PAGE)]
    within = torch.arange(PAGE * width, device=pages.device)
    return (starts[:, None] + within).reshape(-1)[: rank * width]


def _in_use(pairs: Pairs, k: int, splits: Sequence[int], slot_ids: Tensor) -> Iterator[_Pair]:
    for slot in range(pairs.ranks.shape[0]):
        rows = (slot_ids == slot).nonzero().squeeze(1)
        start = 0
        for part, size in enumerate(splits):
            rank = int(pairs.ranks[slot, part])
            if rows.numel() and rank:
                in_A = places(pairs.A_pages[slot, part], rank, k)
                in_B = places(pairs.B_pages[slot, part], rank, size)
                outputs = slice(start, start + size)
                yield _Pair(rows, outputs, in_A, in_B, rank, float(pairs.scaling[slot, part]))
            start += size


def row_vectors(
    vectors: Tensor | None, starts: Tensor | None, which: int, slot_ids: Tensor, size: int, missing: float
) -> Tensor | None:
    """``[M, size]``: of every row the vector of its slot, or ``missing``; None where no slot has any."""
    if vectors is None or starts is None or not starts.shape[0] or not vectors.shape[0]:
        return None
    # on a GPU nobody has looked at the ids: one that is no slot is the base's
    slots = starts.shape[0]
    known = (slot_ids >= 0) & (slot_ids < slots)
    start = torch.where(known, starts[slot_ids.clamp(0, slots - 1).long(), which], -1)[:, None]
    within = torch.arange(size, device=vectors.device)
    found = vectors[(start.clamp(min=0) + within).clamp(max=vectors.shape[0] - 1)]
    return torch.where(start >= 0, found, missing)


def scaled(x: Tensor, factors: Tensor | None) -> Tensor:
    """x times factors of every row, rounded once to x's dtype."""
    return x if factors is None else (x.reshape(factors.shape) * factors).to(x.dtype).view(x.shape)


def forward(x: Tensor, *rest: Any) -> Tensor:
    """``x [..., K]``, the weight's arguments (None for no base), the table's, slot_ids [M], bias; ``[..., N]`` in x's
    dtype.
    """
    weight, (*pairs, vectors, starts, splits, slot_ids, bias) = rest[:7], rest[7:]
    n, k = weight[4], weight[5]
    dtype = accumulator(x.dtype)
    x = scaled(x, row_vectors(vectors, starts, X_SCALE, slot_ids, k, 1.0))
    wide = x.reshape(-1, k).to(dtype)
    y = wide.new_zeros(wide.shape[0], n) if weight[0] is None else wide @ dense_weight(x.dtype, *weight).t()
    values = pairs[0]
    for pair in _in_use(Pairs(*pairs), k, splits, slot_ids):
        # widened here: the whole may be a slab of gigabytes
        A, B = (values[at].to(dtype).view(pair.rank, -1) for at in (pair.in_A, pair.in_B))
        y[pair.rows, pair.outputs] += pair.scale * (wide[pair.rows] @ A.t() @ B)
    c = row_vectors(vectors, starts, Y_SCALE, slot_ids, n, 1.0)
    own_bias = row_vectors(vectors, starts, BIAS, slot_ids, n, 0.0)
    y = y if c is None else y * c
    y = y if bias is None else y + bias
    y = y if own_bias is None else y + own_bias
    return y.to(x.dtype).view(*x.shape[:-1], n)


def backward(dz: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Gradients of ``z = x W^T + s (x A^T) B^T``: dX ``[..., K]`` in x's dtype, dvalues [S] in that of values, each
    empty where it is not wanted.
    """
    weight, (*pairs, splits, slot_ids, needs_dx, needs_dvalues) = rest[:7], rest[7:]
    n, k = weight[4], weight[5]
    dtype = accumulator(x.dtype)
    wide, dz_wide = x.reshape(-1, k).to(dtype), dz.reshape(-1, n).to(dtype)
    values = pairs[0]
    dx, dvalues = wide.new_zeros(wide.shape), torch.zeros(values.shape, dtype=dtype, device=values.device)
    if needs_dx and weight[0] is not None:
        dx += dz_wide @ dense_weight(x.dtype, *weight)
    for pair in _in_use(Pairs(*pairs), k, splits, slot_ids):
        # widened here: the whole may be a slab of gigabytes
        A, B = (values[at].to(dtype).view(pair.rank, -1) for at in (pair.in_A, pair.in_B))
        rows, outputs = wide[pair.rows], dz_wide[pair.rows, pair.outputs]
        g = pair.scale * (outputs @ B.t())
        dx[pair.rows] += g @ A
        # added, not set: slots may share pages
        dvalues.index_add_(0, pair.in_A, (g.t() @ rows).reshape(-1))
        dvalues.index_add_(0, pair.in_B, ((rows @ A.t()).t() @ outputs * pair.scale).reshape(-1))
    dx = dx.to(x.dtype).view(x.shape) if needs_dx else x.new_empty(0)
    return dx, dvalues.to(pairs[0].dtype) if needs_dvalues else pairs[0].new_empty(0)
