"""AdapterTable: pages, slots of every kind, and what is refused."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peftrt import ops
from peftrt.formats.pages import PAGE
from peftrt.ops import AdapterTable, SlotAdapter
from peftrt.reference.multi_lora_linear import places
from tests.cases import exact, randn
from tests.ops.multi_lora import adapters, base, by_row, ids
from tests.tolerances import assert_close, assert_same_bits

PER_SLOT = ("ranks", "A_pages", "B_pages")


def test_slots_may_share_pages() -> None:
    """Two scalings of one adapter: its gradient is the sum of both slots'."""
    ((lora_A, lora_B, _),) = adapters([3], 5, 8)
    leaves = [t.clone().requires_grad_() for t in (lora_A, lora_B)]
    one = AdapterTable.stack([(leaves[0], leaves[1], 1.0)])
    twice = {name: getattr(one, name).repeat(2, *[1] * (getattr(one, name).dim() - 1)) for name in PER_SLOT}
    table = dataclasses.replace(one, **twice | {"scaling": torch.tensor([[0.5], [2.0]])})
    x = randn(3, 8)
    y = ops.multi_lora_linear(x, None, table, ids(0, 1, 1))
    y.sum().backward()
    wide_A, wide_B = (t.double().requires_grad_() for t in (lora_A, lora_B))
    expected = by_row(x, None, [(wide_A, wide_B, 0.5), (wide_A, wide_B, 2.0)], ids(0, 1, 1))
    expected.sum().backward()
    assert_close(y, expected)
    assert_close(leaves[0].grad, wide_A.grad)
    assert_close(leaves[1].grad, wide_B.grad)


def test_pages_lie_in_any_order_and_what_is_behind_a_rank_is_not_read() -> None:
    loras, x, slots = adapters([11, 3], 5, 8), randn(4, 8), ids(1, 0, -1, 0)
    table = AdapterTable.stack(loras)
    values = torch.full((table.values.numel() + 100,), math.nan)
    A_pages, B_pages, free = table.A_pages.clone(), table.B_pages.clone(), 7
    for e, (lora_A, lora_B, _) in reversed(list(enumerate(loras))):
        for pages, matrix in ((B_pages, lora_B.t()), (A_pages, lora_A)):
            for j in reversed(range(-(-matrix.shape[0] // PAGE))):
                rows = matrix[j * PAGE : (j + 1) * PAGE].reshape(-1)
                values[free : free + rows.numel()] = rows
                pages[e, 0, j] = free
                free += PAGE * matrix.shape[1] + 3
    scattered = dataclasses.replace(table, values=values, A_pages=A_pages, B_pages=B_pages)
    expected = ops.multi_lora_linear(x, None, table, slots)
    assert_same_bits(ops.multi_lora_linear(x, None, scattered, slots), expected)


def test_stack_makes_pages_of_mixed_ranks() -> None:
    loras = adapters([4, 11], 16, 64)
    table = AdapterTable.stack([loras[0], None, loras[1]])
    assert (table.n, table.k, table.splits) == (16, 64, (16,))
    assert table.ranks.tolist() == [[4], [0], [11]]
    assert table.scaling.tolist() == [[0.5], [0.0], [1.5]]
    assert (table.ranks.dtype, table.A_pages.dtype, table.scaling.dtype) == (torch.int32, torch.int64, torch.float32)
    assert table.A_pages.shape == (3, 1, 2)
    # ranks are rounded up to pages of 8, and nothing else is stored
    assert table.values.numel() == (8 + 16) * (64 + 16)
    for slot, (lora_A, lora_B, _) in ((0, loras[0]), (2, loras[1])):
        rank = lora_A.shape[0]
        assert_same_bits(table.values[places(table.A_pages[slot, 0], rank, 64)].view(rank, 64), lora_A)
        assert_same_bits(table.values[places(table.B_pages[slot, 0], rank, 16)].view(rank, 16), lora_B.t())


def test_stack_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="AdapterTable: needs at least one adapter"):
        AdapterTable.stack([])
    good = adapters([2], 16, 64)[0]
    with pytest.raises(ValueError, match=r"AdapterTable: adapter 1: .*got \[2, 64\] and \[2, 16\]"):
        AdapterTable.stack([good, (good[0], good[1].t(), 1.0)])


@pytest.mark.parametrize("kind", ["none", "dense", "nf4"])
def test_every_kind_of_adapter_is_a_row_of_one_batch(kind: str) -> None:
    """LoRA on one of two maps, DoRA's factors, IA3 on either side, a bias, and none: values and gradients."""
    n, k, splits = 12, 64, (8, 4)
    weight, b = base(kind, n, k, torch.float64), randn(n, dtype=torch.float64)

    def function(x: Tensor, u: Tensor, c: Tensor, own: Tensor, A: Tensor, B: Tensor, b: Tensor) -> Tensor:
        slots = [
            SlotAdapter(((A, B, 0.5), None)),
            SlotAdapter(((A, B, 0.5), (A[:1], B[:4, :1], 2.0)), y_scale=c),
            SlotAdapter(x_scale=u),
            SlotAdapter(y_scale=c * c),
            SlotAdapter(bias=own),
            SlotAdapter((None, (A[1:], B[:4, 1:], 1.0)), u, c, own),
        ]
        table = AdapterTable.stack(slots, splits=splits, k=k)
        own_weight = weight.to(x.dtype) if isinstance(weight, Tensor) else weight
        return ops.multi_lora_linear(x, own_weight, table, ids(5, 2, 0, -1, 1, 3, 4, 5), b)

    shapes = ((8, k), (k,), (n,), (n,), (3, k), (8, 3))
    leaves = [randn(*s, seed=i, dtype=torch.float64).requires_grad_() for i, s in enumerate(shapes)]
    x, u, c, own, A, B = leaves
    dense = torch.zeros(n, k, dtype=torch.float64) if weight is None else exact(weight, torch.float64)

    def row(i: int, pairs: tuple[Any, Any] = (None, None), u: Any = 1, c: Any = 1, own: Any = 0) -> Tensor:
        seen = x[i] * u
        parts = [
            seen.new_zeros(s) if p is None else p[2] * (p[1] @ (p[0] @ seen))
            for p, s in zip(pairs, splits, strict=True)
        ]
        return c * (dense @ seen + torch.cat(parts)) + b + own

    whole = (None, (A[1:], B[:4, 1:], 1.0))
    expected = torch.stack(
        [
            row(0, whole, u, c, own),
            row(1, u=u),
            row(2, ((A, B, 0.5), None)),
            row(3),
            row(4, ((A, B, 0.5), (A[:1], B[:4, :1], 2.0)), c=c),
            row(5, c=c * c),
            row(6, own=own),
            row(7, whole, u, c, own),
        ]
    )
    y = function(*leaves, b)
    torch.testing.assert_close(y, expected)
    dy = randn(*y.shape, seed=9, dtype=torch.float64)
    grads, wanted = (torch.autograd.grad(t, leaves, dy) for t in (y, expected))
    torch.testing.assert_close(grads, wanted)
    narrow = function(*(t.detach().float() for t in leaves), b.float())
    torch.testing.assert_close(narrow, expected.float(), atol=1e-4, rtol=1e-4)


def test_a_page_has_as_many_ranks_in_every_language() -> None:
    root = Path(__file__).parents[2]
    places = {
        "kernels/_slots.py": r"PAGE = tl\.constexpr\((\d+)\)",
        "csrc/cpu/kernels.h": r"kPage = (\d+);",
        "csrc/cuda/kernels.h": r"kPageRanks = (\d+);",
    }
    for file, pattern in places.items():
        assert re.findall(pattern, (root / file).read_text()) == [str(PAGE)], file
