"""Paged optimizer state on a device: the CPU's bits, however late copies are; no allocation and no wait in a step."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftrt.optim import PagedAdamW
from tests.cases import FLOATS
from tests.gpu.places import on_gpu
from tests.optim.trained import gradients, parameters, refuse_pinned, same, same_pages, train

TIGHT = {"device_budget": "300KiB", "page_size": "16KiB"}
# cycles: some hundredths of a second
LATE = 50_000_000


def train_on(device: torch.device, steps: int = 5, late: bool = False, **options: Any) -> tuple[Any, PagedAdamW]:
    """What ``tests.optim.trained.train`` does on a CPU."""
    dtype = options.pop("dtype", torch.float32)
    host = parameters(dtype)
    params = [nn.Parameter(p.detach().to(device)) for p in host]
    optimizer = PagedAdamW(params, lr=1e-2, weight_decay=0.1, **options)
    for step in range(steps):
        gradients(host, step)
        if late and device.type == "cuda":
            torch.cuda._sleep(LATE)
        for p, q in zip(params, host, strict=True):
            p.grad = None if q.grad is None else q.grad.to(device, non_blocking=True)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_device_gives_the_cpu_s_bits(device: torch.device, bits: int, clip: float | None, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"bits": bits, "max_grad_norm": clip, "dtype": dtype}
    expected, reference = train(5, **options)
    for budget in ({}, TIGHT):
        got, optimizer = train_on(device, **options, **budget)
        assert same(expected, [p.cpu() for p in got])
        assert same_pages(reference, optimizer)


@pytest.mark.parametrize("backing", ["host", "refused", "file"])
def test_pages_move_behind_what_writes_them(
    device: torch.device, backing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, reference = train(8, max_grad_norm=1.0)
    if backing == "refused":
        refuse_pinned(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        where = tmp_path if backing == "file" else "host"
        got, optimizer = train_on(device, 8, late=True, max_grad_norm=1.0, backing=where, **TIGHT)
    assert same(expected, [p.cpu() for p in got])
    assert same_pages(reference, optimizer)
    with optimizer.release_device():
        assert same_pages(reference, optimizer)
    assert same_pages(reference, optimizer)
    optimizer.close()


@on_gpu
@pytest.mark.parametrize("budget", [{}, TIGHT])
def test_a_step_allocates_nothing_on_the_device_and_the_host_waits_for_nothing(budget: dict[str, Any]) -> None:
    device = torch.device("cuda")
    params, optimizer = train_on(device, 3, max_grad_norm=1.0, **budget)
    host = parameters()
    gradients(host, 3)
    for p, q in zip(params, host, strict=True):
        p.grad = None if q.grad is None else q.grad.to(device)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    expected, _ = train(4, max_grad_norm=1.0)
    assert same(expected, [p.cpu() for p in params])


@on_gpu
def test_the_device_holds_no_more_than_the_budget() -> None:
    device = torch.device("cuda")
    params = [nn.Parameter(torch.zeros(1 << 20, device=device)) for _ in range(16)]
    before = torch.cuda.memory_allocated()
    optimizer = PagedAdamW(params, device_budget="24MiB", page_size="4MiB", max_grad_norm=1.0)
    held = torch.cuda.memory_allocated() - before
    assert optimizer.stats().device_bytes <= held <= 24 << 20
    with optimizer.release_device():
        assert torch.cuda.memory_allocated() - before < 1 << 20
    optimizer.shrink("8MiB")
    assert torch.cuda.memory_allocated() - before <= 16 << 20


@on_gpu
def test_a_step_that_is_skipped_waits_once_and_changes_nothing() -> None:
    device = torch.device("cuda")
    params, optimizer = train_on(device, 3, skip_nonfinite=True, **TIGHT)
    kept = [p.detach().clone() for p in params]
    params[4].grad = torch.full_like(params[4], float("nan"))
    optimizer.step()
    assert same(kept, params)
    assert optimizer.stats().skipped == 1
