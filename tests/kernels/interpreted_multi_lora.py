"""multi_lora_linear's kernels in Triton's interpreter; run as interpreted.py is."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import peftrt
from peftrt import ops
from peftrt.formats.pages import PAGE
from peftrt.kernels import multi_lora_decode as multi_lora_decode_module
from peftrt.kernels._routes import TILE_ROWS, route
from peftrt.kernels._slots import Table
from peftrt.kernels.multi_lora_decode import multi_lora_decode
from peftrt.ops import AdapterTable, _device_flag, _paths
from peftrt.ops._weight import weight_args
from tests.cases import exact, laid_out, randn
from tests.ops.multi_lora import base, ids
from tests.tolerances import assert_close, assert_same_bits

KINDS = ("none", "dense", "nf4")
DTYPES = (torch.float32, torch.float16)


class Case:
    """A table whose pages lie scattered among NaN, a base, and what is true of a batch in fp64.

    Args:
        ranks: of each slot and part.
        splits: outputs of each part.
        aligned: pages begin at multiples of 16 elements.
        vectors: of each slot, whether it has (x_scale, y_scale, bias).
        shared: slots that have another one's pages.
    """

    def __init__(
        self,
        ranks: list[list[int]],
        splits: tuple[int, ...],
        k: int,
        kind: str = "none",
        dtype: torch.dtype = torch.float32,
        values: torch.dtype = torch.float32,
        aligned: bool = True,
        vectors: list[tuple[bool, bool, bool]] | None = None,
        shared: dict[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        self.k, self.splits, self.n, self.dtype = k, splits, sum(splits), dtype
        self.weight = base(kind, self.n, k, dtype)
        self.bias = randn(self.n, seed=seed + 1, dtype=dtype)
        draw = random.Random(seed)
        E, P, W = len(ranks), len(splits), max(1, max(-(-r // PAGE) for slot in ranks for r in slot)) + 1
        self.pages = torch.full((2, E, P, W), -(1 << 40))
        self.pairs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        matrices: list[tuple[Tensor, tuple[int, ...]]] = []
        for e, p in ((e, p) for e in range(E) for p in range(P)):
            if shared and e in shared:
                continue
            A = randn(ranks[e][p], k, seed=seed + 7 * e + p, dtype=values) * k**-0.5
            B = randn(splits[p], ranks[e][p], seed=seed + 7 * e + p + 500, dtype=values)
            self.pairs[e, p] = A, B
            for side, rows in ((0, A), (1, B.t().contiguous())):
                matrices += [(rows[r : r + PAGE], (side, e, p, i)) for i, r in enumerate(range(0, rows.shape[0], PAGE))]
        draw.shuffle(matrices)
        data, used = torch.full((sum(PAGE * page.shape[1] + 16 for page, _ in matrices) + 16,), torch.nan), 0
        for page, place in matrices:
            used += -used % 16 if aligned else draw.choice([1, 3, 16])
            data[used : used + page.numel()] = page.reshape(-1).float()
            self.pages[place] = used
            used += PAGE * page.shape[1]
        for e, other in (shared or {}).items():
            self.pages[:, e] = self.pages[:, other]
            for p, rank in enumerate(ranks[e]):
                A, B = self.pairs[other, p]
                self.pairs[e, p] = A[:rank], B[:, :rank]
        self.scaling = torch.tensor([[0.5 + 0.25 * e + p for p in range(P)] for e in range(E)])
        self.vectors, starts = [], torch.full((E, 3), -1)
        at = 0
        for e, has in enumerate(vectors or []):
            for which, size in enumerate((k, self.n, self.n)):
                if has[which]:
                    starts[e, which] = at
                    self.vectors.append(randn(size, seed=seed + 31 * e + which))
                    at += size
        self.table = AdapterTable(
            values=data.to(values),
            ranks=torch.tensor(ranks, dtype=torch.int32),
            A_pages=self.pages[0].contiguous(),
            B_pages=self.pages[1].contiguous(),
            scaling=self.scaling,
            splits=splits,
            k=k,
            vectors=torch.cat(self.vectors) if self.vectors else None,
            vector_starts=starts if self.vectors else None,
        )

    def vector(self, slot: int, which: int, size: int, missing: float) -> Tensor:
        starts = self.table.vector_starts
        if slot < 0 or starts is None or starts[slot, which] < 0:
            return torch.full((size,), missing)
        start = int(starts[slot, which])
        return self.table.vectors[start : start + size]

    def seen(self, x: Tensor, slot_ids: Tensor) -> Tensor:
        factors = [self.vector(slot, 0, self.k, 1.0) for slot in slot_ids.tolist()]
        return (x * torch.stack(factors)).to(x.dtype) if factors else x

    def shares(self, slot: int) -> list[tuple[slice, Tensor, Tensor, float]]:
        """Of each part: its outputs, A, B and scaling, in fp64."""
        found, start = [], 0
        for p, size in enumerate(self.splits):
            if slot >= 0 and self.table.ranks[slot, p]:
                A, B = (t.double() for t in self.pairs[slot, p])
                found.append((slice(start, start + size), A, B, float(self.scaling[slot, p])))
            start += size
        return found

    def y(self, x: Tensor, slot_ids: Tensor, power: int = 1) -> Tensor:
        """The truth; ``power`` 2: sums of the squares of its terms."""
        rows = []
        W = None if self.weight is None else exact(self.weight, self.dtype).pow(power)
        for row, slot in zip(self.seen(x, slot_ids).double().pow(power), slot_ids.tolist(), strict=True):
            z = row.new_zeros(self.n) if W is None else W @ row
            for outputs, A, B, s in self.shares(slot):
                z[outputs] += s**power * (B.pow(power) @ (A.pow(power) @ row))
            scale, bias = (self.vector(slot, w, self.n, m).double().pow(power) for w, m in ((1, 1.0), (2, 0.0)))
            rows.append(z * scale + self.bias.double().pow(power) + bias)
        return torch.stack(rows) if rows else torch.zeros(0, self.n, dtype=torch.float64)

    def gradients(self, dz: Tensor, x: Tensor, slot_ids: Tensor, power: int = 1) -> tuple[Tensor, Tensor]:
        wide, dz = x.double().pow(power), dz.double().pow(power)
        dx = torch.zeros_like(wide)
        if self.weight is not None:
            dx += dz @ exact(self.weight, self.dtype).pow(power)
        dvalues = torch.zeros(self.table.values.shape, dtype=torch.float64)
        for i, slot in enumerate(slot_ids.tolist()):
            parts = [p for p in range(len(self.splits)) if slot >= 0 and self.table.ranks[slot, p]]
            for p, (outputs, A, B, s) in zip(parts, self.shares(slot), strict=True):
                A, B, s = A.pow(power), B.pow(power), s**power
                g, xa = s * (dz[i, outputs] @ B), A @ wide[i]
                dx[i] += g @ A
                for side, grad in ((0, torch.outer(g, wide[i])), (1, s * torch.outer(xa, dz[i, outputs]))):
                    for w in range(0, grad.shape[0], PAGE):
                        start, page = int(self.pages[side, slot, p, w // PAGE]), grad[w : w + PAGE].reshape(-1)
                        dvalues[start : start + page.numel()] += page
        return dx, dvalues

    def arguments(self, slot_ids: Tensor) -> tuple[Any, ...]:
        t, nothing = self.table, (None, None, None, None, self.n, self.k, 0)
        weight = nothing if self.weight is None else weight_args("multi_lora_linear", self.weight)
        pairs = (t.values, t.ranks, t.A_pages, t.B_pages, t.scaling)
        return weight, pairs, (list(self.splits), slot_ids)

    def forward(self, x: Tensor, slot_ids: Tensor, out: Tensor | None = None) -> Tensor:
        with peftrt.backend("triton"):
            return ops.multi_lora_linear(x, self.weight, self.table, slot_ids, self.bias, out=out)

    def backward(self, dz: Tensor, x: Tensor, slot_ids: Tensor, *needs: bool) -> tuple[Tensor, Tensor]:
        weight, pairs, rest = self.arguments(slot_ids)
        with peftrt.backend("triton"):
            return torch.ops.peftrt.multi_lora_linear_backward(dz, x, *weight, *pairs, *rest, *(needs or (True, True)))

    def check(self, slot_ids: Tensor, roundings: int = 1, backward: bool = True) -> None:
        m = slot_ids.numel()
        x, dz = randn(m, self.k, seed=m, dtype=self.dtype), randn(m, self.n, seed=m + 1, dtype=self.dtype)

        def close(got: Tensor, true: Tensor, squares: Tensor, roundings: int = 1) -> None:
            size = squares.max().sqrt().item() if squares.numel() else 0.0
            assert_close(got, true, roundings=roundings, intermediate=size)

        close(self.forward(x, slot_ids), self.y(x, slot_ids), self.y(x, slot_ids, 2), roundings)
        if backward:
            got = self.backward(dz, x, slot_ids)
            expected = zip(got, self.gradients(dz, x, slot_ids), self.gradients(dz, x, slot_ids, 2), strict=True)
            for tensor, true, squares in expected:
                close(tensor, true, squares, roundings)


def drawn_ids(m: int, slots: int, seed: int) -> Tensor:
    return torch.randint(-1, slots, (m,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


@pytest.fixture(params=["decode", "grouped"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways for batches of any size."""
    monkeypatch.setattr(_paths, "MULTI_LORA_ROWS", 1000 if request.param == "decode" else 0)
    return request.param


def drawn_case(seed: int) -> tuple[Case, int]:
    """A table and a number of rows, some of everything."""
    draw = random.Random(seed)
    parts, slots = draw.choice([1, 1, 2, 3]), draw.randint(1, 5)
    splits = tuple(draw.choice([1, 7, 16, 40, 130]) for _ in range(parts))
    ranks = [[draw.choice([0, 1, 3, 8, 9, 16, 33]) for _ in splits] for _ in range(slots)]
    vectors = [tuple(draw.random() < 0.5 for _ in range(3)) for _ in range(slots)] if draw.random() < 0.5 else None
    dtype, kind = draw.choice(DTYPES), draw.choice(KINDS)
    values, aligned = draw.choice([dtype, torch.float32]), draw.random() < 0.5
    k = draw.choice([1, 13, 48, 97, 130])
    return Case(ranks, splits, k, kind, dtype, values, aligned, vectors, seed=seed), draw.choice([1, 2, 5, 12])


@pytest.mark.parametrize("seed", range(8))
def test_drawn_batches_equal_fp64(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_paths, "MULTI_LORA_ROWS", 0 if seed % 2 else 1000)
    case, m = drawn_case(seed)
    case.check(drawn_ids(m, len(case.table.ranks), seed))


@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_than_the_limit(kind: str) -> None:
    """Tiles of more than one slot, and slots of more than one tile."""
    dtype = torch.float16 if kind == "dense" else torch.float32
    case = Case([[3, 8], [17, 0], [1, 1]], (40, 9), 72, kind, dtype)
    m = _paths.MULTI_LORA_ROWS + 5
    slot_ids = drawn_ids(m, 3, 1)
    slot_ids[: TILE_ROWS + 3] = 1
    case.check(slot_ids[torch.randperm(m)])


def test_ranks_to_256(way: str) -> None:
    case = Case([[256], [9]], (33,), 40, values=torch.float16)
    case.check(ids(0, 1, -1), backward=way == "grouped")


def test_sums_in_splits(way: str) -> None:
    """K over several splits, and off any multiple."""
    Case([[17], [9]], (33,), 1101, dtype=torch.float16).check(ids(0, 1, -1), backward=False)


def test_128_slots(way: str) -> None:
    case = Case([[1 + e % 9] for e in range(128)], (24,), 32, values=torch.float16)
    case.check(ids(127, 0, 64, 127, -1), backward=False)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_without_adapters(kind: str, way: str) -> None:
    case = Case([[4], [0]], (20,), 40, kind, vectors=[(True, True, True), (False, False, False)])
    for slot_ids in (ids(-1, -1, -1), ids(1, 1), ids()):
        case.check(slot_ids)
    plain = Case([[4], [0]], (20,), 40, kind)
    alone = plain.forward(randn(3, 40), ids(-1, -1, -1))
    assert_same_bits(plain.forward(randn(3, 40), ids(1, -1, 1)), alone)


VECTORS = [(True, True, True), (False, False, False), (False, True, False)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_place_nor_on_the_others(dtype: torch.dtype, way: str) -> None:
    """Without a base, whose rows get other bits at other places from the interpreter's BLAS."""
    case = Case([[9, 2], [3, 17], [8, 8]], (40, 7), 70, "none", dtype, vectors=VECTORS)
    m = 9
    x, dz, slot_ids = randn(m, 70, dtype=dtype), randn(m, 47, seed=1, dtype=dtype), drawn_ids(m, 3, 5)
    y, dx = case.forward(x, slot_ids), case.backward(dz, x, slot_ids, True, False)[0]
    order = torch.randperm(m, generator=torch.Generator().manual_seed(3)).tolist()
    for rows in (order, [0], [3, 5, 8]):
        assert_same_bits(case.forward(x[rows], slot_ids[rows]), y[rows])
        assert_same_bits(case.backward(dz[rows], x[rows], slot_ids[rows], True, False)[0], dx[rows])


@pytest.mark.parametrize(("kind", "dtype"), [("nf4", torch.float32), ("dense", torch.float16)])
def test_a_row_over_a_base_does_not_depend_on_the_others(kind: str, dtype: torch.dtype, way: str) -> None:
    case = Case([[9, 2], [3, 17], [8, 8]], (40, 7), 70, kind, dtype, vectors=VECTORS)
    x, slot_ids = randn(9, 70, dtype=dtype), drawn_ids(9, 3, 5)
    y = case.forward(x, slot_ids)
    for rows in (slice(0, 1), slice(4, 7)):
        other, other_ids = randn(9, 70, seed=9, dtype=dtype), drawn_ids(9, 3, 11)
        other[rows], other_ids[rows] = x[rows], slot_ids[rows]
        assert_same_bits(case.forward(other, other_ids)[rows], y[rows])


def test_a_slots_gradient_is_that_of_its_rows_alone() -> None:
    """Bit for bit, over more rows than a block of them; and a page that is not used has zeros."""
    case = Case([[9, 2], [3, 17], [8, 8]], (24, 7), 40, "none", torch.float16)
    m = 2 * TILE_ROWS
    x, dz, slot_ids = randn(m, 40, dtype=case.dtype), randn(m, 31, seed=1, dtype=case.dtype), drawn_ids(m, 2, 5)
    slot_ids[: TILE_ROWS + 5] = 0
    together = case.backward(dz, x, slot_ids, False, True)[1]
    alone = []
    for slot in (0, 1):
        rows = (slot_ids == slot).nonzero().squeeze(1)
        alone.append(case.backward(dz[rows], x[rows], slot_ids[rows], False, True)[1])
        assert bool(alone[-1].any())
    assert_same_bits(together, alone[0] + alone[1])  # elsewhere than in its pages each is zero


def test_slots_that_share_pages_are_added_in_the_order_of_slots() -> None:
    """Slot 3 has the pages of slot 0, the last of them in part; slot 2 all of slot 1's."""
    case = Case([[12, 8], [9, 3], [9, 3], [11, 1]], (24, 7), 40, shared={2: 1, 3: 0})
    for slot_ids in (ids(0, 3, 1, 2, 0, 3, 2, -1), ids(3, 2, 3)):
        case.check(slot_ids)


def test_panels_are_rounded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_paths, "MULTI_LORA_ROWS", 0)
    monkeypatch.setattr(_paths, "path", lambda *_, **__: _paths.PANELS)
    for kind, vectors in (("dense", None), ("nf4", [(True, True, True), (False, True, False)]), ("nf4", None)):
        case = Case([[3, 8], [17, 0]], (40, 24), 64, kind, torch.float16, vectors=vectors)
        case.check(ids(0, 1, -1, 1), roundings=2, backward=kind == "dense" or vectors is None)


def test_results_go_where_they_are_wanted(way: str) -> None:
    case = Case([[3], [9]], (20,), 40, "dense", torch.float16)
    x, slot_ids = randn(2, 3, 40, dtype=torch.float16), ids(1, 0, -1, 1, 1, 0)
    y = case.forward(x, slot_ids)
    room = torch.full((2, 3, 33), 7.0, dtype=torch.float16)
    case.forward(x, slot_ids, out=room[..., 5:25])
    assert_same_bits(room[..., 5:25].contiguous(), y)
    assert bool((room[..., :5] == 7).all() and (room[..., 25:] == 7).all())
    for layout in ("transposed", "strided"):
        assert_same_bits(case.forward(laid_out(x, layout), slot_ids), y)


def test_slot_ids_outside_the_table(way: str) -> None:
    case = Case([[3], [9]], (20,), 40)
    for wrong in (2, -2):
        with pytest.raises(ValueError, match=r"multi_lora_linear: slot_ids must be in -1 \.\.\. 1"):
            case.forward(randn(2, 40), ids(0, wrong))


def test_the_flag_of_a_wrong_id_is_raised_by_the_next_call() -> None:
    """As on a device, where nobody waits for the ids: the base serves the row."""
    case = Case([[3], [9]], (20,), 40)
    t = case.table
    table = Table(t.values, t.ranks, t.A_pages, t.B_pages, t.scaling, None, None, t.splits)
    x, out, flag = randn(4, 40), torch.empty(4, 20), torch.zeros(1, dtype=torch.int32)
    multi_lora_decode(x, None, table, ids(0, 1, -1, 0), flag, None, out)
    assert int(flag) == 0
    multi_lora_decode(x, None, table, ids(0, 2, -1, -7), flag, None, out)
    assert int(flag) == 1
    assert bool(out[0].any())
    assert not bool(out[1:].any())
    routes = route(ids(1, 0, 5, 1, -1), 2, _device_flag.flag(x.device))
    assert routes.order.tolist() == [2, 4, 1, 0, 3]
    assert routes.starts.tolist() == [0, 2, 3, 5]
    with pytest.raises(ValueError, match=r"multi_lora_linear: slot_ids .* earlier call"):
        case.forward(x, ids(0, 0, 0, 0))
    case.forward(x, ids(0, 0, 0, 0))


def test_rows_are_routed_in_their_order() -> None:
    flag = torch.zeros(1, dtype=torch.int32)
    for m, slots in ((1, 1), (70, 3), (70, 40), (1100, 2)):
        slot_ids = drawn_ids(m, slots, m)
        routes = route(slot_ids, slots, flag)
        assert routes.order.tolist() == slot_ids.argsort(stable=True).tolist()
        tiles = [tile for tile in routes.tiles.tolist() if tile[1] < tile[2]]
        covered = [(slot, i) for slot, first, last in tiles for i in range(first, last)]
        assert [i for _, i in covered] == list(range(m))
        assert [slot for slot, _ in covered] == slot_ids.sort().values.tolist()
        assert all(last - first <= TILE_ROWS for _, first, last in tiles)
    assert int(flag) == 0


@pytest.mark.parametrize(
    ("op", "kind"), [("nf4_linear", "nf4"), ("lora_linear", "dense"), ("multi_lora_linear", "nf4")]
)
def test_a_row_alone_has_the_bits_of_a_batch_where_bits_count(op: str, kind: str) -> None:
    """y and dX: one schedule for any number of rows, on either side of every limit.

    Rows keep their places: products of the interpreter are NumPy's, whose bits may go by the place in a tile.
    """
    n, k, m = 16, 2048, 80  # of so many columns sums are split, and into how many parts would go by the rows
    weight, draw = base(kind, n, k, torch.float32), random.Random(3)
    table = AdapterTable.stack([(randn(r, k, seed=r) / 8, randn(n, r, seed=r + 1), 0.5) for r in (3, 17)])
    x, dy, slots = randn(m, k), randn(m, n, seed=2), ids(*(draw.randrange(-1, 2) for _ in range(m)))

    def run(rows: slice) -> tuple[Tensor, Tensor]:
        leaf = x[rows].requires_grad_()
        with peftrt.backend("triton"), peftrt.batch_invariant():
            if op == "nf4_linear":
                y = ops.nf4_linear(leaf, weight)
            elif op == "lora_linear":
                y = ops.lora_linear(leaf, weight, randn(8, k, seed=5) / 8, randn(n, 8, seed=6), 0.5)
            else:
                y = ops.multi_lora_linear(leaf, weight, table, slots[rows])
        return y, *torch.autograd.grad(y, leaf, dy[rows])

    everything = run(slice(None))
    for count in (1, 17, 70):
        rows = slice(0, count)
        for got, want in zip(run(rows), everything, strict=True):
            assert_same_bits(got, want[rows])


@pytest.mark.parametrize("sides", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_factors_alone(kind: str, sides: tuple[bool, bool], way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ia3_linear: one slot without a pair; where only outputs have factors nothing passes over x."""
    passes = []
    scale_rows = multi_lora_decode_module.scale_rows
    monkeypatch.setattr(multi_lora_decode_module, "scale_rows", lambda *args: passes.append(1) or scale_rows(*args))
    for dtype, m in itertools.product(DTYPES, (1, 5)):
        weight, x = base(kind, 40, 72, dtype), randn(m, 72, seed=1, dtype=dtype)
        u, c = (randn(size, seed=3) if has else None for has, size in zip(sides, (72, 40), strict=True))
        bias = randn(40, seed=4, dtype=dtype)
        with peftrt.backend(ia3_linear="triton"):
            y = ops.ia3_linear(x, weight, u, c, bias)
        wide = x.double() if u is None else (x * u).to(dtype).double()
        expected = wide @ exact(weight, dtype).t() * (1.0 if c is None else c.double()) + bias.double()
        assert_close(y, expected, intermediate=40.0)
    assert len(passes) == (4 if sides[0] else 0)
