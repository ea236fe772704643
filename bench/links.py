"""What pages of optimizer state go over, both ways at once: a GPU's link to page-locked memory, a CPU's to a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Buffers in turn, each way: a copy begins while the one before it ends.
BUFFERS = 2


class FileLink:
    """Pages of a file that has no name: one thread reads the first half of it, one writes the second.

    What it measures is what an optimizer meets that pages against a file: the page cache and all.
    """

    def __init__(self, pages: int, page_bytes: int, folder: Path | None = None) -> None:
        self._pages, self._page_bytes = pages, page_bytes
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - as long as the link
        content = torch.arange(page_bytes).remainder(251).to(torch.uint8)
        self.arrived, self._leaving = torch.zeros_like(content), content
        self._threads = ThreadPoolExecutor(2)
        for half in range(2):
            self._move(os.pwritev, self._leaving, half)

    def run(self) -> Tensor:
        """Move all pages each way; returns the page that came last."""
        done = [self._threads.submit(self._move, *way) for way in self._ways]
        for each in done:
            each.result()
        return self.arrived

    @property
    def _ways(self) -> tuple[tuple[Any, ...], ...]:
        return (os.preadv, self.arrived, 0), (os.pwritev, self._leaving, 1)

    def _move(self, call: Callable[..., int], memory: Tensor, half: int) -> None:
        view = memoryview(memory.numpy())
        for page in range(half * self._pages, (half + 1) * self._pages):
            if call(self._file.fileno(), [view], page * self._page_bytes) != self._page_bytes:
                raise OSError("a page of the benchmark's file was not moved whole")


class PinnedLink:
    """Pages in page-locked memory: one stream for each direction."""

    def __init__(self, pages: int, page_bytes: int) -> None:
        content = torch.arange(page_bytes).remainder(251).to(torch.uint8)
        self._up, self._down = torch.cuda.Stream(), torch.cuda.Stream()
        self._above = [content.repeat(pages).view(pages, -1).pin_memory() for _ in range(2)]
        self._below = [torch.zeros(BUFFERS, page_bytes, dtype=torch.uint8, device="cuda") for _ in range(2)]
        self._below[1].copy_(content)
        self._pages = pages

    def run(self) -> Tensor:
        """Move all pages each way, behind the current stream and before what it is given next; returns the page that
        came last.
        """
        current = torch.cuda.current_stream()
        for stream, copy in ((self._up, self._fetch), (self._down, self._flush)):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for page in range(self._pages):
                    copy(page)
            current.wait_stream(stream)
        return self._below[0][(self._pages - 1) % BUFFERS]

    def _fetch(self, page: int) -> None:
        self._below[0][page % BUFFERS].copy_(self._above[0][page], non_blocking=True)

    def _flush(self, page: int) -> None:
        self._above[1][page].copy_(self._below[1][page % BUFFERS], non_blocking=True)


def link(device: str, pages: int, page_bytes: int) -> FileLink | PinnedLink:
    """That of ``"cpu"`` or ``"cuda"``."""
    return FileLink(pages, page_bytes) if device == "cpu" else PinnedLink(pages, page_bytes)


def content(page_bytes: int, device: str) -> Tensor:
    """What a page must hold once it has come."""
    return torch.arange(page_bytes, device=device).remainder(251).double()
