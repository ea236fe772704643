"""The scratch: what is kept, for whom, how much of it, and how it is given up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import peftrt
from peftrt.ops import _scratch
from peftrt.ops._scratch import scratch

X = torch.zeros(1)
SHAPE = (3, 8)
BYTES = 3 * 8 * 4


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    peftrt.release_scratch()
    yield
    peftrt.release_scratch()


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The current stream, as its one element says."""
    current = [0]
    monkeypatch.setattr(_scratch, "_stream", lambda device: current[0])
    return current


def address(*shape: int, dtype: torch.dtype = torch.float32) -> int:
    with scratch(X.to(dtype), shape or SHAPE) as room:  # type: ignore[arg-type]
        assert room.shape == (shape or SHAPE)
        assert room.dtype == dtype
        assert room.is_contiguous()
        room.fill_(1)
        return room.data_ptr()


def test_a_buffer_is_kept_and_used_again() -> None:
    first = address()
    assert address() == first
    assert address(2, 4) == first
    assert address(3, 16, dtype=torch.bfloat16) == first
    assert peftrt.release_scratch() == BYTES


def test_a_larger_one_takes_its_place() -> None:
    address()
    address(3, 80)
    assert peftrt.release_scratch() == 10 * BYTES
    assert peftrt.release_scratch() == 0


def test_every_stream_has_its_own(stream: list[int]) -> None:
    first = address()
    stream[0] = 1
    second = address()
    assert second != first
    stream[0] = 0
    assert address() == first
    assert peftrt.release_scratch() == 2 * BYTES


def test_the_stream_not_used_for_longest_loses_its_buffer(stream: list[int]) -> None:
    for stream[0] in range(_scratch.STREAMS):
        address()
    stream[0] = 0
    address()
    stream[0] = 99
    address()
    assert [key[1] for key in _scratch._buffers] == [2, 3, 0, 99]
    assert peftrt.release_scratch() == _scratch.STREAMS * BYTES


def test_two_threads_on_one_stream_do_not_share(stream: list[int]) -> None:
    """Nor does a call inside another: launches of both would write one buffer in turn."""
    addresses: list[int] = []
    with scratch(X, SHAPE) as room:
        addresses.append(room.data_ptr())
        thread = threading.Thread(target=lambda: addresses.append(address()))
        thread.start()
        thread.join()
        room.fill_(2)
    assert addresses[0] != addresses[1]
    assert peftrt.release_scratch() == BYTES, "one of them is kept"


def test_the_larger_of_two_is_kept(stream: list[int]) -> None:
    with scratch(X, SHAPE):
        address(3, 80)
    assert peftrt.release_scratch() == 10 * BYTES


def test_a_captured_stream_takes_nothing_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = address()
    monkeypatch.setattr(_scratch, "_capturing", lambda device: True)
    with scratch(X, SHAPE) as room:
        assert room.data_ptr() != kept
    monkeypatch.setattr(_scratch, "_capturing", lambda device: False)
    assert peftrt.release_scratch() == BYTES
    monkeypatch.setattr(_scratch, "_capturing", lambda device: True)
    address()
    assert peftrt.release_scratch() == 0


def test_memory_of_a_private_pool_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_scratch, "_shared", lambda buffer: False)
    address()
    assert peftrt.release_scratch() == 0


class OnCuda:
    """What the question about a buffer's pool reads of it."""

    is_cuda = True
    device = torch.device("cuda", 1)

    def data_ptr(self) -> int:
        return 4096 + 512


@pytest.mark.parametrize(
    ("segment", "shared"),
    [
        ({"device": 1, "address": 4096, "total_size": 1024, "segment_pool_id": (0, 0)}, True),
        ({"device": 1, "address": 4096, "total_size": 1024, "segment_pool_id": (0, 3)}, False),
        ({"device": 0, "address": 4096, "total_size": 1024, "segment_pool_id": (0, 0)}, False),
        ({"device": 1, "address": 4096, "total_size": 512, "segment_pool_id": (0, 0)}, False),
    ],
)
def test_the_pool_of_a_buffer_is_read_from_the_allocator(
    segment: dict[str, Any], shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {"device": 1, "address": 0, "total_size": 4096, "segment_pool_id": (0, 0)}
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: [other, segment])
    assert _scratch._shared(OnCuda()) is shared  # type: ignore[arg-type]


def test_an_allocator_without_segments_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("cudaMallocAsync does not support it")

    monkeypatch.setattr(torch.cuda, "memory_snapshot", refuse)
    assert not _scratch._shared(OnCuda())  # type: ignore[arg-type]


def test_more_than_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match=f"scratch: {_scratch.LIMIT + 4} bytes are more than {_scratch.LIMIT}"):
        with scratch(X, (1, _scratch.LIMIT // 4 + 1)):
            pass
    assert not _scratch._buffers


def test_a_buffer_of_inference_mode_can_be_written_outside_of_it() -> None:
    with torch.inference_mode():
        address()
    address()


def test_an_error_inside_leaves_the_buffer() -> None:
    with pytest.raises(KeyError), scratch(X, SHAPE):
        raise KeyError
    assert peftrt.release_scratch() == BYTES


def test_of_one_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = {(torch.device("cuda", i), 0): torch.empty(1 + i, dtype=torch.uint8) for i in range(3)}
    monkeypatch.setattr(_scratch, "_buffers", buffers)
    assert peftrt.release_scratch("cpu") == 0
    assert peftrt.release_scratch(torch.device("cuda", 1)) == 2
    assert peftrt.release_scratch("cuda:2") == 3
    assert peftrt.release_scratch("cuda") == 1
    assert not buffers


def test_an_unknown_device_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="nowhere"):
        peftrt.release_scratch("nowhere")
