"""bitsandbytes: ``AdamW32bit``, ``AdamW8bit`` and their paged forms, whose state is in CUDA's managed memory.

The paged ones are never given more than the device has: over-subscribed managed memory can hang a GPU. State of tensors
of less than 100,000 elements they do not page at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bench.peers import need, need_gpu

NAME, NAME_PAGED = "bitsandbytes", "bitsandbytes paged"


def adamw(
    params: Sequence[nn.Parameter], options: Mapping[str, Any], bits: int, paged: bool = False
) -> torch.optim.Optimizer:
    """The optimizer with a state of so many bits."""
    if paged:
        # on a CPU it says that it does not page, and does not
        need_gpu(params[0].device)
    return getattr(need("bitsandbytes").optim, f"{'Paged' if paged else ''}AdamW{bits}bit")(params, **options)
