"""gradient_norm: the norm of many gradients together, and what they are multiplied with to clip it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftrt.ops import _adamw_triton, _native
from peftrt.ops._addresses import Gradients
from peftrt.ops._backend import announce
from peftrt.ops._define import Backend, Op, reference_backend
from peftrt.ops._weight import expect
from peftrt.reference import gradient_norm as reference


def gradient_norm(gradients: Gradients, chunks: Tensor, partials: Tensor, max_norm: float, out: Tensor) -> None:
    """Write the norm over all gradients and the coefficient ``min(1, max_norm / (norm + 1e-6))``, rounded to fp32.

    Squares are summed in fp64 in one order, which every backend keeps: lane l of 256 adds elements l, l + 256, ... of a
    chunk in turn, then the upper half of the lanes is added to the lower, again and again; the chunks' sums are added
    up by 1024 lanes in the same way. So no bit depends on the backend, and none on where the state lies. Where a
    gradient is not finite, the norm is not either. It is not one of ``torch.ops``, as ``adamw_step`` is not.

    Args:
        gradients: T parameters.
        chunks: int64 ``[C, 3]`` on the device: tensor, its first element and how many (at most CHUNK).
        partials: memory for the chunks' sums, fp64 ``[C]`` on the device; written.
        max_norm: above 0; infinity clips nothing.
        out: fp32 ``[2]`` on the device: norm and coefficient; written.

    Raises:
        ValueError: a shape, dtype or device does not fit; nothing is written.
    """
    NORM.eager(gradients, chunks, partials, max_norm, out)


def _check(gradients: Gradients, chunks: Tensor, partials: Tensor, max_norm: float, out: Tensor) -> None:
    op, count = "gradient_norm", chunks.shape[0]
    expect(chunks.dtype == torch.int64 and chunks.shape[1:] == (3,), op, "chunks", "int64 [C, 3]", chunks)
    expect(partials.dtype == torch.float64 and partials.shape == (count,), op, "partials", f"fp64 [{count}]", partials)
    expect(out.dtype == torch.float32 and out.shape == (2,), op, "out", "fp32 [2]", out)
    expect(max_norm > 0, op, "max_norm", "above 0", max_norm)


def _reference(gradients: Gradients, chunks: Tensor, partials: Tensor, max_norm: float, out: Tensor) -> None:
    reference.forward(list(gradients.grads), chunks, partials, max_norm, out)


def _native_unsupported(gradients: Gradients, chunks: Tensor, *_: Any) -> str | None:
    return _native.unsupported(chunks, torch.float32)


def _native_run(gradients: Gradients, chunks: Tensor, partials: Tensor, max_norm: float, out: Tensor) -> None:
    torch.ops.peftrt_cpu.gradient_norm.default(gradients.addresses, chunks, partials, max_norm, out)


announce("gradient_norm")
NORM = Op(
    "gradient_norm",
    _check,
    (
        Backend("native", _native_run, _native_unsupported, ("cpu",), strict=True),
        Backend("triton", _adamw_triton.norm, _adamw_triton.norm_unsupported, ("cuda",)),
        reference_backend(_reference),
    ),
    gradient_norm,
)
