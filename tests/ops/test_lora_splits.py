"""lora_linear with splits: several linear maps of one x in one call, each with an adapter of its own."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import peftrt
from peftrt import ops
from peftrt.ops._weight import weight_args
from tests.cases import NATIVE, exact, nf4, randn
from tests.ops.test_lora_linear import SCALING, base, combinations
from tests.tolerances import assert_close, assert_same_bits

SPLITS = ([24], [16, 8], [5, 0, 12, 7])


def operands(
    splits: list[int], k: int, rank: int, m: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = sum(splits)
    x, bias = randn(m, k, seed=1, dtype=dtype), randn(n, seed=2, dtype=dtype)
    return x, randn(len(splits) * rank, k, seed=3), randn(n, rank, seed=4), bias


def apart(splits: list[int], A: Tensor, B: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """A, B, and of the others the rows, of every part."""
    return list(zip(A.chunk(len(splits)), B.split(splits), *(other.split(splits) for other in others), strict=True))


@pytest.mark.parametrize("m", [0, 1, 5, 40])
@pytest.mark.parametrize("splits", SPLITS, ids=str)
@pytest.mark.parametrize(("kind", "backend"), combinations())
def test_every_part_is_a_map_of_its_own(kind: str, backend: str, splits: list[int], m: int) -> None:
    n, k, rank = sum(splits), 96, 3
    weight = base(kind, n, k, torch.float32)
    dense = exact(weight, torch.float32) if kind != "dense" else weight.double()
    x, A, B, bias = (t.requires_grad_() for t in operands(splits, k, rank, m))
    c = (0.5 + torch.rand(n)).requires_grad_()
    dy = randn(m, n, seed=9)
    with peftrt.backend(backend):
        y = ops.lora_linear(x, weight, A, B, SCALING, bias, row_scale=c, splits=splits)
        got = y, *torch.autograd.grad(y, (x, A, B, bias, c), dy)
    inputs = [t.detach().double() for t in (x, A, B, bias, c, dense)]
    truth, sizes = expected(splits, SCALING, inputs, dy), expected(splits, SCALING**2, [t**2 for t in inputs], dy**2)
    for result, value, size in zip(got, truth, sizes, strict=True):
        assert_close(result, value, roundings=2, intermediate=size.max().sqrt().item() if size.numel() else 0.0)


def expected(splits: list[int], scaling: float, inputs: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    """y and the gradients of all inputs but W, in fp64, part by part. Of squares: how large partial sums may be."""
    x, A, B, bias, c = leaves = [t.requires_grad_() for t in inputs[:5]]
    parts = [
        scale * (x @ W.t() + scaling * (x @ own_A.t() @ own_B.t())) + b
        for own_A, own_B, W, b, scale in apart(splits, A, B, inputs[5], bias, c)
    ]
    y = torch.cat(parts, dim=1)
    return y.detach(), *torch.autograd.grad(y, leaves, dy.double())


@given(
    splits=st.lists(st.integers(0, 70), min_size=1, max_size=4).filter(any),
    k=st.sampled_from([32, 64, 100, 192]),
    rank=st.sampled_from([1, 7, 16, 33]),
    m=st.sampled_from([1, 8, 9, 33]),
)
def test_in_one_call_as_one_by_one(splits: list[int], k: int, rank: int, m: int) -> None:
    """By the kernels: what a part gives in company is what it gives alone, bit for bit but for where rows are cut."""
    weight = randn(sum(splits), k)
    x, A, B, bias = operands(splits, k, rank, m)
    quantized = peftrt.NF4Weight.quantize(weight, 32, double_quant=False)
    y = ops.lora_linear(x, quantized, A, B, SCALING, bias, splits=splits)
    dense = quantized.dequantize()
    for part, own in zip(y.split(splits, dim=1), apart(splits, A, B, dense, bias), strict=True):
        own_A, own_B, W, b = (t.double() for t in own)
        assert_close(part, x.double() @ W.t() + SCALING * (x.double() @ own_A.t() @ own_B.t()) + b)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize(("kind", "backend"), combinations())
def test_opcheck(kind: str, backend: str, p: float) -> None:
    weight = weight_args("lora_linear", base(kind, 6, 64, torch.float32))
    seed = torch.tensor([3]) if p else None
    x, A, B, b = (randn(*s).requires_grad_() for s in ((3, 64), (4, 64), (6, 2), (6,)))
    with peftrt.backend(backend):
        args = (x, *weight, A, B, SCALING, b, p, seed, None, [4, 2])
        torch.library.opcheck(torch.ops.peftrt.lora_linear.default, args)
        dy, x, xa, A, B = (randn(*s) for s in ((3, 6), (3, 64), (3, 4), (4, 64), (6, 2)))
        args = (dy, x, xa, *weight, A, B, SCALING, p, seed, None, True, True, True, [4, 2])
        torch.library.opcheck(torch.ops.peftrt.lora_linear_backward.default, args)


def test_gradients_equal_finite_differences() -> None:
    inputs = [t.double().requires_grad_() for t in operands([3, 2], 6, 2, 4)]
    weight = randn(5, 6, dtype=torch.float64)

    def function(x: Tensor, A: Tensor, B: Tensor, b: Tensor) -> Tensor:
        return ops.lora_linear(x, weight, A, B, SCALING, b, dropout_p=0.3, seed=5, splits=(3, 2))

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize(("kind", "backend"), combinations())
def test_norms_are_of_every_parts_own_adapter(kind: str, backend: str) -> None:
    splits = [13, 4, 20]
    weight = base(kind, 37, 64, torch.float32)
    _, A, B, _ = operands(splits, 64, 5, 1)
    with peftrt.backend(backend):
        norms = ops.lora_weight_norm(weight, A, B, SCALING, splits=splits)
    dense = exact(weight, torch.float32)
    parts = apart(splits, A.double(), B.double(), dense)
    want = torch.cat([(W + SCALING * own_B @ own_A).norm(dim=1) for own_A, own_B, W in parts])
    assert_close(norms, want)


@pytest.mark.parametrize("backend", [NATIVE])
def test_the_number_of_threads_changes_no_bit(backend: str) -> None:
    splits = [300, 40, 300]
    weight = nf4(640, 320)
    x, A, B, _ = operands(splits, 320, 20, 70)
    results, before = [], torch.get_num_threads()
    inputs = [t.requires_grad_() for t in (x, A, B)]
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with peftrt.backend(backend):
                y = ops.lora_linear(x, weight, A, B, SCALING, dropout_p=0.2, seed=1, splits=splits)
                results.append((y, *torch.autograd.grad(y.sin().sum(), inputs)))
    finally:
        torch.set_num_threads(before)
    for first, other in itertools.pairwise(results):
        for got, want in zip(first, other, strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([16, 9], r"lora_linear: splits must be sizes that sum to N = 24, got \[16, 9\]"),
        ([25, -1], "splits must be sizes that sum to N = 24"),
        ([8, 8, 8], r"lora_A must be \[P R, K = 96\] beside P = 3 splits"),
    ],
)
def test_bad_splits_are_named(splits: list[int], message: str) -> None:
    x, A, B, _ = operands([16, 8], 96, 2, 3)
    with pytest.raises(ValueError, match=message):
        ops.lora_linear(x, randn(24, 96), A, B, SCALING, splits=splits)
