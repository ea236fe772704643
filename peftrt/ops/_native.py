"""Finds and loads peftrt/_C/libpeftrt_cpu.so, whose functions are then ``torch.ops.peftrt_cpu.*``."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from peftrt import _build
from peftrt.formats.nf4 import FLOAT_DTYPES

_HINT = "`python -m peftrt build` compiles it"


def library_path() -> Path:
    """Where the CPU library is, or would be."""
    return _build.default_directory() / _build.library_name("cpu")


@functools.lru_cache(maxsize=1)
def load() -> str | None:
    """Loads the CPU library on the first call, and says why it cannot: None means that it is loaded.

    Nothing is raised and nothing is retried: a library built later is found by the next process.
    """
    path = library_path()
    if not path.is_file():
        return f"the native CPU library is not built ({path} is missing); {_HINT}"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"the native CPU library does not load with torch {torch.__version__}: {lines[0]}; {_HINT} again"
    return None


def isa() -> str | None:
    """The kernels' instruction set: ``avx512``, ``avx2``, ``neon`` or ``portable``; None where nothing is loaded."""
    return None if load() is not None else str(torch.ops.peftrt_cpu.isa())


def unsupported(x: Tensor, dtype: torch.dtype) -> str | None:
    """Why the CPU kernels cannot take a call on x's device that computes in ``dtype``; None where they can."""
    if x.device.type != "cpu":
        return f"has kernels for the CPU, not for {x.device.type}"
    if dtype not in FLOAT_DTYPES:
        return f"has kernels for fp32, bf16 and fp16, not for {dtype}"
    return load()


@functools.lru_cache(maxsize=1)
def load_cuda() -> str | None:
    """The same for the CUDA library, whose functions are then ``torch.ops.peftrt_cuda.*``."""
    path = _build.default_directory() / _build.library_name("cuda")
    if not path.is_file():
        return f"the native CUDA library is not built ({path} is missing); {_HINT}"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"the native CUDA library does not load with torch {torch.__version__}: {lines[0]}; {_HINT} again"
    return None


def cuda_unsupported(x: Tensor, dtype: torch.dtype) -> str | None:
    """Why the CUDA kernels cannot take a call on x's device that computes in ``dtype``; None where they can."""
    if x.device.type != "cuda" or torch.version.hip is not None:
        return f"has kernels for the CPU and for CUDA, not for {'hip' if torch.version.hip else x.device.type}"
    if dtype not in FLOAT_DTYPES:
        return f"has kernels for fp32, bf16 and fp16, not for {dtype}"
    reason = load_cuda()
    if reason is None and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "needs compute capability 8.0"
    return reason


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The kernels take raw pointers: every tensor contiguous, copied where it was not."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)
