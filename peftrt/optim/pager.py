"""Which pages of the state are on the device, and the order in which a step meets them.

The first pages of the table stay on the device. The others come through a ring of three slots: one is computed with,
one leaves, one arrives. What the ring holds at the end of a step is what the next one begins with, so that a step moves
three pages fewer than there are, and its first launches wait for nothing. The order differs from step to step, and no
bit of the result depends on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peftrt.optim.movers import Mover, mover_for
from peftrt.optim.page_table import PageTable
from peftrt.optim.stores import Store

RING = 3


class Pager:
    """The pages of a table, as many of them on the device as there are slots.

    Args:
        table: the pages.
        device: where they are computed with.
        store: where they lie otherwise.

    Attributes:
        slab: the device's memory, uint8 [slots * page_bytes]; None while it is released.
        resident: how many pages stay on the device.
        bytes_in, bytes_out: moved to the device and away from it so far.
    """

    def __init__(self, table: PageTable, device: torch.device, store: Store) -> None:
        self.table = table
        self.store = store
        self.slab: Tensor | None = None
        self.resident = 0
        self.bytes_in = self.bytes_out = 0
        self._device = device
        self._mover: Mover | None = None
        self._held: list[int | None] = []  # the page in each slot of the ring
        self._dirty: list[bool] = []  # whether it is newer there than in the store

    def start(self, slots: int) -> None:
        """Take the device's memory, zeroed; pages that have no room in it get theirs in the store.

        Raises:
            MemoryError, RuntimeError, OSError: there is no memory, here or there; nothing is kept.
        """
        self._acquire(slots)
        try:
            self.store.make_room(range(self.resident, len(self.table.pages)))
        except BaseException:
            self._drop()
            raise

    def _acquire(self, slots: int) -> None:
        pages, size = len(self.table.pages), self.table.page_bytes
        if slots < pages and slots < RING:
            raise ValueError(f"Pager: {slots} slots for {pages} pages, at least {RING} are needed")
        with torch.inference_mode(False):
            slab = torch.zeros(min(slots, pages) * size, dtype=torch.uint8, device=self._device)
        self.resident = pages if slots >= pages else slots - RING
        if self.resident < pages:
            ring = [slab[offset : offset + size] for offset in range(self.resident * size, slab.numel(), size)]
            self._mover = mover_for(self.store, ring)
        self._held, self._dirty = [None] * RING, [False] * RING
        self.slab = slab

    def _drop(self) -> None:
        if self._mover is not None:
            self._mover.close()
        self._mover = self.slab = None
        self._held = []

    @property
    def threads(self) -> int:
        """Of the CPU that move pages meanwhile."""
        return 0 if self._mover is None else self._mover.threads

    def step(self, touched: Sequence[bool], launch: Callable[[int, int], None]) -> None:
        """Let ``launch`` update every page that is touched.

        Args:
            touched: for each page.
            launch: is called with a page and its offset in the slab, and with -1 and 0 for all resident pages together;
                what it launches runs on the current stream, or is done when it returns.

        Raises:
            OSError: a page could not be read or written. Some pages are updated, and some are not.
        """
        queue = deque(
            page for page in range(self.resident, len(self.table.pages)) if touched[page] and page not in self._held
        )
        # Slots with something to do come first, so that they are free first.
        ready = deque(slot for slot, page in enumerate(self._held) if page is not None and touched[page])
        for slot in range(RING):
            if slot not in ready and queue:
                self._exchange(slot, queue.popleft())
                ready.append(slot)

        def turn() -> None:
            slot = ready.popleft()
            self._update(slot, launch)
            if queue:
                self._exchange(slot, queue.popleft())
                ready.append(slot)

        for _ in range(len(ready)):
            turn()
        # The resident pages come behind the first round of the ring: pages move meanwhile.
        if any(touched[: self.resident]):
            launch(-1, 0)
        while ready:
            turn()

    def _update(self, slot: int, launch: Callable[[int, int], None]) -> None:
        page = self._held[slot]
        assert page is not None
        assert self._mover is not None
        self._mover.await_fetched(slot)
        self._dirty[slot] = True
        launch(page, (self.resident + slot) * self.table.page_bytes)

    def _exchange(self, slot: int, page: int) -> None:
        """Begin to put a page into a slot in place of the one that is there."""
        assert self._mover is not None
        held = self._held[slot]
        if held is not None and self._dirty[slot]:
            self._mover.flush(held, slot)
            self.bytes_out += self.table.page_bytes
        self._held[slot], self._dirty[slot] = page, False
        self._mover.fetch(page, slot)
        self.bytes_in += self.table.page_bytes

    def read(self, page: int) -> Tensor:
        """A page's bytes, uint8 ``[page_bytes]`` on the CPU, not to be written; they hold until the next call.

        Raises:
            OSError: it cannot be read.
        """
        self._drain()
        place = self._place(page)
        if place is not None:
            return place.cpu()
        found = torch.empty(self.table.page_bytes, dtype=torch.uint8)
        self.store.read(page, found)
        return found

    def write(self, page: int, data: Tensor) -> None:
        """Replace a page by bytes of the CPU.

        Raises:
            OSError: it cannot be written.
        """
        self._drain()
        place = self._place(page)
        if place is None:
            self.store.write(page, data)
            return
        place.copy_(data)
        if page >= self.resident:
            self._dirty[self._held.index(page)] = True

    def _place(self, page: int) -> Tensor | None:
        """Where the page is on the device, if it is there."""
        if self.slab is None:
            return None
        if page < self.resident:
            slot = page
        elif page in self._held:
            slot = self.resident + self._held.index(page)
        else:
            return None
        return self.slab[slot * self.table.page_bytes : (slot + 1) * self.table.page_bytes]

    def _drain(self) -> None:
        if self._mover is not None:
            self._mover.drain()
        elif self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def release(self) -> None:
        """Move every page to the store and give the device's memory back.

        Raises:
            MemoryError, RuntimeError, OSError: the store cannot take them; nothing is lost, and all is where it was.
        """
        if self.slab is None:
            return
        self._drain()
        on_device = [*range(self.resident), *(page for page in self._held if page is not None)]
        self.store.make_room(on_device)
        for page in on_device:
            self.store.write(page, self.read(page))
        self._drop()

    def acquire(self, slots: int) -> None:
        """The inverse of ``release``, with so many slots.

        Raises:
            MemoryError, RuntimeError: the device has no room; all pages are in the store.
        """
        self._acquire(slots)
        try:
            for page in range(self.resident):
                found = torch.empty(self.table.page_bytes, dtype=torch.uint8)
                self.store.read(page, found)
                self.write(page, found)
        except BaseException:
            self._drop()
            raise

    def forget(self) -> None:
        """Take every page that is in the ring for stale, and errors of moving them for settled: all will be written."""
        if self._mover is not None:
            slots = self._mover.slots
            self._mover.close()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._mover = mover_for(self.store, slots)
            self._held, self._dirty = [None] * RING, [False] * RING

    def close(self) -> None:
        """Give all memory back."""
        self._drop()
        self.store.close()
