"""batch_invariant: a row's bits do not depend on how many rows there are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import peftrt
from peftrt import ops
from peftrt.ops import AdapterTable, SlotAdapter, _native
from tests.cases import FLOATS, nf4, randn
from tests.ops.multi_lora import adapters
from tests.tolerances import assert_same_bits

pytestmark = pytest.mark.skipif(_native.load() is not None, reason=str(_native.load()))

# several chunks of N and slices of K, whole groups and not
SHAPES = [(40, 64), (130, 320), (25, 65), (97, 4096), (33, 2049), (520, 64)]
ROWS = [*range(1, 41), 64, 65, 100]


def both(function: object, x: Tensor, dy: Tensor, **leaves: Tensor) -> tuple[Tensor, Tensor]:
    """An output and the gradient of its input."""
    leaf = x.clone().requires_grad_()
    y = function(leaf)  # type: ignore[operator]
    return y.detach(), torch.autograd.grad(y, leaf, dy)[0]


def check(function: object, n: int, k: int, dtype: torch.dtype) -> None:
    most = max(ROWS)
    x, dy = randn(most, k, dtype=dtype), randn(most, n, seed=1, dtype=dtype)
    with peftrt.batch_invariant():
        y, dx = both(function, x, dy)
        for m in ROWS:
            first = (7 * m) % (most - m + 1)
            rows = slice(first, first + m)
            got = both(function, x[rows], dy[rows])
            assert_same_bits(got[0], y[rows])
            assert_same_bits(got[1], dx[rows])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_nf4_linear(n: int, k: int, dtype: torch.dtype) -> None:
    weight, b = nf4(n, k), randn(n, dtype=dtype)
    check(lambda x: ops.nf4_linear(x, weight, b), n, k, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("n", "k"), [(130, 320), (33, 2049)])
@pytest.mark.parametrize("rank", [3, 64, 300])
@pytest.mark.parametrize("kind", ["nf4", "dense"])
def test_lora_linear(kind: str, n: int, k: int, rank: int, dtype: torch.dtype) -> None:
    weight, scale = nf4(n, k) if kind == "nf4" else randn(n, k, dtype=dtype), randn(n)
    ((lora_A, lora_B, s),) = adapters([rank], n, k)
    splits = (n - 9, 9) if rank == 3 else ()
    lora_A = torch.cat([lora_A] * 2) if splits else lora_A
    check(lambda x: ops.lora_linear(x, weight, lora_A, lora_B, s, row_scale=scale, splits=splits), n, k, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "dense", "none"])
def test_multi_lora_linear(kind: str, dtype: torch.dtype) -> None:
    n, k = 130, 320
    weight = {"nf4": nf4(n, k), "dense": randn(n, k, dtype=dtype), "none": None}[kind]
    slots = [SlotAdapter((pair,), randn(k), randn(n), randn(n)) for pair in adapters([3, 16, 20], n, k)]
    table = AdapterTable.stack(slots)

    def one_slot_a_row(x: Tensor) -> Tensor:
        # which slot a row has goes by its values, wherever it stands
        slot_ids = (x.detach()[:, 0].float() * 100).int().remainder(4) - 1
        return ops.multi_lora_linear(x, weight, table, slot_ids)

    check(one_slot_a_row, n, k, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_module_over_a_dense_base(dtype: torch.dtype) -> None:
    n, k = 33, 320
    layer = peftrt.LoRALinear(k, n, r=8, dtype=dtype)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    check(layer, n, k, dtype)


def test_more_rows_than_are_packed_at_a_time() -> None:
    weight, x, dy = nf4(40, 320), randn(1100, 320), randn(1100, 40, seed=1)
    with peftrt.batch_invariant():
        y, dx = both(lambda x: ops.nf4_linear(x, weight), x, dy)
        for rows in (slice(0, 1), slice(510, 514), slice(515, 1090), slice(1099, 1100)):
            got = both(lambda x: ops.nf4_linear(x, weight), x[rows], dy[rows])
            assert_same_bits(got[0], y[rows])
            assert_same_bits(got[1], dx[rows])


def test_without_it_few_rows_go_another_way() -> None:
    """What the promise is for; were this to fail, it could be made for nothing."""
    weight, x = nf4(40, 4096), randn(9, 4096)
    assert (ops.nf4_linear(x[:1], weight) != ops.nf4_linear(x, weight)[:1]).any()


def test_a_backward_is_as_its_forward_was() -> None:
    weight, x, dy = nf4(64, 4096), randn(1, 4096).requires_grad_(), randn(1, 64)
    with peftrt.batch_invariant():
        y = ops.nf4_linear(x, weight)
        (inside,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (outside,) = torch.autograd.grad(y, x, dy)
    assert_same_bits(outside, inside)
    plain = torch.autograd.grad(ops.nf4_linear(x, weight), x, dy)[0]
    assert (plain != inside).any()
