"""What tests of several parts draw from: weights, backends, bitsandbytes without its compilation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from peftrt.formats.nf4 import NF4Weight
from peftrt.ops import _native

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_WHY_NOT = _native.load()
NATIVE = pytest.param("native", marks=pytest.mark.skipif(_WHY_NOT is not None, reason=f"native kernels: {_WHY_NOT}"))
BACKENDS = [NATIVE, "reference"]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
    """Normal values, the same for one seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def nf4(
    n: int, k: int, *, seed: int = 1, dtype: torch.dtype = torch.float32, block: int = 64, nested: bool = True
) -> NF4Weight:
    return NF4Weight.quantize(randn(n, k, seed=seed, dtype=dtype), block, nested)


def exact(weight: Tensor | NF4Weight, dtype: torch.dtype) -> Tensor:
    """W in fp64, as an operation on inputs of ``dtype`` is to see it."""
    if isinstance(weight, NF4Weight):
        weight = weight.dequantize(dtype)
    return weight.to(dtype).double()


def sum_size(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> float:
    """The largest magnitude of a sum in ``x @ weight`` if nothing cancels in it: what its rounding errors go by."""
    squares = x.detach().double().pow(2) @ weight.detach().double().pow(2)
    if bias is not None:
        squares = squares + bias.double().pow(2)
    return squares.max().sqrt().item() if squares.numel() else 0.0


@contextmanager
def bitsandbytes_eager() -> Iterator[None]:
    """bitsandbytes compiles its CPU functions; run plainly, they give the same bits in a hundredth of the time."""
    torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


def misaligned(tensor: Tensor) -> Tensor:
    """The same values, contiguous, one element behind an aligned address."""
    room = tensor.new_empty(tensor.numel() + 1)
    return room[1:].view(tensor.shape).copy_(tensor)


def strided(tensor: Tensor) -> Tensor:
    """The same values with gaps between the elements, and between the rows."""
    room = tensor.new_empty(*(2 * size for size in tensor.shape[:-1]), 3 * tensor.shape[-1])
    return room[(*(slice(None, None, 2),) * (tensor.dim() - 1), slice(None, None, 3))].copy_(tensor)


LAYOUTS = ("contiguous", "strided", "misaligned", "transposed", "expanded")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The values of ``tensor`` in another layout ("expanded": its first row, everywhere, with stride 0)."""
    if layout == "strided":
        return strided(tensor)
    if layout == "misaligned":
        return misaligned(tensor)
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded" and tensor.dim() > 1 and tensor.shape[0] > 0:
        return tensor[:1].expand(tensor.shape)
    return tensor
