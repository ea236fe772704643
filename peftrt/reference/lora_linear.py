"""y = c * (x W^T + s (drop(x) A^T) B^T) + b (LoRA, Hu et al. 2021, arXiv:2106.09685, equation 3, for c = 1; DoRA, Liu
et al. 2024, arXiv:2402.09353, equation 6, for c = m / ||W + s B A||) and its gradients.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peftrt.reference._weight import accumulator, dense_weight
from peftrt.reference.dropout import dropout
from peftrt.reference.parts import grad_b, grad_xa, times_b


def forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """``x [..., K]``, the weight's arguments, A [R, K], B [N, R], s, bias, dropout's p and seed, c [N] or None, splits.

    Returns y ``[..., N]`` in x's dtype and ``xa = drop(x) A^T [..., R]`` in the accumulator's.
    """
    *weight, lora_A, lora_B, scaling, bias, dropout_p, seed, row_scale, splits = rest
    dtype = accumulator(x.dtype)
    wide = x.to(dtype)
    xa = dropout(wide, seed, dropout_p) @ lora_A.to(dtype).t()
    y = wide @ dense_weight(x.dtype, *weight).t() + scaling * times_b(xa, lora_B.to(dtype), splits)
    if row_scale is not None:
        y = y * row_scale
    if bias is not None:
        y = y + bias
    return y.to(x.dtype), xa


def backward(dy: Tensor, x: Tensor, xa: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``dy [..., N]``, x, xa, the weight's arguments, A, B, s, dropout's p, seed, c, whether dX, dA, dB are wanted, and
    splits.

    Returns ``dX = dZ W + drop'(G A)``, ``dA = G^T drop(x)`` and ``dB = s dZ^T xa`` with ``dZ = c * dY`` and
    ``G = s dZ B``; what is not wanted is empty.
    """
    *weight, lora_A, lora_B, scaling, dropout_p, seed, row_scale, needs_dx, needs_dA, needs_dB, splits = rest
    dtype = accumulator(x.dtype)
    rows = dy.reshape(-1, dy.shape[-1]).to(dtype)
    if row_scale is not None:
        rows = rows * row_scale
    g = scaling * grad_xa(rows, lora_B.to(dtype), splits)
    dx, dA, dB = x.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    if needs_dx:
        through = dropout((g @ lora_A.to(dtype)).view(x.shape), seed, dropout_p)
        dx = ((rows @ dense_weight(x.dtype, *weight)).view(x.shape) + through).to(x.dtype)
    if needs_dA:
        dA = (g.t() @ dropout(x.to(dtype), seed, dropout_p).reshape(-1, x.shape[-1])).to(lora_A.dtype)
    if needs_dB:
        dB = (scaling * grad_b(rows, xa.reshape(-1, xa.shape[-1]), splits)).to(lora_B.dtype)
    return dx, dA, dB
