"""multi_lora_linear by CUDA C++: few rows over an NF4 base, in two launches (csrc/cuda/multi_lora_linear.cu)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftrt.formats.nf4 import FLOAT_DTYPES
from peftrt.ops import _device_flag, _native, _paths
from peftrt.ops._invariant import invariant
from peftrt.ops._weight import WeightArgs

_OP = "multi_lora_linear"
PAGES, PARTS = 32, 8  # of a slot and part, and of a site, at most


def unsupported(x: Tensor, *rest: Any) -> str | None:
    """Why the kernel cannot take a call; None where it can."""
    weight, (values, _, A_pages, _, _, vectors, _, splits, _, _) = WeightArgs(*rest[:7]), rest[7:17]
    fits = values.dtype in FLOAT_DTYPES and (vectors is None or vectors.dtype == torch.float32)
    return _refusal(x, weight, fits, len(splits), A_pages.shape[-1])


def unsupported_without_pairs(x: Tensor, *weight: Any) -> str | None:
    """The same for one map, and slots with vectors alone."""
    return _refusal(x, WeightArgs(*weight), True, 1, 0)


def _refusal(x: Tensor, weight: WeightArgs, dtypes_fit: bool, parts: int, pages: int) -> str | None:
    reason = _native.cuda_unsupported(x, x.dtype)
    if reason is not None:
        return reason
    if weight.absmax is None:
        return "multiplies an NF4 base on a GPU, no other"
    if invariant():
        return "has another order of summation than the kernels for many rows"
    if x.element_size() != 2 or _paths.rows_of(x) > _paths.NATIVE_ROWS:
        return f"takes {_paths.NATIVE_ROWS} rows of bf16 or fp16"
    if not dtypes_fit:
        return "has adapters of fp32, bf16 and fp16, and vectors of fp32"
    if parts > PARTS or pages > PAGES:
        return f"takes {PARTS} maps of at most {8 * PAGES} ranks each"
    return None


def run(x: Tensor, *rest: Any) -> Tensor:
    """The operation's arguments; y. An id that was no slot in an earlier call raises here."""
    _device_flag.raise_if_set(_OP, x.device)
    return torch.ops.peftrt_cuda.nf4_multi_lora_linear.default(x, *rest, _device_flag.flag(x.device))


def run_out(row_stride: int, x: Tensor, *rest: Any) -> None:
    """The same into the last argument, whose flattened rows lie ``row_stride`` elements apart."""
    *call, out = rest
    _device_flag.raise_if_set(_OP, x.device)
    rows = out.as_strided((_paths.rows_of(x), out.shape[-1]), (row_stride, 1))
    torch.ops.peftrt_cuda.nf4_multi_lora_linear_out.default(x, *call, _device_flag.flag(x.device), rows)
