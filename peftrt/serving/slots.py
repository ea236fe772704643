"""The pool's memory on the device: one slab of pages, and the descriptors that say where a slot's pages are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from peftrt import ops
from peftrt.formats.pages import PAGE
from peftrt.serving.arena import UNIT, Arena, Piece
from peftrt.serving.layout import FP32_BYTES, Layout, Site
from peftrt.serving.transfer import transfer_for


@dataclass(frozen=True, eq=False)
class Place:
    """Where an adapter is on the device.

    Attributes:
        slot: its id in every site's table.
        pieces: of the slab.
        ready: a mark behind the writes.
    """

    slot: int
    pieces: tuple[Piece, ...]
    ready: Any


class Slots:
    """Up to E adapters over L sites, in one slab that is taken once.

    Pages and vectors of all sites lie anywhere in the slab. A slot's descriptors are written pages first and ranks
    last, and taken back ranks first: a call of another slot's that looks at them meanwhile sees the one or the other.
    Not for several threads at once: the pool's lock is around every call.

    Args:
        sites: L layers on one device.
        nbytes: of the slab.
        dtype: of A and B.
        max_adapters: E.
        max_rank: 8 W.

    Attributes:
        tables: layer -> its AdapterTable.
        plain_tables: the same without vectors, for batches in which no adapter has any.
    """

    def __init__(
        self, sites: Sequence[Site], nbytes: int, dtype: torch.dtype, max_adapters: int, max_rank: int
    ) -> None:
        device = sites[0].layer.weight.device
        self.arena = Arena(nbytes)
        self.dtype = dtype
        self.slab = torch.zeros(self.arena.nbytes, dtype=torch.uint8, device=device)
        self.max_adapters = max_adapters
        self._free = list(range(max_adapters - 1, -1, -1))
        head, width = (len(sites), max_adapters), -(-max_rank // PAGE)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*head, *shape, dtype=dtype, device=device)

        self._ranks = zeros(1, dtype=torch.int32)
        self._A_pages, self._B_pages = (zeros(1, width, dtype=torch.int64) for _ in range(2))
        self._scaling = zeros(1, dtype=torch.float32)
        self._vectors = zeros(3, dtype=torch.int64).fill_(-1)
        # after all that it will write to has been made
        descriptors = (self._ranks, self._A_pages, self._B_pages, self._scaling, self._vectors)
        self.transfer = transfer_for(self.slab, *descriptors)
        self.tables = {site.layer: self._table(site) for site in sites}
        self.plain_tables = {
            layer: replace(table, vectors=None, vector_starts=None) for layer, table in self.tables.items()
        }

    def _table(self, site: Site) -> ops.AdapterTable:
        i = site.index
        return ops.AdapterTable(
            values=self.slab.view(self.dtype),
            ranks=self._ranks[i],
            A_pages=self._A_pages[i],
            B_pages=self._B_pages[i],
            scaling=self._scaling[i],
            vectors=self.slab.view(torch.float32),
            vector_starts=self._vectors[i],
            splits=(site.n,),
            k=site.k,
        )

    @property
    def free_slots(self) -> int:
        """Slots without an adapter."""
        return len(self._free)

    def place(self, layout: Layout, scaling: Tensor, image: Tensor) -> Place | None:
        """Bring an adapter to the device; None, and nothing changed, where there is no room.

        Args:
            layout: of the image.
            scaling: fp32 ``[L]``, on the host.
            image: uint8 ``[layout.nbytes]``, on the host.
        """
        pieces = self.arena.allocate_pages(layout.sizes) if self._free else None
        if pieces is None:
            return None
        slot = self._free.pop()
        try:
            with self.transfer.writing():
                self._write(slot, pieces, layout, scaling, image)
            return Place(slot, tuple(pieces), self.transfer.written())
        except BaseException:
            self._take_back(slot, pieces, ())
            raise

    def _write(self, slot: int, pieces: Sequence[Piece], layout: Layout, scaling: Tensor, image: Tensor) -> None:
        write = self.transfer.write
        addresses = torch.empty(len(layout.sizes), dtype=torch.int64)
        for offset, nbytes, first, end in pieces:
            start = int(layout.offsets[first])
            write(self.slab[offset : offset + nbytes], image[start : start + nbytes])
            addresses[first:end] = layout.offsets[first:end] + (offset - start)
        if not pieces:
            return
        width = layout.A_pages.shape[1]
        for target, numbers in ((self._A_pages, layout.A_pages), (self._B_pages, layout.B_pages)):
            write(target[:, slot, 0, :width], addresses[numbers] // self.dtype.itemsize)
        write(self._scaling[:, slot, 0], scaling)
        starts = torch.where(layout.vectors < 0, -1, addresses[layout.vectors.clamp_min(0)] // FP32_BYTES)
        write(self._vectors[:, slot], starts)
        write(self._ranks[:, slot, 0], layout.ranks)

    def vacate(self, place: Place, after: Iterable[Any] = ()) -> Any:
        """Zero an adapter's bytes once what lies before the marks is done, and give them back; a mark behind that."""
        self._take_back(place.slot, place.pieces, (place.ready, *after))
        return self.transfer.written()

    def _take_back(self, slot: int, pieces: Sequence[Piece], after: Iterable[Any]) -> None:
        fill = self.transfer.fill
        with self.transfer.writing([mark for mark in after if mark is not None]):
            fill(self._ranks[:, slot], 0)
            for piece in pieces:
                fill(self.slab[piece.offset : piece.offset + piece.nbytes], 0)
            fill(self._vectors[:, slot], -1)
            for tensor in (self._scaling, self._A_pages, self._B_pages):
                fill(tensor[:, slot], 0)
        # only now: bytes that could not be zeroed are not given to anyone
        for piece in pieces:
            self.arena.free(piece.offset)
        self._free.append(slot)

    def close(self) -> None:
        """Zero what is not zero yet of the slab, and give it back; a second time does nothing."""
        with self.transfer.writing():
            self.transfer.fill(self._ranks, 0)
            # what was given back is zero already
            if self.arena.used:
                self.transfer.fill(self.slab, 0)
        self.transfer.wait_on_host([mark for mark in (self.transfer.written(),) if mark is not None])
        self.tables.clear()
        self.plain_tables.clear()
        self.slab = self.slab.new_empty(0)


def check_room(nbytes: int, max_adapters: int, max_rank: int) -> None:
    """Raise ValueError for sizes that no pool can have."""
    if nbytes < UNIT:
        raise ValueError(f"AdapterPool: device_budget must be at least {UNIT} bytes, got {nbytes}")
    for name, value in (("max_adapters", max_adapters), ("max_rank", max_rank)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"AdapterPool: {name} must be an integer of at least 1, got {value!r}")
