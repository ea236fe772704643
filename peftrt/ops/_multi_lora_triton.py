"""multi_lora_linear by Triton: a few rows each by itself, more sorted by slot, around the base's product.

Every launch follows from sizes that the host knows: what the slots of a batch are is read on the device alone, so that
a captured graph serves any batch. The base's sums come as fp32 and are rounded once with what the adapters add, where
the product is one of Triton's tiles. Where the table says PANELS it is cuBLAS', and rounded to x's dtype; what is added
to it is rounded once more.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftrt.ops import _device_flag, _panels, _paths, _triton
from peftrt.ops._invariant import invariant
from peftrt.ops._weight import WeightArgs

# peftrt.kernels._slots.Table, which only a call imports
Table = Any
_OP = "multi_lora_linear"


def unsupported(x: Tensor, *rest: Any) -> str | None:
    """Why Triton cannot take a call with these arguments, x and those behind it; None where it can."""
    values = rest[7]
    return _triton.unsupported(x, values.dtype) or _triton.unsupported(x, x.dtype)


def backward_unsupported(dz: Tensor, x: Tensor, *rest: Any) -> str | None:
    """The same for a call of the backward."""
    return unsupported(x, *rest)


def forward(x: Tensor, *rest: Any, scales_x: bool = True) -> Tensor:
    """The operation's arguments; y. ``scales_x``: whether a slot may have an x_scale."""
    weight = WeightArgs(*rest[:7])
    # of its final shape: what is returned must be no view, or users could not write to it
    y = x.new_empty((*x.shape[:-1], weight.n))
    _forward_into(x, weight, rest[7:], y.view(-1, weight.n) if y.numel() else None, scales_x)
    return y


def forward_out(x: Tensor, *rest: Any) -> None:
    """The same with a result given, whose rows have the last stride but one."""
    *call, out, stride = rest
    weight = WeightArgs(*call[:7])
    rows = out.as_strided((x.shape[:-1].numel(), weight.n), (stride, 1)) if out.numel() else None
    _forward_into(x, weight, call[7:], rows)


@_triton.heeds_invariance
def backward(dz: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The operation's arguments; dX and dvalues, each empty where it is not wanted."""
    from peftrt.kernels._routes import route
    from peftrt.kernels.multi_lora_gradient import page_gradients
    from peftrt.kernels.multi_lora_grouped import expand_groups, shrink_groups

    weight, (*pairs, splits, slot_ids, needs_dx, needs_dvalues) = WeightArgs(*rest[:7]), rest[7:]
    values = pairs[0]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else x.new_empty(0)
    dvalues = values.new_zeros(values.shape) if needs_dvalues else values.new_empty(0)
    if x.numel() == 0 or dz.numel() == 0:
        return dx.zero_(), dvalues
    table = _table(pairs, None, None, splits)
    dz_rows, x_rows = _rows(dz), _rows(x)
    routes = route(slot_ids.contiguous(), table.shape[0], _device_flag.flag(x.device))
    g = shrink_groups(dz_rows, table, routes, transposed=True)
    if needs_dx:
        rows = dx.view(-1, weight.k)
        if _by_panels(dz_rows, weight, "dx"):
            _panels_dx(dz_rows, weight, rows)
            expand_groups(g, None, table, routes, rows, add=True, transposed=True)
        else:
            parts = _base_parts(dz_rows, weight, weight.k, dx=True)
            expand_groups(g, parts, table, routes, rows, transposed=True)
    if needs_dvalues:
        page_gradients(g, shrink_groups(x_rows, table, routes), dz_rows, x_rows, table, routes, dvalues)
    return dx, dvalues


@_triton.heeds_invariance
def _forward_into(x: Tensor, weight: WeightArgs, rest: Any, out: Tensor | None, scales_x: bool = True) -> None:
    """``out``: [M, N], columns together; None where it would be empty."""
    from peftrt.kernels.multi_lora_decode import multi_lora_decode, scale_rows

    *pairs, vectors, starts, splits, slot_ids, bias = rest
    _device_flag.raise_if_set(_OP, x.device)
    if out is None:
        return
    table, slot_ids = _table(pairs, vectors, starts, splits), slot_ids.contiguous()
    bias = None if bias is None else bias.contiguous()
    rows, flag = _rows(x), _device_flag.flag(x.device)
    if scales_x and table.vectors is not None:
        rows = scale_rows(rows, table, slot_ids)
    if rows.shape[0] <= _paths.MULTI_LORA_ROWS and not invariant():
        parts = _base_parts(rows, weight, weight.n, dx=False)
        multi_lora_decode(rows, parts, table, slot_ids, flag, bias, out)
    else:
        _grouped(rows, weight, table, slot_ids, flag, bias, out)


def _grouped(
    rows: Tensor, weight: WeightArgs, table: Table, slot_ids: Tensor, flag: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    from peftrt.kernels._routes import route
    from peftrt.kernels.multi_lora_grouped import expand_groups, shrink_groups

    routes = route(slot_ids, table.shape[0], flag)
    shrunk = shrink_groups(rows, table, routes)
    if _by_panels(rows, weight, "forward"):
        # the bias comes behind y_scale; without one the base's own product adds it
        late = table.vectors is not None
        _panels_forward(rows, weight, None if late else bias, out)
        expand_groups(shrunk, None, table, routes, out, add=True, bias=bias if late else None)
    else:
        parts = _base_parts(rows, weight, weight.n, dx=False)
        expand_groups(shrunk, parts, table, routes, out, bias=bias)


def _table(pairs: Sequence[Tensor], vectors: Tensor | None, starts: Tensor | None, splits: Sequence[int]) -> Table:
    from peftrt.kernels._slots import Table

    values, ranks, A_pages, B_pages, scaling = (tensor.contiguous() for tensor in pairs)
    if vectors is not None and starts is not None:
        vectors, starts = vectors.contiguous(), starts.contiguous()
    return Table(values, ranks, A_pages, B_pages, scaling, vectors, starts, tuple(splits))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _without_base(weight: Any) -> bool:
    """None stands for no weight, in this operation alone."""
    return weight.weight is None


def _base_parts(rows: Tensor, weight: WeightArgs, columns: int, dx: bool) -> Tensor | None:
    """fp32 [parts, M, columns], whose sum is the base's product; None without a base."""
    from peftrt.kernels.lora_linear_dense import dense_parts
    from peftrt.kernels.nf4_linear import nf4_linear_parts

    if _without_base(weight):
        return None
    if weight.absmax is None:
        return dense_parts(rows, weight.weight if dx else weight.weight.t(), columns)
    tensors = _triton.weight(*weight[:4])  # type: ignore[arg-type]
    return nf4_linear_parts(rows, *tensors, weight.block_size, columns, dx)


def _by_panels(rows: Tensor, weight: WeightArgs, direction: str) -> bool:
    if _without_base(weight):
        return False
    dense = weight.absmax is None
    if _paths.path("lora_dense" if dense else "lora", rows) != _paths.PANELS:
        return False
    fit = _panels.rows_fit if direction == "forward" else _panels.columns_fit
    return dense or fit(weight, rows.element_size())


def _panels_forward(rows: Tensor, weight: WeightArgs, bias: Tensor | None, out: Tensor) -> None:
    from peftrt.kernels.nf4_dequantize import nf4_dequantize

    def decode(*args: Any) -> None:
        *codes, block_size, panel = args
        nf4_dequantize(*_triton.weight(*codes), block_size, panel)

    if weight.absmax is not None:
        _panels.forward(rows, weight, bias, out, decode)
    elif bias is None:
        torch.mm(rows, weight.weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.weight.t(), out=out)


def _panels_dx(dz: Tensor, weight: WeightArgs, out: Tensor) -> None:
    from peftrt.kernels.nf4_dequantize import nf4_dequantize_columns

    if weight.absmax is None:
        torch.mm(dz, weight.weight, out=out)
        return
    tensors = _triton.weight(*weight[:4])  # type: ignore[arg-type]
    decode = functools.partial(nf4_dequantize_columns, *tensors, weight.block_size, weight.k)
    _panels.grad_input(dz, weight, out, decode)
