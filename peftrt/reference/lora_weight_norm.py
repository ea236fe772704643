"""``||W + s B A||``, row by row: what DoRA divides a magnitude by (Liu et al. 2024, arXiv:2402.09353, equation 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftrt.reference._weight import accumulator, dense_weight
from peftrt.reference.parts import delta


def forward(*weight_and_adapter: Any) -> Tensor:
    """The weight's arguments, A [R, K], B [N, R], s, splits; returns [N] in fp32, or fp64 for a dense weight in fp64.

    An NF4 weight is code times scale in fp32, rounded no further.
    """
    *weight, lora_A, lora_B, scaling, splits = weight_and_adapter
    dtype = accumulator(weight[0].dtype)
    adapted = dense_weight(dtype, *weight) + scaling * delta(lora_A.to(dtype), lora_B.to(dtype), splits)
    return torch.linalg.vector_norm(adapted, dim=1)
