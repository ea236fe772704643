"""The Triton kernels: whether they can run, and a weight's bytes as the arguments they take."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from peftrt.formats.nf4 import DYNAMIC_CODEBOOK, FLOAT_DTYPES, NF4_CODEBOOK, bytes_float
from peftrt.ops._invariant import invariant

P = ParamSpec("P")
R = TypeVar("R")

LEAST_CAPABILITY = (8, 0)


def unsupported(x: Tensor, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot take a call on x's device that computes in ``dtype``; None where they can."""
    if dtype not in FLOAT_DTYPES:
        return f"has kernels for fp32, bf16 and fp16, not for {dtype}"
    if not _installed():
        return "triton is not installed"
    if x.device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "runs on CUDA tensors, and on the CPU in Triton's interpreter (TRITON_INTERPRET=1) only"
        # it truncates where devices round, and its products of bf16 are wrong
        return "Triton's interpreter cannot be trusted with bf16" if dtype == torch.bfloat16 else None
    if x.device.type != "cuda":
        return f"has kernels for CUDA devices, not for {x.device.type}"
    return _too_old(x.device)


def heeds_invariance(run: Callable[P, R]) -> Callable[P, R]:
    """``run``, whose kernels have one schedule for any number of rows under :func:`peftrt.batch_invariant`."""

    @functools.wraps(run)
    def heeding(*args: P.args, **options: P.kwargs) -> R:
        if not invariant():
            return run(*args, **options)
        from peftrt.kernels._schedule import for_any_rows

        with for_any_rows():
            return run(*args, **options)

    return heeding


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _too_old(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < LEAST_CAPABILITY:
        return (
            f"needs compute capability 8.0, {torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}"
        )
    return None


@functools.cache
def _tables(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.cat([NF4_CODEBOOK, DYNAMIC_CODEBOOK]).to(device)


def weight(
    codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Codes and scales as the kernels take them: contiguous, fp32 scales as fp32, and the tables of both codes."""
    tables = _tables(codes.device)
    if nested_absmax is None or nested_offset is None:
        return codes.contiguous(), bytes_float(absmax), None, None, tables
    return codes.contiguous(), absmax.contiguous(), bytes_float(nested_absmax), bytes_float(nested_offset), tables
