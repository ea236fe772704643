"""Loads that fail, or must not be: bytes, registry and what is served are as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from peftrt.formats.errors import FormatError, MissingFileError
from peftrt.serving import (
    AdapterChangedError,
    Quota,
    QuotaError,
)
from tests.serving.tenants import (
    bytes_of,
    check,
    is_empty,
    load_all,
    make_pool,
    serve,
    some,
    write,
)


@pytest.mark.parametrize("fails_at", range(0, 14, 2))
def test_out_of_memory_in_the_middle_of_a_load_is_rolled_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    tenants = some(tmp_path, 3)
    pool = make_pool()
    load_all(pool, tenants)
    serve(pool, ["t0"])
    slots, calls = pool._slots, 0
    state = slots.slab.clone(), slots._ranks.clone(), slots._A_pages.clone(), slots.arena.holes, slots.free_slots
    original = slots.transfer.write

    def write_(target: torch.Tensor, source: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at + 1:
            target.view(-1)[:1].copy_(source.view(-1)[:1]) if target.is_contiguous() else None
            raise torch.OutOfMemoryError("injected")
        original(target, source)

    monkeypatch.setattr(slots.transfer, "write", write_)
    if fails_at < 12:  # six copies an adapter
        with pytest.raises(torch.OutOfMemoryError):
            serve(pool, ["t0", "t1", "t2"])
        after = slots.slab, slots._ranks, slots._A_pages, slots.arena.holes, slots.free_slots
        for now, then in zip(after, state, strict=True):
            assert torch.equal(now, then) if isinstance(now, torch.Tensor) else now == then
        assert pool.stats().adapters_on_device == 1
        assert pool.stats().in_flight == 0
    check(pool, tenants, ["t0", "t1", "t2"])


def test_a_load_that_fails_on_the_host_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tenants = some(tmp_path, 2)
    pool = make_pool(default_quota=Quota(adapters=2))
    pool.load("t0", tenants["t0"].path)
    before = pool.stats()

    def no_memory(nbytes: int) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(pool._slots.transfer, "host_buffer", no_memory)
        for name, replace in (("t1", False), ("t0", True)):
            with pytest.raises(MemoryError):
                pool.load(name, tenants["t1"].path, replace=replace)
    assert pool.stats() == before
    check(pool, tenants, ["t0"])
    pool.load("t1", tenants["t1"].path)
    check(pool, tenants, ["t0", "t1"])


def test_a_quota_stops_a_flood_of_huge_ranks(tmp_path: Path) -> None:
    tenants = some(tmp_path, 3)
    huge = write(tmp_path / "huge", 9, r=64)
    pool = make_pool(device_budget="1MiB", default_quota=Quota(adapters=2))
    pool.quota("mean", rank=8, device_bytes=2 * bytes_of(4), adapters=3)
    with pytest.raises(QuotaError, match="'huge': tenant 'mean' may have rank = 8, would have 64") as caught:
        pool.load("huge", huge.path, tenant="mean")
    assert (caught.value.tenant, caught.value.limit, caught.value.allowed, caught.value.asked) == (
        "mean",
        "rank",
        8,
        64,
    )
    for name in ("t0", "t1"):
        pool.load(name, tenants[name].path, tenant="mean")
    with pytest.raises(QuotaError, match=f"device_bytes = {2 * bytes_of(4)}, would have {3 * bytes_of(4)}"):
        pool.load("t2", tenants["t2"].path, tenant="mean")
    pool.load("t1", tenants["t2"].path, tenant="mean", replace=True)
    for tenant in ("other", None):
        for i in range(2):
            pool.load(f"{tenant}{i}", huge.path, tenant=tenant)
        with pytest.raises(QuotaError, match="may have adapters = 2, would have 3"):
            pool.load("more", tenants["t0"].path, tenant=tenant)
        pool.unload(f"{tenant}0")
        pool.load(f"{tenant}2", tenants["t0"].path, tenant=tenant)
    assert pool.stats().rejected_quota == 4
    pool.unload("t0")
    pool.load("t2", tenants["t2"].path, tenant="mean")
    for bad in ({"adapters": -1}, {"rank": 1.5}, {"device_bytes": "lots"}):
        with pytest.raises(ValueError, match="must be"):
            pool.quota("mean", **bad)  # type: ignore[arg-type]


def test_files_that_changed_since_are_not_served(tmp_path: Path) -> None:
    tenants = some(tmp_path, 4)
    pool = make_pool(adapters=1, host_budget=0)
    load_all(pool, tenants)
    write(tenants["t1"].path, seed=999)
    values = json.loads((tenants["t2"].path / "adapter_config.json").read_text())
    (tenants["t2"].path / "adapter_config.json").write_text(json.dumps({**values, "lora_alpha": 3}))
    (tenants["t3"].path / "adapter_model.safetensors").unlink()
    for name in ("t1", "t2"):
        with pytest.raises(AdapterChangedError, match=f"adapter {name!r}: the files in .* are not those"):
            serve(pool, [name])
    with pytest.raises(MissingFileError):
        serve(pool, ["t3"])
    with pytest.raises(FormatError):
        pool.pin("t3")
    assert is_empty(pool._slots)
    assert pool.stats().in_flight == 0
    pool.load("t1", tenants["t1"].path, replace=True)
    assert serve(pool, ["t1"]).isfinite().all()
    write(tenants["t0"].path, seed=100)  # the same again
    check(pool, tenants, ["t0"])


def test_a_batch_is_brought_whole_or_not_at_all(tmp_path: Path) -> None:
    tenants = some(tmp_path, 3)
    pool = make_pool(adapters=3, host_budget=0)
    load_all(pool, tenants)
    serve(pool, ["t0"])
    write(tenants["t2"].path, seed=999)
    with pytest.raises(AdapterChangedError):
        serve(pool, ["t0", "t1", "t2"])
    assert pool.stats().adapters_on_device == 1
    assert pool.stats().in_flight == 0
    check(pool, tenants, ["t0", "t1"])
