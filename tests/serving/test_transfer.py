"""Copies that run as late as they may: a batch waits for what it reads, and nothing overwrites what one may still read.

The side stream of a CUDA device is emulated by a list of what is to be written, which is worked off when somebody waits
for it, and not a step further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peftrt.serving import slots, transfer
from peftrt.serving.transfer import Transfer, transfer_for
from tests.serving.tenants import check, is_empty, make_pool, serve, some, write


class Use:
    """The mark behind a batch's last use; done when the test says so."""

    def __init__(self) -> None:
        self.done = False


class LateTransfer(Transfer):
    """Of a device whose side stream is as slow as it may be."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], Any]] = []
        self.worked = 0
        self.uses: list[Use] = []
        # for each block of writing, what it came behind
        self.behind: list[tuple[Any, ...]] = []
        self.is_writing = False

    @contextmanager
    def writing(self, after: Iterable[Any] = ()) -> Iterator[None]:
        self.behind.append(tuple(after))
        self.is_writing = True
        yield
        self.is_writing = False

    def written(self) -> int:
        return len(self.steps)

    def used(self) -> Use:
        self.uses.append(Use())
        return self.uses[-1]

    def wait_on_device(self, marks: Iterable[Any]) -> None:
        self.work(marks)

    def wait_on_host(self, marks: Iterable[Any]) -> None:
        self.work(marks)

    def work(self, marks: Iterable[Any]) -> None:
        until = max(marks, default=0)
        while self.worked < until:
            self.steps[self.worked]()
            self.worked += 1

    def is_done(self, mark: Any) -> bool:
        return mark.done if isinstance(mark, Use) else self.worked >= mark

    def write(self, target: Tensor, source: Tensor) -> None:
        assert self.is_writing
        assert target.shape == source.shape
        self.steps.append(lambda: target.copy_(source))

    def fill(self, target: Tensor, value: int) -> None:
        assert self.is_writing
        self.steps.append(lambda: target.fill_(value))


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateTransfer:
    """What the pools of the test move their bytes by."""
    late = LateTransfer()
    monkeypatch.setattr(slots, "transfer_for", lambda *written: late)
    return late


def test_a_batch_waits_for_the_writes_it_reads(tmp_path: Path, late: LateTransfer) -> None:
    tenants = {**some(tmp_path, 6), "dora": write(tmp_path / "dora", 3, use_dora=True)}
    pool = make_pool(adapters=3)
    for name, tenant in tenants.items():
        pool.load(name, tenant.path)
    pool.pin("t5")
    assert late.worked == 0, "loading waits for the device"
    draw = torch.Generator().manual_seed(0)
    names = list(tenants)
    for _ in range(40):
        chosen = [names[i] for i in torch.randint(len(names), (2,), generator=draw).tolist()]
        if "dora" in chosen:
            continue  # with its vectors it fills two adapters' room
        check(pool, tenants, [*chosen[:2], None])
    pool.unpin("t5")
    check(pool, tenants, ["dora", None])
    assert pool.stats().evictions > 10
    pool.unload("dora")
    for name in list(pool.names):
        pool.unload(name)
    assert is_empty(pool._slots)


def test_what_a_batch_may_still_read_is_overwritten_behind_it(tmp_path: Path, late: LateTransfer) -> None:
    tenants = some(tmp_path, 2)
    pool = make_pool(adapters=1)
    for name, tenant in tenants.items():
        pool.load(name, tenant.path)
    for _ in range(3):
        serve(pool, ["t0"])
    late.uses[0].done = True
    serve(pool, ["t0"])
    before = len(late.behind)
    serve(pool, ["t1"])
    zeroing, loading = late.behind[before:]
    assert loading == ()
    # the uses that are not done, and the load itself
    assert [mark for mark in zeroing if isinstance(mark, Use)] == late.uses[1:4]
    assert len(zeroing) == 4
    pool.unload("t1")
    assert late.behind[-1][1:] == (late.uses[4],)
    assert is_empty(pool._slots)


def test_unload_and_close_wait_until_the_bytes_are_gone(tmp_path: Path, late: LateTransfer) -> None:
    tenants = some(tmp_path, 2)
    pool = make_pool()
    for name, tenant in tenants.items():
        pool.load(name, tenant.path)
        serve(pool, [name])
    slab = pool._slots.slab
    pool.unload("t0")
    assert slab.any()
    assert late.worked == len(late.steps)
    pool.close()
    assert not slab.any()


def test_a_cpu_needs_no_streams() -> None:
    assert type(transfer_for(torch.zeros(8, dtype=torch.uint8))) is Transfer
    plain = Transfer()
    assert plain.host_bytes(100) == plain.host_buffer(100).numel() == 100
    assert plain.written() is plain.used() is None
    assert plain.is_done(None)


class Stream:
    """A CUDA stream that keeps what it was told."""

    def __init__(self, device: Any, log: list[tuple[str, Any]]) -> None:
        self.log = log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(("behind stream", other))

    def wait_event(self, event: Event) -> None:
        self.log.append(("behind", event))


class Event:
    """A CUDA event that is done when the host has waited for it."""

    done = False

    def record(self, stream: Stream) -> None:
        stream.log.append(("event", self))

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True


class FakeTorch:
    """torch, with two CUDA streams that do nothing: the one in use, and the side stream."""

    def __init__(self) -> None:
        self.main, self.side = Stream(None, []), Stream(None, [])
        self.now = self.main
        self.cuda = self

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def Stream(self, device: Any) -> Stream:
        return self.side

    Event = Event

    def current_stream(self, device: Any) -> Stream:
        return self.now

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before

    def zeros(self, *args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        return torch.zeros(*args, **kwargs)


def test_what_cuda_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which stream waits for which event; the copies themselves are made at once."""
    fake = FakeTorch()
    seen: list[Tensor] = []
    monkeypatch.setattr(transfer, "torch", fake)
    monkeypatch.setattr(slots, "transfer_for", lambda *written: transfer.CudaTransfer(torch.device("cuda"), written))
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: seen.append(tensor), raising=False)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    tenants = some(tmp_path, 2)
    pool = make_pool(adapters=1)
    assert len(seen) == 6
    assert fake.side.log == [("behind stream", fake.main)]
    for name, tenant in tenants.items():
        pool.load(name, tenant.path)
    check(pool, tenants, ["t0", None])
    (_, loaded), (_, used) = fake.side.log[1], fake.main.log[1]
    assert fake.side.log[1:] == [("event", loaded)]
    assert fake.main.log == [("behind", loaded), ("event", used)]
    check(pool, tenants, ["t1"])
    assert fake.side.log[2:4] == [("behind", loaded), ("behind", used)]
    (_, zeroed), (_, again), (_, used_again) = fake.side.log[4], fake.side.log[5], fake.main.log[3]
    assert fake.main.log[2:] == [("behind", again), ("event", used_again)]
    pool.unload("t1")
    assert fake.side.log[6:8] == [("behind", again), ("behind", used_again)]
    assert fake.side.log[8][1].done, "unload did not wait for the zeroing"
    assert not zeroed.done
    pool.close()
    assert fake.now is fake.main
