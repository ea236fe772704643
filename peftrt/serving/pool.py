"""AdapterPool: any number of adapters behind one model, as many of them on the device as its budget holds."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch
from torch import nn

from peftrt.adapters.activation import check_rows
from peftrt.adapters.configs.lora import LoraConfig
from peftrt.adapters.state import ModelAdapters, all_or_nothing, check_new_name, find_state, unwrap
from peftrt.formats.errors import AdapterNameError
from peftrt.formats.names import fold_name
from peftrt.formats.sizes import expect_bytes
from peftrt.nn.routing import current, opened
from peftrt.serving.entry import Entry
from peftrt.serving.errors import AdapterTooLargeError, PoolError, UnloadTimeoutError
from peftrt.serving.quota import Quota, Usage
from peftrt.serving.reader import Origin, Packed, Reader
from peftrt.serving.routing import PoolRouting
from peftrt.serving.sites import common_dtype, expect_dtype, make_sites
from peftrt.serving.slots import Slots, check_room
from peftrt.serving.stats import PoolStats
from peftrt.serving.tiers import Tiers


class AdapterPool:
    """Serves one model with many LoRA, rsLoRA and DoRA adapters, another one for each entry of a batch.

    ``y_i = c_e * (x_i W^T + s_e (x_i A_e^T) B_e^T) + b`` with the adapter e that entry i of the batch names; see
    :func:`peftrt.ops.multi_lora_linear`. Adapters live in three tiers: on the device, in one slab of memory that is
    taken once; in host memory; on disk, where they were loaded from. What was not used for longest makes room, but for
    what is pinned or in flight. An adapter that was evicted from host memory is read again when it is wanted; should
    its files have changed by then, that is an error.

    A batch keeps the adapters it began with, whatever is loaded, replaced or unloaded meanwhile. Bytes of an adapter
    that goes are zeroed before another's take their place. For any number of threads.

    The model's linear layers become layers without adapters that compute what they did (peftrt.load does the same) and
    stay so. Adapters that it has from ``adapt`` or ``load`` are not touched, and do not act in a batch of the pool. Its
    weights must stay as they are: DoRA's factors are worked out once.

    Args:
        model: any module, in place; one that ``adapt(..., quantize="nf4")`` made too.
        device_budget: bytes on the model's device for adapters, such as "2GiB"; on a CPU, of RAM.
        host_budget: bytes of host memory for adapters, page-locked where the device is CUDA.
        target_modules, exclude_modules: which layers adapters may act on, as of LoraConfig.
        dtype: of A and B on the device; by default that of the model's weights.
        max_adapters: on the device at once.
        max_rank: the largest rank.
        default_quota: of tenants that have none of their own.
        root: a directory that no adapter's path may lead out of, links followed.

    Raises:
        ConfigError, UnsupportedError (both ValueError): target_modules that match nothing, or what a pool cannot serve.
        TypeError, ValueError: an argument out of its range. The model is as it was.

    Source: S-LoRA, Sheng et al. 2023 (arXiv:2311.03285), section 5, for paged adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device_budget: int | str,
        host_budget: int | str,
        target_modules: str | Sequence[str] = "all-linear",
        exclude_modules: str | Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        max_adapters: int = 128,
        max_rank: int = 256,
        default_quota: Quota | None = None,
        root: str | os.PathLike[str] | None = None,
    ) -> None:
        nbytes, host = expect_bytes(device_budget, "device_budget"), expect_bytes(host_budget, "host_budget")
        check_room(nbytes, max_adapters, max_rank)
        if dtype is not None:
            expect_dtype(dtype)
        state = find_state(model) or ModelAdapters()
        model = unwrap(model)
        with all_or_nothing(model):
            sites = make_sites(model, state, target_modules, exclude_modules)
            dtype = expect_dtype(common_dtype(sites)) if dtype is None else dtype
            self._slots = Slots(sites, nbytes, dtype, max_adapters, max_rank)
        self._state = state
        self._reader = Reader(model, state, sites, dtype, max_rank, root, self._slots.transfer)
        self._tiers = Tiers(self._slots, host, lambda entry: self._reader.read_again(entry.name, entry.origin))
        self._usage = Usage(default_quota or Quota())
        self._generations = itertools.count(1)
        # folded names that a thread is loading
        self._reserved: set[str] = set()

    def load(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        tenant: str | None = None,
        subfolder: str | None = None,
        replace: bool = False,
        allow_nonfinite: bool = False,
    ) -> LoraConfig:
        """Read and check an adapter that HF peft or peftrt saved; it is copied to the device when it is first wanted.

        Args:
            name: for :meth:`batch`.
            path, subfolder, allow_nonfinite: as of :func:`peftrt.load`. The directory must stay as it is.
            tenant: whose quota it counts for.
            replace: take the place of an adapter of that name. Batches that have it keep it. A pinned one's successor
                is pinned.

        Returns:
            The adapter's configuration.

        Raises:
            FormatError (a ValueError): as of :func:`peftrt.load`; AdapterNameError for a name that is taken or being
                loaded, UnsupportedError for embeddings, modules_to_save, and layers that are not the pool's.
            AdapterTooLargeError: it has more ranks or bytes than the pool can hold.
            QuotaError: its tenant would have more than it may.
            PoolBusyError: it replaces a pinned one, and there is no room for both.
            Nothing is changed then.

        Warns:
            UserWarning: as of :func:`peftrt.load`.
        """
        check_new_name(name, ())
        if tenant is not None and not isinstance(tenant, str):
            raise TypeError(f"load: tenant must be a str or None, got {type(tenant).__name__}")
        with self._reserve(name, replace):
            config, origin, packed = self._reader.read(path, name, subfolder, allow_nonfinite)
            with self._tiers.changed:
                self._tiers.expect_open()
                self._register(name, tenant, origin, packed)
        return config

    @contextmanager
    def _reserve(self, name: str, replace: bool) -> Iterator[None]:
        """Nobody else can load the name in this block."""
        folded = fold_name(name)
        with self._tiers.changed:
            self._tiers.expect_open()
            self._tiers.expect_free(name, replace)
            if folded in self._reserved:
                raise AdapterNameError(f"adapter name {name!a} is being loaded by another thread")
            self._reserved.add(folded)
        try:
            yield
        finally:
            with self._tiers.changed:
                self._reserved.remove(folded)
                self._tiers.changed.notify_all()

    def _register(self, name: str, tenant: str | None, origin: Origin, packed: Packed) -> None:
        layout, capacity = packed.layout, self._slots.arena.nbytes
        if layout.nbytes > capacity:
            raise AdapterTooLargeError(
                f"load: adapter {name!a} takes {layout.nbytes} bytes on the device, the pool has {capacity}"
            )
        rank = int(layout.ranks.max())
        entry = Entry(name, next(self._generations), tenant, origin, layout, packed.scaling, rank)
        before = self._tiers.entries.get(name)
        self._usage.check(entry, before)
        self._tiers.add(entry, packed.image)
        self._usage.add(entry)
        if before is not None:
            self._usage.remove(before)

    def unload(self, name: str, timeout: float | None = None) -> None:
        """Forget an adapter: no new batch gets it; when the last that has it ends, its bytes are zeroed and given back.

        Args:
            timeout: seconds to wait for those batches; None: as long as they take.

        Raises:
            UnknownAdapterError: it is not loaded.
            UnloadTimeoutError: batches have it still; it is freed when the last one ends.
            PoolError: this thread's own batch has it.
        """
        with self._tiers.changed:
            self._expect_not_mine([self._tiers.look_up(name)], "unload")
            entry = self._tiers.retire(name)
            self._usage.remove(entry)
            if not self._tiers.changed.wait_for(lambda: not entry.refs, timeout):
                raise UnloadTimeoutError(f"unload: adapter {name!a} is in flight; it is freed when that ends")
        if entry.gone is not None:
            self._slots.transfer.wait_on_host([entry.gone])

    def pin(self, name: str, wait: float = 0.0) -> None:
        """Bring an adapter to the device, where it stays until it is unpinned or unloaded.

        Raises:
            As of :meth:`batch`.
        """
        pinned = False
        while not pinned:
            entry = self._tiers.acquire([name], wait)[name]
            with self._tiers.changed:
                # it may have been replaced since
                pinned = entry.pinned = not entry.retired
            self._tiers.release([entry], None)

    def unpin(self, name: str) -> None:
        """Let an adapter be evicted again; UnknownAdapterError where it is not loaded."""
        with self._tiers.changed:
            self._tiers.look_up(name).pinned = False
            self._tiers.changed.notify_all()

    @contextmanager
    def batch(self, names: Sequence[str | None], expand: int = 1, wait: float = 0.0) -> Iterator[None]:
        """Run the model with one adapter, or none, for each entry of the batch: ``with pool.batch(["a", None]):``.

        Holds for calls in this thread until the block ends; a thread that is started in it must open its own. The
        adapters are brought to the device first, all of them or none. On CUDA the block must end on the stream that it
        computes on.

        Args:
            names: one name or None for each entry of the leading dimension of what the model is called with.
            expand: how often each name counts, where the model repeats its batch (beams).
            wait: seconds to wait for room.

        Raises:
            UnknownAdapterError: a name that is not loaded; the base never serves in its place.
            PoolBusyError: there is no room, because of what is pinned or in flight.
            AdapterTooLargeError: the batch's adapters can never be on the device together.
            AdapterChangedError, FormatError: one was evicted from host memory, and its files are no longer what was
                loaded, or gone.
            TypeError, ValueError: as of :func:`peftrt.rows`.
        """
        check_rows("batch", names, expand)
        for name in names:
            if name is not None and not isinstance(name, str):
                raise TypeError(f"batch: names must hold str or None, got {type(name).__name__}")
        tiers, transfer = self._tiers, self._slots.transfer
        wanted = tiers.acquire([name for name in names if name is not None], wait)
        try:
            marks = [entry.place.ready for entry in wanted.values() if entry.place is not None]
            transfer.wait_on_device([mark for mark in marks if mark is not None])
            vectors = any(entry.layout.has_vectors for entry in wanted.values())
            tables = self._slots.tables if vectors else self._slots.plain_tables
            entries = [None if name is None else wanted[name] for name in names]
            with tiers.counted(), opened(self._state, PoolRouting(entries, expand, tables, current(self._state))):
                yield
        finally:
            tiers.release(wanted.values(), transfer.used() if wanted else None)

    def quota(
        self,
        tenant: str,
        *,
        device_bytes: int | str | None = None,
        adapters: int | None = None,
        rank: int | None = None,
    ) -> None:
        """Limit what a tenant may have loaded from now on; None: no limit. What is loaded stays.

        Args:
            device_bytes: that all of its adapters would take on the device together.
            adapters: how many.
            rank: the largest of an adapter.
        """
        if not isinstance(tenant, str):
            raise TypeError(f"quota: tenant must be a str, got {type(tenant).__name__}")
        nbytes = None if device_bytes is None else expect_bytes(device_bytes, "device_bytes")
        with self._tiers.changed:
            self._usage.quotas[tenant] = Quota(nbytes, adapters, rank)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters that are loaded, in the order in which they came."""
        with self._tiers.changed:
            return tuple(self._tiers.entries)

    def __contains__(self, name: object) -> bool:
        with self._tiers.changed:
            return name in self._tiers.entries

    def stats(self) -> PoolStats:
        """What is where, and what was done."""
        with self._tiers.changed:
            return self._tiers.stats({"rejected_quota": self._usage.rejected})

    def close(self, timeout: float | None = None) -> None:
        """Unload all, zero the slab and give it back. The model stays usable: its layers compute their base.

        Args:
            timeout: seconds to wait for batches in flight and loads; None: as long as they take.

        Raises:
            UnloadTimeoutError: some are not done; nothing new is begun, and ``close`` can be called again.
            PoolError: in a batch of this thread's.
        """
        tiers = self._tiers
        with tiers.changed:
            self._expect_not_mine(None, "close")
            tiers.closed = True
            for name in list(tiers.entries):
                self._usage.remove(tiers.retire(name))
            tiers.changed.notify_all()
            if not tiers.changed.wait_for(lambda: not (tiers.is_used or self._reserved), timeout):
                raise UnloadTimeoutError("close: batches are in flight, or adapters being loaded")
            self._slots.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _expect_not_mine(self, entries: Sequence[Entry] | None, what: str) -> None:
        """Waiting for oneself would not end."""
        routing = current(self._state)
        if isinstance(routing, PoolRouting) and routing.uses(self._slots, entries):
            raise PoolError(f"{what}: this thread's own batch is in flight; call it when the block has ended")
