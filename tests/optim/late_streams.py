"""CUDA's streams and events on a CPU: work is done as late as it may be, streams in any order that their events allow.

``install`` puts them in the place of ``torch.cuda`` in a module. A ``Late`` tensor's ``copy_`` is given to the current
stream, as a copy between page-locked memory and a device is.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

_lock = threading.RLock()
_here = threading.local()


class Stream:
    """What it was given and has not done."""

    every: ClassVar[list[Stream]] = []

    def __init__(self, device: Any = None) -> None:
        self.work: deque[tuple[Callable[[], bool], Callable[[], Any]]] = deque()
        Stream.every.append(self)

    def give(self, do: Callable[[], Any], ready: Callable[[], bool] = lambda: True) -> None:
        with _lock:
            self.work.append((ready, do))

    def wait_event(self, event: Event) -> None:
        mark = event.mark
        if mark is not None:
            self.give(lambda: None, lambda: mark[0])

    def wait_stream(self, other: Stream) -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)


class Event:
    """A point in a stream; recorded anew it is another point, and who waits for the old one is not held up by that."""

    def __init__(self) -> None:
        self.mark: list[bool] | None = None

    def record(self, stream: Stream) -> None:
        mark = self.mark = [False]
        stream.give(lambda: mark.__setitem__(0, True))

    def synchronize(self) -> None:
        mark = self.mark
        work_until(lambda: mark is None or mark[0])


def work_until(done: Callable[[], bool]) -> None:
    """Let streams work, one piece of one of them at a time, until then and no further."""
    while True:
        with _lock:
            if done():
                return
            able = [stream for stream in Stream.every if stream.work and stream.work[0][0]()]
            assert able, "streams wait for one another"
            random.choice(able).work.popleft()[1]()


def idle() -> bool:
    return not any(stream.work for stream in Stream.every)


def synchronize(device: Any = None) -> None:
    work_until(idle)


def current_stream(device: Any = None) -> Stream:
    return getattr(_here, "stream", None) or MAIN


@contextmanager
def stream(which: Stream) -> Iterator[None]:
    before = getattr(_here, "stream", None)
    _here.stream = which
    yield
    _here.stream = before


class Late(Tensor):
    """Memory of a device."""

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:  # type: ignore[override]
        if not non_blocking:  # the host's own
            plain(self).copy_(plain(source))
            return self
        current_stream().give(lambda: plain(self).copy_(plain(source)))
        return self


class Locked(Late):
    """Page-locked memory of the host: what is copied to it comes from a device."""


def plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor)


MAIN = Stream()


def install(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Let a module have these streams for ``torch.cuda``'s, and ``Locked`` memory for page-locked."""
    Stream.every[:] = [MAIN]
    MAIN.work.clear()

    def empty(*size: int, pin_memory: bool = False, **options: Any) -> Tensor:
        return torch.zeros(*size, **options).as_subclass(Locked)

    cuda = SimpleNamespace(
        Stream=Stream, Event=Event, current_stream=current_stream, stream=stream, synchronize=synchronize
    )
    monkeypatch.setattr(module, "torch", SimpleNamespace(cuda=cuda, empty=empty, uint8=torch.uint8))
