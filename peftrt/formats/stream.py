"""Writing a safetensors file one tensor at a time, where safetensors' own writer needs them all in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftrt.formats._files import commit, stage
from peftrt.formats.errors import FormatError
from peftrt.formats.header import DTYPES, MAX_HEADER_BYTES, TensorEntry
from peftrt.formats.safe import TensorReader

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8
_CHUNK = 64 << 20
_DIGEST_BYTES = 32


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
    checksum: str | None = None,
) -> None:
    """Write a safetensors file at ``path``, whole or not at all.

    Args:
        path: the file; its directory must exist.
        promises: what the file holds, in order.
        tensors: the tensors, in that order; each is asked for when the one before it is on the disk.
        metadata: strings for the header, ``{"format": "pt"}`` where None.
        checksum: where given, the name of one more tensor, uint8 [32], the last: SHA-256 of every byte before it.

    Raises:
        FormatError: a tensor is not what was promised, or of a dtype that the format has not.
        OSError: the disk is full or cannot be written.
    """
    if checksum is not None:
        promises = [*promises, Promise(checksum, torch.uint8, (_DIGEST_BYTES,))]
    text = _header(path, promises, metadata)

    def write(temporary: str) -> None:
        digest = hashlib.sha256()
        with open(temporary, "wb") as file:

            def put(data: bytes | memoryview) -> None:
                if checksum is not None:
                    digest.update(data)
                file.write(data)

            put(len(text).to_bytes(8, "little"))
            put(text)
            source = iter(tensors)
            for promise in promises if checksum is None else promises[:-1]:
                # No name here holds a tensor that is written: the next one may need its memory.
                _put_tensor(put, next(source).detach(), promise, path)
            if checksum is not None:
                file.write(digest.digest())

    commit(stage(path, write), path)


def _put_tensor(
    put: Callable[[memoryview], None], tensor: Tensor, promise: Promise, path: str | os.PathLike[str]
) -> None:
    if (tensor.dtype, tuple(tensor.shape)) != (promise.dtype, promise.shape):
        came = f"{tensor.dtype} {list(tensor.shape)}"
        raise FormatError(f"{path}: {promise.name!a}: expected {promise.dtype} {list(promise.shape)}, got {came}")
    for chunk in tensor.contiguous().cpu().reshape(-1).view(torch.uint8).split(_CHUNK):
        put(memoryview(chunk.numpy()))


def verify_checksum(reader: TensorReader, name: str) -> None:
    """Read a whole file that ``write_stream`` wrote with ``checksum=name``.

    Raises:
        FormatError: it has no such tensor at its end, or a byte is not what was written.
    """
    entry = reader.entries.get(name)
    if entry is None or (entry.dtype, entry.shape) != (torch.uint8, (_DIGEST_BYTES,)) or entry != _last(reader):
        raise FormatError(f"{reader.path}: expected a checksum, uint8 [{_DIGEST_BYTES}] {name!a}, as the last tensor")
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_CHUNK, entry.start)))
    for start in range(0, entry.start, _CHUNK):
        part = buffer[: min(_CHUNK, entry.start - start)]
        reader.file.read_into(part, start)
        digest.update(part)
    kept = reader.file.read(_DIGEST_BYTES, entry.start)
    reader.file.verify_unchanged()
    if digest.digest() != kept:
        raise FormatError(
            f"{reader.path}: the checksum is {digest.hexdigest()}, expected {kept.hex()}: the file is damaged"
        )


def _header(path: str | os.PathLike[str], promises: Sequence[Promise], metadata: Mapping[str, str] | None) -> bytes:
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
    if len(text) > MAX_HEADER_BYTES:
        raise FormatError(f"{path}: a header of {len(text)} bytes, at most {MAX_HEADER_BYTES} can be read again")
    return text


def _last(reader: TensorReader) -> TensorEntry:
    return next(reversed(reader.entries.values()))
