"""bottleneck: an adapter of two layers with an activation between them, and what it is added to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftrt.formats.nf4 import FLOAT_DTYPES
from peftrt.ops import _bottleneck_triton, _native
from peftrt.ops._define import Backend, define, reference_backend
from peftrt.ops._invariant import invariant
from peftrt.ops._weight import check_device, check_float, expect
from peftrt.reference import bottleneck as reference
from peftrt.reference._weight import accumulator

_OTHER_NAMES = {"swish": "silu"}
# as csrc/cpu/kernels.h has them
_NUMBERS = {name: number for number, name in enumerate(reference.ACTIVATIONS)}


def bottleneck(
    x: Tensor,
    residual: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    scaling: float = 1.0,
    activation: str = "relu",
) -> Tensor:
    """Bottleneck adapter, with its residual connection.

    ``y = residual + s (act(x D^T + b_d) U^T + b_u)``. Differentiable in x, the residual and all four parameters.
    Between forward and backward only x and ``x D^T + b_d`` are kept beside D and U.

    Args:
        x: ``[..., K]``; fp32, bf16 or fp16 (fp64 by the reference); any strides.
        residual: of x's shape and dtype: x itself (Houlsby), or what came before or beside it (Pfeiffer, parallel).
            Under ``torch.autocast`` both are cast to the wider of autocast's dtype and the residual's: y's dtype is
            what torch's own sum would have.
        down_weight: D, ``[R, K]``, any floating dtype: fp32 adapters beside a bf16 model are computed in fp32.
        down_bias: b_d, ``[R]``, any floating dtype.
        up_weight: U, ``[K, R]``, any floating dtype.
        up_bias: b_u, ``[K]``, any floating dtype.
        scaling: s, without unit.
        activation: ``"relu"``, ``"gelu"`` (by the error function), ``"gelu_new"`` (by tanh), ``"silu"`` (also
            ``"swish"``), ``"tanh"``, ``"sigmoid"`` or ``"leaky_relu"`` (slope 0.01).

    Returns:
        ``[..., K]`` in x's dtype: all of it is summed in fp32 and rounded once. On a CPU a row's bits depend on nothing
        but the row and on whether there are more than 8, and the number of threads changes none, nor those of the
        parameters' gradients; on a GPU they depend on the range of rows too (kernels/bottleneck.py, low_rank.py).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape or device that does not fit, or an unknown activation.

    Source: Houlsby et al. 2019 (arXiv:1902.00751), section 2.1; Pfeiffer et al. 2020 (arXiv:2005.00247); parallel, with
    s: He et al. 2021 (arXiv:2110.04366), equation 5.
    """
    x, residual = _autocast(x, residual)
    name = _OTHER_NAMES.get(activation, activation)
    return _FORWARD(x, residual, down_weight, down_bias, up_weight, up_bias, scaling, name)[0]


def _autocast(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Under ``torch.autocast``: both in the dtype that torch gives their sum; otherwise as they are.

    A residual stream in fp32 stays one: autocast rounds what a product takes and gives, not what its result is added
    to. Products in fp32 are exact enough for any dtype.
    """
    if not torch.is_autocast_enabled(x.device.type) or not {x.dtype, residual.dtype} <= set(FLOAT_DTYPES):
        return x, residual
    dtype = torch.promote_types(torch.get_autocast_dtype(x.device.type), residual.dtype)
    return x.to(dtype), residual.to(dtype)


def _check(
    x: Tensor,
    residual: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    _: float,
    activation: str,
) -> None:
    op = "bottleneck"
    _check_products(op, x, down_weight, up_weight, activation)
    check_device(op, "residual", residual, x)
    expect(residual.dtype == x.dtype, op, "residual", f"of x's dtype {x.dtype}", residual, TypeError)
    expect(residual.shape == x.shape, op, "residual", f"{list(x.shape)}, of x's shape", residual)
    rank, k = down_weight.shape
    for name, bias, size, letter in (("down_bias", down_bias, rank, "R"), ("up_bias", up_bias, k, "K")):
        check_float(op, name, bias)
        check_device(op, name, bias, x)
        expect(tuple(bias.shape) == (size,), op, name, f"[{letter}] = [{size}]", bias)


def _check_products(op: str, x: Tensor, down_weight: Tensor, up_weight: Tensor, activation: str) -> None:
    """What forward and backward have in common fits together."""
    check_float(op, "x", x)
    expect(x.dim() > 0, op, "x", "[..., K]", x)
    for name, tensor in (("down_weight", down_weight), ("up_weight", up_weight)):
        check_float(op, name, tensor)
        check_device(op, name, tensor, x)
    k = x.shape[-1]
    expect(down_weight.dim() == 2 and down_weight.shape[1] == k, op, "down_weight", f"[R, K = {k}]", down_weight)
    expected = (k, down_weight.shape[0])
    expect(tuple(up_weight.shape) == expected, op, "up_weight", f"[K, R] = {list(expected)}", up_weight)
    known = activation in reference.ACTIVATIONS
    expect(known, op, "activation", f"one of {', '.join(reference.ACTIVATIONS)}", activation)


def _fake(x: Tensor, residual: Tensor, down_weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    inner = x.new_empty((*x.shape[:-1], down_weight.shape[0]), dtype=accumulator(x.dtype))
    return x.new_empty(x.shape), inner


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # x D^T + b_d is rarely used by itself
    x, _, down_weight, down_bias, up_weight, up_bias, ctx.scaling, ctx.activation = inputs
    ctx.bias_dtypes = down_bias.dtype, up_bias.dtype
    ctx.save_for_backward(x, output[1], down_weight, up_weight)


def _backward(ctx: Any, dy: Tensor | None, d_inner: Tensor | None) -> tuple[Any, ...]:
    x, inner, down_weight, up_weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    d_residual = dy if needs[1] else None
    dy = x.new_zeros(x.shape) if dy is None else dy
    wanted = (needs[0], needs[2] or needs[3], needs[4] or needs[5])
    call = (dy, x, inner, down_weight, up_weight, ctx.scaling, ctx.activation, *wanted)
    if d_inner is None and not torch.is_grad_enabled():
        gradients = _BACKWARD(*call)
    else:  # made of operations that have gradients of their own
        gradients = reference.backward(*call, d_inner=d_inner)
    dx, d_down, d_down_bias, d_up, d_up_bias = gradients
    d_down_bias, d_up_bias = (
        grad.to(dtype) for grad, dtype in zip((d_down_bias, d_up_bias), ctx.bias_dtypes, strict=True)
    )
    order = (dx, d_residual, d_down, d_down_bias, d_up, d_up_bias)
    return (*(grad if need else None for grad, need in zip(order, needs[:6], strict=True)), None, None)


def _check_backward(
    dy: Tensor, x: Tensor, inner: Tensor, down_weight: Tensor, up_weight: Tensor, _: float, activation: str, *__: bool
) -> None:
    op = "bottleneck_backward"
    _check_products(op, x, down_weight, up_weight, activation)
    for name, tensor, size, dtype in (
        ("dy", dy, x.shape[-1], x.dtype),
        ("inner", inner, down_weight.shape[0], accumulator(x.dtype)),
    ):
        check_device(op, name, tensor, x)
        fits = tensor.shape == (*x.shape[:-1], size) and tensor.dtype == dtype
        expect(fits, op, name, f"{dtype} {[*x.shape[:-1], size]}", tensor)


def _fake_backward(
    dy: Tensor, x: Tensor, inner: Tensor, down_weight: Tensor, up_weight: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    wanted = rest[2:]
    dx, d_down, d_up = (
        like.new_empty(like.shape if want else (0,))
        for like, want in zip((x, down_weight, up_weight), wanted, strict=True)
    )
    rank, k = down_weight.shape
    return dx, d_down, inner.new_empty(rank if wanted[1] else 0), d_up, inner.new_empty(k if wanted[2] else 0)


def _native_unsupported(x: Tensor, *_: Any) -> str | None:
    return _native.unsupported(x, x.dtype)


def _native_forward(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *parameters, scaling, activation = rest
    parameters = [t.float() if t.dtype == torch.float64 else t for t in parameters]
    call = (x, residual, *parameters, scaling, _NUMBERS.get(activation, -1), invariant())
    return torch.ops.peftrt_cpu.bottleneck.default(*call)


def _native_backward(
    dy: Tensor, x: Tensor, inner: Tensor, down_weight: Tensor, up_weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    scaling, activation, needs_dx, needs_down, needs_up = rest
    up = up_weight.float() if up_weight.dtype == torch.float64 else up_weight
    call = (dy, x, inner, up, scaling, _NUMBERS[activation], needs_down, needs_up)
    g, d_down, d_down_bias, d_up, d_up_bias = torch.ops.peftrt_cpu.bottleneck_gradient.default(*call)
    dx = (g @ down_weight.float()).view(x.shape).to(x.dtype) if needs_dx else x.new_empty(0)
    d_down = d_down.to(down_weight.dtype) if needs_down else down_weight.new_empty(0)
    d_up = d_up.to(up_weight.dtype) if needs_up else up_weight.new_empty(0)
    return dx, d_down, d_down_bias, d_up, d_up_bias


_FORWARD = define(
    "bottleneck(Tensor x, Tensor residual, Tensor down_weight, Tensor down_bias, Tensor up_weight, Tensor up_bias, "
    "float scaling, str activation) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    backends=(
        Backend("native", _native_forward, _native_unsupported, ("cpu",), strict=True),
        Backend("triton", _bottleneck_triton.forward, _bottleneck_triton.unsupported, ("cuda",)),
        reference_backend(reference.forward),
    ),
    setup_context=_setup_context,
    backward=_backward,
)
_BACKWARD = define(
    "bottleneck_backward(Tensor dy, Tensor x, Tensor inner, Tensor down_weight, Tensor up_weight, float scaling, "
    "str activation, bool needs_dx, bool needs_down, bool needs_up) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=_check_backward,
    fake=_fake_backward,
    backends=(
        Backend("native", _native_backward, _native_unsupported, ("cpu",)),
        Backend("triton", _bottleneck_triton.backward, _bottleneck_triton.unsupported, ("cuda",)),
        reference_backend(reference.backward),
    ),
)
