"""lora_linear by CUDA C++: few rows over an NF4 base, by the kernels of multi_lora_linear with one adapter for all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftrt.ops import _native, _paths
from peftrt.ops._multi_lora_cuda import PAGES, PARTS
from peftrt.ops._weight import WeightArgs


def unsupported(x: Tensor, *rest: Any) -> str | None:
    """Why the kernels cannot take a call of lora_linear; None where they can."""
    weight, (_, lora_B, _, _, dropout_p, _, _, splits) = WeightArgs(*rest[:7]), rest[7:15]
    reason = _native.cuda_unsupported(x, x.dtype)
    if reason is not None:
        return reason
    if weight.absmax is None or weight.n == 0:
        return "multiplies an NF4 base, no other"
    if x.element_size() != 2 or _paths.rows_of(x) > _paths.NATIVE_ROWS:
        return f"takes {_paths.NATIVE_ROWS} rows of bf16 or fp16"
    if dropout_p:
        return "drops nothing: dropout is of training, with more rows"
    if len(splits) > PARTS or 0 in splits or lora_B.shape[-1] > 8 * PAGES:
        return f"takes {PARTS} maps of at most {8 * PAGES} ranks each"
    return None


def chosen(x: Tensor, *rest: Any) -> bool:
    """Whether they take it, and are expected to be the fastest."""
    return x.is_cuda and _paths.path("lora", x) == _paths.DECODE and unsupported(x, *rest) is None


def forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The operation's arguments; y and xa."""
    *weight, lora_A, lora_B, scaling, bias, _, _, row_scale, splits = rest
    lora_A, lora_B = (t.float() if t.dtype == torch.float64 else t for t in (lora_A, lora_B))
    return torch.ops.peftrt_cuda.nf4_lora_linear.default(x, *weight, lora_A, lora_B, scaling, bias, row_scale, splits)
