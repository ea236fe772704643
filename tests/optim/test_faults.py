"""What can go wrong around a step: nothing is half-changed in silence."""

from __future__ import annotations

import errno
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftrt.optim import PagedAdamW, PoisonedError
from peftrt.optim.stores import FileStore, HostStore
from tests.optim.trained import PAGES, gradients, parameters, refuse_pinned, same, same_pages, train


def copies(params: list[nn.Parameter]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params]


def test_no_gradient_leaves_parameter_and_state_alone() -> None:
    params, optimizer = train(steps=3)
    before, steps = copies(params), optimizer.steps.copy()
    for p in params:
        p.grad = None
    optimizer.step()
    assert same(before, params)
    assert optimizer.steps.tolist() == steps.tolist()
    assert optimizer.stats().steps == 3


def test_a_sparse_gradient_is_refused() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    linear = nn.Linear(4, 2)
    optimizer = PagedAdamW([*linear.named_parameters(), ("tokens", embedding.weight)], lr=0.1)
    linear(embedding(torch.tensor([1, 2]))).sum().backward()
    before = copies([*linear.parameters(), embedding.weight])
    with pytest.raises(TypeError, match=r"parameter 2 of group 0 \(tokens\) is sparse .* sparse=False"):
        optimizer.step()
    assert same(before, [*linear.parameters(), embedding.weight])
    assert optimizer.stats().steps == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bits", [32, 8])
def test_a_gradient_that_is_not_finite_skips_the_step(bits: int, bad: float) -> None:
    params, optimizer = train(steps=3, bits=bits, skip_nonfinite=True, **PAGES)
    _, expected = train(steps=3, bits=bits)
    before = copies(params)
    gradients(params, 3)
    grad = params[4].grad
    assert grad is not None
    grad[60_000] = bad
    optimizer.step()
    assert same(before, params)
    assert same_pages(optimizer, expected)
    assert (optimizer.stats().skipped, optimizer.stats().steps) == (1, 3)
    # and the next step is as if it had not been there
    more, _ = train(steps=4, bits=bits)
    gradients(params, 3)
    optimizer.step()
    assert same(more, params)


def test_parameters_that_were_allocated_anew_are_found() -> None:
    def between(step: int, optimizer: PagedAdamW) -> None:
        for p in optimizer.parameters:
            p.data = p.data.clone()

    expected, _ = train(**PAGES)
    got, _ = train(between=between, **PAGES)
    assert same(expected, got)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.to(torch.bfloat16), r"was torch.float32 of 65536 elements .* is torch.bfloat16 of 65536"),
        (lambda p: p[:100].clone(), r"was torch.float32 of 65536 elements .* of 100 now"),
        (lambda p: p.view(256, 256).t().clone(memory_format=torch.preserve_format), "must be contiguous"),
    ],
)
def test_a_parameter_that_became_another_one_is_refused(change: Any, message: str) -> None:
    params, optimizer = train(steps=2)
    params[4].data = change(params[4].data)
    for p in params:
        p.grad = torch.ones_like(p)
    before = copies(params)
    with pytest.raises(ValueError, match=f"parameter 4 of group 0.*{message}"):
        optimizer.step()
    assert same(before, params)
    assert optimizer.stats().steps == 2


@pytest.mark.parametrize(("budget", "page"), [("11MiB", None), ("40KiB", "16KiB"), (0, None)])
def test_a_budget_under_three_pages_is_refused(budget: Any, page: str | None) -> None:
    large = [nn.Parameter(torch.zeros(1 << 21))]
    with pytest.raises(ValueError, match=r"device_budget must be at least .* three pages"):
        PagedAdamW(large, device_budget=budget, page_size=page)


def test_page_locked_memory_that_is_refused_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_pinned(monkeypatch)
    store = HostStore(4096, pinned=True)
    with pytest.warns(RuntimeWarning, match=r"page-locked memory were refused \(CUDA error: out of memory\)"):
        store.make_room(range(5))
    assert not store.pinned, "whoever moves its pages must know"
    store.write(3, torch.full((4096,), 7, dtype=torch.uint8))
    assert store.view(3).float().mean() == 7


def test_host_memory_is_taken_in_powers_of_two() -> None:
    """torch rounds page-locked memory up to one: 11 pages are 8, 2 and 1."""
    store = HostStore(4096, pinned=False)
    store.make_room(range(11))
    sizes = {store.view(page).untyped_storage().nbytes() for page in range(11)}
    assert sizes == {8 * 4096, 2 * 4096, 4096}
    assert store.nbytes == 11 * 4096


def break_store(optimizer: PagedAdamW, monkeypatch: pytest.MonkeyPatch, method: str, page: int) -> None:
    store = optimizer._paging.store
    real = getattr(store, method)

    def broken(number: int, memory: torch.Tensor) -> None:
        if number == page:
            raise OSError(errno.EIO, "the disk is gone")
        real(number, memory)

    monkeypatch.setattr(store, method, broken)


def step_twice(optimizer: PagedAdamW) -> None:
    """What could not be written in one step shows in the next at the latest."""
    optimizer.step()
    optimizer.step()


@pytest.mark.parametrize("method", ["read", "write"])
@pytest.mark.parametrize("backing", ["host", "file"])
def test_a_step_that_fails_half_way_poisons_the_optimizer(
    method: str, backing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    params, optimizer = train(steps=2, **PAGES, backing=tmp_path if backing == "file" else "host")
    steps = optimizer.steps.copy()
    with monkeypatch.context() as broken:
        break_store(optimizer, broken, method, page=20)
        gradients(params, 2)
        with pytest.raises(OSError, match="the disk is gone"):
            step_twice(optimizer)
    for attempt in (optimizer.step, lambda: optimizer.shrink(1), lambda: optimizer.release_device().__enter__()):
        with pytest.raises(PoisonedError, match=r"failed half-way \(OSError.*the disk is gone"):
            attempt()
    assert optimizer.steps.max() <= steps.max() + 1
    # whole again once every page is written
    with optimizer.replacing(optimizer.steps * 0):
        for page in range(len(optimizer.table.pages)):
            optimizer.write_page(page, torch.zeros(optimizer.table.page_bytes, dtype=torch.uint8))
    fresh = parameters()
    with torch.no_grad():
        for p, q in zip(params, fresh, strict=True):
            p.copy_(q)
    for step in range(3):
        gradients(params, step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        optimizer.step()
    expected, _ = train(steps=3)
    assert same(expected, params)


def test_loading_that_ends_with_an_error_poisons_the_optimizer() -> None:
    _, optimizer = train(steps=1)
    with pytest.raises(OSError, match="no more"), optimizer.replacing(optimizer.steps):
        raise OSError("no more")
    with pytest.raises(PoisonedError, match="loading a state was not finished"):
        optimizer.step()


def interrupt(optimizer: PagedAdamW, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """So many Ctrl-C in the middle of the next step."""
    update = optimizer._paging._update
    left = [times]

    def interrupted(*args: Any) -> None:
        while left[0]:
            left[0] -= 1
            os.kill(os.getpid(), signal.SIGINT)
        update(*args)

    monkeypatch.setattr(optimizer._paging, "_update", interrupted)


def test_ctrl_c_comes_when_the_step_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = train(steps=1, **PAGES)
    handler = signal.getsignal(signal.SIGINT)
    interrupt(optimizer, monkeypatch, 1)
    gradients(params, 1)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert signal.getsignal(signal.SIGINT) is handler
    gradients(params, 2)
    optimizer.step()
    expected, reference = train(steps=3)
    assert same(expected, params)
    assert same_pages(reference, optimizer)


def test_a_second_ctrl_c_comes_at_once_and_poisons_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = train(steps=1, **PAGES)
    interrupt(optimizer, monkeypatch, 2)
    gradients(params, 1)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(PoisonedError, match="KeyboardInterrupt"):
        optimizer.step()


def test_a_handler_of_ones_own_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = train(steps=1, **PAGES)
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        interrupt(optimizer, monkeypatch, 3)
        gradients(params, 1)
        optimizer.step()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT] * 3


def test_out_of_memory_elsewhere_leaves_the_last_step() -> None:
    params, optimizer = train(steps=3, **PAGES)
    expected, _ = train(steps=4)
    with pytest.raises(RuntimeError, match="alloc"):
        torch.empty(1 << 50)
    gradients(params, 3)
    optimizer.step()
    assert same(expected, params)


def test_memory_that_does_not_come_back_can_be_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = train(steps=3, **PAGES)
    expected, _ = train(steps=4)

    def refused(slots: int) -> None:
        raise MemoryError("none left")

    with monkeypatch.context() as short:
        short.setattr(optimizer._paging, "_acquire", refused)
        with pytest.raises(MemoryError, match="none left"), optimizer.release_device():
            pass
    with pytest.raises(RuntimeError, match="enter and leave it again"):
        optimizer.step()
    with optimizer.release_device():
        pass
    gradients(params, 3)
    optimizer.step()
    assert same(expected, params)


def test_shrinking_below_three_pages_changes_nothing() -> None:
    params, optimizer = train(steps=3, **PAGES)
    before = optimizer.stats()
    with pytest.raises(ValueError, match=r"at least .* three pages"):
        optimizer.shrink("400KiB")
    assert optimizer.stats() == before
    expected, _ = train(steps=4)
    gradients(params, 3)
    optimizer.step()
    assert same(expected, params)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_is_told() -> None:
    params, optimizer = train(steps=1)
    gradients(params, 1)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            optimizer.step()
            os.write(writer, b"it stepped")
        except BaseException as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    message = os.read(reader, 1000).decode()
    os.close(reader)
    os.close(writer)
    assert f"made in process {os.getpid()}, used in its fork {child}" in message
    optimizer.step()


def test_a_disk_without_room_says_so_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        PagedAdamW(parameters(), backing=tmp_path, **PAGES)
    assert not list(tmp_path.iterdir())


def test_the_backing_file_leaves_nothing_behind_and_touches_nothing(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("important")
    with pytest.raises(ValueError, match="mine exists already"):
        PagedAdamW(parameters(), backing=mine, **PAGES)
    with pytest.raises(ValueError, match=r"no such directory: .*nowhere"):
        PagedAdamW(parameters(), backing=tmp_path / "nowhere" / "file", **PAGES)
    _, optimizer = train(backing=tmp_path / "new", **PAGES)
    assert optimizer.stats().store_bytes >= optimizer.table.nbytes
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert mine.read_text() == "important"
    optimizer.close()


def test_a_file_that_is_cut_short_is_an_error(tmp_path: Path) -> None:
    store = FileStore(tmp_path, 4096, 4)
    store.make_room(range(4))
    assert store._file is not None
    os.ftruncate(store._file.fileno(), 5000)
    with pytest.raises(OSError, match="only 904 of 4096 bytes"):
        store.read(1, torch.empty(4096, dtype=torch.uint8))
    store.close()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 16}, ValueError, r"bits must be one of \(32, 8\), got 16"),
        ({"lr": -1.0}, ValueError, "group 0: lr must be finite and at least 0, got -1.0"),
        ({"lr": float("nan")}, ValueError, "lr must be finite"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas must be two numbers in 0 <= beta < 1"),
        ({"eps": -1e-8}, ValueError, "eps must be finite"),
        ({"weight_decay": float("inf")}, ValueError, "weight_decay must be finite"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be above 0 or None, got 0.0"),
        ({"device_budget": "64 megabytes"}, ValueError, "device_budget must be like .*'512MiB'"),
        ({"device_budget": 1.5}, TypeError, "device_budget must be a number of bytes"),
        ({"page_size": "3MiB"}, ValueError, "page_size must be a power of two from 4096"),
        ({"page_size": 1024}, ValueError, "page_size must be a power of two from 4096"),
    ],
)
def test_arguments_out_of_range_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PagedAdamW(parameters(), **options)


@pytest.mark.parametrize(
    ("parameter", "error", "message"),
    [
        (torch.zeros(4, dtype=torch.float64), TypeError, "parameter 1 of group 0 must be one of float32, bfloat16"),
        (torch.zeros(4, dtype=torch.complex64), TypeError, "must be one of float32, bfloat16, float16, got torch.comp"),
        (torch.zeros(4, 4).t()[1:], ValueError, r"must be contiguous, got \[3, 4\] of strides"),
        (torch.zeros(4, device="meta"), TypeError, "must be a plain dense tensor"),
    ],
)
def test_parameters_that_cannot_be_used_are_named(parameter: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PagedAdamW([nn.Parameter(torch.zeros(3)), nn.Parameter(parameter)])


def test_a_gradient_of_another_dtype_is_refused() -> None:
    p = nn.Parameter(torch.zeros(4))
    optimizer = PagedAdamW([p])
    grad = torch.zeros(4, dtype=torch.bfloat16)
    p.grad_dtype = None
    p.grad = grad
    with pytest.raises(TypeError, match=r"of parameter 0 of group 0 must be torch\.float32, got torch\.bfloat16"):
        optimizer.step()


def test_a_gradient_that_is_not_contiguous_is_taken() -> None:
    p, q = (nn.Parameter(torch.zeros(3, 4)) for _ in range(2))
    grad = torch.randn(4, 3).t()
    p.grad, q.grad = grad, grad.contiguous()
    for each in (p, q):
        PagedAdamW([each], lr=0.1).step()
    assert same([p], [q])


def test_an_empty_parameter_is_no_trouble() -> None:
    p, nothing = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0, 4))
    optimizer = PagedAdamW([p, nothing], lr=0.1, max_grad_norm=1.0)
    p.grad, nothing.grad = torch.ones(3), torch.ones(0, 4)
    optimizer.step()
    assert float(p.detach().sum()) < 3
    PagedAdamW([nothing]).step()


def test_groups_cannot_be_added_and_pages_cannot_be_copied() -> None:
    _, optimizer = train(steps=1)
    with pytest.raises(ValueError, match="groups cannot be added later"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        pickle.dumps(optimizer)
