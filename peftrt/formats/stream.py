"""Writing a safetensors file one tensor at a time, where safetensors' own writer needs them all in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftrt.formats._files import commit, stage
from peftrt.formats._header import DTYPES
from peftrt.formats.errors import FormatError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8
_CHUNK = 64 << 20


class Promise(NamedTuple):
    """A tensor that will be written: its name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_stream(
    path: str | os.PathLike[str],
    promises: Sequence[Promise],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file at ``path``, whole or not at all.

    Args:
        path: the file; its directory must exist.
        promises: what the file holds, in order.
        tensors: the tensors, in that order; each is asked for when the one before it is on the disk.
        metadata: strings for the header, ``{"format": "pt"}`` where None.

    Raises:
        FormatError: a tensor is not what was promised, or of a dtype that the format has not.
        OSError: the disk is full or cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"} if metadata is None else dict(metadata)}
    offset = 0
    for promise in promises:
        if promise.dtype not in _NAMES or promise.name in header:
            raise FormatError(f"{path}: tensor {promise.name!a} of {promise.dtype} cannot be written, or not twice")
        end = offset + promise.nbytes
        header[promise.name] = {
            "dtype": _NAMES[promise.dtype],
            "shape": list(promise.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            source = iter(tensors)
            for promise in promises:
                tensor = next(source).detach()
                if (tensor.dtype, tuple(tensor.shape)) != (promise.dtype, promise.shape):
                    came = f"{tensor.dtype} {list(tensor.shape)}"
                    raise FormatError(
                        f"{path}: {promise.name!a}: expected {promise.dtype} {list(promise.shape)}, got {came}"
                    )
                flat = tensor.contiguous().cpu().reshape(-1).view(torch.uint8)
                for chunk in flat.split(_CHUNK):
                    file.write(memoryview(chunk.numpy()))

    commit(stage(path, write), path)
