"""y_i = x_i W^T + b + s_e (x_i A_e^T) B_e^T with e = slot_ids[i] (Punica, Chen et al. 2023, arXiv:2310.18547)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from peftrt.reference._weight import accumulator, dense_weight


def _slots(ranks: Tensor, offsets: Tensor, scaling: Tensor, slot_ids: Tensor) -> Iterator[tuple[Tensor, slice, float]]:
    """For every slot with rows in the batch: their indices, its slice of the stacked A and B, its scaling."""
    for slot in range(ranks.numel()):
        rows = (slot_ids == slot).nonzero().squeeze(1)
        if rows.numel():
            start = int(offsets[slot])
            yield rows, slice(start, start + int(ranks[slot])), float(scaling[slot])


def forward(x: Tensor, *rest: Any) -> Tensor:
    """``x [..., K]``, the weight's arguments, A [T, K], B [T, N], ranks, offsets, scaling [E], slot_ids [M], bias.

    Returns ``[..., N]`` in x's dtype. Without a weight (None) only the adapters' share.
    """
    weight, (A, B, ranks, offsets, scaling, slot_ids, bias) = rest[:-7], rest[-7:]
    dtype = accumulator(x.dtype)
    wide = x.reshape(-1, x.shape[-1]).to(dtype)
    if weight[0] is None:
        y = wide.new_zeros(wide.shape[0], B.shape[1])
    else:
        y = wide @ dense_weight(x.dtype, *weight).t()
    if bias is not None:
        y = y + bias
    for rows, own, scale in _slots(ranks, offsets, scaling, slot_ids):
        y[rows] += scale * (wide[rows] @ A[own].to(dtype).t() @ B[own].to(dtype))
    return y.to(x.dtype).view(*x.shape[:-1], B.shape[1])


def backward(
    dy: Tensor, x: Tensor, A: Tensor, B: Tensor, ranks: Tensor, offsets: Tensor, scaling: Tensor, slot_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the adapters' share: dX ``[..., K]`` in x's dtype, dA [T, K] and dB [T, N] in theirs."""
    dtype = accumulator(x.dtype)
    wide, dy_wide = x.reshape(-1, x.shape[-1]).to(dtype), dy.reshape(-1, dy.shape[-1]).to(dtype)
    dx, dA, dB = wide.new_zeros(wide.shape), wide.new_zeros(A.shape), wide.new_zeros(B.shape)
    for rows, own, scale in _slots(ranks, offsets, scaling, slot_ids):
        grad = scale * (dy_wide[rows] @ B[own].to(dtype).t())
        dx[rows] = grad @ A[own].to(dtype)
        # added, not set: slots may share rows of the table
        dA[own] += grad.t() @ wide[rows]
        dB[own] += (wide[rows] @ A[own].to(dtype).t()).t() @ dy_wide[rows] * scale
    return dx.to(x.dtype).view(x.shape), dA.to(A.dtype), dB.to(B.dtype)
