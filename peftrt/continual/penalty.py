"""What it costs to leave the values that a former task needs: quadratic, and weighted by a Fisher information."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from peftrt.continual.fisher import chunk


def parameter_penalty(parameter: Tensor, fisher: Tensor, anchor: Tensor) -> Tensor:
    """``sum_i F_i (theta_i - theta*_i)^2``, differentiable in theta, exactly 0 where theta is theta*.

    Args:
        parameter: theta, any shape, floating.
        fisher: F of that shape, on any device.
        anchor: theta* of that shape and dtype.

    Returns:
        fp32 [] (fp64 of an fp64 theta), on theta's device.
    """
    found: Tensor = _ParameterPenalty.apply(parameter, fisher, anchor)
    return found


def change_penalty(lora_A: Tensor, lora_B: Tensor, fisher: Tensor, anchor_A: Tensor, anchor_B: Tensor) -> Tensor:
    """``sum F o (B A - B* A*)^2``, differentiable in A and B, exactly 0 where they are A* and B*.

    The change is made some rows at a time, as ``(B - B*) A + B* (A - A*)``: where nothing has changed it is nothing,
    however a product is rounded, and where little has, little is cancelled. The gradients, of the size of A and B, are
    made on the way; nothing else is kept for the backward.

    Args:
        lora_A, lora_B: [R, K] and [N, R], the scaling in one of them.
        fisher: F [N, K], on any device.
        anchor_A, anchor_B: A* [P, K] and B* [N, P]; P need not be R.

    Returns:
        fp32 [] (fp64 of fp64 halves), on A's device.
    """
    rank = max(lora_A.shape[0], anchor_A.shape[0])
    found: Tensor = _ChangePenalty.apply(
        _of_rank(lora_A, rank, 0),
        _of_rank(lora_B, rank, 1),
        fisher,
        _of_rank(anchor_A, rank, 0),
        _of_rank(anchor_B, rank, 1),
    )
    return found


def _of_rank(half: Tensor, rank: int, dim: int) -> Tensor:
    """A half of a product with zeros up to this rank."""
    more = rank - half.shape[dim]
    if not more:
        return half
    return F.pad(half, (0, 0, 0, more) if dim == 0 else (0, more))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class _ParameterPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, fisher: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(parameter, fisher, anchor)
        total = torch.zeros((), dtype=_wide(parameter), device=parameter.device)
        for now, then, weight in _parts(parameter, anchor, fisher):
            change = now - then
            total += (change * weight * change).sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        parameter, fisher, anchor = ctx.saved_tensors
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        places = whole.view(-1).split(chunk(parameter.device))
        for place, (now, then, weight) in zip(places, _parts(parameter, anchor, fisher), strict=True):
            place.copy_(2 * gradients[0] * (now - then) * weight)
        return whole, None, None


def _parts(parameter: Tensor, anchor: Tensor, fisher: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat parts of the three, in theta's wide dtype and on its device."""
    to: dict[str, Any] = {"dtype": _wide(parameter), "device": parameter.device}
    size = chunk(parameter.device)
    for parts in zip(*(t.reshape(-1).split(size) for t in (parameter, anchor, fisher)), strict=True):
        yield tuple(part.to(**to) for part in parts)


class _ChangePenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lora_A: Tensor, lora_B: Tensor, fisher: Tensor, anchor_A: Tensor, anchor_B: Tensor) -> Tensor:
        to: dict[str, Any] = {"dtype": _wide(lora_A), "device": lora_A.device}
        # a penalty in half precision would be rounded to nothing near theta*
        with torch.autocast(lora_A.device.type, enabled=False):
            A, A0 = lora_A.to(**to), anchor_A.to(**to)
            right = torch.cat([A, A - A0])
            total = torch.zeros((), **to)
            need = any(ctx.needs_input_grad[:2])
            dA, dB = torch.zeros_like(A), torch.empty(lora_B.shape, **to)
            rows = max(1, chunk(lora_A.device) // lora_A.shape[1])
            parts = (tensor.split(rows) for tensor in (lora_B, anchor_B, fisher, dB))
            for part_B, part_B0, part_F, part_dB in zip(*parts, strict=True):
                B, B0 = part_B.to(**to), part_B0.to(**to)
                change = torch.cat([B - B0, B0], dim=1) @ right
                weighted = change * part_F.to(**to)
                total += (weighted * change).sum()
                if need:
                    torch.mm(weighted, A.t(), out=part_dB)
                    dA.addmm_(B.t(), weighted)
        if need:
            ctx.save_for_backward((2 * dA).to(lora_A.dtype), (2 * dB).to(lora_B.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dA, dB = ctx.saved_tensors
        scale = gradients[0]
        return scale.to(dA.dtype) * dA, scale.to(dB.dtype) * dB, None, None, None
