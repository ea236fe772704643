"""lora_weight_norm: the lengths of the rows of a base weight, dense or NF4, with an adapter added to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftrt.formats.nf4 import FLOAT_DTYPES, NF4Weight
from peftrt.ops import _lora_triton, _native
from peftrt.ops._define import Backend, define, reference_backend
from peftrt.ops._weight import WEIGHT, WeightArgs, check_base, check_low_rank, weight_args
from peftrt.reference import lora_weight_norm as reference
from peftrt.reference._weight import accumulator


def lora_weight_norm(
    weight: Tensor | NF4Weight, lora_A: Tensor, lora_B: Tensor, scaling: float, *, splits: Sequence[int] = ()
) -> Tensor:
    """Row norms of an adapted weight.

    ``norm[n] = ||W[n] + s B[n] A||_2``. The sum is never stored whole, nor is an NF4 weight decoded whole. Has no
    gradient, as DoRA wants it; squares are summed in fp32.

    Args:
        weight: ``[N, K]``; fp32, bf16 or fp16 (fp64 by the reference); any strides, by rows or by columns without a
            copy. Or an NF4Weight of that shape, whose weights are code times scale in fp32.
        lora_A: ``[R, K]``, any floating dtype.
        lora_B: ``[N, R]``, any floating dtype.
        scaling: s.
        splits: see :func:`peftrt.ops.lora_linear`.

    Returns:
        ``[N]``, fp32 (fp64 for a weight in fp64). On a CPU the number of threads changes no bit.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape or device that does not fit.

    Source: DoRA, Liu et al. 2024 (arXiv:2402.09353), equation 5 and section 4.3.
    """
    args = weight_args("lora_weight_norm", weight)
    return _NORM(args.weight.detach(), *args[1:], lora_A.detach(), lora_B.detach(), scaling, list(splits))


def _check(*arguments: Any) -> None:
    *weight, lora_A, lora_B, _, splits = arguments
    args = WeightArgs(*weight)
    check_base("lora_weight_norm", args)
    check_low_rank("lora_weight_norm", args, lora_A, lora_B, splits)


def _fake(*arguments: Any) -> Tensor:
    weight, n = arguments[0], arguments[4]
    return arguments[7].new_empty((n,), dtype=accumulator(weight.dtype))


def _native_unsupported(weight: Tensor, absmax: Tensor | None, *_: Any) -> str | None:
    return _native.unsupported(weight, weight.dtype if absmax is None else torch.float32)


def _native_run(*arguments: Any) -> Tensor:
    *weight, lora_A, lora_B, scaling, splits = arguments
    if weight[1] is None and weight[0].dtype not in FLOAT_DTYPES:
        raise RuntimeError(f"lora_weight_norm: native is not for {weight[0].dtype}")
    lora_A, lora_B = (t.float() if t.dtype == torch.float64 else t for t in (lora_A, lora_B))
    return torch.ops.peftrt_cpu.lora_weight_norm.default(*weight, lora_A, lora_B, scaling, splits)


_NORM = define(
    f"lora_weight_norm({WEIGHT}, Tensor lora_A, Tensor lora_B, float scaling, int[] splits) -> Tensor",
    check=_check,
    fake=_fake,
    backends=(
        Backend("native", _native_run, _native_unsupported, ("cpu",), strict=True),
        Backend("triton", _lora_triton.weight_norm, _lora_triton.norm_unsupported, ("cuda",)),
        reference_backend(reference.forward),
    ),
)
