"""lora_weight_norm and row_scale_gradient against fp64, and what DoRA makes of the norms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import peftrt
from peftrt import ops
from peftrt.formats.nf4 import BLOCK_SIZES
from peftrt.ops._weight import weight_args
from tests.cases import BACKENDS, FLOATS, LAYOUTS, NATIVE, exact, laid_out, nf4, randn
from tests.ops.lora_truth import SCALING, base, combinations
from tests.tolerances import assert_close, assert_same_bits

SIZES = [(1, 1), (7, 33), (13, 64), (40, 131), (25, 320), (3, 4099)]
RANKS = (1, 2, 7, 16, 17, 64, 256)


def truth(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    return (weight.double() + SCALING * (lora_B.double() @ lora_A.double())).norm(dim=1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("kind", "backend"), combinations())
def test_norms_equal_fp64(kind: str, backend: str, dtype: torch.dtype) -> None:
    """Of NF4 in fp32 whatever the dtype it was quantised from; adapters of every dtype."""
    for case, (n, k) in enumerate(SIZES):
        rank = RANKS[case % len(RANKS)]
        weight = base(kind, n, k, dtype, case)
        if isinstance(weight, Tensor):
            weight = laid_out(weight, LAYOUTS[case % 4])
        lora_A = laid_out(randn(rank, k, seed=2, dtype=FLOATS[case % 3]), LAYOUTS[(case + 1) % 4])
        lora_B = laid_out(randn(n, rank, seed=3, dtype=FLOATS[(case + 1) % 3]), LAYOUTS[(case + 2) % 4])
        with peftrt.backend(backend):
            norm = ops.lora_weight_norm(weight, lora_A, lora_B, SCALING)
        assert norm.dtype == torch.float32
        values = weight if isinstance(weight, Tensor) else exact(weight, torch.float32)
        assert_close(norm, truth(values, lora_A, lora_B))


@pytest.mark.parametrize("backend", [NATIVE])
def test_every_rank_and_block_size(backend: str) -> None:
    with peftrt.backend(backend):
        for rank in RANKS:
            weight, lora_A, lora_B = nf4(26, 300), randn(rank, 300), randn(26, rank)
            assert_close(
                ops.lora_weight_norm(weight, lora_A, lora_B, SCALING),
                truth(exact(weight, torch.float32), lora_A, lora_B),
            )
        for block in BLOCK_SIZES:
            weight, lora_A, lora_B = nf4(26, 301, block=block, nested=block % 128 == 0), randn(3, 301), randn(26, 3)
            assert_close(
                ops.lora_weight_norm(weight, lora_A, lora_B, SCALING),
                truth(exact(weight, torch.float32), lora_A, lora_B),
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_that_cancels_has_the_norm_of_what_is_left(backend: str) -> None:
    """Squares of W, of B A and twice their product would leave nothing but their roundings."""
    weight, left = randn(5, 64), 1e-3 * randn(5, 64, seed=9)
    lora_A, lora_B = torch.eye(64), (left - weight) / SCALING
    with peftrt.backend(backend):
        norm = ops.lora_weight_norm(weight, lora_A, lora_B, SCALING)
    assert (norm.double() / truth(weight, lora_A, lora_B) - 1).abs().max() < 1e-4


@pytest.mark.parametrize("backend", [NATIVE])
def test_bits_depend_neither_on_threads_nor_on_other_rows(backend: str) -> None:
    weight, lora_A, lora_B = randn(640, 512), randn(8, 512), randn(640, 8)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            seen.append(ops.lora_weight_norm(weight, lora_A, lora_B, SCALING))
    finally:
        torch.set_num_threads(before)
    lora_B[1::2] = math.nan
    seen.append(ops.lora_weight_norm(weight, lora_A, lora_B, SCALING))
    for other in seen[1:]:
        assert_same_bits(other[::2], seen[0][::2])
    assert seen[-1][1::2].isnan().all()


def test_fp64_stays_in_fp64() -> None:
    weight, lora_A, lora_B = randn(6, 64, dtype=torch.float64), randn(2, 64), randn(6, 2)
    norm = ops.lora_weight_norm(weight, lora_A, lora_B, SCALING)
    assert norm.dtype == torch.float64
    assert_close(norm, truth(weight, lora_A, lora_B))


def test_norms_have_no_gradient() -> None:
    weight, lora_A, lora_B = (randn(*s).requires_grad_() for s in ((6, 64), (2, 64), (6, 2)))
    assert not ops.lora_weight_norm(weight, lora_A, lora_B, SCALING).requires_grad


@pytest.mark.parametrize(("kind", "backend"), combinations())
def test_opcheck_of_the_norms(kind: str, backend: str) -> None:
    weight = weight_args("lora_weight_norm", base(kind, 6, 64, torch.float32))
    with peftrt.backend(backend):
        args = (*weight, randn(2, 64), randn(6, 2), SCALING, [])
        torch.library.opcheck(torch.ops.peftrt.lora_weight_norm.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_the_gradient(backend: str) -> None:
    for lead, bias in (((0,), None), ((3,), randn(6)), ((2, 3), None), ((), randn(6))):
        dy, y, scale = randn(*lead, 6), randn(*lead, 6, seed=1), randn(6)
        with peftrt.backend(backend):
            torch.library.opcheck(torch.ops.peftrt.row_scale_gradient.default, (dy, y, bias, scale))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_row_scale_equals_fp64(backend: str, dtype: torch.dtype) -> None:
    for case, (lead, n) in enumerate((((5,), 1), ((2, 3), 33), ((130,), 300), ((0,), 4), ((), 7))):
        dy, y = (laid_out(randn(*lead, n, seed=s, dtype=dtype), LAYOUTS[case % 4]) for s in (1, 2))
        bias = randn(n, seed=3, dtype=dtype) if case % 2 else None
        scale = randn(n, seed=4)
        scale[0] = 0.0
        with peftrt.backend(backend):
            got = ops.row_scale_gradient(dy, y, bias, scale)
        wide = y.double() if bias is None else y.double() - bias.double()
        terms = (dy.double() * wide).reshape(-1, n)
        want = torch.where(scale == 0, 0.0, terms.sum(0) / scale.double())
        assert got.dtype == torch.float32
        assert got[0] == 0
        sizes = terms.square().sum(0).sqrt() / scale.abs().clamp_min(1e-9)
        assert_close(got, want, intermediate=sizes[1:].max().item() if n > 1 else 0.0)


@pytest.mark.parametrize("backend", [NATIVE])
def test_gradient_of_the_row_scale_does_not_depend_on_the_threads(backend: str) -> None:
    dy, y, scale = randn(300, 1000), randn(300, 1000, seed=1), randn(1000)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with peftrt.backend(backend):
                seen.append(ops.row_scale_gradient(dy, y, None, scale))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(seen[1], seen[0])
    assert_same_bits(seen[2], seen[0])


def test_factors_are_magnitudes_by_norms() -> None:
    weight, lora_A, lora_B, m = nf4(6, 64), randn(2, 64), randn(6, 2), randn(6, dtype=torch.bfloat16).requires_grad_()
    scale = ops.dora_scale(weight, lora_A.requires_grad_(), lora_B, SCALING, m)
    norm = truth(exact(weight, torch.float32), lora_A.detach(), lora_B)
    assert_close(scale, m.detach().double() / norm)
    (grad,) = torch.autograd.grad(scale.sum(), m)
    assert_close(grad, 1 / norm)


def test_a_row_of_zeros_has_a_factor_of_zero() -> None:
    weight, lora_A, lora_B, m = randn(4, 64), randn(2, 64), torch.zeros(4, 2), torch.ones(4)
    weight[1], m[1] = 0.0, 0.0
    scale = ops.dora_scale(weight, lora_A, lora_B, SCALING, m)
    assert scale[1] == 0
    assert scale.isfinite().all()


W, A, B, Y = nf4(6, 64), torch.zeros(3, 64), torch.zeros(6, 3), torch.zeros(2, 6)
NORM: dict[str, Any] = {"weight": W, "lora_A": A, "lora_B": B, "scaling": 1.0}
GRADIENT: dict[str, Any] = {"dy": Y, "y": Y, "bias": None, "row_scale": torch.ones(6)}
BAD: dict[str, tuple[Any, dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "A of another width": (
        ops.lora_weight_norm,
        NORM,
        {"lora_A": A[:, 1:]},
        ValueError,
        r"lora_A must be \[R, K = 64\]",
    ),
    "B of another rank": (ops.lora_weight_norm, NORM, {"lora_B": B[:, 1:]}, ValueError, r"lora_B must be \[N, R\]"),
    "A of integers": (ops.lora_weight_norm, NORM, {"lora_A": A.int()}, TypeError, "lora_A must be one of float32"),
    "W of integers": (ops.lora_weight_norm, NORM, {"weight": A.int()}, TypeError, "weight must be one of float32"),
    "W a vector": (ops.lora_weight_norm, NORM, {"weight": A[0]}, ValueError, r"weight must be a matrix \[N, K\]"),
    "dy of another shape": (ops.row_scale_gradient, GRADIENT, {"dy": Y[1:]}, ValueError, "dy must be torch.float32"),
    "dy of another dtype": (ops.row_scale_gradient, GRADIENT, {"dy": Y.half()}, ValueError, "dy must be torch.float32"),
    "c of another length": (ops.row_scale_gradient, GRADIENT, {"row_scale": Y[0, 1:]}, ValueError, "row_scale must be"),
    "c in bf16": (ops.row_scale_gradient, GRADIENT, {"row_scale": Y[0].bfloat16()}, TypeError, "row_scale must be"),
    "bias too short": (ops.row_scale_gradient, GRADIENT, {"bias": Y[0, 1:]}, ValueError, r"bias must be \[N\] = \[6\]"),
    "m of another length": (ops.dora_scale, NORM, {"magnitude": torch.ones(5)}, ValueError, r"magnitude must be \[N\]"),
    "m of integers": (ops.dora_scale, NORM, {"magnitude": torch.ones(6).int()}, TypeError, "magnitude must be one of"),
    "m elsewhere": (
        ops.dora_scale,
        NORM,
        {"magnitude": torch.ones(6, device="meta")},
        ValueError,
        "magnitude must be on",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_named(case: str) -> None:
    op, good, change, error, message = BAD[case]
    with pytest.raises(error, match=f"{op.__name__}: {message}"):
        op(**{**good, **change})
