"""How pages come into a slot of the device's memory and leave it, and what waits for what.

A mover is told four things: begin to fetch a page into a slot; kernels launched from now on need what was fetched;
begin to flush a slot, behind the kernels launched so far; wait for everything. It sees to it that a slot is overwritten
only when its former page has left, and that a page is read only when its last flush is done.

The CUDA half has not run on a GPU yet.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from peftrt.optim.stores import FileStore, HostStore, Store


class Mover:
    """Copies at once: between two places in the memory of a CPU.

    Args:
        store: where pages lie.
        slots: the memory of each slot, uint8 ``[page_bytes]``.

    Attributes:
        threads: of the CPU that move pages while the caller computes.
    """

    threads = 0

    def __init__(self, store: Store, slots: list[Tensor]) -> None:
        self.store = store
        self.slots = slots

    def fetch(self, page: int, slot: int) -> None:
        """Begin to copy a page into a slot; returns before it is there."""
        self.store.read(page, self.slots[slot])

    def await_fetched(self, slot: int) -> None:
        """What is launched on the current stream from now on comes behind the slot's fetch.

        Raises:
            OSError: the page, or one that was in the slot before, could not be read or written.
        """

    def flush(self, page: int, slot: int) -> None:
        """Begin to copy a slot to its page, behind what the current stream has been given so far."""
        self.store.write(page, self.slots[slot])

    def drain(self) -> None:
        """Return when all that was begun is done.

        Raises:
            OSError: a page could not be read or written.
        """

    def close(self) -> None:
        """End threads, if any."""


class StreamMover(Mover):
    """Between page-locked memory and a CUDA device: one stream for each direction, so that they overlap.

    The host waits for nothing but in ``drain``. Events are made once and recorded again.
    """

    store: HostStore

    def __init__(self, store: HostStore, slots: list[Tensor]) -> None:
        super().__init__(store, slots)
        self._device = slots[0].device
        self._up, self._down = torch.cuda.Stream(self._device), torch.cuda.Stream(self._device)
        self._fetched, self._used, self._flushed = ([torch.cuda.Event() for _ in slots] for _ in range(3))
        self._left: dict[int, int] = {}  # page -> the slot that it was last flushed from
        # the slots were made on the caller's stream
        for stream in (self._up, self._down):
            stream.wait_stream(torch.cuda.current_stream(self._device))

    def fetch(self, page: int, slot: int) -> None:
        # An event that was never recorded holds nothing up. Later flushes of a slot are behind earlier ones.
        self._up.wait_event(self._flushed[slot])
        self._up.wait_event(self._flushed[self._left.get(page, slot)])
        with torch.cuda.stream(self._up):
            self.slots[slot].copy_(self.store.view(page), non_blocking=True)
        self._fetched[slot].record(self._up)

    def await_fetched(self, slot: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._fetched[slot])

    def flush(self, page: int, slot: int) -> None:
        self._used[slot].record(torch.cuda.current_stream(self._device))
        self._down.wait_event(self._used[slot])
        with torch.cuda.stream(self._down):
            self.store.view(page).copy_(self.slots[slot], non_blocking=True)
        self._flushed[slot].record(self._down)
        self._left[page] = slot

    def drain(self) -> None:
        torch.cuda.synchronize(self._device)


class ThreadMover(Mover):
    """Between a file and the memory of a CPU: one thread reads and one writes while the caller computes."""

    # OpenMP's threads spin where they wait for work. Left to the movers, their cores make no difference on an idle
    # machine, and where one core is busy with something else a step takes 60 ms instead of 90, with pages of 1 MiB 73
    # instead of 179 (448 tensors of 32,768, nothing resident, two threads, Zen 3, November 2026).
    threads = 2

    def __init__(self, store: Store, slots: list[Tensor]) -> None:
        super().__init__(store, slots)
        self._reader = ThreadPoolExecutor(1, "peftrt-pages-in")
        self._writer = ThreadPoolExecutor(1, "peftrt-pages-out")
        self._fetched: list[Future[None] | None] = [None for _ in slots]
        self._flushed: list[Future[None] | None] = [None for _ in slots]
        self._left: dict[int, int] = {}

    def fetch(self, page: int, slot: int) -> None:
        before = self._flushed[slot], self._flushed[self._left.get(page, slot)]

        def read() -> None:
            for flushed in before:
                _finish(flushed)
            self._bring(page, slot)

        self._fetched[slot] = self._reader.submit(read)

    def await_fetched(self, slot: int) -> None:
        _finish(self._fetched[slot])

    def flush(self, page: int, slot: int) -> None:
        mark = self._mark(slot)
        self._flushed[slot] = self._writer.submit(self._take, page, slot, mark)
        self._left[page] = slot

    def _bring(self, page: int, slot: int) -> None:
        self.store.read(page, self.slots[slot])

    def _mark(self, slot: int) -> Any:
        """A point in the work that the slot's kernels are before."""
        return None

    def _take(self, page: int, slot: int, mark: Any) -> None:
        self.store.write(page, self.slots[slot])

    def drain(self) -> None:
        for future in (*self._flushed, *self._fetched):
            _finish(future)

    def close(self) -> None:
        self._reader.shutdown()
        self._writer.shutdown()


class BounceMover(ThreadMover):
    """Between a CUDA device and a file, or memory that is not page-locked: through page-locked pages, two for a slot.

    Here the host waits for each page that it reads.

    Raises:
        RuntimeError: not even these few pages can be locked.
    """

    def __init__(self, store: Store, slots: list[Tensor]) -> None:
        super().__init__(store, slots)
        self._device = slots[0].device
        self._streams = torch.cuda.Stream(self._device), torch.cuda.Stream(self._device)
        self._incoming, self._outgoing = (
            [torch.empty(slot.numel(), dtype=torch.uint8, pin_memory=True) for slot in slots] for _ in range(2)
        )
        self._arrived, self._used, self._gone = ([torch.cuda.Event() for _ in slots] for _ in range(3))
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream(self._device))

    def await_fetched(self, slot: int) -> None:
        super().await_fetched(slot)
        torch.cuda.current_stream(self._device).wait_event(self._arrived[slot])

    def _bring(self, page: int, slot: int) -> None:
        self._arrived[slot].synchronize()  # the copy that read this buffer last
        self.store.read(page, self._incoming[slot])
        with torch.cuda.stream(self._streams[0]):
            self.slots[slot].copy_(self._incoming[slot], non_blocking=True)
        self._arrived[slot].record(self._streams[0])

    def _mark(self, slot: int) -> Any:
        self._used[slot].record(torch.cuda.current_stream(self._device))
        return self._used[slot]

    def _take(self, page: int, slot: int, mark: Any) -> None:
        self._streams[1].wait_event(mark)
        with torch.cuda.stream(self._streams[1]):
            self._outgoing[slot].copy_(self.slots[slot], non_blocking=True)
        self._gone[slot].record(self._streams[1])
        self._gone[slot].synchronize()
        self.store.write(page, self._outgoing[slot])

    def drain(self) -> None:
        super().drain()
        torch.cuda.synchronize(self._device)


def mover_for(store: Store, slots: list[Tensor]) -> Mover:
    """What moves pages between this store and these slots."""
    if slots[0].is_cuda:
        if isinstance(store, HostStore) and store.pinned:
            return StreamMover(store, slots)
        return BounceMover(store, slots)
    return ThreadMover(store, slots) if isinstance(store, FileStore) else Mover(store, slots)


def _finish(future: Future[None] | None) -> None:
    if future is not None:
        future.result()
