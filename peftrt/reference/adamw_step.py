"""adamw_step in plain torch, each operation rounded to fp32 by itself."""

from __future__ import annotations

from torch import Tensor

from peftrt.formats.adamw_state import EXP_AVG_MAP, EXP_AVG_SQ_MAP, Moments, dequantize, moments, quantize


def forward(
    state: Tensor,
    chunks: Tensor,
    params: list[Tensor],
    grads: list[Tensor | None],
    hyper: Tensor,
    coefficient: Tensor | None,
    bits: int,
    page_bytes: int,
) -> None:
    """Updates parameters and state; the arguments are those of the operation."""
    for tensor, first, count, page, start in chunks.tolist():
        grad = grads[tensor]
        if grad is None:
            continue
        kept = moments(state[page : page + page_bytes], bits).narrow(start, count)
        parameter = params[tensor].detach().view(-1)[first : first + count]
        _update(parameter, grad.detach().view(-1)[first : first + count], kept, hyper[tensor], coefficient)


def _update(parameter: Tensor, grad: Tensor, kept: Moments, hyper: Tensor, coefficient: Tensor | None) -> None:
    one_minus_beta1, one_minus_beta2, step_size, correction, eps, decay = hyper.unbind()
    g = grad.float() if coefficient is None else grad.float() * coefficient
    m, v = _read(kept)
    m = m + one_minus_beta1 * (g - m)
    v = v + one_minus_beta2 * (g * g - v)
    # torch's fp32 root is off by one bit for one number in five on a CPU with MKL; by way of fp64 it is exact
    root = v.double().sqrt().float()
    change = step_size * (m / (root * correction + eps))
    p = parameter.float()
    parameter.copy_(p - (decay * p + change))
    _write(kept, m, v)


def _read(kept: Moments) -> tuple[Tensor, Tensor]:
    if kept.exp_avg_scale is None or kept.exp_avg_sq_scale is None:
        return kept.exp_avg, kept.exp_avg_sq
    return (
        dequantize(kept.exp_avg, kept.exp_avg_scale, EXP_AVG_MAP),
        dequantize(kept.exp_avg_sq, kept.exp_avg_sq_scale, EXP_AVG_SQ_MAP),
    )


def _write(kept: Moments, m: Tensor, v: Tensor) -> None:
    if kept.exp_avg_scale is None or kept.exp_avg_sq_scale is None:
        kept.exp_avg.copy_(m)
        kept.exp_avg_sq.copy_(v)
        return
    for values, codebook, codes, scale in (
        (m, EXP_AVG_MAP, kept.exp_avg, kept.exp_avg_scale),
        (v, EXP_AVG_SQ_MAP, kept.exp_avg_sq, kept.exp_avg_sq_scale),
    ):
        new_codes, new_scale = quantize(values, codebook)
        codes.copy_(new_codes)
        scale.copy_(new_scale)
