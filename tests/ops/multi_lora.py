"""Adapters and their truth: one row after the other, each with matrices of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from peftrt.formats.nf4 import NF4Weight
from tests.cases import nf4, randn

Adapters = list[tuple[Tensor, Tensor, float]]


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def adapters(
    ranks: list[int], n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float32, grad: bool = False
) -> Adapters:
    return [
        (
            randn(r, k, seed=seed + 2 * e, dtype=dtype).requires_grad_(grad),
            randn(n, r, seed=seed + 2 * e + 1, dtype=dtype).requires_grad_(grad),
            0.5 + e,
        )
        for e, r in enumerate(ranks)
    ]


def by_row(x: Tensor, weight: Tensor | None, loras: Adapters, slot_ids: Tensor, bias: Tensor | None = None) -> Tensor:
    """One row after the other, each with matrices of its own."""
    flat = x.double().reshape(-1, x.shape[-1])
    n = loras[0][1].shape[0]
    rows = []
    for i, slot in enumerate(slot_ids.tolist()):
        row = flat.new_zeros(n) if weight is None else weight @ flat[i]
        if slot >= 0:
            lora_A, lora_B, scaling = loras[slot]
            row = row + scaling * (lora_B.double() @ (lora_A.double() @ flat[i]))
        rows.append(row if bias is None else row + bias.double())
    return (torch.stack(rows) if rows else flat.new_zeros(0, n)).view(*x.shape[:-1], n)


def base(kind: str, n: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor | NF4Weight | None:
    if kind == "none":
        return None
    return nf4(n, k, seed=seed) if kind == "nf4" else randn(n, k, seed=seed, dtype=dtype)
