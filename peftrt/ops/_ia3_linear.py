"""ia3_linear: a base weight, dense or NF4, with factors of its inputs, of its outputs, or of both."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from peftrt.formats.nf4 import NF4Weight
from peftrt.ops import _multi_lora_cuda, _multi_lora_native, _multi_lora_triton, _native, _triton
from peftrt.ops._define import OPS, Backend, define, reference_backend
from peftrt.ops._invariant import invariant
from peftrt.ops._weight import (
    WEIGHT,
    WeightArgs,
    autocast,
    check_float,
    check_linear,
    check_row_scale,
    weight_args,
)
from peftrt.reference import ia3_linear as reference
from peftrt.reference import row_scale_gradient
from peftrt.reference._weight import accumulator

_OP = "ia3_linear"


def ia3_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    x_scale: Tensor | None = None,
    y_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Linear map with a factor for each input, each output, or both.

    ``y = c * ((u * x) W^T) + b``. Differentiable in x, a dense W, u, c and b. Factors and bias stand in the product's
    kernel. Between forward and backward x is kept where u or W has a gradient, and y where c has one (to change it in
    place before the backward is an error then).

    Args:
        x: ``[..., K]``; fp32, bf16 or fp16 (fp64 by the reference); any strides. Cast under ``torch.autocast``.
        weight: ``[N, K]`` in x's dtype, or an NF4Weight of that shape.
        x_scale: u, ``[K]``, any floating dtype; ``u * x`` is rounded to x's dtype. None for 1.
        y_scale: c, ``[N]``, any floating dtype; where it is 0 it has no gradient. None for 1.
        bias: ``[N]`` in x's dtype, added as it is: where c is to scale the layer's bias, give ``c * b``.

    Returns:
        ``[..., N]`` in x's dtype. The bits are those of a row of :func:`peftrt.ops.multi_lora_linear` whose slot has
        these factors: on a CPU they do not depend on the other rows, beyond the range of M that ``nf4_linear`` names.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape or device that does not fit.

    Source: IA3, Liu et al. 2022 (arXiv:2205.05638), section 3.3: c on keys and values, u on what the second map of a
    feed-forward layer is given.
    """
    if isinstance(weight, NF4Weight):
        x, bias = autocast(x, bias)  # type: ignore[assignment]
    else:
        x, weight, bias = autocast(x, weight, bias)  # type: ignore[assignment]
    args = weight_args(_OP, weight)
    u, c = _wide("x_scale", x_scale, x), _wide("y_scale", y_scale, x)
    return _FORWARD(x, *args, u, c, bias)


def _wide(name: str, scale: Tensor | None, x: Tensor) -> Tensor | None:
    if scale is None:
        return None
    check_float(_OP, name, scale)
    return scale.to(accumulator(x.dtype))


def _check(x: Tensor, *rest: Any) -> None:
    *weight, x_scale, y_scale, bias = rest
    args = WeightArgs(*weight)
    check_linear(_OP, x, args, bias)
    check_row_scale(_OP, x_scale, args.k, x, name="x_scale", letter="K")
    check_row_scale(_OP, y_scale, args.n, x, name="y_scale")


def _fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[4]))


def _as_batch(x: Tensor, *rest: Any) -> tuple[Any, ...]:
    """The call as one of multi_lora_linear, behind x: all rows have the one slot, which has no pair.

    Its kernels have the factors where they read x and before they round y.
    """
    *weight, x_scale, y_scale, bias = rest
    n, k = weight[4], weight[5]
    for scale, size in ((x_scale, k), (y_scale, n)):
        # the kernels see a part of a vector, and would not miss the rest
        if scale is not None and tuple(scale.shape) != (size,):
            raise RuntimeError(f"{_OP}: {list(scale.shape)} factors for {size}")
    given = [scale for scale in (x_scale, y_scale) if scale is not None]
    vectors = torch.cat(given) if len(given) == 2 else next(iter(given), None)
    starts = _starts(x_scale is not None, y_scale is not None, k, x.device) if given else None
    slot_ids = torch.zeros(x.shape[:-1].numel(), dtype=torch.int32, device=x.device)
    return (*weight, *_no_pairs(x.device), vectors, starts, [n], slot_ids, bias)


@functools.cache
@torch.inference_mode(False)
def _no_pairs(device: torch.device) -> tuple[Tensor, ...]:
    """values, ranks, A_pages, B_pages and scaling of a table of one slot without a low-rank pair."""
    pages = torch.zeros(1, 1, 1, dtype=torch.int64, device=device)
    ranks = torch.zeros(1, 1, dtype=torch.int32, device=device)
    return torch.zeros(0, device=device), ranks, pages, pages, torch.zeros(1, 1, device=device)


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _starts(inputs: bool, outputs: bool, k: int, device: torch.device) -> Tensor:
    """Where in the vectors u and c begin; there is no bias among them."""
    return torch.tensor([[0 if inputs else -1, (k if inputs else 0) if outputs else -1, -1]]).to(device)


def _native_forward(x: Tensor, *rest: Any) -> Tensor:
    if _lies_in_columns(x, rest) and not invariant():
        return _torch_forward(x, *rest)
    call = _as_batch(x, *rest)
    return _multi_lora_native.forward(x, *call) if x.is_cpu else _multi_lora_cuda.run(x, *call)


def _lies_in_columns(x: Tensor, rest: tuple[Any, ...]) -> bool:
    """Whether W is as Conv1D stores it and of fp32: the kernel would copy it first, torch multiplies it as it lies."""
    return x.is_cpu and rest[1] is None and x.dtype == torch.float32 and rest[0].stride(-1) != 1


def _torch_forward(x: Tensor, *rest: Any) -> Tensor:
    # torch would take more than fits, and round for autocast
    if torch.is_autocast_enabled(x.device.type):
        raise RuntimeError(f"{_OP}: not under autocast")
    _check(x, *rest)
    weight, (x_scale, y_scale, bias) = rest[0], rest[7:]
    seen = _scaled(x, x_scale)
    if y_scale is None:
        return torch.nn.functional.linear(seen, weight, bias)
    y = torch.nn.functional.linear(seen, weight)
    return y.mul_(y_scale) if bias is None else torch.addcmul(bias, y, y_scale, out=y)


def _native_unsupported(x: Tensor, *rest: Any) -> str | None:
    if x.is_cpu:
        return _native.unsupported(x, x.dtype)
    return _multi_lora_cuda.unsupported_without_pairs(x, *rest[:7])


def _native_declines(x: Tensor, *rest: Any) -> str | None:
    """A call that the CUDA kernel would refuse is not tried: many rows would pay for the exception each time."""
    return None if x.is_cpu else _native_unsupported(x, *rest)


def _triton_forward(x: Tensor, *rest: Any) -> Tensor:
    # without u, nobody needs to pass over x
    return _multi_lora_triton.forward(x, *_as_batch(x, *rest), scales_x=rest[7] is not None)


def _triton_unsupported(x: Tensor, *_: Any) -> str | None:
    return _triton.unsupported(x, x.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *weight, x_scale, y_scale, bias = inputs
    *tensors, ctx.n, ctx.k, ctx.block_size = weight
    needs = ctx.needs_input_grad
    # y takes the place of (u * x) W^T, which it is a multiple of
    of_y_scale = (output, bias) if needs[9] else (None, None)
    ctx.save_for_backward(x if needs[1] or needs[8] else None, x_scale, y_scale, *of_y_scale, *tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """With dZ = c * dY and dX' = dZ W: dX = u * dX', du = sum_m x dX', dW = dZ^T (u * x), dc = sum_m dY (y - b) / c."""
    x, x_scale, y_scale, y, bias, *tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dz = _scaled(dy, y_scale)
    dx = dweight = dx_scale = dy_scale = dbias = None
    if needs[0] or needs[8]:
        dseen = _times_weight(dz, (*tensors, ctx.n, ctx.k, ctx.block_size))
        dx = _scaled(dseen, x_scale) if needs[0] else None
        dx_scale = _summed_product(dseen, x, x_scale) if needs[8] else None
    if needs[1]:
        dweight = dz.reshape(-1, ctx.n).t() @ _scaled(x, x_scale).reshape(-1, ctx.k)
    if needs[9]:
        of_scale = row_scale_gradient.forward if torch.is_grad_enabled() else OPS["row_scale_gradient"]
        dy_scale = of_scale(dy, y, bias, y_scale)
    if needs[10]:
        dbias = dy.reshape(-1, ctx.n).sum(0)
    return (dx, dweight, None, None, None, None, None, None, dx_scale, dy_scale, dbias)


def _scaled(rows: Tensor, scale: Tensor | None) -> Tensor:
    """Rows times factors, rounded once to the rows' dtype."""
    return rows if scale is None else (rows * scale).to(rows.dtype)


def _times_weight(dz: Tensor, weight: tuple[Any, ...]) -> Tensor:
    """``dZ W``."""
    n, k = weight[4], weight[5]
    if weight[1] is not None:
        return OPS["nf4_linear_dx"](dz, *weight)
    if torch.is_grad_enabled() or not dz.is_cpu or dz.element_size() > 2:
        return dz @ weight[0]
    # 16 rows of bf16 times 4096 x 4096 take 12 ms, torch's own product 1800 (one thread, Zen 3, November 2026); of x
    # the operation wants the shape
    slot_ids = torch.zeros(dz.shape[:-1].numel(), dtype=torch.int32)
    shape = dz.new_empty(1).expand(*dz.shape[:-1], k)
    table = (*_no_pairs(dz.device), [n], slot_ids)
    return OPS["multi_lora_linear_backward"](dz, shape, *weight, *table, True, False)[0]


def _summed_product(dseen: Tensor, x: Tensor, x_scale: Tensor) -> Tensor:
    """``sum_m dX' x``, in fp32 without a copy of either."""
    if torch.is_grad_enabled():
        return (dseen * x.to(x_scale.dtype)).reshape(-1, x.shape[-1]).sum(0)
    # as the gradient of factors of 1
    return OPS["row_scale_gradient"](dseen, x, None, torch.ones_like(x_scale))


_FORWARD = define(
    f"ia3_linear(Tensor x, {WEIGHT}, Tensor? x_scale, Tensor? y_scale, Tensor? bias) -> Tensor",
    check=_check,
    fake=_fake,
    backends=(
        Backend("native", _native_forward, _native_unsupported, ("cpu", "cuda"), strict=True, slower=_native_declines),
        Backend("triton", _triton_forward, _triton_unsupported, ("cuda",)),
        reference_backend(reference.forward),
    ),
    setup_context=_setup_context,
    backward=_backward,
)
