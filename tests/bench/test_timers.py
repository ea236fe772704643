"""The GPU's timer, on a stand-in for torch.cuda that keeps a log: order, streams, rotation, what cannot be captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import measure, timers
from bench.measure import Contender, Race
from bench.results import OWN

L2 = 256


class Cuda:
    """What the timer uses of torch.cuda. A launch is logged with its stream, or added to the graph being captured."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current, self.capturing, self.clock = "default", None, 0.0
        self.Stream = lambda: SimpleNamespace(name="side", wait_stream=lambda other: self.wait("side", other))
        self.Event = lambda enable_timing: self._event(enable_timing)
        self.CUDAGraph = lambda: Graph(self)

    def get_device_properties(self) -> Any:
        return SimpleNamespace(L2_cache_size=L2)

    def current_stream(self) -> Any:
        name = self.current
        return SimpleNamespace(name=name, wait_stream=lambda other: self.wait(name, other))

    def wait(self, name: str, other: Any) -> None:
        self.log.append(f"{name} waits for {other.name}")

    def synchronize(self) -> None:
        self.log.append("synchronize")

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: Graph, stream: Any) -> Iterator[None]:
        assert self.current == stream.name, "captured on another stream than the operands were made on"
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None

    def launch(self, what: str, seconds: float = 0.0) -> None:
        if self.capturing is not None:
            self.capturing.nodes.append((what, seconds))
            return
        self.clock += seconds
        self.log.append(f"{what} on {self.current}")

    def _event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace(at=0.0)

        def record() -> None:
            event.at = self.clock
            self.log.append("event")

        event.record = record
        event.synchronize = lambda: self.log.append("event reached")
        event.elapsed_time = lambda end: (end.at - event.at) * 1e3
        return event


class Graph:
    """A captured graph: replayed, its launches count."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.nodes = cuda, []

    def replay(self) -> None:
        for what, seconds in self.nodes:
            self.cuda.launch(what, seconds)


class Lead:
    """The memory that is read before the first event."""

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        self.cuda, self.nbytes = cuda, nbytes

    def view(self, dtype: torch.dtype) -> Lead:
        assert dtype == torch.float32
        return self

    def sum(self) -> None:
        self.cuda.launch("lead", 1.0)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    fake = Cuda()
    names = {"uint8": torch.uint8, "float32": torch.float32}
    zeros = lambda nbytes, dtype, device: Lead(fake, nbytes)  # noqa: E731
    monkeypatch.setattr(timers, "torch", SimpleNamespace(cuda=fake, zeros=zeros, **names))
    return fake


def _calls(cuda: Cuda, count: int, seconds: float = 0.5) -> list[Callable[[], Any]]:
    return [lambda i=i: cuda.launch(f"call {i}", seconds) for i in range(count)]


def test_operands_rotate_over_four_times_the_cache(cuda: Cuda) -> None:
    timer = timers.CudaTimer()
    assert timer.rotation_bytes == 4 * L2
    assert timer._lead.nbytes == 4 * L2


def test_a_cell_has_one_stream_and_leaves_it_ordered(cuda: Cuda) -> None:
    timer = timers.CudaTimer()
    inside: list[str] = []

    def fail() -> None:
        inside.append(cuda.current)
        raise KeyError

    with pytest.raises(KeyError), timer.scope():
        fail()
    assert inside == ["side"]
    assert cuda.current == "default"
    assert cuda.log == ["side waits for default", "default waits for side"]


def test_a_graph_holds_one_call_a_copy_after_the_warm_up(cuda: Cuda) -> None:
    timer = timers.CudaTimer()
    with timer.scope():
        timed = timer.prepare(_calls(cuda, 3))
    warm_up = [f"call {i} on side" for i in range(3)] * timer.WARM_UPS
    assert cuda.log == ["side waits for default", *warm_up, "synchronize", "default waits for side"]
    assert (timed.batch, timed.note) == (3, None)
    assert [what for what, _ in timed.run.__self__.nodes] == ["call 0", "call 1", "call 2"]


def test_a_turn_is_timed_between_events_on_a_busy_device(cuda: Cuda) -> None:
    timer = timers.CudaTimer()
    with timer.scope():
        timed = timer.prepare(_calls(cuda, 2, seconds=0.5))
        cuda.log.clear()
        seconds = timer.time(timed)
    lead = ["lead on side"] * timer.LEAD_READS
    replay = ["call 0 on side", "call 1 on side"]
    assert cuda.log[:-1] == ["synchronize", *lead, "event", *replay, "event", "event reached"]
    assert seconds == pytest.approx(0.5), "seconds a call, the lead not counted"


def test_all_results_of_a_capture_live_at_once(cuda: Cuda) -> None:
    alive, most = [0], [0]

    class Result:
        def __init__(self) -> None:
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self) -> None:
            alive[0] -= 1

    timer = timers.CudaTimer()
    with timer.scope():
        timer.prepare([Result] * 5)
    assert (most[0], alive[0]) == (5, 0)


def test_what_cannot_be_captured_is_launched_and_says_so(cuda: Cuda) -> None:
    def stubborn() -> None:
        if cuda.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nand a long story")
        cuda.launch("call", 0.25)

    timer = timers.CudaTimer()
    with timer.scope():
        timed = timer.prepare([stubborn, stubborn])
        assert timer.time(timed) == pytest.approx(0.25)
    assert timed.note is not None
    assert timed.note.endswith("cannot be captured: operation not permitted when stream is capturing")


def test_a_training_step_is_launched_as_a_user_launches_it(cuda: Cuda) -> None:
    timer = timers.CudaTimer()
    with timer.scope():
        timed = timer.prepare(_calls(cuda, 1, seconds=0.5), captured=False)
        cuda.log.clear()
        assert timer.time(timed) == pytest.approx(0.5)
    assert "call 0 on side" in cuda.log
    assert timed.note is None


def test_a_peak_on_a_cpu_is_what_a_call_takes_and_gives_back() -> None:
    timer = timers.CpuTimer()
    size = 64 << 20
    kept = bytearray(size)  # what was taken before does not count

    def call() -> None:
        for _ in range(2):  # one after the other: the second finds the first one's place
            memory = bytearray(size)
            memory[::4096] = b"x" * (size // 4096)
            del memory

    # the kernel counts a process's pages in batches, a few of them late
    assert 0.98 * size <= timer.peak(call) < 1.5 * size
    assert timer.peak(lambda: None) < size / 8
    assert len(kept) == size


def test_another_error_is_raised(cuda: Cuda) -> None:
    def broken() -> None:
        if cuda.capturing is not None:
            raise ValueError("not the device's")

    timer = timers.CudaTimer()
    with timer.scope(), pytest.raises(ValueError, match="not the device's"):
        timer.prepare([broken])


def test_the_note_reaches_the_result_file(cuda: Cuda) -> None:
    def stubborn() -> None:
        if cuda.capturing is not None:
            raise RuntimeError("no")
        cuda.launch("call", 0.5)

    timer = timers.CudaTimer()
    contenders = {OWN: Contender(tuple(_calls(cuda, 2)), (), 0.0), "peer": Contender((stubborn,), (), 0.0)}
    with timer.scope():
        race = Race(contenders, timer, measure.BRIEF)
        race.run()
    found = measure.Field(contenders, dict.fromkeys(contenders, 0.0))
    entries = measure.report(race, found, floor=0.25)
    assert race.rounds == measure.BRIEF.min_rounds >= 50
    assert "note" not in entries[OWN]
    assert "cannot be captured: no" in entries["peer"]["note"]
    assert entries["peer"]["ratio"] == 1.0
