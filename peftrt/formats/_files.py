"""Opening only regular files, reading exact ranges, and replacing files whole."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import stat
from collections.abc import Callable
from types import TracebackType
from typing import Self

from peftrt.formats.errors import FormatError, MissingFileError
from peftrt.formats.names import require_inside

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISSOCK, "a socket"),
)


class Closing:
    """A context manager that closes what it opened."""

    def close(self) -> None:
        """Give back what is held; a second time does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RegularFile(Closing):
    """A regular file opened once for reading: every byte comes from this descriptor, so a rename never mixes two files.

    Nothing is mapped into memory: a file cut short while it is read is an error and not a signal.

    Args:
        path: the file; a FIFO, device, socket or directory is refused without blocking.
        root: where given, the file must lie under it once links are followed.

    Raises:
        MissingFileError: there is no such file.
        FormatError: it is not a regular file, or a loop of links.
        AdapterNameError: it lies outside ``root``.
    """

    def __init__(self, path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> None:
        self.path = os.fspath(path)
        descriptor = _open_regular(self.path, root)
        self._file = io.FileIO(descriptor, "rb", closefd=True)
        status = os.fstat(descriptor)
        self.size = status.st_size
        self.identity = _identity(status)

    def read(self, size: int, offset: int) -> bytes:
        """Read exactly ``size`` bytes at ``offset``."""
        buffer = bytearray(size)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset``; raises ``FormatError`` where the file ends before."""
        self._file.seek(offset)
        done = 0
        while done < len(view):
            count = self._file.readinto(view[done:])
            if not count:
                raise FormatError(
                    f"{self.path}: truncated: expected {len(view)} bytes at offset {offset}, got {done} (it had "
                    f"{self.size} bytes when it was opened)"
                )
            done += count

    def verify_unchanged(self) -> None:
        """Raise ``FormatError`` where the opened file was written to since it was opened."""
        now = _identity(os.fstat(self._file.fileno()))
        if now != self.identity:
            raise FormatError(f"{self.path}: changed while it was read ({self.identity[2]} -> {now[2]} bytes)")

    def is_current(self) -> bool:
        """Whether the path still leads to the file that was opened."""
        try:
            return _identity(os.stat(self.path)) == self.identity
        except OSError:
            return False

    def close(self) -> None:
        self._file.close()


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _open_regular(path: str, root: str | os.PathLike[str] | None) -> int:
    if "\0" in path:
        raise FormatError(f"path {path!a} must not contain NUL")
    target = path if root is None else os.fspath(require_inside(root, path))
    try:
        # The first look keeps a device from being opened at all, the second settles what was opened.
        _require_regular(os.stat(target), path)
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(target, flags)
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENXIO):
            raise FormatError(f"{path}: cannot be opened: {error.strerror}") from None
        raise
    try:
        _require_regular(os.fstat(descriptor), path)
        seen_as = f"/proc/self/fd/{descriptor}"
        if root is not None and os.path.exists(seen_as):
            # A directory on the way may have been swapped for a link since it was resolved.
            require_inside(root, os.readlink(seen_as))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _require_regular(status: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in _KINDS if test(status.st_mode)), "not a regular file")
        raise FormatError(f"{path}: expected a regular file, got {kind}")


def stage(path: str | os.PathLike[str], write: Callable[[str], None]) -> str:
    """Let ``write`` make a temporary file beside ``path``, flush it to the disk and return its path.

    On any failure the temporary file is removed and ``path`` is as it was.
    """
    target = os.fspath(path)
    if os.path.isdir(target):
        raise FormatError(f"{target}: expected a file to write, got a directory")
    temporary = os.path.join(os.path.dirname(target) or ".", f".tmp-{secrets.token_hex(8)}")
    try:
        # The mode an ordinary new file gets: safetensors' writer leaves 0600, which would shut out a serving user.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        write(temporary)
        os.chmod(temporary, mode)
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        discard(temporary)
        raise
    return temporary


def commit(temporary: str, path: str | os.PathLike[str]) -> None:
    """Rename a staged file to ``path`` and flush the directory; on failure the staged file is removed."""
    try:
        os.replace(temporary, path)
    except BaseException:
        discard(temporary)
        raise
    sync_directory(os.path.dirname(os.fspath(path)) or ".")


def discard(temporary: str) -> None:
    """Remove a staged file if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)


def sync_directory(path: str) -> None:
    """Flush a directory's entries to the disk, where the platform can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
