"""AdapterTable: the adapters that the rows of one batch choose from, for one site of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peftrt.formats.pages import BIAS, PAGE, X_SCALE, Y_SCALE

LowRankPair = tuple[Tensor, Tensor, float]


@dataclass(frozen=True, eq=False)
class SlotAdapter:
    """What one slot holds for a site: ``y = y_scale * (x' W^T + s (x' A^T) B^T) + b + bias``, ``x' = x_scale * x``.

    Attributes:
        pairs: for each of P linear maps (lora_A [R, K], lora_B [N_p, R], scaling), or None for one without; ranks may
            differ.
        x_scale: ``[K]``, or None. IA3 on a feed-forward layer.
        y_scale: ``[N]``, or None. IA3 on keys and values; DoRA's factors ``m / ||W + s B A||``.
        bias: ``[N]``, or None.
    """

    pairs: Sequence[LowRankPair | None] = ()
    x_scale: Tensor | None = None
    y_scale: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class AdapterTable:
    """The adapters of one site in E slots; a site is P linear maps of one x, one below the other in W (q, k and v).

    Matrices lie in pages of 8 ranks, anywhere in ``values`` and in any order: a page of A is [8, K], a page of B,
    transposed, [8, N_p]. Rank r of slot e and map p is row ``r % 8`` of the pages that begin at
    ``values[A_pages[e, p, r // 8]]`` and ``values[B_pages[e, p, r // 8]]``. What lies behind a rank in its last page is
    not read.

    Attributes:
        values: ``[S]``, any floating dtype.
        ranks: int32 ``[E, P]``; 0 where a slot has nothing for a map.
        A_pages: int64 ``[E, P, W]``, in elements; W pages at most. Behind a slot's own pages anything may stand.
        B_pages: int64 ``[E, P, W]``.
        scaling: fp32 ``[E, P]``.
        splits: the maps' numbers of outputs, which sum to N.
        k: K.
        vectors: fp32 ``[V]``; None where no slot has factors or a bias.
        vector_starts: int64 ``[E, 3]``, where in ``vectors`` a slot's x_scale [K], y_scale [N] and bias [N] begin; -1
            for none.
    """

    values: Tensor
    ranks: Tensor
    A_pages: Tensor
    B_pages: Tensor
    scaling: Tensor
    splits: tuple[int, ...]
    k: int
    vectors: Tensor | None = None
    vector_starts: Tensor | None = None

    @property
    def n(self) -> int:
        """N, of all maps together."""
        return sum(self.splits)

    @classmethod
    def stack(
        cls,
        adapters: Sequence[LowRankPair | SlotAdapter | None],
        *,
        splits: Sequence[int] | None = None,
        k: int | None = None,
    ) -> AdapterTable:
        """A table of adapters, ranks mixed, in slots 0, 1, ...; gradients reach each adapter's tensors.

        Args:
            adapters: of each slot (lora_A [R, K], lora_B [N, R], scaling), a SlotAdapter, or None for an empty one.
            splits: the maps' numbers of outputs; by default one map, of as many as a lora_B has.
            k: K; by default as many as a lora_A has.

        Raises:
            ValueError: no adapters, tensors that do not fit together, or sizes that nothing tells.
        """
        if not adapters:
            raise ValueError("AdapterTable: needs at least one adapter")
        slots = [_as_slot(adapter) for adapter in adapters]
        pairs = [pair for slot in slots for pair in slot.pairs if pair is not None]
        if (k is None or splits is None) and not pairs:
            raise ValueError("AdapterTable: without a low-rank pair, splits and k must be given")
        k = pairs[0][0].shape[-1] if k is None else k
        splits = (pairs[0][1].shape[0],) if splits is None else tuple(splits)
        stacking = _Stacking(splits, k)
        for number, slot in enumerate(slots):
            stacking.add(number, slot)
        return stacking.table()


def _as_slot(adapter: LowRankPair | SlotAdapter | None) -> SlotAdapter:
    if isinstance(adapter, SlotAdapter):
        return adapter
    return SlotAdapter() if adapter is None else SlotAdapter((adapter,))


@dataclass
class _Stacking:
    """A table in the making: its pieces one behind the other, and where they begin."""

    splits: tuple[int, ...]
    k: int
    pieces: list[Tensor] = field(default_factory=list)
    used: int = 0
    ranks: list[list[int]] = field(default_factory=list)
    pages: list[list[tuple[list[int], list[int]]]] = field(default_factory=list)
    scaling: list[list[float]] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)
    vectors_used: int = 0
    starts: list[list[int]] = field(default_factory=list)

    def add(self, number: int, slot: SlotAdapter) -> None:
        pairs = list(slot.pairs) or [None] * len(self.splits)
        if len(pairs) != len(self.splits):
            raise ValueError(f"AdapterTable: adapter {number}: {len(pairs)} pairs for {len(self.splits)} splits")
        self.ranks.append([0 if pair is None else pair[0].shape[0] for pair in pairs])
        self.scaling.append([0.0 if pair is None else float(pair[2]) for pair in pairs])
        self.pages.append([self._pair(number, pair, n) for pair, n in zip(pairs, self.splits, strict=True)])
        starts = [-1, -1, -1]
        n = sum(self.splits)
        for which, name, size in ((X_SCALE, "x_scale", self.k), (Y_SCALE, "y_scale", n), (BIAS, "bias", n)):
            vector = getattr(slot, name)
            if vector is None:
                continue
            if tuple(vector.shape) != (size,):
                raise ValueError(f"AdapterTable: adapter {number}: {name} must be [{size}], got {list(vector.shape)}")
            starts[which] = self.vectors_used
            self.vectors.append(vector)
            self.vectors_used += size
        self.starts.append(starts)

    def _pair(self, number: int, pair: LowRankPair | None, n: int) -> tuple[list[int], list[int]]:
        if pair is None:
            return [], []
        lora_A, lora_B, _ = pair
        rank = lora_A.shape[0] if lora_A.dim() == 2 else -1
        if tuple(lora_A.shape) != (rank, self.k) or tuple(lora_B.shape) != (n, rank):
            shapes = f"{list(lora_A.shape)} and {list(lora_B.shape)}"
            sizes = f"lora_A [R, {self.k}], lora_B [{n}, R]"
            raise ValueError(f"AdapterTable: adapter {number}: expected {sizes}, got {shapes}")
        return self._matrix(lora_A), self._matrix(lora_B.t())

    def _matrix(self, rows: Tensor) -> list[int]:
        """The pages of [R, width]."""
        rank, width = rows.shape
        padded = torch.nn.functional.pad(rows, (0, 0, 0, -rank % PAGE))
        self.pieces.append(padded.reshape(-1))
        starts = [self.used + first * width for first in range(0, padded.shape[0], PAGE)]
        self.used += padded.numel()
        return starts

    def table(self) -> AdapterTable:
        given = [*self.pieces, *self.vectors]
        device = given[0].device if given else torch.device("cpu")
        most = max(len(pages) for slot in self.pages for part in slot for pages in part) if self.pages else 0
        A_pages, B_pages = (
            [[part[side] + [0] * (max(most, 1) - len(part[side])) for part in slot] for slot in self.pages]
            for side in (0, 1)
        )
        return AdapterTable(
            values=torch.cat(self.pieces) if self.pieces else torch.zeros(0, device=device),
            ranks=torch.tensor(self.ranks, dtype=torch.int32).to(device),
            A_pages=torch.tensor(A_pages, dtype=torch.int64).to(device),
            B_pages=torch.tensor(B_pages, dtype=torch.int64).to(device),
            scaling=torch.tensor(self.scaling, dtype=torch.float32).to(device),
            splits=self.splits,
            k=self.k,
            vectors=torch.cat([_wide(vector) for vector in self.vectors]) if self.vectors else None,
            vector_starts=torch.tensor(self.starts, dtype=torch.int64).to(device) if self.vectors else None,
        )


def _wide(vector: Tensor) -> Tensor:
    return vector if vector.dtype == torch.float64 else vector.float()
