"""Random sequences of calls: after each, every byte of the slab is accounted for, and refusals have a reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peftrt.formats.errors import AdapterNameError
from peftrt.serving import PoolBusyError, UnknownAdapterError
from tests.serving.tenants import Tenant, bytes_of, check, expected, inputs, is_empty, make_pool, some
from tests.tolerances import assert_close

NAMES = ("a", "b", "c", "d", "e", "f")
ROOM = 3
CALLS = ("load", "replace", "unload", "pin", "unpin", "open", "close", "serve")
STEPS = st.lists(st.tuples(st.sampled_from(CALLS), st.integers(0, 5), st.integers(0, 5)), max_size=40)


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tenant]:
    """Six adapters of equal size, so that no room is lost between them."""
    return some(tmp_path_factory.mktemp("tenants"), 6)


class Walk:
    """A pool, and what must be in it."""

    def __init__(self, tenants: dict[str, Tenant], host: int) -> None:
        self.pool: Any = make_pool(adapters=ROOM, host_budget=host * bytes_of(4))
        self.tenants = tenants
        self.loaded: dict[str, str] = {}
        self.pinned: set[str] = set()
        # open batches: how to end them, and the bytes that each began with
        self.open: list[tuple[ExitStack, dict[Any, Tensor]]] = []

    def step(self, call: str, i: int, j: int) -> None:
        name, tenant = NAMES[i], f"t{j}"
        if call in ("load", "replace"):
            self.load(name, tenant, call == "replace")
        elif call == "open":
            self.enter([name, NAMES[j]])
        elif call == "close":
            if self.open:
                self.open.pop(j % len(self.open))[0].close()
        elif call == "serve":
            with self.refused([name]):
                check(self.pool, {name: self.tenants[self.loaded.get(name, "t0")]}, [name, None])
        elif call == "pin":
            with self.refused([name]):
                self.pool.pin(name)
                self.pinned.add(name)
        elif name not in self.loaded:
            with pytest.raises(UnknownAdapterError):
                getattr(self.pool, call)(name)
        elif call == "unpin":
            self.pool.unpin(name)
            self.pinned.discard(name)
        elif not self.is_open(name):
            self.pool.unload(name)
            self.pinned.discard(name)
            del self.loaded[name]

    def load(self, name: str, tenant: str, replace: bool) -> None:
        if name in self.loaded and not replace:
            with pytest.raises(AdapterNameError):
                self.pool.load(name, self.tenants[tenant].path)
            return
        try:
            self.pool.load(name, self.tenants[tenant].path, replace=replace)
        except PoolBusyError:
            assert name in self.pinned, "only a pinned one's successor needs room"
            assert self.kept() == ROOM
        else:
            self.loaded[name] = tenant

    def enter(self, names: list[str]) -> None:
        with self.refused(names):
            stack = ExitStack()
            # not by ``batch``: here they are ended in any order
            entries = self.pool._tiers.acquire(names, 0.0).values()
            stack.callback(self.pool._tiers.release, entries, None)
            self.open.append((stack, {entry: self.bytes_of(entry) for entry in entries}))

    @contextmanager
    def refused(self, names: list[str]) -> Iterator[None]:
        """The calls of the block may be refused, for one reason at a time."""
        try:
            yield
        except UnknownAdapterError:
            assert not self.loaded.keys() >= set(names)
        except PoolBusyError:
            wanted = {self.pool._tiers.entries[name] for name in names}
            missing = sum(entry.place is None for entry in wanted)
            assert missing
            assert len({entry for entry in self.resident() if not entry.is_evictable} | wanted) > ROOM

    def is_open(self, name: str) -> bool:
        return any(entry.name == name for _, held in self.open for entry in held)

    def bytes_of(self, entry: Any) -> Tensor:
        slab = self.pool._slots.slab
        return torch.cat([slab[piece.offset : piece.offset + piece.nbytes] for piece in entry.place.pieces])

    def resident(self) -> list[Any]:
        return list(self.pool._tiers._resident.values())

    def kept(self) -> int:
        return sum(not entry.is_evictable for entry in self.resident())

    def check(self) -> None:
        slots, tiers, resident = self.pool._slots, self.pool._tiers, self.resident()
        assert sorted(self.loaded) == sorted(self.pool.names)
        assert {entry.name for entry in resident if entry.pinned} == self.pinned
        assert slots.arena.used == sum(entry.nbytes for entry in resident)
        assert slots.free_slots + len(resident) == slots.max_adapters
        assert len({entry.slot for entry in resident}) == len(resident)
        assert tiers._host_used == sum(entry.image.numel() for entry in tiers._host) <= tiers._host_budget
        assert sum(entry.refs for entry in tiers._in_flight) == sum(len(held) for _, held in self.open)
        rest = slots.slab.clone()
        for entry in resident:
            assert not entry.bringing
            for piece in entry.place.pieces:
                assert rest[piece.offset : piece.offset + piece.nbytes].any()
                rest[piece.offset : piece.offset + piece.nbytes] = 0
        assert not rest.any(), "bytes of nobody's"
        for _, held in self.open:
            for entry, before in held.items():
                assert torch.equal(self.bytes_of(entry), before), "changed under a batch"


@given(STEPS, st.integers(0, 4))
def test_every_byte_is_accounted_for(tenants: dict[str, Tenant], steps: list[tuple[str, int, int]], host: int) -> None:
    walk = Walk(tenants, host)
    for step in steps:
        walk.step(*step)
        walk.check()
    for stack, _ in walk.open:
        stack.close()
    for name, tenant in walk.loaded.items():
        walk.pool.unpin(name)
        with torch.no_grad(), walk.pool.batch([name]):
            result = walk.pool.model(inputs(1))
        assert_close(result, expected(walk.pool.model, [tenants[tenant]], inputs(1)), torch.float32, roundings=8)
        walk.pool.unload(name)
    assert is_empty(walk.pool._slots)
