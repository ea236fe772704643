"""What DoRA multiplies the rows of an adapted weight with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftrt.formats.nf4 import NF4Weight
from peftrt.ops._define import OPS
from peftrt.ops._weight import check_device, check_float, expect, weight_args


def dora_scale(
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor,
    *,
    splits: Sequence[int] = (),
) -> Tensor:
    """DoRA's factor of each row: ``c = m / ||W + s B A||``.

    Differentiable in m alone: the norm counts as a constant. A row of norm 0 is divided by the smallest normal fp32
    number in its stead, so that m = 0 gives c = 0.

    Args:
        weight, lora_A, lora_B, scaling, splits: see :func:`peftrt.ops.lora_weight_norm`.
        magnitude: m, ``[N]``, any floating dtype.

    Returns:
        ``[N]``, fp32 (fp64 for a weight or magnitude in fp64).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape or device that does not fit.

    Source: DoRA, Liu et al. 2024 (arXiv:2402.09353), equations 5 and 6, section 4.3.
    """
    args = weight_args("dora_scale", weight)
    check_float("dora_scale", "magnitude", magnitude)
    check_device("dora_scale", "magnitude", magnitude, args.weight)
    expect(tuple(magnitude.shape) == (args.n,), "dora_scale", "magnitude", f"[N] = [{args.n}]", magnitude)
    base = (args.weight.detach(), *args[1:])
    norm = OPS["lora_weight_norm"](*base, lora_A.detach(), lora_B.detach(), scaling, list(splits))
    return magnitude / norm.clamp_min(torch.finfo(torch.float32).tiny)
