"""The highest memory of a part of a process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import torch

from peftrt.finetune.progress import peak_memory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Bytes at the highest, above what the process held when this was made; on a GPU, of the GPU.

    Where the kernel lets a process reset its high-water mark, :meth:`begin` does: what loading took does not count.
    """

    def __init__(self) -> None:
        _give_back()
        self._before = 0 if torch.cuda.is_available() else _status("VmRSS")

    def begin(self) -> None:
        """From here on."""
        _give_back()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")

    @property
    def bytes(self) -> int:
        """The highest so far."""
        highest = peak_memory() if torch.cuda.is_available() else _status("VmHWM")
        return max(0, highest - self._before)


def _give_back() -> None:
    """Hand what is free on to the system: what malloc keeps would be used again, and not be seen."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> int:
    """Bytes of one line of /proc/self/status; elsewhere what the process took at most."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return peak_memory()
