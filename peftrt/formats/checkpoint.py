"""Model checkpoints in safetensors, one file or sharded, read one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from peftrt.formats._files import Closing, RegularFile
from peftrt.formats.errors import FormatError, MissingFileError, UnsafeFileError
from peftrt.formats.header import TensorEntry
from peftrt.formats.names import require_inside
from peftrt.formats.safe import TensorReader, refuse_pickle
from peftrt.formats.strict_json import loads_strict

SINGLE_NAME = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
_PICKLE_NAMES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

MAX_TENSORS = 262_144
MAX_SHARD_BYTES = 1 << 40
_MAX_SHARDS = 4096
_MAX_INDEX_BYTES = 64 << 20


class Checkpoint(Closing):
    """The tensors of a model on disk, by name; at most one shard is open and one tensor in memory at a time.

    Every shard's header is checked when the checkpoint is opened. A shard that is replaced later is an error at the
    next read, so that tensors of two checkpoints are never mixed.

    Args:
        files: path -> names of the tensors to take from it, None for all; made by ``open_checkpoint``.
        options: keyword arguments of ``TensorReader``.

    Attributes:
        entries: name -> ``TensorEntry`` (dtype, shape, nbytes), in the order of the files and of the bytes in them.
        metadata: the ``__metadata__`` of all files.
    """

    def __init__(self, files: Mapping[str, set[str] | None], options: dict[str, Any]) -> None:
        self._options = options
        self._open: TensorReader | None = None
        self._file_of: dict[str, str] = {}
        self._identity: dict[str, tuple[int, int, int, int]] = {}
        self.entries: dict[str, TensorEntry] = {}
        self.metadata: dict[str, str] = {}
        for path, wanted in files.items():
            with TensorReader(path, **options) as reader:
                self._identity[path] = reader.file.identity
                self.metadata.update(reader.metadata)
                missing = sorted((wanted or set()) - reader.entries.keys())
                if missing:
                    raise FormatError(f"{path}: tensor {missing[0]!a} is in the index but not in this file")
                for name, entry in reader.entries.items():
                    if wanted is None or name in wanted:
                        self.entries[name] = entry
                        self._file_of[name] = path

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, in memory of its own on the CPU.

        Raises:
            KeyError: no such tensor.
            FormatError: the file was replaced or changed since the checkpoint was opened.
            NonFiniteError: it holds NaN or infinity and ``allow_nonfinite`` was not given.
        """
        path = self._file_of[name]
        if self._open is None or self._open.path != path:
            self.close()
            self._open = TensorReader(path, **self._options)
        if self._open.file.identity != self._identity[path]:
            self.close()
            raise FormatError(f"{path}: was replaced since the checkpoint was opened")
        return self._open.read(name)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) in the order of the files: one pass over the disk."""
        for name in self.entries:
            yield name, self.read(name)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def close(self) -> None:
        """Close the shard that is open; the checkpoint can still be read afterwards."""
        if self._open is not None:
            self._open.close()
            self._open = None


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    max_tensors: int = MAX_TENSORS,
    max_bytes: int = MAX_SHARD_BYTES,
    allow_nonfinite: bool = False,
) -> Checkpoint:
    """Open a model's safetensors without reading its tensors.

    Args:
        path: a ``.safetensors`` file, an ``….safetensors.index.json``, or a directory with ``model.safetensors``, one
            index, or one ``.safetensors`` file.
        root: where given, every file must lie under it once links are followed.
        max_tensors, max_bytes: bounds for each file.
        allow_nonfinite: accept NaN and infinity.

    Raises:
        MissingFileError: nothing of the kind is there.
        UnsafeFileError: there are only pickles; the message says how to convert them.
        FormatError: a header, the index or a file's name is not as it must be; or the choice is ambiguous.
    """
    options = {
        "root": root,
        "max_tensors": max_tensors,
        "max_bytes": max_bytes,
        "allow_nonfinite": allow_nonfinite,
    }
    found = os.fspath(path)
    if os.path.isdir(found):
        found = _in_directory(found, root)
    if found.endswith(".json"):
        return Checkpoint(_shards(found, root), options)
    return Checkpoint({found: None}, options)


def _in_directory(path: str, root: str | os.PathLike[str] | None) -> str:
    if root is not None:
        require_inside(root, path)
    names = sorted(os.listdir(path))
    if SINGLE_NAME in names:
        return os.path.join(path, SINGLE_NAME)
    for suffix in (INDEX_SUFFIX, ".safetensors"):
        fitting = [name for name in names if name.endswith(suffix)]
        if len(fitting) == 1:
            return os.path.join(path, fitting[0])
        if fitting:
            raise FormatError(
                f"{path}: more than one file ends in {suffix} ({', '.join(fitting[:8])}); name the one to read"
            )
    for name in names:
        if name in _PICKLE_NAMES:
            refuse_pickle(os.path.join(path, name.removesuffix(".index.json")))
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        raise UnsafeFileError(f"{path}: expected a .safetensors file, found only pickles, which are never opened")
    raise MissingFileError(f"{path}: no {SINGLE_NAME}, no index and no other .safetensors file")


def _shards(index: str, root: str | os.PathLike[str] | None) -> dict[str, set[str] | None]:
    with RegularFile(index, root) as file:
        if file.size > _MAX_INDEX_BYTES:
            raise FormatError(f"{index}: {file.size} bytes, at most {_MAX_INDEX_BYTES} are accepted for an index")
        document = loads_strict(file.read(file.size, 0), index)
    mapping = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(mapping, dict) or not mapping:
        raise FormatError(f"{index}: 'weight_map' must be an object that maps tensors to files")
    wanted: dict[str, set[str]] = {}
    for name, shard in mapping.items():
        if not isinstance(shard, str):
            raise FormatError(f"{index}: weight_map[{name!a}] must be a file's name, got {shard!a}")
        wanted.setdefault(shard, set()).add(name)
    if len(wanted) > _MAX_SHARDS:
        raise FormatError(f"{index}: names {len(wanted)} files, at most {_MAX_SHARDS} are accepted")
    directory = os.path.dirname(index) or "."
    files: dict[str, set[str] | None] = {}
    for shard, names in wanted.items():
        # Links are followed: download caches keep their files elsewhere. ``root`` bounds where they may lead.
        if os.path.basename(shard) != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise FormatError(f"{index}: weight_map names {shard!a}, expected a .safetensors file beside the index")
        files[os.path.join(directory, shard)] = names
    return files
