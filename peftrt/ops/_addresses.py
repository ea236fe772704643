"""Many tensors as one table of addresses, for kernels that a launch a tensor would keep waiting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# The codes of dtypes in a table; csrc/dtype.h has the same.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# The most elements that a row of a table of chunks speaks of: 16 blocks of the state.
CHUNK = 4096


@dataclass(frozen=True)
class Gradients:
    """T parameters with their gradients, on one device, and where they lie.

    Whoever calls an operation with it sees to it that the addresses are those of the tensors, that all are contiguous,
    and that they live until what was launched has run. The tensors themselves serve the reference.

    Attributes:
        params: fp32, bf16 or fp16, any shape.
        grads: of the parameter's shape and dtype each, or None.
        addresses: int64 ``[T, 3]`` on the device: of the parameter's and of the gradient's first element (0 where there
            is none), and the code of their dtype.
        aligned: all addresses are multiples of 16, and chunks begin at multiples of 16 bytes of their tensors.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    addresses: Tensor
    aligned: bool = False


class StepArgs(NamedTuple):
    """The arguments of ``adamw_step``, which has their docstring, as its backends are given them."""

    state: Tensor
    chunks: Tensor
    gradients: Gradients
    hyper: Tensor
    coefficient: Tensor | None
    bits: int
    page_bytes: int
    dtype: torch.dtype
    spare: int
