"""adamw_step: one step of AdamW over pages of state, whose chunks belong to many parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftrt.formats.adamw_state import BITS
from peftrt.ops import _adamw_triton, _native
from peftrt.ops._addresses import DTYPE_CODES, Gradients, StepArgs
from peftrt.ops._backend import announce
from peftrt.ops._define import Backend, Op, reference_backend
from peftrt.ops._weight import expect
from peftrt.reference import adamw_step as reference


def adamw_step(
    state: Tensor,
    chunks: Tensor,
    gradients: Gradients,
    hyper: Tensor,
    coefficient: Tensor | None,
    bits: int,
    page_bytes: int,
    dtype: torch.dtype,
    spare: int = 0,
) -> None:
    """Update parameters and the pages of their state, each operation rounded to fp32 by itself, never contracted::

        g = coefficient g
        m = m + (1 - beta1) (g - m)
        v = v + (1 - beta2) (g g - v)
        p = p - (lr weight_decay p + step_size (m / (sqrt(v) correction + eps)))

    with ``step_size = lr / (1 - beta1^t)`` and ``correction = 1 / sqrt(1 - beta2^t)``; p is rounded once, to its dtype.
    So every backend writes the same bits, on any device. The moments are moved towards g and g^2, not scaled and added
    to: in fp32, ``beta2 v + (1 - beta2) g^2`` settles 1e-5 beside g^2, since the two factors are rounded apart.

    It is not one of ``torch.ops``: it goes by addresses, which no schema can tell, and neither autograd nor a compiler
    has business in it. ``peftrt.backend(adamw_step=...)`` chooses as for every operation.

    Args:
        state: the pages, uint8 [bytes], as ``peftrt.formats.adamw_state`` lays them out; all named by ``chunks`` are
            of ``bits`` and ``page_bytes``.
        chunks: int64 ``[C, 5]`` on the device: tensor, its first element and how many (at most CHUNK), offset of the
            page in ``state`` in bytes (a multiple of 16), and first element in the page (a multiple of BLOCK). No two
            overlap. A tensor without gradient is left alone, and so is its state.
        gradients: T parameters, of ``dtype`` where chunks name them.
        hyper: fp32 ``[T, 6]`` on the device: 1 - beta1, 1 - beta2, step_size, correction, eps, lr * weight_decay.
        coefficient: what gradients are multiplied with, fp32 ``[]`` on the device, or None.
        bits: 32 or 8.
        page_bytes: of a page, a multiple of 16.
        dtype: fp32, bf16 or fp16.
        spare: threads of a CPU that are left to whoever moves pages meanwhile.

    Raises:
        ValueError: a shape, dtype or device does not fit; nothing is changed.

    Source: Adam, Kingma and Ba 2015 (arXiv:1412.6980), algorithm 1; AdamW, Loshchilov and Hutter 2019
    (arXiv:1711.05101), algorithm 2.
    """
    STEP.eager(state, chunks, gradients, hyper, coefficient, bits, page_bytes, dtype, spare)


def _check(*arguments: Any) -> None:
    args = StepArgs(*arguments)
    op, count, state, chunks, hyper = "adamw_step", len(args.gradients.params), args.state, args.chunks, args.hyper
    expect(args.bits in BITS, op, "bits", f"one of {BITS}", args.bits)
    expect(state.dtype == torch.uint8 and state.dim() == 1, op, "state", "uint8 [bytes]", state)
    expect(chunks.dtype == torch.int64 and chunks.shape[1:] == (5,), op, "chunks", "int64 [C, 5]", chunks)
    expect(hyper.dtype == torch.float32 and hyper.shape == (count, 6), op, "hyper", f"fp32 [{count}, 6]", hyper)


def _reference(*arguments: Any) -> None:
    args = StepArgs(*arguments)
    params, grads = list(args.gradients.params), list(args.gradients.grads)
    reference.forward(args.state, args.chunks, params, grads, args.hyper, args.coefficient, args.bits, args.page_bytes)


def _native_unsupported(*arguments: Any) -> str | None:
    args = StepArgs(*arguments)
    return _native.unsupported(args.state, args.dtype)


def _native_run(*arguments: Any) -> None:
    state, chunks, gradients, *numbers, dtype, spare = StepArgs(*arguments)
    code = DTYPE_CODES.get(dtype, -1)
    torch.ops.peftrt_cpu.adamw_step.default(state, chunks, gradients.addresses, *numbers, code, spare)


announce("adamw_step")
STEP = Op(
    "adamw_step",
    _check,
    (
        Backend("native", _native_run, _native_unsupported, ("cpu",), strict=True),
        Backend("triton", _adamw_triton.step, _adamw_triton.step_unsupported, ("cuda",)),
        reference_backend(_reference),
    ),
    adamw_step,
)
