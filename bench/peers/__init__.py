"""Other libraries that do the same work, each called the way its own users call it."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch


class UnavailableError(Exception):
    """A peer cannot be had here; the message says why, and the result file keeps it."""


def need(module: str) -> ModuleType:
    """Import a peer's package.

    Raises:
        UnavailableError: it is not installed, or fails while it is imported.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise UnavailableError(f"{module} cannot be imported: {type(error).__name__}: {error}") from error


def need_gpu(device: torch.device) -> None:
    """Some kernels are written for GPUs alone.

    Raises:
        UnavailableError: ``device`` is none.
    """
    if device.type != "cuda":
        raise UnavailableError(f"its kernels need a GPU, and these operands are on a {device.type}")
