"""nf4_dequantize: NF4 codes and scales to a float tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from peftrt.formats.nf4 import NF4Weight
from peftrt.ops import _native, _triton
from peftrt.ops._define import Backend, define, reference_backend
from peftrt.ops._weight import COMPUTE_DTYPES, check_device, check_nf4, describe, expect
from peftrt.reference import nf4 as reference

_ARGUMENTS = (
    "Tensor weight, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, SymInt[] shape, int block_size, "
)


def nf4_dequantize(weight: NF4Weight, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """Decode an NF4 weight.

    ``W[i] = round(nf4[code[i]] * scale[i // G])``: the fp32 product rounded once to the result's dtype, bit for bit as
    bitsandbytes has it.

    Args:
        weight: an NF4Weight of any shape.
        dtype: fp32, bf16, fp16 or fp64 (the fp32 value); default: the dtype that was quantised.
        out: contiguous tensor of the weight's shape that is overwritten and returned; ``dtype`` is then taken from it.

    Raises:
        TypeError: another dtype, or ``out`` and ``dtype`` differ.
        ValueError: ``out`` has another shape or device, or is not contiguous.

    Source: QLoRA, Dettmers et al. 2023 (arXiv:2305.14314), equation 6.
    """
    if out is None:
        return weight.dequantize(dtype)
    if dtype not in (None, out.dtype):
        raise TypeError(f"nf4_dequantize: out must be of dtype {dtype}, got {describe(out)}")
    torch.ops.peftrt.nf4_dequantize.out(*_flatten(weight), out)
    return out


def _flatten(weight: NF4Weight) -> tuple[Any, ...]:
    scales = (weight.absmax, weight.nested_absmax, weight.nested_offset)
    return (weight.codes, *scales, list(weight.shape), weight.block_size)


def _check(
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: list[int],
    block_size: int,
    dtype: torch.dtype,
) -> None:
    check_nf4("nf4_dequantize", weight, absmax, nested_absmax, nested_offset, math.prod(shape), block_size)
    expect(dtype in COMPUTE_DTYPES, "nf4_dequantize", "dtype", f"one of {COMPUTE_DTYPES}", dtype, TypeError)


def _check_out(*args: Any) -> None:
    weight, absmax, nested_absmax, nested_offset, shape, block_size, out = args
    _check(weight, absmax, nested_absmax, nested_offset, shape, block_size, out.dtype)
    check_device("nf4_dequantize", "out", out, weight)
    shape = list(shape)
    expect(
        list(out.shape) == shape and out.is_contiguous(), "nf4_dequantize", "out", f"contiguous of shape {shape}", out
    )


def _fake(weight: Tensor, *rest: Any) -> Tensor:
    *_, shape, _, dtype = rest
    return weight.new_empty(shape, dtype=dtype)


def _native_out(weight: Tensor, *rest: Any) -> None:
    absmax, nested_absmax, nested_offset, _, block_size, out = rest
    _native.library(weight).nf4_dequantize(
        *_native.contiguous(weight, absmax, nested_absmax, nested_offset), block_size, out
    )


def _native_new(*args: Any) -> Tensor:
    out = _fake(*args)
    _native_out(*args[:-1], out)
    return out


def _triton_out(*args: Any) -> None:
    from peftrt.kernels.nf4_dequantize import nf4_dequantize

    *weight, _, block_size, out = args
    nf4_dequantize(*_triton.weight(*weight), block_size, out)


def _triton_new(*args: Any) -> Tensor:
    out = _fake(*args)
    _triton_out(*args[:-1], out)
    return out


def _reference_out(*args: Any) -> None:
    weight, absmax, nested_absmax, nested_offset, shape, block_size, out = args
    out.copy_(reference.dequantize(weight, absmax, nested_absmax, nested_offset, shape, block_size, out.dtype))


def _native_unsupported(*args: Any) -> str | None:
    return _native.unsupported_anywhere(args[0], _result_dtype(args))


def _triton_unsupported(*args: Any) -> str | None:
    return _triton.unsupported(args[0], _result_dtype(args))


def _result_dtype(args: tuple[Any, ...]) -> torch.dtype:
    """Of either variant: the last argument is ``dtype`` or ``out``."""
    return args[-1].dtype if isinstance(args[-1], Tensor) else args[-1]


_NATIVE_DEVICES = ("cpu", "cuda")
_TRITON_DEVICES = ("cuda",)

define(
    f"nf4_dequantize({_ARGUMENTS}ScalarType dtype) -> Tensor",
    check=_check,
    fake=_fake,
    backends=(
        Backend("native", _native_new, _native_unsupported, _NATIVE_DEVICES),
        Backend("triton", _triton_new, _triton_unsupported, _TRITON_DEVICES),
        reference_backend(reference.dequantize),
    ),
)
define(
    f"nf4_dequantize.out({_ARGUMENTS}Tensor(a!) out) -> ()",
    check=_check_out,
    fake=lambda *_: None,
    backends=(
        Backend("native", _native_out, _native_unsupported, _NATIVE_DEVICES),
        Backend("triton", _triton_out, _triton_unsupported, _TRITON_DEVICES),
        reference_backend(_reference_out),
    ),
)
