"""Batches of many adapters: which row has which, the adapters themselves, and how both are rotated over memory."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.problem import SEED
from bench.shapes import MIXED_RANKS, Site
from peftrt.ops import AdapterTable

Adapter = tuple[Tensor, Tensor, float]

DISTINCT, UNIFORM, ZIPF, IDENTICAL = "distinct", "uniform", "zipf", "identical"
ZIPF_EXPONENT = 1.5
BARE = "-bare"  # a quarter of the rows has no adapter
BARE_SHARE = 0.25
# What is in use moves by whole groups of so many slots: their ranks are the same eight again.
GROUP = len(MIXED_RANKS)
# More calls than these are not captured in one graph: what a call uses is then so small that it fits beside the rest.
MOST_CALLS = 64

PART = re.compile(r"(distinct|uniform|zipf|identical)(-bare)?-r(\d+|mix)-e(\d+)$")


@dataclass(frozen=True)
class Mix:
    """How a batch chooses from a table.

    Attributes:
        popularity: ``distinct``: row i has adapter i mod slots; ``identical``: all rows have one; ``uniform`` and
            ``zipf``: drawn.
        bare: whether a quarter of the rows has no adapter.
        rank: of every adapter; None: ranks are mixed.
        slots: of the table.
    """

    popularity: str
    bare: bool
    rank: int | None
    slots: int

    def __str__(self) -> str:
        bare = BARE if self.bare and self.popularity in (DISTINCT, IDENTICAL) else ""
        return f"{self.popularity}{bare}-r{self.rank or 'mix'}-e{self.slots}"

    @classmethod
    def of(cls, part: str) -> Mix:
        """The mix that the end of a cell's part names."""
        found = PART.search(part)
        if found is None:
            raise ValueError(f"{part}: expected it to end in <popularity>[-bare]-r<rank or mix>-e<slots>")
        popularity, bare, rank, slots = found.groups()
        bare = bare is not None or popularity in (UNIFORM, ZIPF)
        return cls(popularity, bare, None if rank == "mix" else int(rank), int(slots))

    @property
    def ranks(self) -> list[int]:
        """The rank of every slot."""
        return [self.rank or MIXED_RANKS[slot % GROUP] for slot in range(self.slots)]

    def ids(self, M: int) -> list[int]:
        """The adapter of each row, -1 for none; the same every time. Those in use are the first slots."""
        generator = torch.Generator().manual_seed(SEED + 5)
        weights = torch.ones(self.slots)
        if self.popularity == ZIPF:
            weights = torch.arange(1, self.slots + 1).double() ** -ZIPF_EXPONENT
        drawn = torch.multinomial(weights, M, replacement=True, generator=generator).tolist()
        given = {DISTINCT: [i % self.slots for i in range(M)], IDENTICAL: [0] * M}.get(self.popularity, drawn)
        rows = torch.randperm(M, generator=generator)[: round(BARE_SHARE * M) if self.bare else 0].tolist()
        for i in rows:
            given[i] = -1
        places: dict[int, int] = {-1: -1}
        for slot in given:
            places.setdefault(slot, len(places) - 1)
        return [places[slot] for slot in given]

    def letters(self, M: int) -> tuple[tuple[str, int], ...]:
        """T: the sum of the ranks of the adapters in use; Q: the sum over the rows of the ranks of theirs."""
        ids, ranks = self.ids(M), self.ranks
        used = [slot for slot in ids if slot >= 0]
        return (("T", sum(ranks[slot] for slot in {*used})), ("Q", sum(ranks[slot] for slot in used)))


def _normal(*shape: int, generator: torch.Generator, scale: float, dtype: torch.dtype) -> Tensor:
    return (scale * torch.randn(*shape, generator=generator, device=generator.device)).to(dtype)


# One table at a time: 128 adapters of rank 128 take half a gigabyte at 4096 x 4096 in fp32.
@functools.lru_cache(maxsize=1)
def adapters(site: Site, ranks: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Adapter, ...]:
    """(A ``[R, K]``, B ``[N, R]``, s) of every slot, in ``dtype``; s is a power of two, so that B times s is exact."""
    generator = torch.Generator(device).manual_seed(SEED + 6)
    made = []
    for slot, rank in enumerate(ranks):
        A = _normal(rank, site.K, generator=generator, scale=site.K**-0.5, dtype=dtype)
        B = _normal(site.N, rank, generator=generator, scale=rank**-0.5, dtype=dtype)
        made.append((A, B, 2.0 ** (slot % 3 - 1)))
    return tuple(made)


@dataclass(frozen=True)
class Stack:
    """Adapters as servers hold them: one tensor for all slots, padded to the largest rank with zeros; one slot more,
    of rank 0, for rows without an adapter.
    """

    A: Tensor  # [E + 1, R, K]
    B: Tensor  # [E + 1, N, R]
    ranks: tuple[int, ...]
    scaling: tuple[float, ...]

    @classmethod
    def of(cls, given: Sequence[Adapter]) -> Stack:
        """A stack of ``given``, in their order."""
        ranks = tuple(A.shape[0] for A, _, _ in given)
        (K, N), most = (given[0][0].shape[1], given[0][1].shape[0]), max(ranks)
        A, B = given[0][0].new_zeros(len(given) + 1, most, K), given[0][0].new_zeros(len(given) + 1, N, most)
        for slot, (one_A, one_B, _) in enumerate(given):
            A[slot, : ranks[slot]] = one_A
            B[slot, :, : ranks[slot]] = one_B
        return cls(A, B, (*ranks, 0), (*(scaling for _, _, scaling in given), 0.0))

    @property
    def slots(self) -> int:
        """Of adapters."""
        return len(self.ranks) - 1

    def folded(self) -> Stack:
        """The scalings in B."""
        factors = torch.tensor(self.scaling, dtype=self.B.dtype, device=self.B.device)
        return replace(self, B=self.B * factors[:, None, None], scaling=(1.0,) * len(self.scaling))

    def clone(self) -> Stack:
        """The same values elsewhere in memory."""
        return replace(self, A=self.A.clone(), B=self.B.clone())


@dataclass(frozen=True)
class Rotation:
    """Which copy of a table each call of a turn reads, and how far into its slots: no call finds its adapters in a
    GPU's cache, though no more copies are made than it takes.
    """

    calls: int
    tables: int
    step: int
    slots: int

    @classmethod
    def plan(cls, mix: Mix, M: int, call_bytes: float, rotation_bytes: int) -> Rotation:
        """As many calls as fill ``rotation_bytes``."""
        calls = max(1, min(MOST_CALLS, math.ceil(rotation_bytes / call_bytes)))
        used = len({*mix.ids(M)} - {-1})
        step = GROUP * max(1, math.ceil(used / GROUP))
        places = max(1, mix.slots // step)
        return cls(calls, math.ceil(calls / places), step, mix.slots)

    def table(self, call: int) -> int:
        """The copy that a call reads."""
        return call % self.tables

    def ids(self, ids: Sequence[int], call: int) -> list[int]:
        """The rows' adapters in a call."""
        shift = call // self.tables * self.step
        return [slot if slot < 0 else (slot + shift) % self.slots for slot in ids]


def moved(table: AdapterTable) -> AdapterTable:
    """A table whose values lie elsewhere in memory."""
    return replace(table, values=table.values.clone())
