"""What the operations over a base weight share: its arguments in a schema, and the checks of them.

A base weight, dense or NF4, travels through a schema as seven arguments. ``absmax`` is None for a dense weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftrt.formats.nf4 import BLOCK_SIZES, FLOAT_DTYPES, NF4Weight, stored_sizes
from peftrt.reference._weight import accumulator

WEIGHT = (
    "Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_offset, SymInt n, SymInt k, int block_size"
)
# fp64 is served by the references, so that gradients can be checked against finite differences.
COMPUTE_DTYPES = (*FLOAT_DTYPES, torch.float64)


class WeightArgs(NamedTuple):
    """A base weight W [N, K] as schema arguments: dense values, or NF4 codes with their scales."""

    weight: Tensor
    absmax: Tensor | None
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    n: int
    k: int
    block_size: int


def weight_args(op: str, weight: Tensor | NF4Weight) -> WeightArgs:
    """Flatten a weight for a schema."""
    if isinstance(weight, NF4Weight):
        if len(weight.shape) != 2:
            raise ValueError(f"{op}: weight must be a matrix [N, K], got an NF4Weight of shape {weight.shape}")
        n, k = weight.shape
        return WeightArgs(
            weight.codes, weight.absmax, weight.nested_absmax, weight.nested_offset, n, k, weight.block_size
        )
    if not isinstance(weight, Tensor):
        raise TypeError(f"{op}: weight must be a Tensor or an NF4Weight, got {type(weight).__name__}")
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be a matrix [N, K], got shape {tuple(weight.shape)}")
    return WeightArgs(weight, None, None, None, weight.shape[0], weight.shape[1], 0)


def describe(value: Any) -> str:
    """``uint8 [4096, 64] on cpu``: how an error names what it got."""
    if not isinstance(value, Tensor):
        return f"{value!r}"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"


def expect(
    condition: bool, op: str, argument: str, expected: str, got: Any, error: type[Exception] = ValueError
) -> None:
    """Raise ``<op>: <argument> must be <expected>, got <got>`` unless the condition holds."""
    if not condition:
        raise error(f"{op}: {argument} must be {expected}, got {describe(got)}")


def check_float(op: str, argument: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...] = COMPUTE_DTYPES) -> None:
    """The tensor's dtype is one that the operations compute in."""
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        expect(False, op, argument, f"one of {names}", tensor, TypeError)


def check_device(op: str, argument: str, tensor: Tensor | None, like: Tensor) -> None:
    """The tensor, where there is one, is on the device of ``like``."""
    if tensor is not None and tensor.device != like.device:
        expect(False, op, argument, f"on {like.device}, where the input is", tensor)


def check_nf4(
    op: str,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    numel: int,
    block_size: int,
) -> None:
    """Codes and scales are the bytes that a weight of ``numel`` elements needs: a kernel may trust their sizes."""
    expect(block_size in BLOCK_SIZES, op, "block_size", f"one of {BLOCK_SIZES}", block_size)
    expect(
        (nested_absmax is None) == (nested_offset is None),
        op,
        "nested_offset",
        "given with nested_absmax",
        nested_offset,
    )
    fields = {"codes": codes, "absmax": absmax, "nested_absmax": nested_absmax, "nested_offset": nested_offset}
    for field, size in stored_sizes(numel, block_size, nested_absmax is not None).items():
        argument, tensor = "weight" if field == "codes" else field, fields[field]
        check_device(op, argument, tensor, codes)
        if tensor is None or tensor.dtype != torch.uint8:
            expect(False, op, argument, f"uint8 of {size} bytes", tensor, TypeError)
        elif tensor.numel() != size:
            expect(False, op, argument, f"uint8 of {size} bytes for {numel} weights in blocks of {block_size}", tensor)


def check_linear(op: str, x: Tensor, weight: WeightArgs, bias: Tensor | None, name: str = "x", side: str = "k") -> None:
    """An input ``[..., K]`` (or a gradient ``[..., N]``), its base weight and bias fit together."""
    check_float(op, name, x)
    size = getattr(weight, side)
    if x.dim() == 0 or x.shape[-1] != size:
        expect(False, op, name, f"[..., {side.upper()} = {size}] for a weight of {weight.n} x {weight.k}", x)
    check_device(op, "weight", weight.weight, x)
    if weight.absmax is None and weight.weight.dtype != x.dtype:
        expect(False, op, "weight", f"of {name}'s dtype {x.dtype}", weight.weight, TypeError)
    check_base(op, weight)
    check_bias(op, bias, weight.n, x)


def check_base(op: str, weight: WeightArgs) -> None:
    """A base weight's tensors are what its sizes need."""
    if weight.absmax is not None:
        check_nf4(op, *weight[:4], weight.n * weight.k, weight.block_size)  # type: ignore[arg-type]
        return
    check_float(op, "weight", weight.weight)
    if tuple(weight.weight.shape) != (weight.n, weight.k):
        expect(False, op, "weight", f"[N, K] = [{weight.n}, {weight.k}]", weight.weight)


def check_low_rank(op: str, weight: WeightArgs, lora_A: Tensor, lora_B: Tensor, splits: Sequence[int]) -> None:
    """An adapter's A [R, K], or [P R, K] beside P splits, and B [N, R] fit each other and the weight, on its device."""
    fits = not splits or (min(splits) >= 0 and sum(splits) == weight.n)
    expect(fits, op, "splits", f"sizes that sum to N = {weight.n}", splits)
    parts = len(splits) or 1
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B)):
        check_float(op, name, tensor)
        check_device(op, name, tensor, weight.weight)
    fits = lora_A.dim() == 2 and lora_A.shape[1] == weight.k
    expect(fits, op, "lora_A", f"[R, K = {weight.k}]", lora_A)
    fits = lora_A.shape[0] % parts == 0
    expect(fits, op, "lora_A", f"[P R, K = {weight.k}] beside P = {parts} splits", lora_A)
    rank = lora_A.shape[0] // parts
    fits = lora_B.dim() == 2 and tuple(lora_B.shape) == (weight.n, rank)
    expect(fits, op, "lora_B", f"[N, R] = [{weight.n}, {rank}] beside lora_A of rank {rank}", lora_B)


def check_row_scale(
    op: str, row_scale: Tensor | None, n: int, x: Tensor, name: str = "row_scale", letter: str = "N"
) -> None:
    """The factors of the rows, where there are any, are [N] in the accumulator's dtype, on x's device."""
    if row_scale is None:
        return
    check_device(op, name, row_scale, x)
    dtype = accumulator(x.dtype)
    expect(row_scale.dtype == dtype, op, name, f"{dtype} beside an input of {x.dtype}", row_scale, TypeError)
    expect(tuple(row_scale.shape) == (n,), op, name, f"[{letter}] = [{n}]", row_scale)


def check_bias(op: str, bias: Tensor | None, n: int, x: Tensor) -> None:
    """The bias, where there is one, is [N] in x's dtype, on its device."""
    if bias is None:
        return
    check_device(op, "bias", bias, x)
    if bias.dtype != x.dtype:
        expect(False, op, "bias", f"of x's dtype {x.dtype}", bias, TypeError)
    if tuple(bias.shape) != (n,):
        expect(False, op, "bias", f"[N] = [{n}]", bias)


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under ``torch.autocast``: x, and what must have its dtype, in autocast's dtype; otherwise as they are."""
    tensors = (x, *others)
    if not torch.is_autocast_enabled(x.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t.to(dtype) if t is not None and t.dtype in FLOAT_DTYPES else t for t in tensors)
