"""gradient_norm in plain torch, summed in fp64 in the one order that every backend has."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LANES, FINAL_LANES = 256, 1024  # of a chunk's sum, and of the sum over chunks


def forward(grads: list[Tensor | None], chunks: Tensor, partials: Tensor, max_norm: float, out: Tensor) -> None:
    """Writes ``out`` (norm and coefficient); the arguments are those of the operation."""
    for i, (tensor, first, count) in enumerate(chunks.tolist()):
        grad = grads[tensor]
        part = None if grad is None else grad.detach().view(-1)[first : first + count].double()
        partials[i] = 0.0 if part is None else _sum(part * part, LANES)
    # the nearest number, which torch's own root is not always on a CPU
    norm = partials.new_tensor(math.sqrt(_sum(partials, FINAL_LANES).item()))
    out[0] = norm
    # torch.nn.utils.clip_grad_norm_'s, in fp64
    out[1] = (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _sum(values: Tensor, lanes: int) -> Tensor:
    """Lane l adds elements l, l + lanes, ... in turn; then the upper half of the lanes is added to the lower, again and
    again.
    """
    rows = torch.nn.functional.pad(values, (0, -values.numel() % lanes)).view(-1, lanes)
    total = torch.zeros(lanes, dtype=torch.float64, device=values.device)
    for row in rows:
        total = total + row
    while total.numel() > 1:
        half = total.numel() // 2
        total = total[:half] + total[half:]
    return total[0]
