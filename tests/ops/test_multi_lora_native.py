"""multi_lora_linear by the CPU library: against fp64 row by row, and what its bits depend on."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import peftrt
from peftrt import ops
from peftrt.formats.nf4 import NF4Weight
from peftrt.ops import AdapterTable, SlotAdapter, _native
from peftrt.ops._weight import weight_args
from tests.cases import FLOATS, exact, nf4, randn
from tests.ops.multi_lora import ids
from tests.tolerances import assert_close, assert_same_bits

pytestmark = pytest.mark.skipif(_native.load() is not None, reason=str(_native.load()))

KINDS = ["nf4", "dense", "none"]
RANKS = [0, 1, 3, 8, 9, 16, 20]
# of the parts q, k and v, or of one
SPLITS = [(40,), (33, 8, 24), (17, 0, 64)]


@dataclasses.dataclass
class Site:
    """A base with adapters of mixed ranks in scattered pages that share nothing, poison wherever nothing is."""

    k: int
    splits: tuple[int, ...]
    slots: list[SlotAdapter]
    table: AdapterTable
    weight: Tensor | NF4Weight | None
    dtype: torch.dtype

    @property
    def n(self) -> int:
        return sum(self.splits)

    def __call__(self, x: Tensor, slot_ids: Tensor, bias: Tensor | None = None, **more: Any) -> Tensor:
        with peftrt.backend(multi_lora_linear="native"):
            return ops.multi_lora_linear(x, self.weight, self.table, slot_ids, bias, **more)

    def backward(self, dz: Tensor, x: Tensor, slot_ids: Tensor) -> tuple[Tensor, Tensor]:
        args = (None, None, None, None, self.n, self.k, 0)
        if self.weight is not None:
            args = weight_args("test", self.weight)
        t = self.table
        pairs = (t.values, t.ranks, t.A_pages, t.B_pages, t.scaling, list(t.splits), slot_ids)
        with peftrt.backend("native"):
            return torch.ops.peftrt.multi_lora_linear_backward(dz, x, *args, *pairs, True, True)


def scattered(
    slots: list[SlotAdapter], k: int, splits: tuple[int, ...], dtype: torch.dtype, seed: int = 0
) -> AdapterTable:
    """The table of ``stack`` with its pages in any order, gaps between them, and NaN in all that no rank has."""
    stacked = AdapterTable.stack(slots, k=k, splits=splits)
    shuffle = torch.Generator().manual_seed(seed)
    moved, at, pieces = [], 3, []
    for name in ("A_pages", "B_pages"):
        pages = getattr(stacked, name).clone()
        for e in range(pages.shape[0]):
            for p, size in enumerate(splits):
                width = k if name == "A_pages" else size
                for w in range(pages.shape[2]):
                    held = min(8, int(stacked.ranks[e, p]) - 8 * w)
                    if held > 0:
                        start = int(pages[e, p, w])
                        pieces.append((name, (e, p, w), stacked.values[start : start + held * width], 8 * width))
                    else:
                        pages[e, p, w] = 2**62
        moved.append(pages)
    order = torch.randperm(len(pieces), generator=shuffle).tolist()
    values = torch.full((sum(piece[3] + 5 for piece in pieces) + 3,), math.nan)
    for i in order:
        name, where, piece, room = pieces[i]
        moved[name == "B_pages"][where] = at
        values[at : at + piece.numel()] = piece
        at += room + int(torch.randint(6, (1,), generator=shuffle))
    return dataclasses.replace(stacked, values=values.to(dtype), A_pages=moved[0], B_pages=moved[1])


def site(
    kind: str = "nf4",
    k: int = 130,
    splits: tuple[int, ...] = SPLITS[1],
    ranks: list[int] = RANKS,
    dtype: torch.dtype = torch.float32,
    values: torch.dtype = torch.float32,
    vectors: bool = False,
    seed: int = 0,
) -> Site:
    n, slots = sum(splits), []
    for e, r in enumerate(ranks):
        pairs = []
        for p, size in enumerate(splits):
            own = (r + 3 * p) % 21 if r else 0
            A, B = randn(own, k, seed=seed + 100 * e + p), randn(size, own, seed=seed + 100 * e + p + 50)
            pairs.append((A.to(values).float(), B.to(values).float(), 0.25 + 0.5 * e) if own else None)
        some = [randn(size, seed=seed + e) if vectors and e % 2 else None for size in (k, n, n)]
        slots.append(SlotAdapter(pairs, *some))
    weight = base_of(kind, n, k, dtype, seed)
    return Site(k, splits, slots, scattered(slots, k, splits, values, seed), weight, dtype)


def base_of(kind: str, n: int, k: int, dtype: torch.dtype, seed: int) -> Tensor | NF4Weight | None:
    if kind == "none":
        return None
    return nf4(n, k, seed=seed + 1) if kind == "nf4" else randn(n, k, seed=seed + 1, dtype=dtype)


def rows_of_slots(m: int, slots: int, seed: int = 0) -> Tensor:
    return torch.randint(-1, slots, (m,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def truth(at: Site, x: Tensor, slot_ids: Tensor, bias: Tensor | None) -> tuple[Tensor, float]:
    """Every row by itself in fp64, and how large its sums are where nothing cancels."""
    W = torch.zeros(at.n, at.k).double() if at.weight is None else exact(at.weight, at.dtype)
    rows, size = [], 0.0
    for i, e in enumerate(slot_ids.tolist()):
        slot = at.slots[e] if e >= 0 else SlotAdapter()
        seen = x[i] if slot.x_scale is None else (x[i].float() * slot.x_scale).to(at.dtype)
        seen, c = seen.double(), 1.0 if slot.y_scale is None else slot.y_scale.double()
        z, squares, begin = W @ seen, W.pow(2) @ seen.pow(2), 0
        for pair, width in zip(slot.pairs or [None] * len(at.splits), at.splits, strict=True):
            if pair is not None:
                A, B, s = pair[0].double(), pair[1].double(), pair[2]
                z[begin : begin + width] += s * (B @ (A @ seen))
                squares[begin : begin + width] += s * s * (B.pow(2) @ (A.pow(2) @ seen.pow(2)))
            begin += width
        y = c * z
        y = y if bias is None else y + bias.double()
        rows.append(y if slot.bias is None else y + slot.bias.double())
        if at.n:
            size = max(size, (squares.sqrt() * c).abs().max().item())
    return torch.stack(rows) if rows else torch.zeros(0, at.n).double(), size


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@given(
    m=st.sampled_from([0, 1, 2, 3, 7, 8, 9, 17, 40]),
    k=st.sampled_from([1, 7, 64, 65, 130, 192, 2049]),
    splits=st.sampled_from(SPLITS),
    values=st.sampled_from(FLOATS),
    vectors=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_every_row_is_its_own(
    kind: str,
    dtype: torch.dtype,
    m: int,
    k: int,
    splits: tuple[int, ...],
    values: torch.dtype,
    vectors: bool,
    bias: bool,
    seed: int,
) -> None:
    at = site(kind, k, splits, dtype=dtype, values=values, vectors=vectors, seed=seed)
    x, slots = randn(m, k, seed=seed, dtype=dtype), rows_of_slots(m, len(RANKS), seed)
    b = randn(at.n, seed=seed, dtype=dtype) if bias else None
    expected, size = truth(at, x, slots, b)
    assert_close(at(x, slots, b), expected, intermediate=size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_are_the_references(kind: str, dtype: torch.dtype) -> None:
    at = site(kind, dtype=dtype)
    at.table = dataclasses.replace(at.table, values=at.table.values.nan_to_num(0.0))  # which multiplies with padding
    x, dz, slots = randn(30, at.k, dtype=dtype), randn(30, at.n, seed=5, dtype=dtype), rows_of_slots(30, len(RANKS))
    dx, dvalues = at.backward(dz, x, slots)
    t = at.table
    args: tuple[Any, ...] = (None, None, None, None, at.n, at.k, 0)
    if at.weight is not None:
        args = weight_args("test", exact(at.weight, dtype))
    rest = (t.ranks, t.A_pages, t.B_pages, t.scaling, list(t.splits), slots, True, True)
    with peftrt.backend("reference"):
        wide = torch.ops.peftrt.multi_lora_linear_backward(dz.double(), x.double(), *args, t.values.double(), *rest)
    assert_close(dx, wide[0])
    assert_close(dvalues, wide[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [5, 40])
def test_a_row_does_not_see_its_neighbours(kind: str, m: int) -> None:
    """Rows change places, others come in their stead, all rows share one slot: not a bit changes."""
    at = site(kind, vectors=True)
    x, slots, dz = randn(m, at.k), rows_of_slots(m, len(RANKS)), randn(m, at.n, seed=3)
    y, (dx, _) = at(x, slots), at.backward(dz, x, slots)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(1))
    assert_same_bits(at(x[order], slots[order]), y[order])
    assert_same_bits(at.backward(dz[order], x[order], slots[order])[0], dx[order])
    for i in (0, m // 2, m - 1):
        for fill in (-1, int(slots[i]), 6):
            others, theirs = randn(m, at.k, seed=9), torch.full_like(slots, fill)
            grads = randn(m, at.n, seed=8)
            others[i], theirs[i], grads[i] = x[i], slots[i], dz[i]
            assert_same_bits(at(others, theirs)[i], y[i])
            assert_same_bits(at.backward(grads, others, theirs)[0][i], dx[i])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", FLOATS, ids=str)
def test_a_slots_gradient_is_that_of_its_rows_alone(kind: str, values: torch.dtype) -> None:
    at = site(kind, values=values)
    m = 60
    x, slots, dz = randn(m, at.k), rows_of_slots(m, len(RANKS)), randn(m, at.n, seed=3)
    together = at.backward(dz, x, slots)[1]
    apart = sum(at.backward(dz[slots == e], x[slots == e], slots[slots == e])[1].float() for e in range(len(RANKS)))
    assert_same_bits(together, apart.to(values))


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_no_bit(kind: str) -> None:
    at = site(kind, k=1024, splits=(700, 333), vectors=True)
    x, slots, dz = randn(70, at.k), rows_of_slots(70, len(RANKS)), randn(70, at.n, seed=3)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((at(x, slots), *at.backward(dz, x, slots)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_shared_pages_are_added_to(kind: str) -> None:
    """Two slots of one adapter, with scalings of their own, and a page that is at once A's and B's."""
    at = site(kind, k=48, splits=(48,), ranks=[5, 5])
    t = at.table
    pages = {"A_pages": t.A_pages[:1].expand(2, 1, -1), "B_pages": t.A_pages[:1].expand(2, 1, -1)}
    t = at.table = dataclasses.replace(t, **pages)
    x, dz, slots = randn(9, 48), randn(9, 48, seed=2), rows_of_slots(9, 2)
    got = at.backward(dz, x, slots)[1]
    with peftrt.backend("reference"):
        args = (None, None, None, None, 48, 48, 0)
        rest = (t.ranks, t.A_pages, t.B_pages, t.scaling, [48], slots, False, True)
        want = torch.ops.peftrt.multi_lora_linear_backward(
            dz.double(), x.double(), *args, t.values.nan_to_num(0.0).double(), *rest
        )[1]
    assert_close(got, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_stays_in_its_row(kind: str, bad: float) -> None:
    at = site(kind)
    x, slots, dz = randn(20, at.k), rows_of_slots(20, len(RANKS)), randn(20, at.n, seed=3)
    y, (dx, _) = at(x, slots), at.backward(dz, x, slots)
    assert y.isfinite().all()  # and not what lies behind the ranks
    assert dx.isfinite().all()
    others = torch.arange(20) != 11
    x[11, 2], dz[11, 3] = bad, bad
    assert_same_bits(at(x, slots)[others], y[others])
    assert_same_bits(at.backward(dz, x, slots)[0][others], dx[others])


def test_gradients_of_padding_are_zero() -> None:
    at = site()
    m = 20
    dvalues = at.backward(randn(m, at.n), randn(m, at.k), rows_of_slots(m, len(RANKS)))[1]
    assert (dvalues[at.table.values.isnan()] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", [1, 5, 8, 19])
def test_out_is_written_where_it_lies(kind: str, dtype: torch.dtype, m: int) -> None:
    at = site(kind, dtype=dtype, vectors=True)
    x, slots, b = randn(m, at.k, dtype=dtype), rows_of_slots(m, len(RANKS)), randn(at.n, dtype=dtype)
    around = torch.full((m, at.n + 9), 7.0, dtype=dtype)
    out = around[:, 4 : 4 + at.n]
    at(x, slots, b, out=out)
    assert_same_bits(out, at(x, slots, b))
    around[:, 4 : 4 + at.n] = 7.0
    assert (around == 7).all()


NATIVE_BAD: list[tuple[str, dict[str, Any]]] = [
    ("slot_ids must be -1 or a slot", {"slot_ids": ids(0, 7, 1)}),
    ("slot_ids must be -1 or a slot", {"slot_ids": ids(0, -2, 1)}),
    ("slot_ids must be of the table's shape", {"slot_ids": ids(0, 1)}),
    ("ranks must be what the pages hold", {"ranks": 25}),
    ("ranks must be what the pages hold", {"ranks": -1}),
    ("A_pages must be inside of values", {"A_pages": -1}),
    ("A_pages must be inside of values", {"A_pages": 2**62}),
    ("B_pages must be inside of values", {"B_pages": -(2**62)}),
    ("B_pages must be inside of values", {"B_pages": 10**6}),
    ("vector_starts must be inside of vectors", {"vector_starts": 10**6}),
    ("vector_starts must be inside of vectors", {"vector_starts": -2}),
    ("vector_starts must be given exactly when", {"vectors": None}),
]


@pytest.mark.parametrize(("message", "change"), NATIVE_BAD)
def test_a_bad_table_is_refused_by_the_library_itself(message: str, change: dict[str, Any]) -> None:
    at = site(vectors=True)
    slot_ids = change.get("slot_ids", ids(1, 3, -1))
    fields = {}
    for name, value in change.items():
        if name != "slot_ids":
            fields[name] = None if value is None else getattr(at.table, name).clone()
            if value is not None:
                fields[name][3] = value
    t = dataclasses.replace(at.table, **fields)
    rest = (t.values, t.ranks, t.A_pages, t.B_pages, t.scaling)
    assert at.weight is not None
    args = (*weight_args("test", at.weight), *rest)
    cpu, x = torch.ops.peftrt_cpu, randn(3, at.k)
    with pytest.raises(RuntimeError, match=f"multi_lora_linear: {message}"):
        cpu.multi_lora_linear(x, *args, t.vectors, t.vector_starts, list(t.splits), slot_ids, None)
    if "vectors" not in change and "vector_starts" not in change:
        with pytest.raises(RuntimeError, match=f"multi_lora_linear_backward: {message}"):
            cpu.multi_lora_linear_backward(randn(3, at.n), x, *args, list(t.splits), slot_ids, True, True)
    if "slot_ids" not in change and "vectors" not in change:  # no row reaches it
        cpu.multi_lora_linear(x, *args, t.vectors, t.vector_starts, list(t.splits), ids(1, -1, 2), None)
