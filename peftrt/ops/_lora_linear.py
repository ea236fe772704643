"""lora_linear: a base weight, dense or NF4, and one low-rank adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftrt.formats.nf4 import FLOAT_DTYPES, NF4Weight
from peftrt.ops import _native
from peftrt.ops._define import OPS, Backend, define, reference_backend
from peftrt.ops._seed import as_seed, check_seed
from peftrt.ops._weight import (
    WEIGHT,
    WeightArgs,
    autocast,
    check_device,
    check_float,
    check_linear,
    expect,
    weight_args,
)
from peftrt.reference import lora_linear as reference
from peftrt.reference._weight import accumulator


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
) -> Tensor:
    """Linear map with a low-rank adapter.

    ``y = x W^T + b + s (drop(x) A^T) B^T``. Differentiable in x, a dense W, A, B and b. Between forward and backward
    only x and ``drop(x) A^T`` are kept beside the parameters; the dropout mask is a function of the seed and is
    computed again.

    Args:
        x: ``[..., K]``; fp32, bf16 or fp16 (fp64 by the reference); any strides. Cast under ``torch.autocast``.
        weight: ``[N, K]`` in x's dtype, or an NF4Weight of that shape.
        lora_A: ``[R, K]``, any floating dtype: fp32 adapters over a bf16 base are computed in fp32.
        lora_B: ``[N, R]``, any floating dtype.
        scaling: s, without unit: alpha / R, or alpha / sqrt(R) for rsLoRA.
        bias: ``[N]`` in x's dtype, or None.
        dropout_p: probability that an element of the adapter's input is zeroed; in [0, 1).
        seed: of the dropout mask: int64 ``[1]`` on x's device, or an int. Default: drawn from torch's generator.

    Returns:
        ``[..., N]`` in x's dtype.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, device or probability that does not fit.

    Source: LoRA, Hu et al. 2021 (arXiv:2106.09685), equation 3; rsLoRA, Kalajdzievski 2023 (arXiv:2312.03732).
    """
    x, weight, bias = _autocast(x, weight, bias)
    args = weight_args("lora_linear", weight)
    drawn = as_seed(seed, x) if dropout_p else None
    return _FORWARD(x, *args, lora_A, lora_B, scaling, bias, dropout_p, drawn)[0]


def _autocast(
    x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None
) -> tuple[Tensor, Tensor | NF4Weight, Tensor | None]:
    if isinstance(weight, Tensor):
        return autocast(x, weight, bias)  # type: ignore[return-value]
    x, bias = autocast(x, bias)  # type: ignore[assignment]
    return x, weight, bias


def _check(x: Tensor, *rest: Any) -> None:
    *weight, lora_A, lora_B, _, bias, dropout_p, seed = rest
    args = WeightArgs(*weight)
    check_linear("lora_linear", x, args, bias)
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B)):
        check_float("lora_linear", name, tensor)
        check_device("lora_linear", name, tensor, x)
    fits = lora_A.dim() == 2 and lora_A.shape[1] == args.k
    expect(fits, "lora_linear", "lora_A", f"[R, K = {args.k}]", lora_A)
    rank = lora_A.shape[0]
    fits = lora_B.dim() == 2 and tuple(lora_B.shape) == (args.n, rank)
    expect(fits, "lora_linear", "lora_B", f"[N, R] = [{args.n}, {rank}] beside lora_A of rank {rank}", lora_B)
    check_seed("lora_linear", "dropout_p", dropout_p, seed, x)


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    n, lora_A = rest[4], rest[7]
    xa = x.new_empty((*x.shape[:-1], lora_A.shape[0]), dtype=accumulator(x.dtype))
    return x.new_empty((*x.shape[:-1], n)), xa


def _native_unsupported(x: Tensor, *rest: Any) -> str | None:
    if x.dtype not in FLOAT_DTYPES:
        return f"has kernels for fp32, bf16 and fp16, not for {x.dtype}"
    # a dense base is multiplied by torch; on a GPU nf4_linear chooses for itself
    return _native.load() if rest[1] is not None and x.device.type == "cpu" else None


def _native_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Over NF4 on a CPU one kernel sums the base's and the adapter's share."""
    *weight, lora_A, lora_B, scaling, bias, dropout_p, seed = rest
    if weight[1] is None or not x.is_cpu:
        return _added_forward(x, *rest)
    dropped = None
    if dropout_p:
        check_seed("lora_linear", "dropout_p", dropout_p, seed, x)
        dropped = _drop(x.float(), seed, dropout_p)
    lora_A, lora_B = (t.float() if t.dtype == torch.float64 else t for t in (lora_A, lora_B))
    return torch.ops.peftrt_cpu.nf4_lora_linear.default(x, dropped, *weight, lora_A, lora_B, scaling, bias)


def _added_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The base by its kernel; the adapter, a small share of the work, is added to its result."""
    # Torch itself would take more than fits: other dtypes, what can be broadcast, and fp32 products for autocast to
    # round, which is switched off where the backends are chosen.
    if torch.is_autocast_enabled(x.device.type) or _native_unsupported(x, *rest) is not None:
        raise RuntimeError("lora_linear: not for autocast or these dtypes")
    _check(x, *rest)
    *weight, lora_A, lora_B, scaling, bias, dropout_p, seed = rest
    xa = _drop(x.float(), seed, dropout_p) @ lora_A.float().t()
    if weight[1] is None:
        y = torch.nn.functional.linear(x, weight[0], bias)
    else:
        y = OPS["nf4_linear"](x, *weight, bias)
    if y.dtype == torch.float32:
        y.view(-1, y.shape[-1]).addmm_(xa.view(-1, xa.shape[-1]), lora_B.float().t(), alpha=scaling)
        return y, xa
    return torch.add(y.float(), xa @ lora_B.float().t(), alpha=scaling).to(x.dtype), xa


def _drop(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    return OPS["dropout"](x, seed, p) if p else x


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *weight, lora_A, lora_B, ctx.scaling, _, ctx.dropout_p, seed = inputs
    *tensors, ctx.n, ctx.k, ctx.block_size = weight
    ctx.save_for_backward(x, lora_A, lora_B, output[1], seed, *tensors)


def _backward(ctx: Any, dy: Tensor, dxa: Tensor | None) -> tuple[Any, ...]:
    """dX = dY W + drop'(G A), dA = G^T drop(x), dB = s dY^T xa with G = s dY B (+ xa's gradient where it was used)."""
    x, lora_A, lora_B, xa, seed, *tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad
    weight = (*tensors, ctx.n, ctx.k, ctx.block_size)
    wide = accumulator(x.dtype)
    dy_rows = dy.reshape(-1, ctx.n)
    dy_wide, xa_rows = dy_rows.to(wide), xa.reshape(-1, xa.shape[-1])
    grad = ctx.scaling * (dy_wide @ lora_B.to(wide))
    if dxa is not None:
        grad = grad + dxa.reshape(grad.shape)
    dx = dweight = dA = dB = dbias = None
    if needs[0]:
        dx = _grad_input(dy, weight, grad, lora_A, seed, ctx.dropout_p)
    if needs[1]:
        dweight = dy_rows.t() @ x.reshape(-1, ctx.k)
    if needs[8]:
        dA = (grad.t() @ _drop(x.to(wide), seed, ctx.dropout_p).reshape(-1, ctx.k)).to(lora_A.dtype)
    if needs[9]:
        dB = (ctx.scaling * (dy_wide.t() @ xa_rows)).to(lora_B.dtype)
    if needs[11]:
        dbias = dy_rows.sum(0)
    return (dx, dweight, None, None, None, None, None, None, dA, dB, None, dbias, None, None)


def _grad_input(
    dy: Tensor, weight: tuple[Any, ...], grad: Tensor, lora_A: Tensor, seed: Tensor | None, dropout_p: float
) -> Tensor:
    """dX = dY W + drop'(G A), with G ``grad`` [M, R]."""
    dx = dy @ weight[0] if weight[1] is None else OPS["nf4_linear_dx"](dy, *weight)
    if not dropout_p and dx.dtype == grad.dtype:
        rows = dx.reshape(-1, dx.shape[-1])
        return torch.addmm(rows, grad, lora_A.to(grad.dtype)).view(dx.shape)
    through = _drop((grad @ lora_A.to(grad.dtype)).view(dx.shape), seed, dropout_p)
    return dx + through.to(dx.dtype)


_FORWARD = define(
    f"lora_linear(Tensor x, {WEIGHT}, Tensor lora_A, Tensor lora_B, float scaling, Tensor? bias, float dropout_p, "
    "Tensor? seed) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    backends=(
        Backend("native", _native_forward, _native_unsupported, ("cpu", "cuda"), strict=True),
        reference_backend(reference.forward),
    ),
    setup_context=_setup_context,
    backward=_backward,
)
