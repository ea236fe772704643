"""torch: ``torch.optim.AdamW(fused=True)``, whose state has the parameters' dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

NAME = "torch"


def adamw(params: Sequence[nn.Parameter], options: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimizer, in one kernel for many tensors."""
    return torch.optim.AdamW(params, **options, fused=True)
