"""How bytes come to the device and when they may be touched: at once on a CPU, by streams and events on CUDA.

On CUDA all writes to a pool's slab are made on one side stream, in the order in which they are asked for. A batch's
stream waits for the event behind the writes it needs; the side stream waits for the event behind a batch's last use
before it overwrites what that batch read. The host waits for neither, but in ``unload`` and ``close``.

The CUDA half has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Transfer:
    """Of a CPU: everything is done when the call returns, and there is nothing to wait for.

    A mark is a point in the work of a stream; here it is always None.
    """

    def host_buffer(self, nbytes: int) -> Tensor:
        """Zeros, uint8 ``[nbytes]``, which copies to the device can read while the host goes on."""
        return torch.zeros(nbytes, dtype=torch.uint8)

    def host_bytes(self, nbytes: int) -> int:
        """Bytes that a host buffer of this size really takes."""
        return nbytes

    @contextmanager
    def writing(self, after: Iterable[Any] = ()) -> Iterator[None]:
        """Write to the slab in this block; what is written comes behind the marks."""
        yield

    def written(self) -> Any:
        """A mark behind all that has been written so far."""
        return None

    def used(self) -> Any:
        """A mark behind what the caller's stream has been given so far."""
        return None

    def wait_on_device(self, marks: Iterable[Any]) -> None:
        """Let what the caller's stream is given from now on come behind the marks."""

    def wait_on_host(self, marks: Iterable[Any]) -> None:
        """Return when what lies before the marks is done."""

    def is_done(self, mark: Any) -> bool:
        """Whether what lies before the mark is done."""
        return True

    def write(self, target: Tensor, source: Tensor) -> None:
        """Copy host memory, which must not change any more, into the slab or its descriptors; in ``writing``."""
        target.copy_(source)

    def fill(self, target: Tensor, value: int) -> None:
        """Set all of a part of the slab or its descriptors; in ``writing``."""
        target.fill_(value)


class CudaTransfer(Transfer):
    """Of a CUDA device.

    Args:
        device: it.
        written: all that is written by this object.
    """

    def __init__(self, device: torch.device, written: Sequence[Tensor]) -> None:
        self.device = device
        self.side = torch.cuda.Stream(device)
        # their first values were written on the stream of whoever made them
        self.side.wait_stream(torch.cuda.current_stream(device))
        for tensor in written:
            tensor.record_stream(self.side)

    def host_buffer(self, nbytes: int) -> Tensor:
        # page-locked, so that a copy need not pass through a buffer of the driver's
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)

    def host_bytes(self, nbytes: int) -> int:
        # torch's allocator of page-locked memory rounds up to a power of two
        return 1 << max(nbytes - 1, 0).bit_length()

    @contextmanager
    def writing(self, after: Iterable[Any] = ()) -> Iterator[None]:
        for mark in after:
            self.side.wait_event(mark)
        with torch.cuda.stream(self.side):
            yield

    def written(self) -> Any:
        event = torch.cuda.Event()
        event.record(self.side)
        return event

    def used(self) -> Any:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait_on_device(self, marks: Iterable[Any]) -> None:
        stream = torch.cuda.current_stream(self.device)
        for mark in marks:
            if not mark.query():
                stream.wait_event(mark)

    def wait_on_host(self, marks: Iterable[Any]) -> None:
        for mark in marks:
            mark.synchronize()

    def is_done(self, mark: Any) -> bool:
        return mark.query()

    def write(self, target: Tensor, source: Tensor) -> None:
        # torch keeps page-locked memory from being used again before a copy out of it is done
        target.copy_(source if source.is_pinned() else source.pin_memory(), non_blocking=True)


def transfer_for(*written: Tensor) -> Transfer:
    """What moves bytes to these tensors, which are on one device and have their first values."""
    device = written[0].device
    return CudaTransfer(device, written) if device.type == "cuda" else Transfer()
