"""Which adapters are on the device, which in host memory, which on disk alone, and who is using them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from peftrt.formats.names import check_adapter_name, fold_name
from peftrt.serving.entry import Entry
from peftrt.serving.errors import AdapterTooLargeError, PoolBusyError, PoolClosedError, UnknownAdapterError
from peftrt.serving.slots import Slots
from peftrt.serving.stats import PoolStats


class Tiers:
    """The entries of a pool; for any number of threads.

    One lock is around all of it, and one condition tells of every change. Disks are read outside of the lock: an entry
    that a thread is bringing to the device is marked so, others that want it wait, and a thread that waits holds
    nothing that another could wait for. Copies to the device are made under the lock.

    Args:
        slots: on the device.
        host_budget: bytes of images in host memory.
        read_again: gives an entry's image from disk, or raises.

    Attributes:
        changed: the condition; the methods that say so want it held.
        entries: name -> entry that new batches get.
    """

    def __init__(self, slots: Slots, host_budget: int, read_again: Callable[[Entry], Tensor]) -> None:
        self.changed = threading.Condition(threading.Lock())
        self.entries: dict[str, Entry] = {}
        self.closed = False
        self.batches = 0
        self._slots, self._host_budget, self._read_again = slots, host_budget, read_again
        self._folded: dict[str, str] = {}
        self._resident: dict[int, Entry] = {}
        # in the order of their last use
        self._host: dict[Entry, int] = {}
        self._host_used = 0
        self._in_flight: set[Entry] = set()
        self._clock = 0
        self._count = dict.fromkeys(_COUNTED, 0)
        self._seconds: list[float] = [0.0, 0.0]  # sum, largest

    def expect_open(self) -> None:
        """Raise PoolClosedError once the pool was closed."""
        if self.closed:
            raise PoolClosedError("the pool was closed")

    def expect_free(self, name: str, replace: bool) -> None:
        """Raise AdapterNameError unless a new adapter can be called so; the lock is held."""
        other = self._folded.get(fold_name(name))
        if other is not None and not (replace and other == name):
            check_adapter_name(name, [other])

    def look_up(self, name: str) -> Entry:
        """The entry of that name; the lock is held."""
        entry = self.entries.get(name)
        if entry is None:
            raise UnknownAdapterError(f"no adapter {name!a} is loaded; the pool knows {len(self.entries)}")
        return entry

    def add(self, entry: Entry, image: Tensor) -> None:
        """Give the entry to all batches from now on, in place of one of its name; the lock is held.

        A pinned one's successor is pinned, too.

        Raises:
            PoolBusyError: there is no room for that; nothing is changed.
        """
        before = self.entries.get(entry.name)
        if before is not None and before.pinned:
            if not self._could_place([entry]) or not self._place([entry], {entry: image}):
                raise self._busy([entry])
            entry.pinned = True
        if before is not None:
            self.retire(entry.name)
        self.entries[entry.name] = entry
        self._folded[fold_name(entry.name)] = entry.name
        self._keep(entry, image)
        self.changed.notify_all()

    def retire(self, name: str) -> Entry:
        """Let no new batch have the entry; it is freed now, or when the last batch that has it ends. The lock is held.

        Raises:
            UnknownAdapterError: there is none.
        """
        entry = self.look_up(name)
        del self.entries[name]
        del self._folded[fold_name(name)]
        entry.retired, entry.pinned = True, False
        self._drop_image(entry)
        if not entry.refs:
            self._leave(entry)
        self.changed.notify_all()
        return entry

    def acquire(self, names: Iterable[str], wait: float) -> dict[str, Entry]:
        """The entries of these names, all on the device and kept there until :meth:`release`.

        Args:
            names: repeats do not matter.
            wait: seconds to wait for room.

        Raises:
            UnknownAdapterError: a name that is not loaded.
            AdapterTooLargeError: together they cannot be on the device.
            PoolBusyError: there is no room for all of them: nothing is held.
            AdapterChangedError, FormatError, OSError: one cannot be read from disk again.
        """
        names = tuple(dict.fromkeys(names))
        deadline = time.monotonic() + wait
        with self.changed:
            while True:
                self.expect_open()
                wanted = {name: self.look_up(name) for name in names}
                entries = list(wanted.values())
                self._expect_to_fit(entries)
                if any(entry.bringing for entry in entries):
                    self.changed.wait()
                    continue
                if self._hold(entries):
                    return wanted
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self._busy(entries)
                self.changed.wait(left)

    def release(self, entries: Iterable[Entry], mark: Any) -> None:
        """End a batch's use of its entries; ``mark`` lies behind its work, None where that is done."""
        with self.changed:
            for entry in entries:
                if mark is not None:
                    entry.marks = [m for m in entry.marks if not self._slots.transfer.is_done(m)] + [mark]
                self._let_go(entry)
            self.changed.notify_all()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """A batch is open in this block."""
        with self.changed:
            self.batches += 1
        try:
            yield
        finally:
            with self.changed:
                self.batches -= 1
                self.changed.notify_all()

    @property
    def is_used(self) -> bool:
        """Whether a batch is open or about to be; the lock is held."""
        return bool(self._in_flight or self.batches)

    def stats(self, pending: dict[str, int]) -> PoolStats:
        """All figures; ``pending``: those that others count. The lock is held."""
        arena = self._slots.arena
        return PoolStats(
            adapters_known=len(self.entries),
            adapters_on_host=len(self._host),
            adapters_on_device=len(self._resident),
            pinned=sum(entry.pinned for entry in self._resident.values()),
            in_flight=len(self._in_flight),
            batches=self.batches,
            device_bytes_used=arena.used,
            device_bytes_free=arena.free_bytes,
            device_bytes_largest_hole=arena.largest_hole,
            host_bytes_used=self._host_used,
            load_seconds_sum=self._seconds[0],
            load_seconds_max=self._seconds[1],
            **{**self._count, **pending},
        )

    def _hold(self, entries: Sequence[Entry]) -> bool:
        """Take a reference of each, once all are on the device; False, and nothing held, where there is no room."""
        missing = [entry for entry in entries if entry.place is None]
        for entry in entries:
            entry.refs += 1
            self._in_flight.add(entry)
        held = False
        try:
            held = not missing or self._bring(missing)
        finally:
            if not held:
                for entry in entries:
                    self._let_go(entry)
        if held:
            self._clock += 1
            self._count["hits"] += len(entries) - len(missing)
            for entry in entries:
                entry.used = self._clock
                if entry in self._host:
                    self._host[entry] = self._host.pop(entry)
        return held

    def _let_go(self, entry: Entry) -> None:
        entry.refs -= 1
        if entry.refs:
            return
        self._in_flight.discard(entry)
        if entry.retired:
            self._leave(entry)

    def _leave(self, entry: Entry) -> None:
        """Take an entry off the device, its bytes zeroed; it may be elsewhere."""
        place, entry.place = entry.place, None
        if place is None:
            return
        del self._resident[place.slot]
        marks, entry.marks = entry.marks, []
        entry.gone = self._slots.vacate(place, marks)

    def _bring(self, missing: Sequence[Entry]) -> bool:
        """Bring entries to the device, all or none; False where there is no room. The lock is let go to read disks."""
        if not self._could_place(missing):
            return False
        start = time.monotonic()
        for entry in missing:
            entry.bringing = True
        try:
            images = self._images(missing)
            if not self._place(missing, images):
                return False
        finally:
            for entry in missing:
                entry.bringing = False
            self.changed.notify_all()
        seconds = time.monotonic() - start
        self._count["load_count"] += 1
        self._seconds = [self._seconds[0] + seconds, max(self._seconds[1], seconds)]
        return True

    def _images(self, missing: Sequence[Entry]) -> dict[Entry, Tensor]:
        images = {entry: entry.image for entry in missing if entry.image is not None}
        unread = [entry for entry in missing if entry not in images]
        if unread:
            with self._unlocked():
                read = {entry: self._read_again(entry) for entry in unread}
            self._count["reloads_from_disk"] += len(read)
            for entry, image in read.items():
                images[entry] = image
                self._keep(entry, image)
        return images

    @contextmanager
    def _unlocked(self) -> Iterator[None]:
        self.changed.release()
        try:
            yield
        finally:
            self.changed.acquire()

    def _could_place(self, entries: Sequence[Entry]) -> bool:
        """Whether there would be slots and bytes for the entries if all were evicted that may be."""
        going = [entry for entry in self._resident.values() if entry.is_evictable]
        free = self._slots.arena.free_bytes + sum(entry.nbytes for entry in going)
        enough = self._slots.free_slots + len(going) >= len(entries)
        return enough and free >= sum(entry.nbytes for entry in entries)

    def _place(self, entries: Sequence[Entry], images: dict[Entry, Tensor]) -> bool:
        """Copy entries to the device, evicting others; after False or an error none of them is there."""
        placed: list[Entry] = []
        complete = False
        try:
            for entry in entries:
                while (place := self._slots.place(entry.layout, entry.scaling, images[entry])) is None:
                    going = [other for other in self._resident.values() if other.is_evictable]
                    if not going:
                        return False
                    self._leave(min(going, key=lambda other: other.used))
                    self._count["evictions"] += 1
                entry.place = place
                self._resident[place.slot] = entry
                placed.append(entry)
                # a new entry has no references yet, and must not be the next to go
                entry.refs += 1
            complete = True
        finally:
            for entry in placed:
                entry.refs -= 1
                if not complete:
                    self._leave(entry)
        self._count["loads"] += len(placed)
        return True

    def _keep(self, entry: Entry, image: Tensor) -> None:
        """Hold an image in host memory, as far as the budget allows; those not used for longest go."""
        size = self._slots.transfer.host_bytes(image.numel())
        if entry.retired or entry in self._host or size > self._host_budget:
            return
        while self._host_used + size > self._host_budget:
            self._drop_image(next(iter(self._host)))
            self._count["host_evictions"] += 1
        entry.image = image
        self._host[entry] = size
        self._host_used += size

    def _drop_image(self, entry: Entry) -> None:
        entry.image = None
        self._host_used -= self._host.pop(entry, 0)

    def _expect_to_fit(self, entries: Sequence[Entry]) -> None:
        nbytes, slots = sum(entry.nbytes for entry in entries), len(entries)
        if nbytes > self._slots.arena.nbytes or slots > self._slots.max_adapters:
            raise AdapterTooLargeError(
                f"{_some(entries)}: {slots} adapters of {nbytes} bytes; the pool holds {self._slots.max_adapters} of "
                f"{self._slots.arena.nbytes} bytes on the device at once"
            )

    def _busy(self, entries: Sequence[Entry]) -> PoolBusyError:
        self._count["rejected_busy"] += 1
        arena = self._slots.arena
        kept = [entry for entry in self._resident.values() if not entry.is_evictable]
        return PoolBusyError(
            f"no room on the device for {_some(entries)} ({sum(entry.nbytes for entry in entries)} bytes): of "
            f"{arena.nbytes} bytes and {self._slots.max_adapters} slots, {sum(entry.nbytes for entry in kept)} bytes "
            f"and {len(kept)} slots are pinned or in flight"
        )


_COUNTED = ("hits", "loads", "evictions", "host_evictions", "reloads_from_disk", "rejected_busy", "load_count")


def _some(entries: Sequence[Entry]) -> str:
    names = ", ".join(ascii(entry.name) for entry in entries[:4])
    return names + (f" and {len(entries) - 4} more" if len(entries) > 4 else "")
