"""The native library: found and loaded once, and what it can take."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from peftrt.formats.nf4 import FLOAT_DTYPES

LIBRARY = Path(__file__).parent.parent / "_C" / "libpeftrt_cpu.so"


@functools.cache
def load() -> str | None:
    """Load the library of CPU kernels; None, or the reason why it is not to be had."""
    if not LIBRARY.exists():
        return f"not built ({LIBRARY.name} is missing: run `python -m peftrt build`)"
    try:
        torch.ops.load_library(LIBRARY)
    except (OSError, RuntimeError) as error:
        return f"{LIBRARY.name} does not load with torch {torch.__version__}: {error} (run `python -m peftrt build`)"
    return None


def unsupported(x: Tensor, dtype: torch.dtype) -> str | None:
    """Why the CPU kernels cannot take a call on x's device that computes in ``dtype``; None where they can."""
    if x.device.type != "cpu":
        return f"has kernels for the CPU, not for {x.device.type}"
    if dtype not in FLOAT_DTYPES:
        return f"has kernels for fp32, bf16 and fp16, not for {dtype}"
    return load()


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The kernels take raw pointers: every tensor contiguous, copied where it was not."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)
