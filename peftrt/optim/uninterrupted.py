"""A block that Ctrl-C does not cut in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """The first Ctrl-C in the block is raised when it has ended, the second one at once.

    In a thread that gets no signals, and where somebody has a handler of his own, the block is as any other.

    Raises:
        KeyboardInterrupt: behind the block, where it came inside.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    caught = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal caught
        if caught:
            signal.default_int_handler(number, frame)
        caught = True

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if caught:
        raise KeyboardInterrupt
