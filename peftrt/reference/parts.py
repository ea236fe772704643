"""Adapters of several linear maps of one x, one below the other in W (q, k and v): each has rows of A of its own.

``splits`` are the numbers of outputs of the parts, P of them; A is [P R, K], B [N, R], and x A^T has P R columns. No
splits: one part. Every function is made of operations that have gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def _parts(splits: Sequence[int], n: int, rank: int) -> Iterator[tuple[slice, slice]]:
    """Of each part: its outputs, and its columns of x A^T."""
    start = 0
    for part, size in enumerate(splits or (n,)):
        yield slice(start, start + size), slice(part * rank, (part + 1) * rank)
        start += size


def times_b(xa: Tensor, lora_B: Tensor, splits: Sequence[int]) -> Tensor:
    """``xa B^T``, [..., N]."""
    if not splits:
        return xa @ lora_B.t()
    n, rank = lora_B.shape
    return torch.cat([xa[..., own] @ lora_B[outputs].t() for outputs, own in _parts(splits, n, rank)], dim=-1)


def grad_xa(dy: Tensor, lora_B: Tensor, splits: Sequence[int]) -> Tensor:
    """``dY B``, [M, P R], of dY [M, N]."""
    if not splits:
        return dy @ lora_B
    n, rank = lora_B.shape
    return torch.cat([dy[:, outputs] @ lora_B[outputs] for outputs, _ in _parts(splits, n, rank)], dim=1)


def grad_b(dy: Tensor, xa: Tensor, splits: Sequence[int]) -> Tensor:
    """``dY^T xa``, [N, R], of dY [M, N] and xa [M, P R]."""
    if not splits:
        return dy.t() @ xa
    n, rank = dy.shape[1], xa.shape[1] // len(splits)
    return torch.cat([dy[:, outputs].t() @ xa[:, own] for outputs, own in _parts(splits, n, rank)])


def delta(lora_A: Tensor, lora_B: Tensor, splits: Sequence[int]) -> Tensor:
    """``B A``, [N, K]."""
    return times_b(lora_A.t(), lora_B, splits).t()
