"""The base weight of a linear operation, dense or NF4, as the matrix that the references multiply with."""

from __future__ import annotations

import torch
from torch import Tensor

from peftrt.reference import nf4


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense_weight(
    dtype: torch.dtype,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    n: int,
    k: int,
    block_size: int,
) -> Tensor:
    """W [N, K] as values of ``dtype`` (NF4 is rounded to it once), held in the dtype of the accumulator."""
    if absmax is not None:
        weight = nf4.dequantize(weight, absmax, nested_absmax, nested_offset, (n, k), block_size, dtype)
    return weight.to(accumulator(dtype))
