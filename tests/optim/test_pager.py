"""Pages come and go: each step meets every page once, whatever the streams do, and moves no more than it must."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peftrt.optim import movers, pager
from peftrt.optim.page_table import Kind, PageTable
from peftrt.optim.pager import RING, Pager
from peftrt.optim.stores import FileStore, HostStore, Store
from tests.optim import late_streams
from tests.optim.late_streams import Late, Locked, plain

PAGE = 4096
PAGES = 11


def make_table() -> PageTable:
    return PageTable([PAGE // 8 * PAGES], [Kind(32, torch.float32)], PAGE)


def step(paging: Pager, touched: list[bool], seen: list[int] | None = None) -> None:
    """Adds 1 to every byte of every page that is touched."""

    def launch(page: int, offset: int) -> None:
        assert paging.slab is not None
        whole = paging.slab
        if page < 0:
            for i in range(paging.resident):
                if touched[i]:
                    whole[i * PAGE : (i + 1) * PAGE] += 1
                    if seen is not None:
                        seen.append(i)
            return
        whole[offset : offset + PAGE] += 1
        if seen is not None:
            seen.append(page)

    paging.step(touched, launch)


def values(paging: Pager) -> list[int]:
    found = []
    for page in range(PAGES):
        data = paging.read(page)
        assert data.min() == data.max(), f"page {page} is torn"
        found.append(int(data[0]))
    return found


def host(tmp_path: Path) -> Store:
    return HostStore(PAGE, pinned=False)


def file(tmp_path: Path) -> Store:
    return FileStore(tmp_path, PAGE, PAGES)


@pytest.fixture(params=[host, file])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made = request.param(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("slots", [3, 4, 7, 10, 11, 20])
def test_each_step_meets_every_page_once_and_moves_all_but_three(store: Store, slots: int) -> None:
    paging = Pager(make_table(), torch.device("cpu"), store)
    paging.start(slots)
    ring = PAGES - paging.resident
    assert paging.resident == (PAGES if slots >= PAGES else slots - RING)
    assert paging.slab is not None
    assert paging.slab.nbytes == min(slots, PAGES) * PAGE
    for number in range(5):
        before = paging.bytes_in, paging.bytes_out
        seen: list[int] = []
        step(paging, [True] * PAGES, seen)
        assert sorted(seen) == list(range(PAGES))
        moved = paging.bytes_in - before[0], paging.bytes_out - before[1]
        if ring == 0:
            assert moved == (0, 0)
        elif number == 0:  # the ring is empty to begin with
            assert moved == (ring * PAGE, max(0, ring - RING) * PAGE)
        else:
            assert moved == (max(0, ring - RING) * PAGE,) * 2
    assert values(paging) == [5] * PAGES
    paging.close()


def test_only_touched_pages_are_met(store: Store) -> None:
    paging = Pager(make_table(), torch.device("cpu"), store)
    paging.start(5)
    draw = random.Random(0)
    expected = [0] * PAGES
    for _ in range(200):
        touched = [draw.random() < draw.choice([0.1, 0.5, 0.9]) for _ in range(PAGES)]
        before = paging.bytes_in
        seen: list[int] = []
        step(paging, touched, seen)
        assert sorted(seen) == [page for page in range(PAGES) if touched[page]]
        assert paging.bytes_in - before <= sum(touched[paging.resident :]) * PAGE
        expected = [value + add for value, add in zip(expected, touched, strict=True)]
        if draw.random() < 0.1:
            assert values(paging) == [value % 256 for value in expected]
    assert values(paging) == [value % 256 for value in expected]
    paging.close()


def test_the_resident_pages_come_behind_the_first_round_of_the_ring() -> None:
    paging = Pager(make_table(), torch.device("cpu"), HostStore(PAGE, pinned=False))
    paging.start(6)
    order: list[int] = []
    paging.step([True] * PAGES, lambda page, offset: order.append(page))
    assert order == [3, 4, 5, -1, 6, 7, 8, 9, 10]
    order.clear()
    paging.step([True] * PAGES, lambda page, offset: order.append(page))
    assert sorted(order[:3]) == [8, 9, 10], "what the ring holds comes first"
    assert order[3] == -1
    assert order[4:] == [3, 4, 5, 6, 7]


def test_pages_are_read_and_written_wherever_they_are(store: Store) -> None:
    paging = Pager(make_table(), torch.device("cpu"), store)
    paging.start(5)
    step(paging, [True] * PAGES)
    for page in range(PAGES):
        paging.write(page, torch.full((PAGE,), 10 * page, dtype=torch.uint8))
    assert values(paging) == [10 * page for page in range(PAGES)]
    step(paging, [True] * PAGES)
    step(paging, [True] * PAGES)
    assert values(paging) == [10 * page + 2 for page in range(PAGES)]
    paging.close()


def test_releasing_and_acquiring_loses_nothing(store: Store) -> None:
    paging = Pager(make_table(), torch.device("cpu"), store)
    paging.start(11)
    step(paging, [True] * PAGES)
    for number, slots in enumerate((3, 8, 11, 4, 4)):
        paging.release()
        assert paging.slab is None
        assert values(paging) == [number + 1] * PAGES
        paging.release()
        paging.acquire(slots)
        step(paging, [True] * PAGES)
        assert values(paging) == [number + 2] * PAGES
    paging.close()


def test_too_few_slots_are_refused() -> None:
    paging = Pager(make_table(), torch.device("cpu"), HostStore(PAGE, pinned=False))
    with pytest.raises(ValueError, match="2 slots for 11 pages, at least 3"):
        paging.start(2)
    assert paging.slab is None


class LatePager(Pager):
    """Its slab is a device's, as late as its streams are."""

    def _drain(self) -> None:
        super()._drain()
        late_streams.synchronize()


def late_step(paging: Pager, touched: list[bool]) -> None:
    def launch(page: int, offset: int) -> None:
        slab = plain(paging.slab)  # type: ignore[arg-type]
        spans = range(paging.resident) if page < 0 else [offset // PAGE]
        for i in spans:
            if page >= 0 or touched[i]:
                late_streams.MAIN.give(lambda i=i: slab[i * PAGE : (i + 1) * PAGE].add_(1))

    paging.step(touched, launch)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[movers.Mover], Store], LatePager]:
    """Makes pagers whose pages are moved by a mover of CUDA's."""
    late_streams.install(monkeypatch, movers)

    def make(mover: type[movers.Mover], store: Store) -> LatePager:
        def chosen(store: Store, slots: list[Tensor]) -> movers.Mover:
            return mover(store, [slot.as_subclass(Late) for slot in slots])

        monkeypatch.setattr(pager, "mover_for", chosen)
        return LatePager(make_table(), torch.device("cpu"), store)

    return make


class LockedStore(HostStore):
    """Copies to its pages are a device's."""

    def view(self, page: int) -> Tensor:
        return super().view(page).as_subclass(Locked)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["streams", "bounce-host", "bounce-file"])
def test_nothing_is_torn_however_late_streams_are(late: Any, kind: str, seed: int, tmp_path: Path) -> None:
    random.seed(seed)
    store: Store = file(tmp_path) if kind == "bounce-file" else LockedStore(PAGE, pinned=False)
    paging = late(movers.StreamMover if kind == "streams" else movers.BounceMover, store)
    paging.start(5)
    expected = [0] * PAGES
    for number in range(12):
        touched = [number % 2 == 0 or random.random() < 0.6 for _ in range(PAGES)]
        late_step(paging, touched)
        expected = [value + add for value, add in zip(expected, touched, strict=True)]
        if random.random() < 0.3:
            late_streams.work_until(lambda: late_streams.idle() or random.random() < 0.2)
    assert values(paging) == expected
    paging.release()
    paging.acquire(3)
    late_step(paging, [True] * PAGES)
    assert values(paging) == [value + 1 for value in expected]
    paging.close()


@pytest.mark.parametrize("lost", ["_used", "_flushed", "_fetched"])
def test_a_wait_that_is_left_out_shows(late: Any, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulation can fail: without one kind of event pages are torn or old, for some order of the streams."""

    def run(seed: int) -> bool:
        random.seed(seed)
        paging = late(movers.StreamMover, LockedStore(PAGE, pinned=False))
        paging.start(4)
        assert paging._mover is not None
        never = [late_streams.Event() for _ in range(RING)]
        for event in never:
            monkeypatch.setattr(event, "record", lambda stream: None)
        monkeypatch.setattr(paging._mover, lost, never)
        for _ in range(4):
            late_step(paging, [True] * PAGES)
        late_streams.synchronize()
        try:
            return values(paging) != [4] * PAGES
        except AssertionError:
            return True

    assert any(run(seed) for seed in range(20))
