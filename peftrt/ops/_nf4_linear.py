"""nf4_linear and its input gradient: products with an NF4 weight that is never stored decoded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftrt.formats.nf4 import NF4Weight
from peftrt.ops import _native, _triton
from peftrt.ops._define import Backend, define, reference_backend
from peftrt.ops._weight import WEIGHT, WeightArgs, autocast, check_linear, expect, weight_args
from peftrt.reference import nf4_linear as reference


def nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """Linear map over an NF4 weight.

    ``y = x W^T + b`` with ``W = round(nf4[code] * scale)`` in x's dtype and sums in fp32. Differentiable in x and bias.

    Args:
        x: ``[..., K]``; fp32, bf16 or fp16 (fp64 by the reference); any strides. Cast under ``torch.autocast``.
        weight: NF4Weight of shape (N, K).
        bias: ``[N]`` in x's dtype, or None.

    Returns:
        ``[..., N]`` in x's dtype. A row's bits do not depend on the other rows as long as M stays within one kernel's
        range; another range of M may sum in another order. On a CPU neither the number of threads nor what else runs
        changes a bit.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape or device that does not fit.

    Source: QLoRA, Dettmers et al. 2023 (arXiv:2305.14314), equation 5.
    """
    if not isinstance(weight, NF4Weight):
        raise TypeError(f"nf4_linear: weight must be an NF4Weight, got {type(weight).__name__}")
    x, bias = autocast(x, bias)  # type: ignore[assignment]
    return _FORWARD(x, *weight_args("nf4_linear", weight), bias)


def _check(x: Tensor, *rest: Any) -> None:
    *weight, bias = rest
    expect(weight[1] is not None, "nf4_linear", "absmax", "the scales of an NF4 weight", weight[1])
    check_linear("nf4_linear", x, WeightArgs(*weight), bias)


def _check_dx(dy: Tensor, *weight: Any) -> None:
    expect(weight[1] is not None, "nf4_linear_dx", "absmax", "the scales of an NF4 weight", weight[1])
    check_linear("nf4_linear_dx", dy, WeightArgs(*weight), None, name="dy", side="n")


def _fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[4]))


def _fake_dx(dy: Tensor, *weight: Any) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], weight[5]))


def _native_unsupported(x: Tensor, *_: Any) -> str | None:
    return _native.unsupported(x, x.dtype)


def _native_forward(*args: Any) -> Tensor:
    return torch.ops.peftrt_cpu.nf4_linear.default(*args)


def _native_dx(*args: Any) -> Tensor:
    return torch.ops.peftrt_cpu.nf4_linear_dx.default(*args)


def _triton_unsupported(x: Tensor, *_: Any) -> str | None:
    return _triton.unsupported(x, x.dtype)


def _triton_forward(x: Tensor, *rest: Any) -> Tensor:
    from peftrt.kernels.nf4_linear import nf4_linear

    *codes, _, _, block_size, bias = rest
    out = _fake(x, *rest)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    bias = None if bias is None else bias.contiguous()
    nf4_linear(rows, *_triton.weight(*codes), block_size, bias, out.view(-1, out.shape[-1]))
    return out


def _triton_dx(dy: Tensor, *weight: Any) -> Tensor:
    from peftrt.kernels.nf4_linear import nf4_linear_dx

    *codes, _, _, block_size = weight
    out = _fake_dx(dy, *weight)
    rows = dy.reshape(-1, dy.shape[-1]).contiguous()
    nf4_linear_dx(rows, *_triton.weight(*codes), block_size, out.view(-1, out.shape[-1]))
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, ctx.n, ctx.k, ctx.block_size, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    weight = (*ctx.saved_tensors, ctx.n, ctx.k, ctx.block_size)
    dx = _GRAD_INPUT(dy, *weight) if ctx.needs_input_grad[0] else None
    dbias = dy.flatten(end_dim=-2).sum(0) if ctx.needs_input_grad[-1] else None
    return (dx, *(None,) * len(weight), dbias)


def _backward_dx(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """dX is linear in dY, with the transposed map: its own gradient is the forward without bias."""
    weight = (*ctx.saved_tensors, ctx.n, ctx.k, ctx.block_size)
    return (_FORWARD(grad, *weight, None), *(None,) * len(weight))


def _setup_context_dx(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _setup_context(ctx, (*inputs, None), output)


_FORWARD = define(
    f"nf4_linear(Tensor x, {WEIGHT}, Tensor? bias) -> Tensor",
    check=_check,
    fake=_fake,
    backends=(
        Backend("native", _native_forward, _native_unsupported, ("cpu",), strict=True),
        Backend("triton", _triton_forward, _triton_unsupported, ("cuda",)),
        reference_backend(reference.forward),
    ),
    setup_context=_setup_context,
    backward=_backward,
)
_GRAD_INPUT = define(
    f"nf4_linear_dx(Tensor dy, {WEIGHT}) -> Tensor",
    check=_check_dx,
    fake=_fake_dx,
    backends=(
        Backend("native", _native_dx, _native_unsupported, ("cpu",), strict=True),
        Backend("triton", _triton_dx, _triton_unsupported, ("cuda",)),
        reference_backend(reference.grad_input),
    ),
    setup_context=_setup_context_dx,
    backward=_backward_dx,
)
