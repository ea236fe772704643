"""Strict reading and whole-or-nothing writing of safetensors files.

Files are read, never mapped, from one descriptor; the header is checked in full before anything is allocated, so a bad
file costs nothing and changes nothing.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping

import safetensors.torch
import torch
from safetensors import SafetensorError

from peftrt.formats._files import Closing, RegularFile, commit, stage
from peftrt.formats.errors import FormatError, NonFiniteError, UnsafeFileError
from peftrt.formats.header import CONVERT_HINT, DTYPES, LENGTH_BYTES, TensorEntry, header_length, parse_header

MAX_TENSORS = 65536
MAX_BYTES = 16 << 30
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

# Elements that the check for NaN looks at together; bounds its temporary memory.
_CHECK_CHUNK = 1 << 22


class TensorReader(Closing):
    """An open safetensors file: its header checked, its tensors read one at a time.

    Args:
        path: the file; a suffix of torch's pickles is refused without opening it.
        root: where given, the file must lie under it once links are followed.
        max_tensors, max_bytes: larger files are refused before anything is allocated.
        allow_nonfinite: accept NaN and infinity in floating tensors.

    Attributes:
        entries: name -> ``TensorEntry``, in the order of the bytes in the file.
        metadata: the header's ``__metadata__``.

    Raises:
        MissingFileError, UnsafeFileError, FormatError: see ``peftrt.formats.errors``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        root: str | os.PathLike[str] | None = None,
        max_tensors: int = MAX_TENSORS,
        max_bytes: int = MAX_BYTES,
        allow_nonfinite: bool = False,
    ) -> None:
        self.path = os.fspath(path)
        self.allow_nonfinite = allow_nonfinite
        refuse_pickle(self.path)
        if sys.byteorder != "little":
            raise FormatError(f"{self.path}: safetensors files are little-endian, this machine is not")
        self.file = RegularFile(self.path, root)
        try:
            if self.file.size < LENGTH_BYTES:
                raise FormatError(f"{self.path}: truncated: {self.file.size} bytes are no safetensors file")
            length = header_length(self.file.read(LENGTH_BYTES, 0), self.file.size, self.path)
            raw = self.file.read(length, LENGTH_BYTES)
            entries, self.metadata = parse_header(
                raw, self.file.size, self.path, max_tensors=max_tensors, max_bytes=max_bytes
            )
            self.entries: dict[str, TensorEntry] = {entry.name: entry for entry in entries}
        except BaseException:
            self.file.close()
            raise

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor ``name``, of the dtype and shape in ``entries``, in memory of its own on the CPU.

        Raises:
            KeyError: there is no such tensor.
            NonFiniteError: it holds NaN or infinity.
            FormatError: the file changed since it was opened.
        """
        shape = self.entries[name].shape
        return self.read_range(name, 0, math.prod(shape)).reshape(shape)

    def read_range(self, name: str, first: int, count: int) -> torch.Tensor:
        """Return ``count`` elements from ``first`` of the tensor ``name``, flat; else as ``read``."""
        entry = self.entries[name]
        if not 0 <= first <= first + count <= math.prod(entry.shape):
            raise ValueError(
                f"{self.path}: tensor {name!a} of shape {list(entry.shape)} has no [{first}:{first + count}]"
            )
        data = torch.empty(count * entry.dtype.itemsize, dtype=torch.uint8)
        self.file.read_into(memoryview(data.numpy().data), entry.start + first * entry.dtype.itemsize)
        self.file.verify_unchanged()
        if entry.dtype is torch.bool and bool((data > 1).any()):
            raise FormatError(f"{self.path}: tensor {name!a}: a byte of BOOL is neither 0 nor 1")
        tensor = data.view(entry.dtype)
        if not self.allow_nonfinite and not is_finite(tensor):
            raise NonFiniteError(
                f"{self.path}: tensor {name!a} holds NaN or infinity, expected finite values; allow_nonfinite=True "
                f"accepts it"
            )
        return tensor

    def close(self) -> None:
        self.file.close()


def read_tensors(
    path: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    max_tensors: int = MAX_TENSORS,
    max_bytes: int = MAX_BYTES,
    allow_nonfinite: bool = False,
) -> dict[str, torch.Tensor]:
    """Return all tensors of a safetensors file; arguments and errors are those of ``TensorReader``."""
    with TensorReader(
        path, root=root, max_tensors=max_tensors, max_bytes=max_bytes, allow_nonfinite=allow_nonfinite
    ) as reader:
        return {name: reader.read(name) for name in reader.entries}


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file at ``path``, whole or not at all: a file that was there is intact after any failure.

    Args:
        path: the file; its directory must exist.
        tensors: name -> tensor of any device and stride; each is written contiguous.
        metadata: strings for the header, ``{"format": "pt"}`` where None.

    Raises:
        TypeError: a name, tensor or metadata entry of the wrong type.
        FormatError: a tensor that the format cannot hold, or ``path`` is a directory.
        OSError: the disk is full or cannot be written.
    """
    commit(stage_tensors(path, tensors, metadata), path)


def stage_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write as ``write_tensors`` does, but to a temporary file beside ``path``; return it for ``commit`` or
    ``discard``.
    """
    notes = {"format": "pt"} if metadata is None else dict(metadata)
    for key, text in notes.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError(f"{path}: metadata must map str to str, got {key!r}: {text!r}")
    plain = _plain_tensors(os.fspath(path), tensors)

    def write(temporary: str) -> None:
        try:
            safetensors.torch.save_file(plain, temporary, metadata=notes)
        except SafetensorError as error:
            raise OSError(f"{os.fspath(path)}: cannot be written: {error}") from error

    return stage(path, write)


def refuse_pickle(path: str) -> None:
    """Raise ``UnsafeFileError`` where the name is that of a pickle."""
    if path.lower().endswith(PICKLE_SUFFIXES):
        raise UnsafeFileError(
            f"{path}: expected safetensors, got a name that torch.save gives its pickles: {CONVERT_HINT}"
        )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; tensors of integers always do."""
    if not tensor.is_floating_point():
        return True
    for chunk in tensor.reshape(-1).split(_CHECK_CHUNK):
        # float8_e4m3fn has no isfinite of its own.
        wide = chunk.float() if chunk.dtype.itemsize == 1 else chunk
        if not bool(torch.isfinite(wide).all()):
            return False
    return True


def _plain_tensors(path: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    plain: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    known = set(DTYPES.values())
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"{path}: tensor names must be str, got {name!r}")
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{path}: {name!a} must be a tensor, got {type(tensor).__name__}")
        if name == "__metadata__":
            raise FormatError(f"{path}: no tensor can be named '__metadata__'")
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in known:
            raise FormatError(
                f"{path}: tensor {name!a} must be dense, with data, of a dtype that safetensors has; got "
                f"{tensor.dtype} {tensor.layout} on {tensor.device}"
            )
        dense = tensor.detach().cpu().contiguous()
        # The format has no notion of shared memory: tied weights are written once each.
        if dense.numel() and dense.untyped_storage().data_ptr() in storages:
            dense = dense.clone()
        storages.add(dense.untyped_storage().data_ptr())
        plain[name] = dense
    return plain
