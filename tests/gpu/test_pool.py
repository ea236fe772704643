"""A pool of adapters on a device: streams that run late read what they were given, whatever is evicted meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from peftrt.serving import AdapterPool
from tests.gpu.places import on_gpu
from tests.serving.tenants import (
    Tenant,
    Tower,
    bytes_of,
    expected,
    in_thread,
    inputs,
    is_empty,
    load_all,
    some,
    write,
)
from tests.tolerances import assert_close

# cycles: some hundredths of a second
LATE = 50_000_000


def make(device: torch.device, adapters: float, **options: Any) -> Any:
    """A pool over a Tower on the device."""
    model = Tower().to(device)
    pool: Any = AdapterPool(model, device_budget=int(adapters * bytes_of(4)), host_budget="64MiB", **options)
    pool.model = model
    return pool


def serve(pool: Any, names: list[str | None], device: torch.device, late: bool = False) -> torch.Tensor:
    """Without waiting for the result; where ``late``, the device begins long after the host has ended."""
    with torch.no_grad(), pool.batch(names, wait=5.0):
        if late and device.type == "cuda":
            torch.cuda._sleep(LATE)
        return pool.model(inputs(len(names)).to(device))


def check(result: torch.Tensor, tenants: dict[str, Tenant], names: list[str | None]) -> None:
    chosen = [None if name is None else tenants[name] for name in names]
    assert_close(result.cpu(), expected(Tower(), chosen, inputs(len(names))), torch.float32, roundings=8)


def test_rows_are_served_with_their_own_adapters(device: torch.device, tmp_path: Path) -> None:
    tenants = {**some(tmp_path, 2), "dora": write(tmp_path / "d", 7, r=11, use_dora=True)}
    pool = make(device, adapters=16)
    load_all(pool, tenants)
    names = ["t0", None, "dora", "t1", "t0"]
    check(serve(pool, names, device), tenants, names)
    pool.unload("dora")
    pool.close()
    assert is_empty(pool._slots)


def test_late_work_reads_what_it_was_given(device: torch.device, tmp_path: Path) -> None:
    """Every batch evicts the one before it, which has not begun on the device."""
    tenants = some(tmp_path, 6)
    pool = make(device, adapters=1)
    load_all(pool, tenants)
    names = [f"t{i % 6}" for i in range(18)]
    results = [serve(pool, [name], device, late=True) for name in names]
    assert pool.stats().evictions >= 17
    for name, result in zip(names, results, strict=True):
        check(result, tenants, [name])


def test_threads_on_streams_of_their_own(device: torch.device, tmp_path: Path) -> None:
    tenants = some(tmp_path, 8)
    pool = make(device, adapters=3)
    load_all(pool, tenants)
    barrier = threading.Barrier(3)

    def run(seed: int) -> None:
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        draw = torch.Generator().manual_seed(seed)
        barrier.wait()
        for step in range(20):
            name = f"t{int(torch.randint(8, (), generator=draw))}"
            with torch.cuda.stream(stream):
                check(serve(pool, [name, None], device, late=step % 4 == 0), tenants, [name, None])

    for result in [in_thread(lambda seed=seed: run(seed)) for seed in range(3)]:  # type: ignore[misc]
        result()
    for name in tenants:
        pool.unload(name)
    assert is_empty(pool._slots)


@on_gpu
def test_replaced_and_unloaded_while_late_work_runs(tmp_path: Path) -> None:
    device = torch.device("cuda")
    tenants = some(tmp_path, 2)
    pool = make(device, adapters=2)
    pool.load("it", tenants["t0"].path)
    before = serve(pool, ["it"], device, late=True)
    pool.load("it", tenants["t1"].path, replace=True)
    after = serve(pool, ["it"], device, late=True)
    pool.unload("it")
    assert is_empty(pool._slots)
    check(before, tenants, ["t0"])
    check(after, tenants, ["t1"])


@on_gpu
def test_host_memory_is_page_locked(tmp_path: Path) -> None:
    pool = make(torch.device("cuda"), adapters=2)
    pool.load("a", write(tmp_path / "a", 1).path)
    (entry,) = pool._tiers.entries.values()
    assert entry.image.is_pinned()
    model = Tower()
    model.second.cuda()
    with pytest.raises(ValueError, match="on one device"):
        AdapterPool(model, device_budget="1MiB", host_budget=0)
