"""The gradient of c in ``y = c z + b``, out of y: ``dc = sum_m dy (y - b) / c``."""

from __future__ import annotations

import torch
from torch import Tensor

from peftrt.reference._weight import accumulator


def forward(dy: Tensor, y: Tensor, bias: Tensor | None, row_scale: Tensor) -> Tensor:
    """``dy``, ``y [..., N]``, ``bias [N]`` or None, ``row_scale [N]``; returns [N], 0 where c is 0."""
    dtype = accumulator(y.dtype)
    scaled = y.to(dtype) if bias is None else y.to(dtype) - bias.to(dtype)
    total = (dy.to(dtype) * scaled).reshape(-1, y.shape[-1]).sum(0)
    # the division's own gradient must be finite where its result is not used
    divisor = torch.where(row_scale == 0, 1.0, row_scale)
    return torch.where(row_scale == 0, 0.0, total / divisor)
