"""nf4_linear and its input gradient: products with an NF4 weight that is never stored decoded as a whole."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from peftrt.formats.nf4 import NF4Weight
from peftrt.ops import _native, _panels, _paths, _triton
from peftrt.ops._define import Backend, define, reference_backend
from peftrt.ops._invariant import invariant
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
        changes a bit. On CUDA the ranges are those of peftrt/ops/_paths.py, for bf16 and fp16 on a Hopper: M to 32,
        64, 128, 256, 384 and 512 (native, where it is built, else Triton's tiles to 511, in ranges of their own), and
        more (parts of W are decoded and multiplied by cuBLAS, which chooses its kernels by M: there a row's bits may
        change with every M). The last heeds torch's switches for cuBLAS: ``torch.backends.cuda.matmul.allow_tf32`` for
        fp32, and ``allow_bf16_reduced_precision_reduction``, on by default, which lets it round partial sums to bf16.

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


def _native_unsupported(x: Tensor, *rest: Any) -> str | None:
    return _native.unsupported(x, x.dtype) if x.is_cpu else _cuda_unsupported(x, *rest)


def _cuda_unsupported(x: Tensor, *rest: Any) -> str | None:
    reason = _native.cuda_unsupported(x, x.dtype)
    if reason is not None or _decodes(x, rest) or _panels.rows_fit(WeightArgs(*rest[:7]), x.element_size()):
        return reason
    return f"takes {_most_rows(x, rest)} rows of bf16 or fp16, and more where panels of W can be decoded apart"


def _native_slower(x: Tensor, *rest: Any) -> str | None:
    return None if x.is_cpu else _cuda_slower(x, *rest)


def _cuda_slower(x: Tensor, *rest: Any) -> str | None:
    way = _way("forward", x, rest, decodes=_decodes(x, rest))
    if way != _paths.TILE or _triton.unsupported(x, x.dtype) is not None:
        return None
    return f"at M = {_paths.rows_of(x)} tiles by Triton are expected to be faster on this device"


def _decodes(x: Tensor, rest: tuple[Any, ...]) -> bool:
    """Whether the CUDA library has a kernel for so many rows, where it is loaded."""
    return x.element_size() == 2 and _paths.rows_of(x) <= _most_rows(x, rest)


def _most_rows(x: Tensor, rest: tuple[Any, ...]) -> int:
    k = rest[5]
    return _paths.NATIVE_ROWS if k % _paths.CHUNK else _native.cuda_rows(x.device)


def _way(direction: str, x: Tensor, rest: tuple[Any, ...], *, decodes: bool = False) -> str | None:
    """What the table says, where the weight can go that way."""
    way = _paths.path(direction, x, decodes=decodes)
    fit = _panels.rows_fit if direction == "forward" else _panels.columns_fit
    return _paths.TILE if way == _paths.PANELS and not fit(WeightArgs(*rest[:7]), x.element_size()) else way


def _native_forward(x: Tensor, *rest: Any) -> Tensor:
    return torch.ops.peftrt_cpu.nf4_linear.default(x, *rest, invariant()) if x.is_cpu else _native_cuda(x, *rest)


def _native_cuda(x: Tensor, *rest: Any) -> Tensor:
    """A few rows by the kernel, more by panels that the library decodes."""
    reason = _cuda_unsupported(x, *rest)
    if reason is not None:
        raise RuntimeError(f"nf4_linear: native {reason}")
    if _decodes(x, rest):
        return torch.ops.peftrt_cuda.nf4_linear.default(x, *rest)
    # cuBLAS would take more than fits, such as a bias that can be broadcast, and round fp32 for autocast
    if torch.is_autocast_enabled(x.device.type):
        raise RuntimeError("nf4_linear: panels are not for autocast")
    _check(x, *rest)
    return _panels_forward(_native_decode, x, *rest)


def _native_decode(*args: Any) -> None:
    torch.ops.peftrt_cuda.nf4_dequantize.default(*args)


def _native_dx_unsupported(dy: Tensor, *_: Any) -> str | None:
    if dy.device.type == "cuda":
        return "has kernels for the CPU; on CUDA devices the input gradient is Triton's"
    return _native.unsupported(dy, dy.dtype)


def _native_dx(*args: Any) -> Tensor:
    return torch.ops.peftrt_cpu.nf4_linear_dx.default(*args, invariant())


def _panels_forward(decode: _panels.DecodeRows, x: Tensor, *rest: Any) -> Tensor:
    *weight, bias = rest
    out = _fake(x, *rest)
    _panels.forward(_rows(x), WeightArgs(*weight), bias, out.view(-1, out.shape[-1]), decode)
    return out


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _triton_unsupported(x: Tensor, *_: Any) -> str | None:
    return _triton.unsupported(x, x.dtype)


@_triton.heeds_invariance
def _triton_forward(x: Tensor, *rest: Any) -> Tensor:
    from peftrt.kernels.nf4_linear import nf4_linear

    if _way("forward", x, rest) == _paths.PANELS:
        return _panels_forward(_triton_decode, x, *rest)
    *codes, _, _, block_size, bias = rest
    out = _fake(x, *rest)
    bias = None if bias is None else bias.contiguous()
    nf4_linear(_rows(x), *_triton.weight(*codes), block_size, bias, out.view(-1, out.shape[-1]))
    return out


def _triton_decode(*args: Any) -> None:
    from peftrt.kernels.nf4_dequantize import nf4_dequantize

    *weight, block_size, out = args
    nf4_dequantize(*_triton.weight(*weight), block_size, out)


@_triton.heeds_invariance
def _triton_dx(dy: Tensor, *weight: Any) -> Tensor:
    from peftrt.kernels.nf4_dequantize import nf4_dequantize_columns
    from peftrt.kernels.nf4_linear import nf4_linear_dx

    *codes, _, k, block_size = weight
    out = _fake_dx(dy, *weight)
    rows, out_rows, tensors = _rows(dy), out.view(-1, out.shape[-1]), _triton.weight(*codes)
    if _way("dx", dy, weight) == _paths.PANELS:
        decode = functools.partial(nf4_dequantize_columns, *tensors, block_size, k)
        _panels.grad_input(rows, WeightArgs(*weight), out_rows, decode)
    else:
        nf4_linear_dx(rows, *tensors, block_size, out_rows)
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
        Backend("native", _native_forward, _native_unsupported, ("cpu", "cuda"), strict=True, slower=_native_slower),
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
        Backend("native", _native_dx, _native_dx_unsupported, ("cpu",), strict=True),
        Backend("triton", _triton_dx, _triton_unsupported, ("cuda",)),
        reference_backend(reference.grad_input),
    ),
    setup_context=_setup_context_dx,
    backward=_backward_dx,
)
