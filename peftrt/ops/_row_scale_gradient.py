"""row_scale_gradient: the gradient of what the rows of an adapted weight are multiplied with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftrt.ops import _native
from peftrt.ops._define import Backend, define, reference_backend
from peftrt.ops._weight import check_bias, check_device, check_float, check_row_scale, expect
from peftrt.reference import row_scale_gradient as reference
from peftrt.reference._weight import accumulator


def row_scale_gradient(dy: Tensor, y: Tensor, bias: Tensor | None, row_scale: Tensor) -> Tensor:
    """Gradient of c in ``y = c z + b``, without z.

    ``dc[n] = sum_m dy[m, n] (y[m, n] - b[n]) / c[n]``, and 0 where ``c[n]`` is 0, where y tells nothing of z.

    Args:
        dy: ``[..., N]``; fp32, bf16 or fp16 (fp64 by the reference).
        y: of dy's shape and dtype.
        bias: ``[N]`` in y's dtype, or None.
        row_scale: c, ``[N]``, fp32 (fp64 beside y in fp64).

    Returns:
        ``[N]`` in row_scale's dtype. On a CPU the number of threads changes no bit.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape or device that does not fit.

    Source: DoRA, Liu et al. 2024 (arXiv:2402.09353), equation 6: a magnitude's gradient is this, divided by the norm.
    """
    return _GRADIENT(dy, y, bias, row_scale)


def _check(dy: Tensor, y: Tensor, bias: Tensor | None, row_scale: Tensor) -> None:
    op = "row_scale_gradient"
    check_float(op, "y", y)
    expect(y.dim() > 0, op, "y", "[..., N]", y)
    check_device(op, "dy", dy, y)
    expect(dy.shape == y.shape and dy.dtype == y.dtype, op, "dy", f"{y.dtype} {list(y.shape)}, like y", dy)
    check_bias(op, bias, y.shape[-1], y)
    check_row_scale(op, row_scale, y.shape[-1], y)


def _fake(dy: Tensor, y: Tensor, bias: Tensor | None, row_scale: Tensor) -> Tensor:
    return row_scale.new_empty(row_scale.shape, dtype=accumulator(y.dtype))


def _native_unsupported(dy: Tensor, *_: Any) -> str | None:
    return _native.unsupported(dy, dy.dtype)


def _native_run(*arguments: Any) -> Tensor:
    return torch.ops.peftrt_cpu.row_scale_gradient.default(*arguments)


_GRADIENT = define(
    "row_scale_gradient(Tensor dy, Tensor y, Tensor? bias, Tensor row_scale) -> Tensor",
    check=_check,
    fake=_fake,
    backends=(
        Backend("native", _native_run, _native_unsupported, ("cpu",), strict=True),
        reference_backend(reference.forward),
    ),
)
