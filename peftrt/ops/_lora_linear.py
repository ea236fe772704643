"""lora_linear: a base weight, dense or NF4, and one low-rank adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftrt.formats.nf4 import FLOAT_DTYPES, NF4Weight
from peftrt.ops import _lora_cuda, _lora_triton, _native
from peftrt.ops._define import OPS, Backend, define, reference_backend
from peftrt.ops._dora import dora_scale
from peftrt.ops._invariant import invariant
from peftrt.ops._seed import as_seed, check_seed
from peftrt.ops._weight import (
    WEIGHT,
    WeightArgs,
    autocast,
    check_device,
    check_float,
    check_linear,
    check_low_rank,
    check_row_scale,
    expect,
    weight_args,
)
from peftrt.reference import lora_linear as reference
from peftrt.reference import row_scale_gradient
from peftrt.reference._weight import accumulator
from peftrt.reference.parts import grad_b, grad_xa, times_b


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
    magnitude: Tensor | None = None,
    row_scale: Tensor | None = None,
    splits: Sequence[int] = (),
) -> Tensor:
    """Linear map with a low-rank adapter.

    ``y = c * (x W^T + s (drop(x) A^T) B^T) + b`` with c = 1 for LoRA and ``c = m / ||W + s B A||``, row by row, for
    DoRA. Differentiable in x, a dense W, A, B, b and m or c; DoRA's norm counts as a constant. Between forward and
    backward only x and ``drop(x) A^T`` are kept beside the parameters, and y where a gradient of m or c is wanted (to
    change it in place before the backward is an error then); the dropout mask is a function of the seed and is computed
    again.

    Dropout is of the adapter's input alone, with m as without. HF peft also has the base's share of ``c - 1`` computed
    of the dropped input; without dropout, outputs and gradients are the same.

    Args:
        x: ``[..., K]``; fp32, bf16 or fp16 (fp64 by the reference); any strides. Cast under ``torch.autocast``.
        weight: ``[N, K]`` in x's dtype, or an NF4Weight of that shape.
        lora_A: ``[R, K]``, any floating dtype: fp32 adapters over a bf16 base are computed in fp32.
        lora_B: ``[N, R]``, any floating dtype.
        scaling: s, without unit: alpha / R, or alpha / sqrt(R) for rsLoRA.
        bias: ``[N]`` in x's dtype, or None.
        dropout_p: probability that an element of the adapter's input is zeroed; in [0, 1).
        seed: of the dropout mask: int64 ``[1]`` on x's device, or an int. Default: drawn from torch's generator.
        magnitude: m, ``[N]``, any floating dtype; None for LoRA. Every call reads the weight once more for the norm.
        row_scale: c itself, in place of m, ``[N]``, any floating dtype; where it is 0 it has no gradient.
        splits: of P linear maps of one x, one below the other in W, such as q, k and v: how many outputs each has. Each
            has an adapter of its own: lora_A is ``[P R, K]``, theirs one below the other, lora_B ``[N, R]``.

    Returns:
        ``[..., N]`` in x's dtype. On CUDA a row's bits do not depend on the other rows as long as M stays within one
        range of each kernel's (kernels/nf4_linear.py, lora_linear_dense.py, low_rank.py), the same call gives the same
        bits, and so do its gradients; beyond the limits in peftrt/ops/_paths.py the base's product is cuBLAS', as
        nf4_linear says.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, device or probability that does not fit, or both magnitude and row_scale.

    Source: LoRA, Hu et al. 2021 (arXiv:2106.09685), equation 3; rsLoRA, Kalajdzievski 2023 (arXiv:2312.03732); DoRA,
    Liu et al. 2024 (arXiv:2402.09353), equation 6 and section 4.3.
    """
    if magnitude is not None:
        expect(row_scale is None, "lora_linear", "row_scale", "None beside a magnitude", row_scale)
        # of the weight as it is, not as autocast rounds it
        row_scale = dora_scale(weight, lora_A, lora_B, scaling, magnitude, splits=splits)
    x, weight, bias = _autocast(x, weight, bias)
    args = weight_args("lora_linear", weight)
    if row_scale is not None:
        check_float("lora_linear", "row_scale", row_scale)
        row_scale = row_scale.to(accumulator(x.dtype))
    drawn = as_seed(seed, x) if dropout_p else None
    return _FORWARD(x, *args, lora_A, lora_B, scaling, bias, dropout_p, drawn, row_scale, list(splits))[0]


def _autocast(
    x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None
) -> tuple[Tensor, Tensor | NF4Weight, Tensor | None]:
    if isinstance(weight, Tensor):
        return autocast(x, weight, bias)  # type: ignore[return-value]
    x, bias = autocast(x, bias)  # type: ignore[assignment]
    return x, weight, bias


def _check(x: Tensor, *rest: Any, op: str = "lora_linear") -> None:
    *weight, lora_A, lora_B, _, bias, dropout_p, seed, row_scale, splits = rest
    args = WeightArgs(*weight)
    check_linear(op, x, args, bias)
    check_low_rank(op, args, lora_A, lora_B, splits)
    check_row_scale(op, row_scale, args.n, x)
    check_seed(op, "dropout_p", dropout_p, seed, x)


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    n, lora_A = rest[4], rest[7]
    xa = x.new_empty((*x.shape[:-1], lora_A.shape[0]), dtype=accumulator(x.dtype))
    return x.new_empty((*x.shape[:-1], n)), xa


def _native_unsupported(x: Tensor, *rest: Any) -> str | None:
    if x.dtype not in FLOAT_DTYPES:
        return f"has kernels for fp32, bf16 and fp16, not for {x.dtype}"
    # a dense base is multiplied by torch, unless bits count; on a GPU nf4_linear chooses for itself
    return _native.load() if (rest[1] is not None or invariant()) and x.device.type == "cpu" else None


def _native_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """One kernel sums the base's and the adapter's share: on a CPU over NF4, and where bits count over a dense base; on
    a GPU over NF4 for a few rows.
    """
    if x.is_cuda and _lora_cuda.unsupported(x, *rest) is None:
        return _lora_cuda.forward(x, *rest)
    *weight, lora_A, lora_B, scaling, bias, dropout_p, seed, row_scale, splits = rest
    if not x.is_cpu or (weight[1] is None and not invariant()):
        return _added_forward(x, *rest)
    dropped = None
    if dropout_p:
        check_seed("lora_linear", "dropout_p", dropout_p, seed, x)
        dropped = _drop(x.float(), seed, dropout_p)
    lora_A, lora_B = (t.float() if t.dtype == torch.float64 else t for t in (lora_A, lora_B))
    adapter = (lora_A, lora_B, scaling, bias, row_scale, splits, invariant())
    return torch.ops.peftrt_cpu.nf4_lora_linear.default(x, dropped, *weight, *adapter)


def _added_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The base by its kernel; the adapter, a small share of the work, is added to its result."""
    # Torch itself would take more than fits: other dtypes, what can be broadcast, and fp32 products for autocast to
    # round, which is switched off where the backends are chosen.
    if torch.is_autocast_enabled(x.device.type) or _native_unsupported(x, *rest) is not None:
        raise RuntimeError("lora_linear: not for autocast or these dtypes")
    _check(x, *rest)
    *weight, lora_A, lora_B, scaling, bias, dropout_p, seed, row_scale, splits = rest
    xa = _drop(x.float(), seed, dropout_p) @ lora_A.float().t()
    first_bias = bias if row_scale is None else None
    if weight[1] is None:
        y = torch.nn.functional.linear(x, weight[0], first_bias)
    else:
        y = OPS["nf4_linear"](x, *weight, first_bias)
    if y.dtype == torch.float32 and not splits:
        y.view(-1, y.shape[-1]).addmm_(xa.view(-1, xa.shape[-1]), lora_B.float().t(), alpha=scaling)
    else:
        y = torch.add(y.float(), times_b(xa, lora_B.float(), splits), alpha=scaling)
    if row_scale is not None:
        y = y.mul_(row_scale) if bias is None else torch.addcmul(bias.float(), y, row_scale, out=y)
    return y.to(x.dtype), xa


def _drop(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    return OPS["dropout"](x, seed, p) if p else x


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # xa is rarely used by itself
    x, *weight, lora_A, lora_B, ctx.scaling, bias, ctx.dropout_p, seed, row_scale, ctx.splits = inputs
    *tensors, ctx.n, ctx.k, ctx.block_size = weight
    y, xa = output
    # y takes the place of x W^T, which it is a multiple of
    of_row_scale = (y, bias) if ctx.needs_input_grad[14] else (None, None)
    ctx.save_for_backward(x, lora_A, lora_B, xa, seed, row_scale, *of_row_scale, *tensors)


def _backward(ctx: Any, dy: Tensor | None, dxa: Tensor | None) -> tuple[Any, ...]:
    """With dZ = c * dY and G = s dZ B (+ xa's gradient where it was used): dX = dZ W + drop'(G A), dA = G^T drop(x),
    dB = s dZ^T xa.
    """
    x, lora_A, lora_B, xa, seed, row_scale, y, bias, *tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad
    weight = (*tensors, ctx.n, ctx.k, ctx.block_size)
    dy = x.new_zeros((*x.shape[:-1], ctx.n)) if dy is None else dy
    dweight = dbias = dscale = None
    wanted = (needs[0], needs[8], needs[9])
    call = (dy, x, xa, *weight, lora_A, lora_B, ctx.scaling, ctx.dropout_p, seed, row_scale, *wanted, ctx.splits)
    again = torch.is_grad_enabled()
    if dxa is None and not again:
        gradients = _BACKWARD(*call)
    else:  # made of operations that have gradients of their own
        gradients = _composed(*call, dxa=dxa)
    if needs[1]:
        dweight = _scaled(dy, row_scale).reshape(-1, ctx.n).t() @ x.reshape(-1, ctx.k)
    if needs[11]:
        dbias = dy.reshape(-1, ctx.n).sum(0)
    if needs[14]:
        of_scale = row_scale_gradient.forward if again else OPS["row_scale_gradient"]
        dscale = of_scale(dy, y, bias, row_scale)
    dx, dA, dB = (grad if want else None for grad, want in zip(gradients, wanted, strict=True))
    return (dx, dweight, None, None, None, None, None, None, dA, dB, None, dbias, None, None, dscale, None)


def _scaled(dy: Tensor, row_scale: Tensor | None) -> Tensor:
    """``c * dY``, rounded once to dY's dtype."""
    return dy if row_scale is None else (dy * row_scale).to(dy.dtype)


def _check_backward(dy: Tensor, x: Tensor, xa: Tensor, *rest: Any) -> None:
    *weight, lora_A, lora_B, scaling, dropout_p, seed, row_scale, _, _, _, splits = rest
    _check(x, *weight, lora_A, lora_B, scaling, None, dropout_p, seed, row_scale, splits, op="lora_linear_backward")
    for name, tensor, size, dtype in (
        ("dy", dy, weight[4], x.dtype),
        ("xa", xa, lora_A.shape[0], accumulator(x.dtype)),
    ):
        check_device("lora_linear_backward", name, tensor, x)
        fits = tensor.shape == (*x.shape[:-1], size) and tensor.dtype == dtype
        expect(fits, "lora_linear_backward", name, f"{dtype} {[*x.shape[:-1], size]}", tensor)


def _fake_backward(dy: Tensor, x: Tensor, xa: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dx, dA, dB = (
        like.new_empty(like.shape if want else (0,))
        for like, want in zip((x, rest[7], rest[8]), rest[-4:-1], strict=True)
    )
    return dx, dA, dB


def _native_backward_unsupported(dy: Tensor, x: Tensor, *_: Any) -> str | None:
    if x.dtype not in FLOAT_DTYPES:
        return f"has kernels for fp32, bf16 and fp16, not for {x.dtype}"
    return _native.load() if x.is_cpu else None


def _native_backward(dy: Tensor, x: Tensor, xa: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """On a CPU the adapter's part is one kernel, and over NF4 dX another; a dense base is multiplied by torch."""
    *weight, lora_A, lora_B, scaling, dropout_p, seed, row_scale, needs_dx, needs_dA, needs_dB, splits = rest
    if weight[1] is None or not x.is_cpu:
        # as in _added_forward: torch would take more than fits, and round for autocast
        if torch.is_autocast_enabled(x.device.type):
            raise RuntimeError("lora_linear_backward: not under autocast")
        _check_backward(dy, x, xa, *rest)
    if not x.is_cpu:
        return _composed(dy, x, xa, *rest)
    A, B = (t.float() if t.dtype == torch.float64 else t for t in (lora_A, lora_B))
    drawn = int(seed) if dropout_p else None
    g, dA, dB = torch.ops.peftrt_cpu.low_rank_gradient.default(
        dy, x, xa, B, scaling, drawn, dropout_p, row_scale, needs_dA, needs_dB, splits
    )
    dx = x.new_empty(0)
    if needs_dx and (weight[1] is not None or invariant()):
        rest_of_call = (g, A, drawn, dropout_p, row_scale, invariant())
        dx = torch.ops.peftrt_cpu.nf4_lora_linear_dx.default(dy, *weight, *rest_of_call)
    elif needs_dx:
        dx = _add_adapter(_scaled(dy, row_scale) @ weight[0], g, lora_A, seed, dropout_p)
    return dx, _or_empty(dA, lora_A, needs_dA), _or_empty(dB, lora_B, needs_dB)


def _or_empty(grad: Tensor, like: Tensor, wanted: bool) -> Tensor:
    return grad.to(like.dtype) if wanted else like.new_empty(0)


def _composed(
    dy: Tensor, x: Tensor, xa: Tensor, *rest: Any, dxa: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by operations of which each has a gradient of its own; ``dxa``: of xa, where it was used."""
    *weight, lora_A, lora_B, scaling, dropout_p, seed, row_scale, needs_dx, needs_dA, needs_dB, splits = rest
    wide = accumulator(x.dtype)
    dy_rows = dy.reshape(-1, dy.shape[-1]).to(wide)
    dy_rows = dy_rows if row_scale is None else dy_rows * row_scale
    g = scaling * grad_xa(dy_rows, lora_B.to(wide), splits)
    if dxa is not None:
        g = g + dxa.reshape(g.shape)
    dx, dA, dB = x.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    if needs_dx:
        dz = _scaled(dy, row_scale)
        base = dz @ weight[0] if weight[1] is None else OPS["nf4_linear_dx"](dz, *weight)
        dx = _add_adapter(base, g, lora_A, seed, dropout_p)
    if needs_dA:
        dA = (g.t() @ _drop(x.to(wide), seed, dropout_p).reshape(-1, x.shape[-1])).to(lora_A.dtype)
    if needs_dB:
        dB = (scaling * grad_b(dy_rows, xa.reshape(-1, xa.shape[-1]), splits)).to(lora_B.dtype)
    return dx, dA, dB


def _add_adapter(dx: Tensor, g: Tensor, lora_A: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """``dX + drop'(G A)``, with G [M, R]."""
    if not dropout_p and dx.dtype == g.dtype:
        rows = dx.reshape(-1, dx.shape[-1])
        return torch.addmm(rows, g, lora_A.to(g.dtype)).view(dx.shape)
    through = _drop((g @ lora_A.to(g.dtype)).view(dx.shape), seed, dropout_p)
    return dx + through.to(dx.dtype)


def _triton_unsupported(x: Tensor, *rest: Any) -> str | None:
    return _lora_triton.unsupported(x, rest[-1])


def _slower_forward(x: Tensor, *rest: Any) -> str | None:
    return None if _lora_cuda.chosen(x, *rest) else _slower(x, *rest)


def _slower(x: Tensor, *rest: Any) -> str | None:
    return _lora_triton.slower(x, rest[-1])


_FORWARD = define(
    f"lora_linear(Tensor x, {WEIGHT}, Tensor lora_A, Tensor lora_B, float scaling, Tensor? bias, float dropout_p, "
    "Tensor? seed, Tensor? row_scale, int[] splits) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    backends=(
        Backend("native", _native_forward, _native_unsupported, ("cpu", "cuda"), strict=True, slower=_slower_forward),
        Backend("triton", _lora_triton.forward, _triton_unsupported, ("cuda",)),
        reference_backend(reference.forward),
    ),
    setup_context=_setup_context,
    backward=_backward,
)
_BACKWARD = define(
    f"lora_linear_backward(Tensor dy, Tensor x, Tensor xa, {WEIGHT}, Tensor lora_A, Tensor lora_B, float scaling, "
    "float dropout_p, Tensor? seed, Tensor? row_scale, bool needs_dx, bool needs_dA, bool needs_dB, "
    "int[] splits) -> (Tensor, Tensor, Tensor)",
    check=_check_backward,
    fake=_fake_backward,
    backends=(
        Backend("native", _native_backward, _native_backward_unsupported, ("cpu", "cuda"), strict=True, slower=_slower),
        Backend("triton", _lora_triton.backward, _triton_unsupported, ("cuda",)),
        reference_backend(reference.backward),
    ),
)
