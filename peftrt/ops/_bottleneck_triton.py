"""bottleneck by Triton: a kernel for the way forward, the narrow products of adapters for the way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftrt.ops import _triton
from peftrt.ops._paths import rows_of
from peftrt.reference.bottleneck import ACTIVATIONS, SLOPES


def unsupported(x: Tensor, *_: Any) -> str | None:
    """Why Triton cannot take a call with such an x; None where it can."""
    return _triton.unsupported(x, x.dtype)


@_triton.heeds_invariance
def forward(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The operation's arguments; y and ``x D^T + b_d``."""
    from peftrt.kernels.bottleneck import bottleneck

    *parameters, scaling, activation = rest
    down_weight, down_bias, up_weight, up_bias = (_operand(t) for t in parameters)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    inner = x.new_empty((*x.shape[:-1], down_weight.shape[0]), dtype=torch.float32)
    adapter = (down_weight, down_bias, up_weight, up_bias, scaling, activation)
    bottleneck(_rows(x), _rows(residual), *adapter, _rows(inner), _rows(y))
    return y, inner


@_triton.heeds_invariance
def backward(
    dy: Tensor, x: Tensor, inner: Tensor, down_weight: Tensor, up_weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operation's arguments; dX and the gradients of D, b_d, U and b_u, empty where not wanted."""
    from peftrt.kernels.lora_linear_dense import adapter_share
    from peftrt.kernels.low_rank import low_rank, low_rank_gradient

    scaling, activation, needs_dx, needs_down, needs_up = rest
    dy_rows, x_rows, inside = _rows(dy), _rows(x), _rows(inner)
    down, up = _operand(down_weight), _operand(up_weight)
    dx, d_down, d_up = x.new_empty(0), down_weight.new_empty(0), up_weight.new_empty(0)
    d_down_bias, d_up_bias = inner.new_empty(0), inner.new_empty(0)
    g = torch.empty_like(inside)
    if needs_dx or needs_down:
        low_rank(dy_rows, up.t(), g, factor=scaling)
        g.mul_(SLOPES[activation](inside))
    if needs_dx:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        adapter_share(g, down, _rows(dx))
    if needs_down:
        d_down, d_down_bias = down.new_empty(down.shape), g.sum(0)
        low_rank_gradient(g, x_rows, d_down)
    if needs_up:
        d_up, d_up_bias = up.new_empty(up.shape), scaling * dy_rows.sum(0, dtype=torch.float32)
        low_rank_gradient(ACTIVATIONS[activation](inside), dy_rows, d_up.t(), factor=scaling)
    return dx, d_down.to(down_weight.dtype), d_down_bias, d_up.to(up_weight.dtype), d_up_bias


def _rows(x: Tensor) -> Tensor:
    """[M, ...]: of what is contiguous, the same memory."""
    return x.reshape(rows_of(x), x.shape[-1]).contiguous()


def _operand(parameter: Tensor) -> Tensor:
    """A parameter as the kernels take it: contiguous, and not fp64."""
    return (parameter.float() if parameter.dtype == torch.float64 else parameter).contiguous()
