"""Where pages lie that are not on the device: host memory, page-locked for CUDA, or a file."""

from __future__ import annotations

import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class HostStore:
    """Pages in host memory.

    Args:
        page_bytes: of a page.
        pinned: page-locked, so that a GPU copies from and to it by itself. Where that is refused there is a warning,
            and the memory is ordinary.

    Attributes:
        pinned: whether the memory is page-locked.
    """

    def __init__(self, page_bytes: int, pinned: bool) -> None:
        self.page_bytes = page_bytes
        self.pinned = pinned
        self._pages: dict[int, Tensor] = {}

    def make_room(self, pages: Iterable[int]) -> None:
        """Hold zeros for those pages that have no room yet."""
        wanted = [page for page in pages if page not in self._pages]
        while wanted:
            # torch's allocator of page-locked memory rounds up to a power of two: pieces of 2^i pages waste none of it
            count = 1 << (len(wanted).bit_length() - 1)
            piece = self._allocate(count * self.page_bytes)
            for i, page in enumerate(wanted[:count]):
                self._pages[page] = piece[i * self.page_bytes : (i + 1) * self.page_bytes]
            del wanted[:count]

    def _allocate(self, nbytes: int) -> Tensor:
        with torch.inference_mode(False):
            if self.pinned:
                try:
                    return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)
                except RuntimeError as error:
                    reason = str(error).strip().partition("\n")[0]
                    warnings.warn(
                        f"PagedAdamW: {nbytes} bytes of page-locked memory were refused ({reason}): pages go through "
                        "six page-locked ones, at a fraction of the speed",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                    self.pinned = False
            return torch.zeros(nbytes, dtype=torch.uint8)

    def view(self, page: int) -> Tensor:
        """The page itself, uint8 ``[page_bytes]``."""
        return self._pages[page]

    def read(self, page: int, into: Tensor) -> None:
        """Copy a page to host memory."""
        into.copy_(self._pages[page])

    def write(self, page: int, data: Tensor) -> None:
        """Copy a page from host memory."""
        self._pages[page].copy_(data)

    @property
    def nbytes(self) -> int:
        """Held."""
        return len(self._pages) * self.page_bytes

    def close(self) -> None:
        """Give the memory back."""
        self._pages.clear()


class FileStore:
    """Pages in a file that has no name: it is gone with the process, however that ends.

    It is read and written, not mapped: a full or broken disk is then an error with a text and not a signal, pages come
    whole and not by faults of 4 KiB, and what is in memory is what the budget says. Its room is taken at once, so that
    a disk that is too small says so before the first step.

    Args:
        path: a directory, or a name in one that nothing has yet.
        page_bytes: of a page.
        pages: how many there will be, once there is one.

    Raises:
        ValueError: ``path`` is a file, or its directory is missing.
    """

    def __init__(self, path: str | os.PathLike[str], page_bytes: int, pages: int) -> None:
        place = Path(path)
        if place.exists() and not place.is_dir():
            raise ValueError(f"PagedAdamW: backing must be a directory or a new file, and {place} exists already")
        folder = place if place.is_dir() else place.parent
        if not folder.is_dir():
            raise ValueError(f"PagedAdamW: backing: no such directory: {folder}")
        self.page_bytes = page_bytes
        self._folder = folder
        self._whole = pages * page_bytes
        self._file: io.FileIO | None = None

    def make_room(self, pages: Iterable[int]) -> None:
        """Take the room of all pages if there is any to come.

        Raises:
            OSError: there is none, or no permission.
        """
        if self._file is not None or not any(True for _ in pages):
            return
        file: Any = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, self._whole)
            else:
                file.truncate(self._whole)
        except BaseException:
            file.close()
            raise
        self._file = file

    def read(self, page: int, into: Tensor) -> None:
        """Read a page into host memory."""
        self._move(os.preadv, page, into, "read")

    def write(self, page: int, data: Tensor) -> None:
        """Write a page from host memory."""
        self._move(os.pwritev, page, data, "written")

    def _move(self, call: Callable[[int, list[memoryview], int], int], page: int, memory: Tensor, verb: str) -> None:
        assert self._file is not None
        view, done = memoryview(memory.numpy()), 0  # type: ignore[arg-type]
        while done < self.page_bytes:
            count = call(self._file.fileno(), [view[done:]], page * self.page_bytes + done)
            if count <= 0:
                raise OSError(f"PagedAdamW: only {done} of {self.page_bytes} bytes of a page could be {verb}")
            done += count

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return 0 if self._file is None else self._whole

    def close(self) -> None:
        """Give the room back."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __del__(self) -> None:
        # an optimizer need not be closed, and one that was never finished has no file
        if getattr(self, "_file", None) is not None:
            self.close()


Store = HostStore | FileStore
