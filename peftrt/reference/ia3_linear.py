"""y = c * ((u * x) W^T) + b: IA3's factors of a linear map's inputs or outputs (Liu et al. 2022, arXiv:2205.05638)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peftrt.reference._weight import accumulator, dense_weight


def forward(x: Tensor, *rest: Any) -> Tensor:
    """``x [..., K]``, the weight's arguments, u [K], c [N] and the bias [N], each or None; ``[..., N]`` in x's dtype.

    ``u * x`` is rounded to x's dtype, as a layer before this one would round it.
    """
    *weight, x_scale, y_scale, bias = rest
    seen = x if x_scale is None else (x * x_scale).to(x.dtype)
    y = seen.to(accumulator(x.dtype)) @ dense_weight(x.dtype, *weight).t()
    if y_scale is not None:
        y = y * y_scale
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)
