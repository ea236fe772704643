"""Seeds of dropout, which the operations that drop share."""

from __future__ import annotations

import torch
from torch import Tensor

from peftrt.ops._weight import check_device, expect


def as_seed(seed: Tensor | int | None, x: Tensor) -> Tensor:
    """A seed as int64 [1] on x's device; drawn there, without waiting for the device, where none is given."""
    if seed is None:
        return torch.randint(2**62, (1,), device=x.device)
    return seed if isinstance(seed, Tensor) else torch.tensor([seed], dtype=torch.int64, device=x.device)


def check_seed(op: str, argument: str, p: float, seed: Tensor | None, x: Tensor) -> None:
    """``argument`` is a probability, and where it is not 0 there is a seed on x's device."""
    expect(0.0 <= p < 1.0, op, argument, "in [0, 1)", p)
    if p:
        good = seed is not None and seed.dtype == torch.int64 and seed.numel() == 1
        expect(good, op, "seed", f"int64 [1] where {argument} is not 0", seed)
        check_device(op, "seed", seed, x)
