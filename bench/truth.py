"""What every result is held against: products in float64, decoded here apart from the package's own code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from peftrt import NF4Weight
from peftrt.formats.nf4 import DYNAMIC_CODEBOOK, NESTED_BLOCK_SIZE, NF4_CODEBOOK, bytes_float

# Rows of the weight decoded at a time: bounds the float64 copies to about 120 MB each.
CHUNK = 1024

# The largest error, as a share of the largest true value, that a contender may be timed with. Wide enough for a peer
# that rounds to the dtype along its way, far too narrow for a wrong result.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


def decode(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """``[N, K]`` in ``dtype``, exact: each rounding of the format's definition is made from a float64 product."""
    return torch.cat(list(_decoded_rows(weight, dtype)))


def _decoded_rows(weight: NF4Weight, dtype: torch.dtype) -> Iterator[Tensor]:
    N, K = weight.shape
    scales = _scales(weight).view(N, -1).repeat_interleave(weight.block_size, dim=1)
    codebook = NF4_CODEBOOK.to(weight.device).double()
    codes = weight.codes.view(N, -1)
    for start in range(0, N, CHUNK):
        packed = codes[start : start + CHUNK]
        levels = torch.stack([packed >> 4, packed & 15], dim=-1).view(-1, K)
        yield (codebook[levels.int()] * scales[start : start + CHUNK]).float().to(dtype)


def encode(dense: Tensor, block_size: int = 64) -> Tensor:
    """The packed codes of ``[N, K]``, K a multiple of ``block_size``, as the format defines them in fp32.

    The values are scaled by the reciprocal of their block's largest magnitude; a value's level is the number of
    midpoints between neighbouring levels that are below it.
    """
    return torch.cat([_encoded(rows.float().view(-1, block_size)) for rows in dense.split(CHUNK)])


def _encoded(blocks: Tensor) -> Tensor:
    scaled = (blocks * (1.0 / blocks.abs().amax(dim=1, keepdim=True))).view(-1)
    codebook = NF4_CODEBOOK.tolist()
    levels = torch.zeros_like(scaled, dtype=torch.uint8)
    for below, above in pairwise(codebook):
        levels += scaled > torch.tensor((below + above) / 2, dtype=torch.float32)
    return (levels[::2] << 4) | levels[1::2]


def _scales(weight: NF4Weight) -> Tensor:
    if weight.nested_absmax is None or weight.nested_offset is None:
        return bytes_float(weight.absmax).double()
    codes = weight.absmax.reshape(-1)
    steps = bytes_float(weight.nested_absmax).double().repeat_interleave(NESTED_BLOCK_SIZE)[: codes.numel()]
    product = (DYNAMIC_CODEBOOK.to(codes.device).double()[codes.int()] * steps).float()
    return (product.double() + bytes_float(weight.nested_offset).double()).float().double()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` in float64; x ``[M, K]``, W ``[N, K]``."""
    wide = x.detach().double()
    return torch.cat([wide @ rows.double().t() for rows in weight.split(CHUNK)], dim=1)


def linear_dx(dy: Tensor, weight: Tensor) -> Tensor:
    """``dy W`` in float64; dy ``[M, N]``, W ``[N, K]``."""
    parts = zip(dy.double().split(CHUNK, dim=1), weight.split(CHUNK), strict=True)
    return sum((part @ rows.double() for part, rows in parts), dy.new_zeros((), dtype=torch.float64))


def lora(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """``x W^T + s (x A^T) B^T`` in float64."""
    wide, A, B = (tensor.detach().double() for tensor in (x, lora_A, lora_B))
    return linear(x, weight) + scaling * (wide @ A.t() @ B.t())


def multi_lora(
    x: Tensor,
    weight: Tensor | None,
    adapters: Sequence[tuple[Tensor, Tensor, float]],
    slot_ids: Sequence[int],
) -> Tensor:
    """``x_i W^T + s_e (x_i A_e^T) B_e^T`` in float64, e the row's id; -1 is ``x_i W^T``, and without W that is 0."""
    wide = x.detach().double()
    y = wide.new_zeros(x.shape[0], adapters[0][1].shape[0]) if weight is None else linear(x, weight)
    for slot in sorted({*slot_ids} - {-1}):
        A, B, scaling = adapters[slot]
        rows = [i for i, of_row in enumerate(slot_ids) if of_row == slot]
        y[rows] += scaling * (wide[rows] @ A.double().t() @ B.double().t())
    return y


def row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """``||W + s B A||``, row by row, in float64."""
    parts = zip(weight.split(CHUNK), lora_B.split(CHUNK), strict=True)
    return torch.cat([(w.double() + scaling * (b.double() @ lora_A.double())).norm(dim=1) for w, b in parts])


def lora_gradients(
    x: Tensor,
    dy: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """dX, dA, dB in float64; dm where DoRA's magnitude is given, its norm taken as constant."""
    wide, grad, A, B = (tensor.detach().double() for tensor in (x, dy, lora_A, lora_B))
    of_magnitude: tuple[Tensor, ...] = ()
    if magnitude is not None:
        norms = row_norms(weight, lora_A, lora_B, scaling)
        of_magnitude = ((grad * lora(x, weight, lora_A, lora_B, scaling)).sum(0) / norms,)
        grad = grad * (magnitude.double() / norms)
    inner = scaling * (grad @ B)
    return linear_dx(grad, weight) + inner @ A, inner.t() @ wide, scaling * (grad.t() @ (wide @ A.t())), *of_magnitude


def adamw(
    values: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Parameter and both moments in float64 after AdamW's step of that number, counted from 1."""
    parameter, exp_avg, exp_avg_sq = (value.double() for value in values)
    g = grad.double()
    exp_avg = betas[0] * exp_avg + (1 - betas[0]) * g
    exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * g * g
    mean, square = exp_avg / (1 - betas[0] ** step), exp_avg_sq / (1 - betas[1] ** step)
    return (1 - lr * weight_decay) * parameter - lr * mean / (square.sqrt() + eps), exp_avg, exp_avg_sq


def eight_bits(values: Tensor, codebook: Tensor, block: int = 256) -> Tensor:
    """What is left of ``values``, a multiple of ``block``, when each is the nearest level of its block's largest."""
    blocks, levels = values.double().view(-1, block), codebook.to(values.device).double()
    scale = blocks.abs().amax(dim=1, keepdim=True).float().double()
    codes = torch.bucketize(blocks / scale, (levels[1:] + levels[:-1]) / 2)
    return (levels[codes] * scale).view_as(values)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute error as a share of the largest true magnitude; infinite where a value is not finite.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shape {list(actual.shape)}, expected {list(expected.shape)}")
    got = actual.detach()
    if not bool(got.isfinite().all()):
        return float("inf")
    error, scale = float((got.double() - expected).abs().max()), float(expected.abs().max())
    return error / scale if scale else error
