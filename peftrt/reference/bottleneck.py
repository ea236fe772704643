"""y = residual + s (act(x D^T + b_d) U^T + b_u) (Houlsby et al. 2019, arXiv:1902.00751, section 2.1) and its
gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from peftrt.reference._weight import accumulator

LEAKY_SLOPE = 0.01
_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715


def _gelu_new(v: Tensor) -> Tensor:
    return functional.gelu(v, approximate="tanh")


def _leaky_relu(v: Tensor) -> Tensor:
    return functional.leaky_relu(v, LEAKY_SLOPE)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu_new": _gelu_new,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": _leaky_relu,
}


def _relu_slope(v: Tensor) -> Tensor:
    return torch.where(v <= 0, 0.0, 1.0).to(v.dtype)  # of a NaN 1, as torch has it


def _gelu_slope(v: Tensor) -> Tensor:
    density = torch.exp(-0.5 * v * v) / math.sqrt(2 * math.pi)
    return 0.5 * torch.erfc(-v / math.sqrt(2)) + v * density


def _gelu_new_slope(v: Tensor) -> Tensor:
    half = torch.sigmoid(2 * _TANH_SCALE * (v + _TANH_CUBE * v * v * v))
    inner = 2 * _TANH_SCALE * (1 + 3 * _TANH_CUBE * v * v)
    return half + v * half * (1 - half) * inner


def _silu_slope(v: Tensor) -> Tensor:
    half = torch.sigmoid(v)
    return half + v * half * (1 - half)


def _tanh_slope(v: Tensor) -> Tensor:
    return 1 - torch.tanh(v).square()


def _sigmoid_slope(v: Tensor) -> Tensor:
    half = torch.sigmoid(v)
    return half * (1 - half)


def _leaky_relu_slope(v: Tensor) -> Tensor:
    return torch.where(v > 0, 1.0, LEAKY_SLOPE).to(v.dtype)


SLOPES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": _relu_slope,
    "gelu": _gelu_slope,
    "gelu_new": _gelu_new_slope,
    "silu": _silu_slope,
    "tanh": _tanh_slope,
    "sigmoid": _sigmoid_slope,
    "leaky_relu": _leaky_relu_slope,
}


def forward(
    x: Tensor,
    residual: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    scaling: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """``x [..., K]``, the residual of its shape, D [R, K], b_d [R], U [K, R], b_u [K], s and the activation's name.

    Returns y ``[..., K]`` in x's dtype and ``x D^T + b_d``, [..., R], in the accumulator's.
    """
    dtype = accumulator(x.dtype)
    inner = x.to(dtype) @ down_weight.to(dtype).t() + down_bias.to(dtype)
    outer = ACTIVATIONS[activation](inner) @ up_weight.to(dtype).t() + up_bias.to(dtype)
    return (residual.to(dtype) + scaling * outer).to(x.dtype), inner


def backward(
    dy: Tensor, x: Tensor, inner: Tensor, down_weight: Tensor, up_weight: Tensor, *rest: Any, d_inner: Any = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``dy [..., K]``, x, V = ``x D^T + b_d``, D, U, s, the activation's name, and whether dX, the gradients of D and
    b_d, and those of U and b_u are wanted; ``d_inner``: a gradient of V, where it was used.

    Returns ``dX = G D``, ``dD = G^T x``, ``db_d = sum_m G``, ``dU = s dY^T act(V)`` and ``db_u = s sum_m dY`` with
    ``G = s act'(V) * (dY U)``; those of biases are in the accumulator's dtype. What is not wanted is empty.
    """
    scaling, activation, needs_dx, needs_down, needs_up = rest
    dtype = accumulator(x.dtype)
    m = math.prod(x.shape[:-1])
    wide, rows, inside = (t.reshape(m, t.shape[-1]) for t in (x.to(dtype), dy.to(dtype), inner))
    g = scaling * (rows @ up_weight.to(dtype)) * SLOPES[activation](inside)
    if d_inner is not None:
        g = g + d_inner.reshape(g.shape)
    dx, d_down, d_up = x.new_empty(0), down_weight.new_empty(0), up_weight.new_empty(0)
    d_down_bias, d_up_bias = inner.new_empty(0), inner.new_empty(0)
    if needs_dx:
        dx = (g @ down_weight.to(dtype)).view(x.shape).to(x.dtype)
    if needs_down:
        d_down = (g.t() @ wide).to(down_weight.dtype)
        d_down_bias = g.sum(0)
    if needs_up:
        d_up = (scaling * (rows.t() @ ACTIVATIONS[activation](inside))).to(up_weight.dtype)
        d_up_bias = scaling * rows.sum(0)
    return dx, d_down, d_down_bias, d_up, d_up_bias
