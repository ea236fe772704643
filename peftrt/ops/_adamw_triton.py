"""The Triton kernels of adamw_step and gradient_norm, called by addresses."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from peftrt.formats.adamw_state import EXP_AVG_MAP, EXP_AVG_SQ_MAP, capacity
from peftrt.formats.nf4 import midpoints
from peftrt.ops import _triton
from peftrt.ops._addresses import Gradients, StepArgs


def step_unsupported(*arguments: Any) -> str | None:
    args = StepArgs(*arguments)
    return _triton.unsupported(args.state, args.dtype)


def norm_unsupported(gradients: Gradients, chunks: Tensor, *_: Any) -> str | None:
    # of what is only read, the interpreter can be trusted with bf16
    return _triton.unsupported(chunks, torch.float32)


def step(*arguments: Any) -> None:
    from peftrt.kernels.adamw_step import adamw_step

    args = StepArgs(*arguments)
    adamw_step(
        args.state,
        args.chunks,
        args.gradients.addresses,
        args.hyper,
        args.coefficient,
        _tables(args.state.device) if args.bits == 8 else None,
        args.bits,
        capacity(args.page_bytes, args.bits),
        args.dtype,
        args.gradients.aligned,
    )


def norm(gradients: Gradients, chunks: Tensor, partials: Tensor, max_norm: float, out: Tensor) -> None:
    from peftrt.kernels.gradient_norm import gradient_norm

    gradient_norm(gradients.addresses, chunks, partials, max_norm, out, gradients.aligned)


@functools.cache
def _tables(device: torch.device) -> Tensor:
    """The levels of both maps, then the midpoints of each; behind 255 one that nothing is above."""
    with torch.inference_mode(False):
        maps, last = (EXP_AVG_MAP, EXP_AVG_SQ_MAP), torch.full((1,), torch.inf)
        return torch.cat([*maps, *(part for levels in maps for part in (midpoints(levels), last))]).to(device)
