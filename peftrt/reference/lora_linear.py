"""y = x W^T + b + s (drop(x) A^T) B^T (LoRA, Hu et al. 2021, arXiv:2106.09685, equation 3) and its gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peftrt.reference._weight import accumulator, dense_weight
from peftrt.reference.dropout import dropout


def forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """``x [..., K]``, the weight's arguments, A [R, K], B [N, R], s, bias, dropout's p and seed.

    Returns y ``[..., N]`` in x's dtype and ``xa = drop(x) A^T [..., R]`` in the accumulator's.
    """
    *weight, lora_A, lora_B, scaling, bias, dropout_p, seed = rest
    dtype = accumulator(x.dtype)
    wide = x.to(dtype)
    xa = dropout(wide, seed, dropout_p) @ lora_A.to(dtype).t()
    y = wide @ dense_weight(x.dtype, *weight).t() + scaling * (xa @ lora_B.to(dtype).t())
    if bias is not None:
        y = y + bias
    return y.to(x.dtype), xa
