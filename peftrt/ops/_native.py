"""Finds and loads the libraries in peftrt/_C: their functions are ``torch.ops.peftrt_cpu.*`` and ``peftrt_cuda.*``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftrt import _build
from peftrt.formats.nf4 import FLOAT_DTYPES

_HINT = "`python -m peftrt build` compiles it"


def library_path(target: str = "cpu") -> Path:
    """Where a target's library (``cpu``, ``cuda``) is, or would be."""
    return _build.default_directory() / _build.library_name(target)


@functools.lru_cache(maxsize=1)
def load() -> str | None:
    """Loads the CPU library on the first call, and says why it cannot: None means that it is loaded.

    Nothing is raised and nothing is retried: a library built later is found by the next process.
    """
    return _load("cpu")


@functools.lru_cache(maxsize=1)
def load_cuda() -> str | None:
    """The same for the CUDA library. It needs no device to load, but a torch that is built for CUDA."""
    if torch.version.cuda is None:
        return f"the native CUDA library needs a torch that is built for CUDA, and this is {torch.__version__}"
    return _load("cuda")


def _load(target: str) -> str | None:
    path, name = library_path(target), f"the native {target.upper()} library"
    if not path.is_file():
        return f"{name} is not built ({path} is missing); {_HINT}"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"{name} does not load with torch {torch.__version__}: {lines[0]}; {_HINT} again"
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


def cuda_unsupported(x: Tensor, dtype: torch.dtype) -> str | None:
    """Why the CUDA kernels cannot take a call on x's device that computes in ``dtype``; None where they can."""
    if x.device.type != "cuda" or torch.version.hip is not None:
        return f"has kernels for CUDA devices, not for {x.device.type if torch.version.hip is None else 'ROCm'}"
    if dtype not in FLOAT_DTYPES:
        return f"has kernels for fp32, bf16 and fp16, not for {dtype}"
    return load_cuda() or _not_compiled_for(x.device)


def unsupported_anywhere(x: Tensor, dtype: torch.dtype) -> str | None:
    """Why the kernels for x's device cannot take such a call, where an operation has them for both."""
    return unsupported(x, dtype) if x.is_cpu else cuda_unsupported(x, dtype)


def library(x: Tensor) -> Any:
    """The functions for x's device."""
    return torch.ops.peftrt_cpu if x.is_cpu else torch.ops.peftrt_cuda


@functools.cache
def cuda_rows(device: torch.device) -> int:
    """How many rows of bf16 or fp16 the loaded CUDA library multiplies itself on a device."""
    return int(torch.ops.peftrt_cuda.nf4_linear_rows(device.index or 0))


@functools.cache
def _not_compiled_for(device: torch.device) -> str | None:
    capability, built_for = torch.cuda.get_device_capability(device), str(torch.ops.peftrt_cuda.sm()).split()
    if any(runs_on(arch, capability) for arch in built_for):
        return None
    name, version = torch.cuda.get_device_name(device), ".".join(map(str, capability))
    return f"is compiled for compute capability {', '.join(built_for)}, {name} has {version}; PEFTRT_CUDA_ARCHS adds it"


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether machine code for ``arch`` (``8.0``, ``9.0a``) runs on a device: of its major version, and not older.

    ``a`` is for that capability alone; ``f`` is for its family, which is taken to be the major version.
    """
    major, minor = (int(part) for part in arch.rstrip("af").split("."))
    return (major, minor) == capability or (
        not arch.endswith("a") and major == capability[0] and minor <= capability[1]
    )


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The kernels take raw pointers: every tensor contiguous, copied where it was not."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)
