"""dropout: zeros that are a function of a seed, so that a backward finds them again without a stored mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftrt.ops import _native
from peftrt.ops._define import Backend, define, reference_backend
from peftrt.ops._seed import as_seed, check_seed
from peftrt.ops._weight import check_float
from peftrt.reference import dropout as reference


def dropout(x: Tensor, p: float, seed: Tensor | int | None = None) -> Tensor:
    """Zero elements at random and scale up the rest.

    ``y[j] = x[j] / (1 - p)`` where ``keep(seed, j)``, else 0, with j the flat index. The same seed gives the same zeros
    on every device; :mod:`peftrt.reference.dropout` has the integer arithmetic. Differentiable in x.

    Args:
        x: any shape; fp32, bf16 or fp16 (fp64 by the reference).
        p: probability of a zero; in [0, 1).
        seed: int64 ``[1]`` on x's device, or an int; default: drawn from torch's generator.

    Raises:
        TypeError: another dtype.
        ValueError: a probability or seed that does not fit.

    Source: Srivastava et al. 2014 (JMLR 15), section 4; the hash is MurmurHash3's finaliser (Appleby 2011).
    """
    if p == 0.0:
        return x
    return _DROPOUT(x, as_seed(seed, x), p)


def _check(x: Tensor, seed: Tensor, p: float) -> None:
    check_float("dropout", "x", x)
    check_seed("dropout", "p", p, seed, x)


def _native_run(x: Tensor, seed: Tensor, p: float) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.ops.peftrt_cpu.dropout(x.contiguous(), int(seed), p, out)
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (seed,) = ctx.saved_tensors
    return _DROPOUT(grad, seed, ctx.p), None, None


_DROPOUT = define(
    "dropout(Tensor x, Tensor seed, float p) -> Tensor",
    check=_check,
    fake=lambda x, seed, p: torch.empty_like(x, memory_format=torch.contiguous_format),
    backends=(
        Backend("native", _native_run, lambda x, seed, p: _native.unsupported(x, x.dtype), ("cpu",)),
        reference_backend(reference.dropout),
    ),
    setup_context=_setup_context,
    backward=_backward,
)
