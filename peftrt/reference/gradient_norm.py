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
    # Python's root and quotient are the nearest numbers, which torch's are not always on a CPU.
    norm = math.sqrt(_sum(partials, FINAL_LANES).item())
    ratio = max_norm / (norm + 1e-6)
    out.copy_(partials.new_tensor([norm, 1.0 if ratio > 1.0 else ratio]))


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
