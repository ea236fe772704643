"""multi_lora_linear: a base weight and another adapter for every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftrt.formats.nf4 import NF4Weight
from peftrt.formats.pages import PAGE, X_SCALE, Y_SCALE
from peftrt.ops import _multi_lora_cuda, _multi_lora_native, _multi_lora_triton
from peftrt.ops._adapter_table import AdapterTable
from peftrt.ops._define import Backend, define, reference_backend
from peftrt.ops._weight import (
    WEIGHT,
    WeightArgs,
    autocast,
    check_bias,
    check_device,
    check_float,
    check_linear,
    expect,
    weight_args,
)
from peftrt.reference import multi_lora_linear as reference
from peftrt.reference._weight import accumulator
from peftrt.reference.multi_lora_linear import row_vectors, scaled

_OP = "multi_lora_linear"


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight | None,
    table: AdapterTable,
    slot_ids: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Linear map in which every row has its own adapter, or none.

    ``y_i = c_e * (x'_i W^T + s_e (x'_i A_e^T) B_e^T) + b + b_e`` with ``e = slot_ids[i]`` and ``x'_i = u_e * x_i``; an
    adapter without c, u or b_e has 1, 1 and 0, and -1 is the base alone. Of several maps of one x each has an A and B
    of its own. Differentiable in x, a dense W, b, and the table's values and vectors. Only x is kept for the backward:
    ``x A^T`` is computed again.

    Args:
        x: ``[..., K]``, M rows when flattened; fp32, bf16 or fp16 (fp64 by the reference); any strides. Cast under
            ``torch.autocast``.
        weight: ``[N, K]`` in x's dtype, an NF4Weight of that shape, or None for the adapters' share alone.
        table: AdapterTable over K and N.
        slot_ids: int32 ``[M]``; -1 ... E - 1. On a CPU other ids are an error; on other devices the base serves the
            row, and the next call raises the error.
        bias: ``[N]`` in x's dtype, or None.
        out: where the result goes: ``[..., N]`` in x's dtype, rows at any one stride, a row's elements together, not
            overlapping with an argument. Takes no part in gradients.

    Returns:
        ``[..., N]`` in x's dtype; ``out`` where it was given. The bits of a row do not depend on the other rows, nor
        does an adapter's gradient on the other adapters' rows. Over a dense base on a GPU, and where cuBLAS multiplies
        (peftrt/ops/_paths.py), that is said of what the adapter adds.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, device or slot id that does not fit.

    Source: Punica, Chen et al. 2023 (arXiv:2310.18547), section 4; S-LoRA, Sheng et al. 2023 (arXiv:2311.03285),
    section 5, for pages.
    """
    if isinstance(weight, NF4Weight) or weight is None:
        x, bias = autocast(x, bias)  # type: ignore[assignment]
    else:
        x, weight, bias = autocast(x, weight, bias)  # type: ignore[assignment]
    nothing = (None, None, None, None, table.n, table.k, 0)
    args = nothing if weight is None else weight_args(_OP, weight)
    pairs = (table.values, table.ranks, table.A_pages, table.B_pages, table.scaling)
    rest = (*args, *pairs, table.vectors, table.vector_starts, list(table.splits), slot_ids, bias)
    if out is None:
        return _FORWARD(x, *rest)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (x, *rest)):
        raise ValueError(f"{_OP}: out takes no part in gradients: call it under torch.no_grad()")
    _OUT(x, *rest, out)
    return out


def _check(x: Tensor, *rest: Any) -> None:
    weight, (*pairs, vectors, starts, splits, slot_ids, bias) = WeightArgs(*rest[:7]), rest[7:]
    if rest[0] is None:
        check_bias(_OP, bias, weight.n, x)
    else:
        check_linear(_OP, x, weight, bias)
    _check_pairs(_OP, x, weight, pairs, splits, slot_ids)
    _check_vectors(x, vectors, starts, pairs[1].shape[0])


def _check_pairs(
    op: str, x: Tensor, weight: WeightArgs, pairs: Sequence[Tensor], splits: Sequence[int], slot_ids: Tensor
) -> None:
    check_float(op, "x", x)
    expect(x.dim() > 0 and x.shape[-1] == weight.k, op, "x", f"[..., K = {weight.k}]", x)
    fits = len(splits) > 0 and min(splits) >= 0 and sum(splits) == weight.n
    expect(fits, op, "splits", f"sizes that sum to N = {weight.n}", splits)
    values, ranks, A_pages, B_pages, scaling = pairs
    check_device(op, "values", values, x)
    check_float(op, "values", values)
    expect(values.dim() == 1, op, "values", "of shape [S]", values)
    expect(ranks.dim() == 2, op, "ranks", "of shape [E, P]", ranks)
    expect(A_pages.dim() == 3, op, "A_pages", "of shape [E, P, W]", A_pages)
    shape = (ranks.shape[0], len(splits))
    rows = x.shape[:-1].numel()
    for name, tensor, expected, dtype in (
        ("ranks", ranks, shape, torch.int32),
        ("A_pages", A_pages, (*shape, A_pages.shape[2]), torch.int64),
        ("B_pages", B_pages, (*shape, A_pages.shape[2]), torch.int64),
        ("scaling", scaling, shape, torch.float32),
        ("slot_ids", slot_ids, (rows,), torch.int32),
    ):
        check_device(op, name, tensor, x)
        if tuple(tensor.shape) != expected:
            expect(False, op, name, f"of shape {list(expected)}", tensor)
        if tensor.dtype != dtype:
            expect(False, op, name, f"{dtype}", tensor, TypeError)


def _check_vectors(x: Tensor, vectors: Tensor | None, starts: Tensor | None, slots: int) -> None:
    expect((vectors is None) == (starts is None), _OP, "vector_starts", "given with vectors", starts)
    if vectors is None or starts is None:
        return
    for name, tensor in (("vectors", vectors), ("vector_starts", starts)):
        check_device(_OP, name, tensor, x)
    wide = vectors.dim() == 1 and vectors.dtype in (torch.float32, accumulator(x.dtype))
    expect(wide, _OP, "vectors", "float32 [V]", vectors, TypeError)
    fits = starts.dtype == torch.int64 and tuple(starts.shape) == (slots, 3)
    expect(fits, _OP, "vector_starts", f"int64 [E, 3] = [{slots}, 3]", starts)


def check_contents(x: Tensor, *rest: Any) -> None:
    """Slot ids and the slots they name lie inside the table. Values can be looked at without waiting only on a CPU."""
    n, k, (*pairs, vectors, starts, splits, slot_ids, _) = rest[4], rest[5], rest[7:]
    if not x.is_cpu:
        return
    slots = pairs[1].shape[0]
    if not bool(((slot_ids >= -1) & (slot_ids < slots)).all()):
        low, high = int(slot_ids.min()), int(slot_ids.max())
        raise ValueError(f"{_OP}: slot_ids must be in -1 ... {slots - 1}, got {low} ... {high}")
    used = slot_ids.unique().long()
    used = used[used >= 0]
    _check_pages(_OP, k, pairs, splits, used)
    if vectors is not None and starts is not None:
        sizes = torch.tensor([k, n, n])
        good = ((starts >= -1) & ((starts < 0) | (starts + sizes <= vectors.shape[0])))[used]
        expect(bool(good.all()), _OP, "vector_starts", f"within the {vectors.shape[0]} vectors, or -1", starts.tolist())


def _check_pages(op: str, k: int, pairs: Sequence[Tensor], splits: Sequence[int], used: Tensor) -> None:
    values, ranks, A_pages, B_pages, _ = pairs
    most = A_pages.shape[2] * PAGE
    ranks = ranks[used].long()
    good = bool(((ranks >= 0) & (ranks <= most)).all())
    expect(good, op, "ranks", f"in 0 ... {most}, what {A_pages.shape[2]} pages hold", ranks.tolist())
    # of every page, how many ranks of its slot it holds
    held = (ranks[:, :, None] - PAGE * torch.arange(A_pages.shape[2])).clamp(max=PAGE)
    outputs = torch.tensor(splits)[None, :, None]
    for name, starts, width in (("A_pages", A_pages[used], k), ("B_pages", B_pages[used], outputs)):
        good = bool(((held <= 0) | ((starts >= 0) & (starts + held * width <= values.shape[0]))).all())
        expect(good, op, name, f"within the {values.shape[0]} values", starts[held > 0].tolist())


def _fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[4]))


def _reference(x: Tensor, *rest: Any) -> Tensor:
    check_contents(x, *rest)
    return reference.forward(x, *rest)


def _native(x: Tensor, *rest: Any) -> Tensor:
    if not x.is_cpu:
        return _multi_lora_cuda.run(x, *rest)
    try:
        return _multi_lora_native.forward(x, *rest)
    except RuntimeError:  # it looks at the table's contents itself; these are better words
        _check(x, *rest)
        check_contents(x, *rest)
        raise


def _native_out(x: Tensor, *rest: Any) -> None:
    if not x.is_cpu:
        return _multi_lora_cuda.run_out(row_stride(rest[-1]) or 0, x, *rest)
    try:
        return _multi_lora_native.forward_out(x, *rest)
    except RuntimeError:
        _check_out(x, *rest)
        check_contents(x, *rest[:-1])
        raise


def _native_unsupported(x: Tensor, *rest: Any) -> str | None:
    return _multi_lora_native.unsupported(x, *rest) if x.is_cpu else _multi_lora_cuda.unsupported(x, *rest)


def _native_declines(x: Tensor, *rest: Any) -> str | None:
    """A call that the CUDA kernel would refuse is not tried: many rows would pay for the exception each time."""
    return None if x.is_cpu else _multi_lora_cuda.unsupported(x, *rest)


def _triton(x: Tensor, *rest: Any) -> Tensor:
    check_contents(x, *rest)
    return _multi_lora_triton.forward(x, *rest)


def _triton_out(x: Tensor, *rest: Any) -> None:
    *call, out = rest
    check_contents(x, *call)
    _multi_lora_triton.forward_out(x, *rest, row_stride(out))


def _check_out(x: Tensor, *rest: Any) -> None:
    *call, out = rest
    _check(x, *call)
    check_device(_OP, "out", out, x)
    shape = (*x.shape[:-1], call[4])
    fits = tuple(out.shape) == shape and out.dtype == x.dtype
    expect(fits, _OP, "out", f"{x.dtype} {list(shape)}", out)
    expect(row_stride(out) is not None, _OP, "out", "of rows at one stride, with a row's elements together", out)


def row_stride(out: Tensor) -> int | None:
    """How many elements lie between the flattened rows of ``[..., N]``; None where that is not one number."""
    n = out.shape[-1]
    if out.numel() == 0:
        return n
    if n > 1 and out.stride(-1) != 1:
        return None
    stride, rows = n, 1
    for size, step in zip(reversed(out.shape[:-1]), reversed(out.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if rows == 1:
            stride = step
        elif step != stride * rows:
            return None
        rows *= size
    return stride if rows == 1 or stride >= n else None


def _reference_out(x: Tensor, *rest: Any) -> None:
    *call, out = rest
    out.copy_(_reference(x, *call))


def _check_backward(dz: Tensor, x: Tensor, *rest: Any) -> None:
    op, weight, (*pairs, splits, slot_ids, _, _) = f"{_OP}_backward", WeightArgs(*rest[:7]), rest[7:]
    if rest[0] is not None:
        check_linear(op, x, weight, None)
    _check_pairs(op, x, weight, pairs, splits, slot_ids)
    check_device(op, "dz", dz, x)
    shape = (*x.shape[:-1], weight.n)
    expect(tuple(dz.shape) == shape and dz.dtype == x.dtype, op, "dz", f"{x.dtype} {list(shape)}", dz)


def _fake_backward(dz: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    values, (needs_dx, needs_dvalues) = rest[7], rest[-2:]
    return x.new_empty(x.shape if needs_dx else (0,)), values.new_empty(values.shape if needs_dvalues else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *weight = inputs[:8]
    *tensors, ctx.n, ctx.k, ctx.block_size = weight
    *table, ctx.splits, slot_ids, _ = inputs[8:]
    ctx.save_for_backward(x, *tensors, *table, slot_ids)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """With dZ = c * dY: what flows back into z by the operation below, and into c, u and the biases by sums of rows."""
    x, *rest = ctx.saved_tensors
    tensors, pairs, (vectors, starts, slot_ids) = rest[:4], rest[4:9], rest[9:]
    needs = ctx.needs_input_grad
    weight = (*tensors, ctx.n, ctx.k, ctx.block_size)
    factors = row_vectors(vectors, starts, X_SCALE, slot_ids, ctx.k, 1.0)
    dz = scaled(dy, row_vectors(vectors, starts, Y_SCALE, slot_ids, ctx.n, 1.0))
    seen = scaled(x, factors)
    table = (*pairs, ctx.splits, slot_ids)
    dseen, dvalues = _BACKWARD(dz, seen, *weight, *table, needs[0] or (needs[13] and factors is not None), needs[8])
    dweight = dbias = dvectors = None
    if needs[1]:
        dweight = dz.reshape(-1, ctx.n).t() @ seen.reshape(-1, ctx.k)
    if needs[17]:
        dbias = dy.reshape(-1, ctx.n).sum(0)
    if needs[13]:
        z = _FORWARD(seen, *weight, *pairs, None, None, ctx.splits, slot_ids, None)
        rows = [None if factors is None else dseen * x, dy * z, dy]
        dvectors = _grad_vectors(vectors, starts, slot_ids, rows)
    dx = scaled(dseen, factors) if needs[0] else None
    dvalues = dvalues if needs[8] else None
    none = (None,) * 4
    return (dx, dweight, *none, None, None, dvalues, *none, dvectors, None, None, None, dbias)


def _grad_vectors(vectors: Tensor, starts: Tensor, slot_ids: Tensor, rows: Sequence[Tensor | None]) -> Tensor:
    """Adds ``rows`` [M, size], what each row has of the gradient of its slot's vectors, where those lie."""
    grad = torch.zeros_like(vectors)
    for which, part in enumerate(rows):
        if part is None or not starts.shape[0]:
            continue
        part = part.reshape(slot_ids.shape[0], -1).to(vectors.dtype)
        sums = part.new_zeros(starts.shape[0] + 1, part.shape[1])
        # in the order of the rows, so that a slot's sum is that of its rows alone; what has none falls on the last
        slots = starts.shape[0]
        sums.index_add_(0, torch.where((slot_ids >= 0) & (slot_ids < slots), slot_ids, slots), part)
        has = starts[:, which] >= 0
        at = starts[:, which].clamp(min=0)[:, None] + torch.arange(part.shape[1], device=vectors.device)
        grad.index_add_(0, at.clamp(max=vectors.shape[0] - 1).reshape(-1), (sums[:-1] * has[:, None]).reshape(-1))
    return grad


_ARGUMENTS = (
    f"Tensor x, {WEIGHT.replace('Tensor weight', 'Tensor? weight')}, Tensor values, Tensor ranks, Tensor A_pages, "
    "Tensor B_pages, Tensor scaling, Tensor? vectors, Tensor? vector_starts, int[] splits, Tensor slot_ids, "
    "Tensor? bias"
)
_FORWARD = define(
    f"multi_lora_linear({_ARGUMENTS}) -> Tensor",
    check=_check,
    fake=_fake,
    backends=(
        Backend("native", _native, _native_unsupported, ("cpu", "cuda"), strict=True, slower=_native_declines),
        Backend("triton", _triton, _multi_lora_triton.unsupported, ("cuda",)),
        reference_backend(_reference),
    ),
    setup_context=_setup_context,
    backward=_backward,
)
_OUT = define(
    f"multi_lora_linear.out({_ARGUMENTS}, Tensor(a!) out) -> ()",
    check=_check_out,
    fake=lambda *_: None,
    backends=(
        Backend("native", _native_out, _native_unsupported, ("cpu", "cuda"), strict=True, slower=_native_declines),
        Backend("triton", _triton_out, _multi_lora_triton.unsupported, ("cuda",)),
        reference_backend(_reference_out),
    ),
)
_BACKWARD = define(
    f"multi_lora_linear_backward(Tensor dz, Tensor x, {WEIGHT.replace('Tensor weight', 'Tensor? weight')}, "
    "Tensor values, Tensor ranks, Tensor A_pages, Tensor B_pages, Tensor scaling, int[] splits, Tensor slot_ids, "
    "bool needs_dx, bool needs_dvalues) -> (Tensor, Tensor)",
    check=_check_backward,
    fake=_fake_backward,
    backends=(
        Backend("native", _multi_lora_native.backward, _multi_lora_native.backward_unsupported, ("cpu",), strict=True),
        Backend("triton", _multi_lora_triton.backward, _multi_lora_triton.backward_unsupported, ("cuda",)),
        reference_backend(reference.backward),
    ),
)
