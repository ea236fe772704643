"""A pool with too little room: nothing is lost, and nothing of one adapter is left for another."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from peftrt.serving import (
    AdapterTooLargeError,
    PoolBusyError,
)
from peftrt.serving.reader import digest
from tests.serving.tenants import (
    PREFIX,
    SIZES,
    Tenant,
    bytes_of,
    check,
    in_thread,
    is_empty,
    load_all,
    make_pool,
    serve,
    some,
    write,
)


def ten_thousand(pool: Any, folder: Path, through_load: bool) -> dict[str, Tenant]:
    """So many adapters of rank 1 on disk and in the pool; unless ``through_load``, without load's checks of each, which
    take most of the time.
    """
    first = write(folder / "first", seed=0, r=1, targets=["second"])
    pool.load("first", first.path)
    _, origin, packed = pool._reader.read(first.path, "first", None, False)
    pool.unload("first")
    values = json.loads((first.path / "adapter_config.json").read_text())
    weights = (first.path / "adapter_model.safetensors").read_bytes()
    header = weights[: len(weights) - 4 * sum(SIZES["second"])]
    numbers = torch.randn(10_000, sum(SIZES["second"]))
    n, k = SIZES["second"]
    tenants = {}
    for i, row in enumerate(numbers):
        path = folder / str(i)
        path.mkdir()
        os.link(first.path / "adapter_config.json", path / "adapter_config.json")
        (path / "adapter_model.safetensors").write_bytes(header + row.numpy().tobytes())
        tensors = {
            f"{PREFIX}second.lora_A.weight": row[:k].view(1, k),
            f"{PREFIX}second.lora_B.weight": row[k:].view(n, 1),
        }
        tenants[f"t{i}"] = Tenant(path, tensors, first.config)
        if through_load:
            pool.load(f"t{i}", path)
            continue
        image = torch.zeros_like(packed.image)
        halves = image.view(torch.float32).split([8 * k, 8 * n])
        halves[0][:k], halves[1][:n] = row[:k], row[k:]
        with pool._tiers.changed:
            new = origin._replace(directory=str(path), digest=digest(values, tensors))
            pool._register(f"t{i}", None, new, packed._replace(image=image))
    return tenants


def test_ten_thousand_adapters_at_a_small_budget_are_evicted_and_reloaded(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    one, long = bytes_of(1, ["second"]), request.config.getoption("--fuzz")
    pool = make_pool(device_budget=8 * one, host_budget=100 * one)
    tenants = ten_thousand(pool, tmp_path, through_load=long)
    assert pool.stats().adapters_known == 10_000
    assert pool.stats().adapters_on_host == 100
    draw = torch.Generator().manual_seed(0)
    for _ in range(1000 if long else 60):
        names = [f"t{i}" for i in torch.randint(10_000, (6,), generator=draw).tolist()]
        check(pool, tenants, names)
    stats = pool.stats()
    assert stats.loads >= 300
    assert stats.evictions == stats.loads - stats.adapters_on_device
    assert stats.reloads_from_disk > 300
    assert stats.adapters_on_device <= 8
    assert stats.host_bytes_used <= 100 * one
    pool.close()
    assert is_empty(pool._slots)


def test_all_pinned_or_in_flight_is_back_pressure_and_nothing_is_lost(tmp_path: Path) -> None:
    tenants = some(tmp_path, 5)
    pool = make_pool(adapters=3)
    load_all(pool, tenants)
    pool.pin("t0")
    before = pool.stats()
    with pool.batch(["t1", "t2"]):
        for names in (["t3"], ["t1", "t3"]):
            with pytest.raises(PoolBusyError, match=r"no room on the device for .*'t3'.*3 slots are pinned or in fl"):
                serve(pool, names)
        with pytest.raises(PoolBusyError):
            pool.pin("t3")
        check(pool, tenants, ["t0", "t1", "t2", None])
        with pytest.raises(AdapterTooLargeError, match=r"4 adapters of .* bytes; the pool holds 128 of"):
            serve(pool, ["t0", "t1", "t2", "t3"])
    assert pool.names == tuple(tenants)
    assert pool.stats().rejected_busy == before.rejected_busy + 3
    assert pool.stats().evictions == 0, "something was evicted for a batch that was refused"
    with pytest.raises(PoolBusyError):
        serve(pool, ["t1", "t2", "t3"])
    check(pool, tenants, ["t3", "t4", "t0"])
    pool.unpin("t0")
    check(pool, tenants, ["t1", "t2", "t3"])
    assert pool.stats().in_flight == 0


def test_slots_run_out_as_bytes_do(tmp_path: Path) -> None:
    tenants = some(tmp_path, 3)
    pool = make_pool(adapters=10, max_adapters=2)
    load_all(pool, tenants)
    with pool.batch(["t0", "t1"]), pytest.raises(PoolBusyError):
        serve(pool, ["t2"])
    with pytest.raises(AdapterTooLargeError):
        serve(pool, ["t0", "t1", "t2"])
    check(pool, tenants, ["t2", "t1"])


def test_a_batch_waits_for_room(tmp_path: Path) -> None:
    tenants = some(tmp_path, 3)
    pool = make_pool(adapters=2)
    load_all(pool, tenants)
    with pool.batch(["t0", "t1"]):
        waiting = in_thread(lambda: check(pool, tenants, ["t2"], wait=20.0))
        start = time.monotonic()
        with pytest.raises(PoolBusyError):
            serve(pool, ["t2"], wait=0.05)
        assert time.monotonic() - start >= 0.05
    waiting()
    pool.pin("t0")
    pool.pin("t1")
    waiting = in_thread(lambda: check(pool, tenants, ["t2"], wait=20.0))
    pool.unpin("t0")
    waiting()
    pool.pin("t2", wait=1.0)
    waiting = in_thread(lambda: check(pool, tenants, ["t0"], wait=20.0))
    pool.unload("t2")
    waiting()


def test_what_was_used_least_recently_makes_room(tmp_path: Path) -> None:
    tenants = some(tmp_path, 4)
    pool = make_pool(adapters=3)
    load_all(pool, tenants)
    for name in ("t0", "t1", "t2", "t0"):
        serve(pool, [name])
    serve(pool, ["t3"])
    before = pool.stats().loads
    serve(pool, ["t0", "t2", "t3"])
    assert pool.stats().loads == before
    serve(pool, ["t1"])
    assert pool.stats().loads == before + 1


def test_a_freed_slot_is_zeroed(tmp_path: Path) -> None:
    tenants = {**some(tmp_path, 2), "dora": write(tmp_path / "d", 7, r=21, use_dora=True)}
    pool = make_pool(device_budget="1MiB")
    load_all(pool, tenants)
    serve(pool, list(tenants))
    assert pool._slots.slab.any()
    for name in tenants:
        pool.unload(name)
    assert is_empty(pool._slots)


def test_bytes_of_a_former_tenant_are_gone_before_another_s_come(tmp_path: Path) -> None:
    """The last page of rank 1 has room for seven ranks of whoever was there before."""
    pool = make_pool(adapters=1)
    pool.load("full", write(tmp_path / "full", 1, r=8).path)
    serve(pool, ["full"])
    pool.load("one", write(tmp_path / "one", 2, r=1).path)
    serve(pool, ["one"])
    values = pool._slots.slab.view(torch.float32)
    assert int(values.count_nonzero()) == sum(n + k for n, k in SIZES.values())


def test_holes_of_small_adapters_take_the_pages_of_a_large_one(tmp_path: Path) -> None:
    tenants = {**some(tmp_path, 9), "large": write(tmp_path / "l", 5, r=32)}
    pool = make_pool(adapters=9)
    load_all(pool, tenants)
    for i in range(9):
        serve(pool, [f"t{i}"])
    for i in range(1, 9, 2):
        pool.pin(f"t{i}")
    check(pool, tenants, ["large", "t1", "t3"])
    assert len(pool._tiers.entries["large"].place.pieces) > 1
    assert pool.stats().evictions == 5
    pool.unload("large")
    check(pool, tenants, [f"t{i}" for i in range(9)])
