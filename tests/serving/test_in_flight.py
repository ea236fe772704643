"""Several threads at one adapter: a batch keeps what it began with, and one of two loads wins."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from peftrt.formats.errors import AdapterNameError
from peftrt.serving import (
    PoolBusyError,
    PoolError,
    UnloadTimeoutError,
)
from peftrt.serving.reader import Reader
from tests.serving.tenants import (
    bytes_of,
    check,
    expected,
    in_thread,
    inputs,
    is_empty,
    load_all,
    make_pool,
    serve,
    some,
)
from tests.tolerances import assert_close, assert_same_bits


def reads(monkeypatch: pytest.MonkeyPatch, before: Any = None) -> list[str]:
    """The names that are read from disk again, as they are."""
    found: list[str] = []
    original = Reader.read_again

    def read_again(self: Reader, name: str, origin: Any) -> Any:
        found.append(name)
        if before is not None:
            before(name)
        return original(self, name, origin)

    monkeypatch.setattr(Reader, "read_again", read_again)
    return found


def test_two_threads_load_one_name_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tenants = some(tmp_path, 2)
    pool = make_pool()
    reading, go_on = threading.Event(), threading.Event()
    original = Reader.read

    def read(*args: Any) -> Any:
        reading.set()
        assert go_on.wait(20)
        return original(*args)

    monkeypatch.setattr(Reader, "read", read)
    first = in_thread(lambda: pool.load("t0", tenants["t0"].path))
    assert reading.wait(20)
    for name, replace in (("t0", False), ("t0", True), ("T0", False)):
        with pytest.raises(AdapterNameError, match="is being loaded by another thread"):
            pool.load(name, tenants["t1"].path, replace=replace)
    go_on.set()
    first()
    for name in ("t0", "T0"):
        with pytest.raises(AdapterNameError, match="in use"):
            pool.load(name, tenants["t1"].path)
    with pytest.raises(AdapterNameError, match="in use, only by case"):
        pool.load("T0", tenants["t1"].path, replace=True)
    check(pool, tenants, ["t0"])


def test_of_many_threads_that_load_one_name_one_wins(tmp_path: Path) -> None:
    tenants = some(tmp_path, 8)
    pool = make_pool()
    barrier = threading.Barrier(8)

    def load(name: str) -> str:
        barrier.wait()
        pool.load("it", tenants[name].path)
        return name

    winners = []
    for result in [in_thread(lambda name=name: load(name)) for name in tenants]:  # type: ignore[misc]
        try:
            winners.append(result())
        except AdapterNameError:
            continue
    assert len(winners) == 1
    check(pool, {"it": tenants[winners[0]]}, ["it"])
    assert pool.stats().host_bytes_used == bytes_of(4)


def test_a_request_in_flight_keeps_its_adapter_through_a_replace(tmp_path: Path) -> None:
    tenants = some(tmp_path, 2)
    pool = make_pool(adapters=2)
    pool.load("it", tenants["t0"].path)
    x = inputs(1)
    with torch.no_grad(), pool.batch(["it"]):
        before = pool.model(x)
        pool.load("it", tenants["t1"].path, replace=True)
        assert_same_bits(pool.model(x), before)
        in_thread(lambda: check(pool, {"it": tenants["t1"]}, ["it"]))()
        assert pool.stats().adapters_on_device == 2
        assert_same_bits(pool.model(x), before)
    assert pool.stats().adapters_on_device == 1
    check(pool, {"it": tenants["t1"]}, ["it"])
    pool.unload("it")
    assert is_empty(pool._slots)


def test_the_successor_of_a_pinned_adapter_is_pinned(tmp_path: Path) -> None:
    tenants = some(tmp_path, 3)
    pool = make_pool(adapters=2)
    pool.load("it", tenants["t0"].path)
    pool.pin("it")
    pool.load("other", tenants["t2"].path)
    with pool.batch(["other"]), pytest.raises(PoolBusyError):
        pool.load("it", tenants["t1"].path, replace=True)
    check(pool, {"it": tenants["t0"]}, ["it"])
    pool.load("it", tenants["t1"].path, replace=True)
    assert pool.stats().pinned == 1
    check(pool, {"it": tenants["t1"], "other": tenants["t2"]}, ["it", "other"])
    with pool.batch(["other"]):
        check(pool, {"it": tenants["t1"]}, ["it"])
    pool.unload("it")
    assert pool.stats().pinned == 0


def test_unload_waits_for_a_request_in_flight(tmp_path: Path) -> None:
    tenants = some(tmp_path, 1)
    pool = make_pool()
    load_all(pool, tenants)
    entered, leave = threading.Event(), threading.Event()

    def request() -> torch.Tensor:
        with torch.no_grad(), pool.batch(["t0"]):
            entered.set()
            assert leave.wait(20)
            return pool.model(inputs(1))

    running = in_thread(request)
    assert entered.wait(20)
    unloading = in_thread(lambda: pool.unload("t0"))
    deadline = time.monotonic() + 20
    while pool.names and time.monotonic() < deadline:
        time.sleep(0.001)
    with pytest.raises(PoolError, match="no adapter 't0'"):
        serve(pool, ["t0"])
    assert not is_empty(pool._slots)
    leave.set()
    unloading()
    assert_close(running(), expected(pool.model, [tenants["t0"]], inputs(1)), torch.float32, roundings=8)
    assert is_empty(pool._slots)


def test_unload_in_vain_frees_when_the_request_ends(tmp_path: Path) -> None:
    tenants = some(tmp_path, 1)
    pool = make_pool()
    load_all(pool, tenants)
    with pool.batch(["t0"]):
        with pytest.raises(PoolError, match="this thread's own batch is in flight"):
            pool.unload("t0")
        with pytest.raises(PoolError, match="this thread's own batch is in flight"), pool.batch([None]):
            pool.close()
        assert pool.names == ("t0",)
        with pytest.raises(UnloadTimeoutError, match="'t0' is in flight"):
            in_thread(lambda: pool.unload("t0", timeout=0.01))()
        assert pool.names == ()
        pool.load("t0", tenants["t0"].path)
        with pytest.raises(UnloadTimeoutError, match="batches are in flight"):
            in_thread(lambda: pool.close(timeout=0.01))()
        assert not is_empty(pool._slots)
    assert is_empty(pool._slots)
    pool.close()


def test_two_batches_that_need_one_evicted_adapter_read_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenants = some(tmp_path, 2)
    pool = make_pool(adapters=2, host_budget=0)
    load_all(pool, tenants)
    reading, go_on = threading.Event(), threading.Event()

    def wait(name: str) -> None:
        reading.set()
        assert go_on.wait(20)

    found = reads(monkeypatch, wait)
    first = in_thread(lambda: check(pool, tenants, ["t0"]))
    assert reading.wait(20)
    second = in_thread(lambda: check(pool, tenants, ["t0"]))
    assert pool.stats().adapters_known == 2, "the lock is held while a disk is read"
    go_on.set()
    first()
    second()
    assert found == ["t0"]
    check(pool, tenants, ["t0", "t1"])
    assert found == ["t0", "t1"]


def test_an_adapter_unloaded_while_it_is_read_serves_its_batch_and_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenants = some(tmp_path, 2)
    pool = make_pool(host_budget=bytes_of(4))
    load_all(pool, tenants)
    reading, go_on = threading.Event(), threading.Event()

    def wait(name: str) -> None:
        reading.set()
        assert go_on.wait(20)

    reads(monkeypatch, wait)
    x = inputs(1)
    running = in_thread(lambda: serve(pool, ["t0"], x))
    assert reading.wait(20)
    with pytest.raises(UnloadTimeoutError):
        pool.unload("t0", timeout=0.01)
    go_on.set()
    assert_close(running(), expected(pool.model, [tenants["t0"]], x), torch.float32, roundings=8)
    assert is_empty(pool._slots)
    assert pool.stats().host_bytes_used == bytes_of(4), "of the other one"
    pool.unload("t1")
    assert pool.stats().host_bytes_used == 0
