"""Device memory for decoded parts of weights: one buffer a device and stream, kept from call to call.

A stream runs in order, so that a buffer which only one stream uses may be written again as soon as that stream's
readers are launched: no event and no ``record_stream`` is needed. Torch's allocator reasons alike when it keeps freed
blocks by stream, so that a buffer that is dropped here while kernels still read it is reused by its stream alone, after
them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# The most bytes of one buffer: an operation that would need more goes another way. Decoded in one piece, the largest
# matrix of an 8B model would take 235 MB.
LIMIT = 128 << 20
# Buffers of a device; beyond, that of the stream not used for longest goes.
STREAMS = 4

Key = tuple[torch.device, int]
# the most recently used last
_buffers: dict[Key, Tensor] = {}
_lock = threading.Lock()


@contextmanager
def scratch(like: Tensor, shape: tuple[int, int]) -> Iterator[Tensor]:
    """Uninitialised memory [shape] of ``like``'s dtype and device, for launches on the current stream.

    Args:
        like: a tensor of the dtype and device.
        shape: of the memory, at most LIMIT bytes.

    While a thread has a stream's buffer, another one on the same stream gets memory of its own: two sequences of
    launches in one buffer would overwrite each other. So does a stream that a CUDA graph is captured from, whose
    replays run on any stream, later, beside others: its memory comes from the graph's own pool.
    """
    size = shape[0] * shape[1] * like.element_size()
    if size > LIMIT:
        raise ValueError(f"scratch: {size} bytes are more than {LIMIT}")
    key = None if _capturing(like.device) else (like.device, _stream(like.device))
    buffer = _take(key, size)
    if buffer is None:
        # under inference mode the buffer would be one that no call outside of it may write
        with torch.inference_mode(False):
            buffer = torch.empty(size, dtype=torch.uint8, device=like.device)
        if key is not None and not _shared(buffer):
            key = None
    try:
        yield buffer[:size].view(like.dtype).view(shape)
    finally:
        _put(key, buffer)


def release_scratch(device: torch.device | str | int | None = None) -> int:
    """Give up the memory that decoded parts of weights were kept in between calls.

    The next large product allocates it again. The memory goes to torch's allocator; ``torch.cuda.empty_cache()`` hands
    it on to the device. A call that runs meanwhile in another thread keeps its own.

    Args:
        device: of which it is given up; ``"cuda"`` is every CUDA device. Default: all.

    Returns:
        The bytes given up.

    Raises:
        RuntimeError: a device that torch does not know.
    """
    wanted = None if device is None else torch.device(device)
    with _lock:
        keys = [key for key in _buffers if wanted is None or _matches(key[0], wanted)]
        return sum(_buffers.pop(key).numel() for key in keys)


def _matches(device: torch.device, wanted: torch.device) -> bool:
    return device.type == wanted.type and wanted.index in (None, device.index)


def _take(key: Key | None, size: int) -> Tensor | None:
    """The stream's buffer, no longer among those kept. One that is too small is given up before another is made."""
    if key is None:
        return None
    with _lock:
        buffer = _buffers.pop(key, None)
    return buffer if buffer is not None and buffer.numel() >= size else None


def _put(key: Key | None, buffer: Tensor) -> None:
    if key is None:
        return
    with _lock:
        kept = _buffers.pop(key, None)  # another thread may have returned one for the stream in the meantime
        _buffers[key] = buffer if kept is None or kept.numel() < buffer.numel() else kept
        same = [other for other in _buffers if other[0] == key[0]]
        for other in same[:-STREAMS]:
            del _buffers[other]


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _shared(buffer: Tensor) -> bool:
    """Whether the memory is of the pool that everything allocates from, so that it may be kept.

    Inside ``torch.cuda.use_mem_pool``, and while ``torch.compile`` warms a CUDA graph up, it is of a pool whose owner
    counts what is left in it. Asked once an allocation: the allocator makes a list of its segments for it. One that has
    no such list, as cudaMallocAsync, is asked for memory by every call.
    """
    if not buffer.is_cuda:
        return True
    try:
        segments = torch.cuda.memory_snapshot()
    except RuntimeError:
        return False
    for segment in segments:
        start = segment["address"]
        if segment["device"] == buffer.device.index and start <= buffer.data_ptr() < start + segment["total_size"]:
            return tuple(segment["segment_pool_id"]) == (0, 0)
    return False
