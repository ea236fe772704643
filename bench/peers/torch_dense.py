"""torch: the dense layer that a quantised one replaces."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NAME = "torch"


def linear(weight: Tensor) -> nn.Module:
    """A frozen ``nn.Linear`` without bias over ``weight [N, K]``."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What it costs to allocate and touch a tensor of this size."""
    return torch.zeros(shape, dtype=dtype, device=device)
