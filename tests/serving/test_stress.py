"""Threads load, unload, replace, pin and serve at once: every row is its own adapter's, and all comes back."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peftrt.formats.errors import AdapterNameError
from peftrt.serving import AdapterTooLargeError, PoolBusyError, QuotaError, UnknownAdapterError
from tests.serving.tenants import expected, inputs, is_empty, make_pool, write

NAMES = [f"t{i}" for i in range(10)]
VERSIONS = 3
THREADS = 6
# other outputs are further away than this, and rounding is far closer
NEAR = 1e-3

# what a thread must reckon with
REFUSED = (UnknownAdapterError, PoolBusyError, AdapterTooLargeError, AdapterNameError, QuotaError)


class Storm:
    """What the threads do to one pool, and what they saw."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.pool: Any = make_pool(adapters=6, max_adapters=4, host_budget=12_000)
        self.pool.quota("t1", rank=4)
        self.paths: dict[str, list[Path]] = {}
        self.answers: dict[str | None, list[Tensor]] = {}
        x = inputs(1)
        for i, name in enumerate(NAMES):
            ranks = [(3, 8, 12)[(i + v) % 3] for v in range(VERSIONS)]
            tenants = [
                write(folder / f"{name}-{v}", seed=10 * i + v, r=ranks[v], use_dora=i % 3 == 2) for v in range(VERSIONS)
            ]
            self.paths[name] = [tenant.path for tenant in tenants]
            self.answers[name] = [expected(self.pool.model, [tenant], x)[0] for tenant in tenants]
        self.answers[None] = [expected(self.pool.model, [None], x)[0]]
        self.x, self.end = x[0], time.monotonic() + seconds
        self.did: Counter[str] = Counter()
        self.errors: list[BaseException] = []

    def run(self, seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < self.end and not self.errors:
            action = draw.choices(("serve", "load", "unload", "pin", "unpin"), (12, 4, 2, 1, 1))[0]
            try:
                getattr(self, action)(draw)
                self.did[action] += 1
            except REFUSED as error:
                self.did[type(error).__name__] += 1
            except BaseException as error:
                self.errors.append(error)

    def serve(self, draw: random.Random) -> None:
        known = list(self.pool.names) or NAMES
        names = [draw.choice([*known, None]) for _ in range(draw.randint(1, 4))]
        with torch.no_grad(), self.pool.batch(names, wait=draw.choice((0.0, 0.05))):
            x = self.x.expand(len(names), *self.x.shape)
            first = self.pool.model(x)
            time.sleep(draw.choice((0.0, 0.002)))
            again = self.pool.model(x)
        assert torch.equal(first, again), "an adapter changed under a batch"
        for name, row in zip(names, first, strict=True):
            distances = {
                (other, version): (row.double() - answer).abs().max().item()
                for other, answers in self.answers.items()
                for version, answer in enumerate(answers)
            }
            nearest = min(distances, key=lambda who: distances[who])
            assert nearest[0] == name, f"{name} was served {nearest}"
            assert distances[nearest] < NEAR, f"{name} was served nobody's: {distances[nearest]}"

    def load(self, draw: random.Random) -> None:
        name = draw.choice(NAMES)
        tenant = draw.choice((None, name))
        self.pool.load(name, draw.choice(self.paths[name]), tenant=tenant, replace=draw.random() < 0.7)

    def unload(self, draw: random.Random) -> None:
        self.pool.unload(draw.choice(NAMES), timeout=20.0)

    def pin(self, draw: random.Random) -> None:
        if self.pool.stats().pinned < 2:
            self.pool.pin(draw.choice(NAMES))

    def unpin(self, draw: random.Random) -> None:
        for name in NAMES:
            if name in self.pool:
                self.pool.unpin(name)


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def short_turns() -> Iterator[None]:
    """Threads take turns often, so that they meet at more places."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("short_turns")
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files where /proc says them")
def test_a_storm_of_threads_serves_nobody_another_s_adapter(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    storm = Storm(tmp_path, 60.0 if request.config.getoption("--fuzz") else 5.0)
    before = handles()
    threads = [threading.Thread(target=storm.run, args=(seed,), daemon=True) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), f"a thread does not end: {storm.did}, {storm.pool.stats()}"
    if storm.errors:
        raise storm.errors[0]
    pool, stats = storm.pool, storm.pool.stats()
    assert min(storm.did[action] for action in ("serve", "load", "unload", "pin")) > 0, storm.did
    assert stats.evictions > 0
    assert stats.reloads_from_disk > 0
    assert (stats.in_flight, stats.batches) == (0, 0)
    for name in pool.names:
        pool.unload(name)
    assert is_empty(pool._slots)
    assert pool.stats().host_bytes_used == 0
    assert not pool._usage._adapters
    assert not pool._usage._bytes
    assert handles() == before
