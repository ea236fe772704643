"""y = x W^T + b and dX = dY W over an NF4 weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peftrt.reference._weight import accumulator, dense_weight


def forward(x: Tensor, *weight_and_bias: Any) -> Tensor:
    """``x [..., K]``, the weight's arguments, ``bias [N]`` or None; returns ``[..., N]`` in x's dtype."""
    *weight, bias = weight_and_bias
    y = x.to(accumulator(x.dtype)) @ dense_weight(x.dtype, *weight).t()
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def grad_input(dy: Tensor, *weight: Any) -> Tensor:
    """``dy [..., N]``, the weight's arguments; returns ``[..., K]`` in dy's dtype."""
    return (dy.to(accumulator(dy.dtype)) @ dense_weight(dy.dtype, *weight)).to(dy.dtype)
