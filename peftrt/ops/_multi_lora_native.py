"""multi_lora_linear by the CPU library: base and adapters in one sum, rounded once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftrt.formats.nf4 import FLOAT_DTYPES
from peftrt.ops import _native
from peftrt.ops._invariant import invariant


def unsupported(x: Tensor, *rest: Any) -> str | None:
    """Why the CPU kernels cannot take a call of the operation or its ``out`` variant; None where they can."""
    return _refusal(x, x, rest)


def backward_unsupported(dz: Tensor, x: Tensor, *rest: Any) -> str | None:
    """The same for the backward."""
    return _refusal(dz, x, rest)


def _refusal(first: Tensor, x: Tensor, rest: tuple[Any, ...]) -> str | None:
    reason = _native.unsupported(first, x.dtype)
    if reason is None and rest[7].dtype not in FLOAT_DTYPES:
        reason = f"has kernels for fp32, bf16 and fp16 adapters, not for {rest[7].dtype}"
    return reason


def forward(x: Tensor, *rest: Any) -> Tensor:
    """``rest``: the arguments of the operation."""
    return torch.ops.peftrt_cpu.multi_lora_linear.default(x, *rest, invariant())


def forward_out(x: Tensor, *rest: Any) -> None:
    """The result in the last argument, whose rows may be apart."""
    torch.ops.peftrt_cpu.multi_lora_linear.out(x, *rest, invariant())


def backward(dz: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """dX and, summed in fp32, the gradient of values in their dtype."""
    dx, dvalues = torch.ops.peftrt_cpu.multi_lora_linear_backward.default(dz, x, *rest, invariant())
    return dx, dvalues.to(rest[7].dtype)
