"""Adapters and their truth: one row after the other, each with matrices of its own."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from peftrt import ops
from peftrt.formats.nf4 import NF4Weight
from peftrt.ops import AdapterTable, SlotAdapter
from peftrt.ops._define import OPS
from peftrt.ops._weight import weight_args
from peftrt.reference.multi_lora_linear import places
from tests.cases import FLOATS, exact, nf4, randn
from tests.tolerances import assert_close, assert_same_bits

Adapters = list[tuple[Tensor, Tensor, float]]


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def adapters(
    ranks: list[int], n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float32, grad: bool = False
) -> Adapters:
    return [
        (
            randn(r, k, seed=seed + 2 * e, dtype=dtype).requires_grad_(grad),
            randn(n, r, seed=seed + 2 * e + 1, dtype=dtype).requires_grad_(grad),
            0.5 + e,
        )
        for e, r in enumerate(ranks)
    ]


def by_row(x: Tensor, weight: Tensor | None, loras: Adapters, slot_ids: Tensor, bias: Tensor | None = None) -> Tensor:
    """One row after the other, each with matrices of its own."""
    flat = x.double().reshape(-1, x.shape[-1])
    n = loras[0][1].shape[0]
    rows = []
    for i, slot in enumerate(slot_ids.tolist()):
        row = flat.new_zeros(n) if weight is None else weight @ flat[i]
        if slot >= 0:
            lora_A, lora_B, scaling = loras[slot]
            row = row + scaling * (lora_B.double() @ (lora_A.double() @ flat[i]))
        rows.append(row if bias is None else row + bias.double())
    return (torch.stack(rows) if rows else flat.new_zeros(0, n)).view(*x.shape[:-1], n)


def base(kind: str, n: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor | NF4Weight | None:
    if kind == "none":
        return None
    return nf4(n, k, seed=seed) if kind == "nf4" else randn(n, k, seed=seed, dtype=dtype)


HIDDEN = (1, 3, 8, 17, 33, 64, 65, 96, 128, 130, 192, 257)


class Batch:
    """A random call of multi_lora_linear and its backward, by seed; ``truth`` is its result, row by row in fp64.

    Args:
        seed: of everything.
        dtypes: of x and of the adapters, one of them each.
        large: hidden sizes and ranks up to 2049 and 256 in one batch of eight, else small ones.
    """

    def __init__(self, seed: int, dtypes: Sequence[torch.dtype] = FLOATS, large: bool = True) -> None:
        draw = self.draw = random.Random(seed)
        self.seed = seed
        self.dtype = draw.choice(dtypes)
        big = large and draw.random() < 0.125
        sizes = (*HIDDEN, 384, 1000, 2049) if big else HIDDEN
        self.k, self.splits = draw.choice(sizes), tuple(draw.choice(sizes) for _ in range(draw.choice((1, 1, 2, 3))))
        self.n, self.most = sum(self.splits), 256 if big else draw.choice((4, 16, 64))
        slots = draw.choice((1, 2, 3, 9, 128 if self.most <= 16 else 5))
        self.values = draw.choice(dtypes)
        self.slots = [self._slot(e) for e in range(slots)]
        self.m = draw.choice((0, 1, 1, 2, 5, 8, 9, 16, 17, 33, 70))
        busy = draw.sample(range(slots), k=draw.randint(1, slots))
        ids = {
            "mixed": lambda: draw.choice((-1, *busy)),
            "none": lambda: -1,
            "one": lambda: busy[0],
            "distinct": lambda: draw.randrange(slots),
        }[draw.choice(("mixed", "mixed", "distinct", "one", "none"))]
        self.slot_ids = torch.tensor([ids() for _ in range(self.m)], dtype=torch.int32)
        self.x, self.dy = (self._randn(self.m, size).to(self.dtype) for size in (self.k, self.n))
        self.kind = draw.choice(("none", "dense", "nf4", "nf4"))
        self.weight = base(self.kind, self.n, self.k, self.dtype, seed)
        self.bias = self._randn(self.n).to(self.dtype) if draw.random() < 0.5 else None

    def __repr__(self) -> str:
        shape = f"M={self.m}, N={self.splits}, K={self.k}, {self.kind}, {self.dtype}, values {self.values}"
        return f"Batch({self.seed}): {shape}, {len(self.slots)} slots of rank <= {self.most}"

    def _randn(self, *shape: int) -> Tensor:
        return randn(*shape, seed=self.draw.randrange(2**31))

    def _slot(self, number: int) -> SlotAdapter | None:
        if self.draw.random() < 0.1:
            return None
        pairs: list[tuple[Tensor, Tensor, float] | None] = []
        for size in self.splits:
            rank = self.draw.randint(1, self.most)
            A, B = (self._randn(*shape).to(self.values) for shape in ((rank, self.k), (size, rank)))
            pairs.append(None if self.draw.random() < 0.2 else (A, B, self.draw.choice((0.5, 2.0, -1.0))))
        given = [self._randn(size) if self.draw.random() < 0.15 else None for size in (self.k, self.n, self.n)]
        return SlotAdapter(pairs, *given)

    def table(self) -> AdapterTable:
        """The slots, with NaN in the padding of their last pages."""
        table = AdapterTable.stack(self.slots, splits=self.splits, k=self.k)
        used = torch.zeros(table.values.shape[0], dtype=torch.bool)
        for e, part in itertools.product(range(len(self.slots)), range(len(self.splits))):
            rank = int(table.ranks[e, part])
            used[places(table.A_pages[e, part], rank, self.k)] = True
            used[places(table.B_pages[e, part], rank, self.splits[part])] = True
        return dataclasses.replace(table, values=table.values.masked_fill(~used, torch.nan))

    def row(self, i: int, x: Tensor, slot: SlotAdapter | None, dense: Tensor | None) -> Tensor:
        """One row in fp64: what the slot makes of x [K]."""
        slot = slot or SlotAdapter([None] * len(self.splits))
        if slot.x_scale is not None:
            x = x + ((x.detach().to(self.dtype) * slot.x_scale).to(self.dtype).double() - x.detach())
        y = x.new_zeros(self.n) if dense is None else dense @ x
        parts = [
            y.new_zeros(size) if pair is None else pair[2] * (pair[1].double() @ (pair[0].double() @ x))
            for pair, size in zip(slot.pairs, self.splits, strict=True)
        ]
        y = y + torch.cat(parts)
        y = y if slot.y_scale is None else y * slot.y_scale.double()
        y = y if self.bias is None else y + self.bias.double()
        return y if slot.bias is None else y + slot.bias.double()

    def truth(self) -> Tensor:
        """[M, N], fp64."""
        dense = None if self.weight is None else exact(self.weight, self.dtype)
        rows = [
            self.row(i, self.x[i].double(), self.slots[e] if e >= 0 else None, dense)
            for i, e in enumerate(self.slot_ids.tolist())
        ]
        return torch.stack(rows) if rows else torch.zeros(0, self.n, dtype=torch.float64)

    def size(self) -> float:
        """The largest magnitude of a sum in a result if nothing cancels: what its rounding errors go by."""
        squared = copy.copy(self)
        squared.slots = [
            s
            and SlotAdapter(
                [p and (p[0].double().pow(2), p[1].double().pow(2), p[2] ** 2) for p in s.pairs],
                None if s.x_scale is None else s.x_scale.double().abs() + 1,
                *(None if v is None else v.double().pow(2) for v in (s.y_scale, s.bias)),
            )
            for s in self.slots
        ]
        squared.bias = None if self.bias is None else self.bias.double().pow(2)
        dense = None if self.weight is None else exact(self.weight, self.dtype).pow(2)
        most = 0.0
        for i, e in enumerate(self.slot_ids.tolist()):
            slot = squared.slots[e] if e >= 0 else None
            x = self.x[i].double().pow(2)
            if slot is not None and slot.x_scale is not None:
                x, slot = x * slot.x_scale.pow(2), dataclasses.replace(slot, x_scale=None)
            most = max(most, squared.row(i, x, slot, dense).max().item())
        return most**0.5

    def gradients(self, power: int = 1) -> tuple[Tensor, dict[tuple[int, int], tuple[Tensor, Tensor]]]:
        """dX [M, K], and dA and dB^T of every slot and part in use, in fp64, of z = x W^T + s (x A^T) B^T with dZ = dy.

        ``power`` 2: of the squares of all, whose root is the size of the sums if nothing cancels.
        """
        x, dz = self.x.double() ** power, self.dy.double() ** power
        dense = None if self.weight is None else exact(self.weight, self.dtype) ** power
        dx = x.new_zeros(x.shape) if dense is None else dz @ dense
        found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for e, slot in enumerate(self.slots):
            rows, start = (self.slot_ids == e).nonzero().squeeze(1), 0
            for part, size in enumerate(self.splits):
                pair = slot.pairs[part] if slot is not None and rows.numel() else None
                if pair is not None:
                    A, B, s = pair[0].double() ** power, pair[1].double() ** power, pair[2] ** power
                    own = dz[rows, start : start + size]
                    g = s * (own @ B)
                    dx[rows] += g @ A
                    found[e, part] = g.t() @ x[rows], s * (x[rows] @ A.t()).t() @ own
                start += size
        return dx, found


def run(batch: Batch, rows: Tensor | None = None) -> Tensor:
    """The call, or that of some of its rows."""
    x, slot_ids = (t if rows is None else t[rows] for t in (batch.x, batch.slot_ids))
    return ops.multi_lora_linear(x, batch.weight, batch.table(), slot_ids, batch.bias)


def backward(batch: Batch, table: AdapterTable, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """dX and dvalues of the call, or of some of its rows."""
    dz, x, slot_ids = (t if rows is None else t[rows] for t in (batch.dy, batch.x, batch.slot_ids))
    nothing = (None, None, None, None, batch.n, batch.k, 0)
    weight = nothing if batch.weight is None else weight_args("test", batch.weight)
    pairs = (table.values, table.ranks, table.A_pages, table.B_pages, table.scaling)
    return OPS["multi_lora_linear_backward"](dz, x, *weight, *pairs, list(table.splits), slot_ids, True, True)


def check_rows(batch: Batch) -> None:
    """Every row against its truth."""
    with named(batch):
        assert_close(run(batch), batch.truth(), intermediate=batch.size())


def check_gradients(batch: Batch, solo: bool = True) -> None:
    """dX and dvalues against their truth; with ``solo`` a slot's bits against those of its own rows alone."""
    table = batch.table()
    (want_dx, wanted), (size_dx, sizes) = batch.gradients(), batch.gradients(power=2)
    dx, dvalues = backward(batch, table)
    alone = {e: backward(batch, table, (batch.slot_ids == e).nonzero().squeeze(1))[1] for e, _ in wanted if solo}
    untouched = torch.ones(dvalues.shape, dtype=torch.bool)
    with named(batch):
        assert_close(dx, want_dx, intermediate=size_dx.max().sqrt().item() if size_dx.numel() else 0.0)
        for (e, part), pair in wanted.items():
            rank = int(table.ranks[e, part])
            for which, width in ((0, batch.k), (1, batch.splits[part])):
                at = places((table.A_pages, table.B_pages)[which][e, part], rank, width)
                size = sizes[e, part][which].max().sqrt().item()
                assert_close(dvalues[at], pair[which].reshape(-1), intermediate=size)
                if solo:
                    assert_same_bits(alone[e][at], dvalues[at])
                untouched[at] = False
        assert (dvalues[untouched] == 0).all()


@contextmanager
def named(batch: Batch) -> Iterator[None]:
    """A failure in the block says which batch it was."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{batch}: {error}") from error
