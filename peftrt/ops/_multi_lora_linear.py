"""multi_lora_linear: a base weight and another low-rank adapter for every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftrt.formats.nf4 import NF4Weight
from peftrt.ops._define import OPS, define, reference_backend
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


@dataclass(frozen=True, eq=False)
class AdapterTable:
    """The adapters of one site, stacked: adapter e owns rows ``offsets[e] ... offsets[e] + ranks[e]`` of A and B.

    Attributes:
        A: ``[T, K]``, the adapters' lora_A one below the other; T is the sum of the ranks.
        B: ``[T, N]``, the adapters' lora_B, transposed, one below the other.
        ranks: int32 ``[E]``.
        offsets: int32 ``[E]``.
        scaling: fp32 ``[E]``.
    """

    A: Tensor
    B: Tensor
    ranks: Tensor
    offsets: Tensor
    scaling: Tensor

    @classmethod
    def stack(cls, adapters: Sequence[tuple[Tensor, Tensor, float]]) -> AdapterTable:
        """A table of (lora_A [R, K], lora_B [N, R], scaling), ranks mixed; gradients reach each adapter's tensors.

        Raises:
            ValueError: no adapters, or an A and B that do not fit together.
        """
        if not adapters:
            raise ValueError("AdapterTable: needs at least one adapter")
        for slot, (lora_A, lora_B, _) in enumerate(adapters):
            if lora_A.dim() != 2 or lora_B.dim() != 2 or lora_A.shape[0] != lora_B.shape[1]:
                shapes = f"{list(lora_A.shape)} and {list(lora_B.shape)}"
                raise ValueError(f"AdapterTable: adapter {slot}: expected lora_A [R, K], lora_B [N, R], got {shapes}")
        device = adapters[0][0].device
        ranks = torch.tensor([lora_A.shape[0] for lora_A, _, _ in adapters], dtype=torch.int32)
        return cls(
            A=torch.cat([lora_A for lora_A, _, _ in adapters]),
            B=torch.cat([lora_B.t() for _, lora_B, _ in adapters]),
            ranks=ranks.to(device),
            offsets=(ranks.cumsum(0, dtype=torch.int32) - ranks).to(device),
            scaling=torch.tensor([scaling for _, _, scaling in adapters], dtype=torch.float32).to(device),
        )


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight | None,
    table: AdapterTable,
    slot_ids: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Linear map in which every row has its own low-rank adapter, or none.

    ``y_i = x_i W^T + b + s_e (x_i A_e^T) B_e^T`` with ``e = slot_ids[i]``; -1 is the base alone. Differentiable in x, a
    dense W, the table's A and B, and b.

    Args:
        x: ``[..., K]``, M rows when flattened; fp32, bf16 or fp16 (fp64 by the reference). Cast under
            ``torch.autocast``.
        weight: ``[N, K]`` in x's dtype, an NF4Weight of that shape, or None for the adapters' share alone.
        table: AdapterTable over K and N.
        slot_ids: int32 ``[M]``; -1 ... E - 1. On a CPU other ids are an error; on other devices they mean the base.
        bias: ``[N]`` in x's dtype, or None.

    Returns:
        ``[..., N]`` in x's dtype.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, device or slot id that does not fit.

    Source: Punica, Chen et al. 2023 (arXiv:2310.18547), section 4.
    """
    if isinstance(weight, NF4Weight) or weight is None:
        x, bias = autocast(x, bias)  # type: ignore[assignment]
    else:
        x, weight, bias = autocast(x, weight, bias)  # type: ignore[assignment]
    n, k = table.B.shape[-1], table.A.shape[-1]
    args = (None, None, None, None, n, k, 0) if weight is None else weight_args("multi_lora_linear", weight)
    return _FORWARD(x, *args, table.A, table.B, table.ranks, table.offsets, table.scaling, slot_ids, bias)


_OPTIONAL_WEIGHT = WEIGHT.replace("Tensor weight", "Tensor? weight")
_TABLE = "Tensor A, Tensor B, Tensor ranks, Tensor offsets, Tensor scaling, Tensor slot_ids"


def _check(x: Tensor, *rest: Any) -> None:
    weight, table, bias = WeightArgs(*rest[:7]), rest[7:13], rest[13]
    if rest[0] is not None:
        check_linear("multi_lora_linear", x, weight, bias)
    else:
        check_bias("multi_lora_linear", bias, weight.n, x)
    _check_table("multi_lora_linear", x, weight.n, weight.k, *table)


def _check_table(
    op: str,
    x: Tensor,
    n: int,
    k: int,
    A: Tensor,
    B: Tensor,
    ranks: Tensor,
    offsets: Tensor,
    scaling: Tensor,
    slot_ids: Tensor,
) -> None:
    check_float(op, "x", x)
    expect(x.dim() > 0 and x.shape[-1] == k, op, "x", f"[..., K = {k}]", x)
    slots, rows = ranks.numel(), x.numel() // x.shape[-1]
    integer, total = torch.int32, A.shape[0]
    for name, tensor, shape, dtype in (
        ("A", A, (total, k), None),
        ("B", B, (total, n), None),
        ("ranks", ranks, (slots,), integer),
        ("offsets", offsets, (slots,), integer),
        ("scaling", scaling, (slots,), torch.float32),
        ("slot_ids", slot_ids, (rows,), integer),
    ):
        check_device(op, name, tensor, x)
        expect(tuple(tensor.shape) == shape, op, name, f"of shape {list(shape)}", tensor)
        if dtype is None:
            check_float(op, name, tensor)
        else:
            expect(tensor.dtype == dtype, op, name, f"{dtype}", tensor, TypeError)


def _check_contents(A: Tensor, ranks: Tensor, offsets: Tensor, slot_ids: Tensor) -> None:
    """Values can be looked at without waiting only on a CPU."""
    if A.device.type != "cpu":
        return
    op, slots = "multi_lora_linear", ranks.numel()
    good = bool(((slot_ids >= -1) & (slot_ids < slots)).all())
    if not good:
        low, high = int(slot_ids.min()), int(slot_ids.max())
        raise ValueError(f"{op}: slot_ids must be in -1 ... {slots - 1}, got {low} ... {high}")
    good = bool(((ranks >= 0) & (offsets >= 0) & (ranks.long() + offsets <= A.shape[0])).all())
    expect(good, op, "ranks and offsets", f"slices of the {A.shape[0]} rows of A", (ranks.tolist(), offsets.tolist()))


def _fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[4]))


def _forward(x: Tensor, *rest: Any) -> Tensor:
    A, _, ranks, offsets, _, slot_ids, _ = rest[7:]
    _check_contents(A, ranks, offsets, slot_ids)
    return reference.forward(x, *rest)


def _check_backward(dy: Tensor, x: Tensor, A: Tensor, B: Tensor, *table: Any) -> None:
    _check_table("multi_lora_linear_backward", x, B.shape[1], A.shape[1], A, B, *table)
    shape = (*x.shape[:-1], B.shape[1])
    expect(tuple(dy.shape) == shape, "multi_lora_linear_backward", "dy", f"of shape {list(shape)}", dy)


def _fake_backward(dy: Tensor, x: Tensor, A: Tensor, B: Tensor, *table: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), A.new_empty(A.shape), B.new_empty(B.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *weight = inputs[:8]
    *tensors, ctx.n, ctx.k, ctx.block_size = weight
    ctx.save_for_backward(x, *inputs[8:14], *tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    table, weight = rest[:6], rest[6:]
    needs = ctx.needs_input_grad
    dx, dA, dB = _BACKWARD(dy, x, *table)
    dweight = dbias = None
    if needs[0] and weight[0] is not None:
        nf4 = (*weight, ctx.n, ctx.k, ctx.block_size)
        dx = dx + (dy @ weight[0] if weight[1] is None else OPS["nf4_linear_dx"](dy, *nf4))
    if needs[1]:
        dweight = dy.reshape(-1, ctx.n).t() @ x.reshape(-1, ctx.k)
    if needs[14]:
        dbias = dy.reshape(-1, ctx.n).sum(0)
    return (dx, dweight, None, None, None, None, None, None, dA, dB, None, None, None, None, dbias)


_FORWARD = define(
    f"multi_lora_linear(Tensor x, {_OPTIONAL_WEIGHT}, {_TABLE}, Tensor? bias) -> Tensor",
    check=_check,
    fake=_fake,
    backends=(reference_backend(_forward),),
    setup_context=_setup_context,
    backward=_backward,
)
_BACKWARD = define(
    f"multi_lora_linear_backward(Tensor dy, Tensor x, {_TABLE}) -> (Tensor, Tensor, Tensor)",
    check=_check_backward,
    fake=_fake_backward,
    backends=(reference_backend(reference.backward),),
)
