"""lora_linear and lora_weight_norm by Triton: the base's products with the adapter's share in the same tiles.

Where the table says PANELS the base's product is cuBLAS'. The adapter's share, and the bias, are then written first, in
x's dtype, and cuBLAS adds its fp32 sums to them: y is written twice and read once, and rounded to its dtype once beside
the share's own rounding. Ranks beside the columns of x would save the pass, but a copy of x as large as x would hold
them; adding the share afterwards would move as many bytes, and round the base's part instead, which is the larger.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftrt.ops import _panels, _paths, _triton
from peftrt.ops._weight import WeightArgs

_NO_SPLITS = "takes one linear map a call, no splits"


def unsupported(x: Tensor, splits: Sequence[int]) -> str | None:
    """Why Triton cannot take a call with such an x; None where it can."""
    return _NO_SPLITS if splits else _triton.unsupported(x, x.dtype)


def slower(x: Tensor, splits: Sequence[int]) -> str | None:
    """Why what is made of the base's product and torch's is left to Triton; None where that cannot run."""
    if x.is_cpu or unsupported(x, splits) is not None:
        return None
    return "the base's product and torch's pass over y three times, Triton's once or twice"


@_triton.heeds_invariance
def forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The operation's arguments; y and xa."""
    from peftrt.kernels.lora_linear import lora_linear
    from peftrt.kernels.low_rank import low_rank

    *parts, lora_A, lora_B, scaling, bias, dropout_p, seed, row_scale, _ = rest
    weight, lora_A, lora_B = WeightArgs(*parts), _operand(lora_A), _operand(lora_B)
    # of their final shapes: what is returned must be no view, or users could not write to it
    y, xa = x.new_empty((*x.shape[:-1], weight.n)), x.new_empty((*x.shape[:-1], lora_A.shape[0]), dtype=torch.float32)
    rows, y_rows, xa_rows = _rows(x), y.view(-1, weight.n), xa.view(-1, lora_A.shape[0])
    low_rank(rows, lora_A, xa_rows, seed=seed, dropout_p=dropout_p)
    bias, row_scale = (None if t is None else t.contiguous() for t in (bias, row_scale))
    if _by_panels(rows, weight, "forward"):
        _panels_forward(rows, weight, xa_rows, lora_B, scaling, bias, row_scale, y_rows)
    else:
        lora_linear(rows, _base(weight), xa_rows, lora_B, scaling, bias, row_scale, y_rows)
    return y, xa


@_triton.heeds_invariance
def backward(dy: Tensor, x: Tensor, xa: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The operation's arguments; dX, dA and dB, empty where not wanted."""
    from peftrt.kernels.low_rank import low_rank, low_rank_gradient

    *parts, lora_A, lora_B, scaling, dropout_p, seed, row_scale, needs_dx, needs_dA, needs_dB, _ = rest
    dy_rows, B = _rows(dy), _operand(lora_B)
    row_scale = None if row_scale is None else row_scale.contiguous()
    drop = {"seed": seed, "dropout_p": dropout_p}
    scaled = {"factor": scaling, "column_scale": row_scale}
    dx, dA, dB = x.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    g = dy_rows.new_empty((dy_rows.shape[0], B.shape[1]), dtype=torch.float32)
    if needs_dx or needs_dA:
        low_rank(dy_rows, B.t(), g, **scaled)
    if needs_dx:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows = dx.view(-1, x.shape[-1])
        _grad_input(dy_rows, WeightArgs(*parts), g, _operand(lora_A), seed, dropout_p, row_scale, rows)
    if needs_dA:
        dA = _operand(lora_A).new_empty(lora_A.shape)
        low_rank_gradient(g, _rows(x), dA, **drop)
    if needs_dB:
        dB = B.new_empty(B.shape)
        low_rank_gradient(_rows(xa), dy_rows, dB.t(), **scaled)
    return dx, dA.to(lora_A.dtype), dB.to(lora_B.dtype)


def norm_unsupported(weight: Tensor, absmax: Tensor | None, *rest: Any) -> str | None:
    """Why Triton cannot take a call of lora_weight_norm; None where it can."""
    if rest[-1]:
        return _NO_SPLITS
    return _triton.unsupported(weight, weight.dtype if absmax is None else torch.float32)


def weight_norm(*arguments: Any) -> Tensor:
    """The arguments of lora_weight_norm; fp32 [N]."""
    from peftrt.kernels.lora_weight_norm import lora_weight_norm

    *parts, lora_A, lora_B, scaling, _ = arguments
    out = lora_A.new_empty(lora_B.shape[0], dtype=torch.float32)
    lora_weight_norm(_base(WeightArgs(*parts)), _operand(lora_A), _operand(lora_B), scaling, out)
    return out


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _operand(adapter: Tensor) -> Tensor:
    """A or B as the kernels take it: contiguous, and not fp64."""
    return (adapter.float() if adapter.dtype == torch.float64 else adapter).contiguous()


def _base(weight: WeightArgs) -> Any:
    """The base as the kernels take it: a dense matrix, or codes, scales and block size."""
    if weight.absmax is None:
        return weight.weight
    return (*_triton.weight(*weight[:4]), weight.block_size)  # type: ignore[arg-type]


def _by_panels(rows: Tensor, weight: WeightArgs, direction: str) -> bool:
    dense = weight.absmax is None
    if _paths.path("lora_dense" if dense else "lora", rows) != _paths.PANELS:
        return False
    fit = _panels.rows_fit if direction == "forward" else _panels.columns_fit
    return dense or fit(weight, rows.element_size())


def _panels_forward(
    rows: Tensor,
    weight: WeightArgs,
    xa: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    row_scale: Tensor | None,
    out: Tensor,
) -> None:
    from peftrt.kernels.lora_linear_dense import adapter_share
    from peftrt.kernels.nf4_dequantize import nf4_dequantize

    if weight.absmax is None and row_scale is not None:
        # nothing of W's size may be written to scale it: the result is scaled, and rounded again
        _panels_forward(rows, weight, xa, lora_B, scaling, None, None, out)
        out.mul_(row_scale) if bias is None else torch.addcmul(bias, out, row_scale, out=out)
        return

    def begin(first: int, columns: Tensor) -> None:
        part = slice(first, first + columns.shape[1])
        addend, scale = (None if t is None else t[part] for t in (bias, row_scale))
        adapter_share(xa, lora_B[part].t(), columns, factor=scaling, bias=addend, result_scale=scale)

    def decode(*args: Any) -> None:
        *codes, block_size, panel = args
        nf4_dequantize(*_triton.weight(*codes), block_size, panel)

    if weight.absmax is None:
        begin(0, out)
        out.addmm_(rows, weight.weight.t())
    else:
        _panels.forward(rows, weight, begin, out, decode, row_scale)


def _grad_input(
    dy: Tensor,
    weight: WeightArgs,
    g: Tensor,
    lora_A: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    row_scale: Tensor | None,
    out: Tensor,
) -> None:
    from peftrt.kernels.lora_linear import lora_linear_dx
    from peftrt.kernels.lora_linear_dense import adapter_share
    from peftrt.kernels.nf4_dequantize import nf4_dequantize_columns

    if not _by_panels(dy, weight, "dx"):
        lora_linear_dx(dy, _base(weight), g, lora_A, seed, dropout_p, row_scale, out)
        return

    def begin(first: int, columns: Tensor) -> None:
        right = lora_A[:, first : first + columns.shape[1]]
        adapter_share(g, right, columns, seed=seed, dropout_p=dropout_p, first=first, columns=weight.k)

    if weight.absmax is None:
        begin(0, out)
        out.addmm_(dy if row_scale is None else (dy * row_scale).to(dy.dtype), weight.weight)
    else:
        tensors = _triton.weight(*weight[:4])  # type: ignore[arg-type]
        decode = functools.partial(nf4_dequantize_columns, *tensors, weight.block_size, weight.k)
        _panels.grad_input(dy, weight, out, decode, begin, row_scale)
