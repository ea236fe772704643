"""The header of a safetensors file, checked in full before a byte of data is read.

Layout: 8 bytes little-endian header length, the header (a JSON object), then the data. The object maps a tensor's name
to ``{"dtype", "shape", "data_offsets": [begin, end]}``, offsets counted from the start of the data, and
``__metadata__`` to a map of strings. Source: the format's description at https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from peftrt.formats.errors import FormatError, UnsafeFileError
from peftrt.formats.strict_json import loads_strict

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 32 << 20
_MAX_DIMENSIONS = 16

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

CONVERT_HINT = (
    "it could run code when opened, so it is never read. Convert it where you trust its origin: "
    "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'adapter_model.safetensors', "
    "metadata={'format': 'pt'})"
)


class TensorEntry(NamedTuple):
    """One tensor of a file: its dtype, its shape, and where its bytes lie, from the beginning of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


def header_length(prefix: bytes, file_size: int, path: str) -> int:
    """Return the length that the first 8 bytes announce, checked against the size of the file.

    Raises:
        FormatError: the length is beyond the end of the file or over ``MAX_HEADER_BYTES``.
        UnsafeFileError: the file is a pickle under another name.
    """
    length = int.from_bytes(prefix, "little")
    room = file_size - LENGTH_BYTES
    if length <= min(room, MAX_HEADER_BYTES):
        return length
    # A zip archive (torch.save) or a pickle of protocol 2 to 5; as a length either is absurd.
    if prefix.startswith(b"PK\x03\x04") or (prefix[0] == 0x80 and prefix[1] in (2, 3, 4, 5)):
        raise UnsafeFileError(f"{path}: this is a pickle (torch.save), not safetensors: {CONVERT_HINT}")
    if length > room:
        raise FormatError(
            f"{path}: header of {length} bytes announced, but only {room} bytes follow: truncated or not safetensors"
        )
    raise FormatError(f"{path}: header of {length} bytes, at most {MAX_HEADER_BYTES} are accepted")


def parse_header(
    raw: bytes, file_size: int, path: str, *, max_tensors: int, max_bytes: int
) -> tuple[list[TensorEntry], dict[str, str]]:
    """Return the tensors, in the order of their bytes, and the metadata.

    Args:
        raw: the header's bytes.
        file_size: size of the whole file; the tensors must fill the rest of it without gap or overlap.
        path: named in errors.
        max_tensors: more tensors are refused before the JSON is parsed.
        max_bytes: more bytes of data, or one shape that stands for more, are refused.

    Raises:
        FormatError: anything at all that is not as the format says.
    """
    _check_amount(raw, path, max_tensors)
    header = loads_strict(raw, f"{path}: header")
    if not isinstance(header, dict):
        raise FormatError(f"{path}: header must be a JSON object, got {type(header).__name__}")
    metadata = _metadata(header.pop("__metadata__", {}), path)
    if len(header) > max_tensors:
        raise FormatError(f"{path}: holds {len(header)} tensors, at most {max_tensors} are accepted")
    data_start = LENGTH_BYTES + len(raw)
    entries = [_entry(name, spec, data_start, path, max_bytes) for name, spec in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.nbytes))
    position = data_start
    for entry in entries:
        if entry.start != position:
            what = "overlaps the one before" if entry.start < position else "leaves a hole before it"
            raise FormatError(
                f"{path}: tensor {entry.name!a} {what}: it begins at byte {entry.start - data_start} of the data, "
                f"expected {position - data_start}"
            )
        position += entry.nbytes
    if position != file_size:
        what = "truncated" if position > file_size else "trailing bytes"
        raise FormatError(f"{path}: {what}: the header describes {position} bytes, the file has {file_size}")
    if position - data_start > max_bytes:
        raise FormatError(f"{path}: holds {position - data_start} bytes of tensors, at most {max_bytes} are accepted")
    return entries, metadata


def _check_amount(raw: bytes, path: str, max_tensors: int) -> None:
    # Counted on the bytes: a header of a few MB can otherwise become a GB of Python objects.
    described = raw.count(b'"data_offsets"')
    if described > max_tensors:
        raise FormatError(f"{path}: holds {described} tensors, at most {max_tensors} are accepted")
    pieces = raw.count(b"{") + raw.count(b"[") + raw.count(b",")
    if pieces > 65536 + 16 * max_tensors:
        raise FormatError(f"{path}: header has {pieces} pieces of JSON, too many for at most {max_tensors} tensors")


def _metadata(value: Any, path: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise FormatError(f"{path}: __metadata__ must map strings to strings, got {type(value).__name__}")
    for key, item in value.items():
        if not isinstance(item, str):
            raise FormatError(f"{path}: __metadata__ {key!a} must be a string, got {type(item).__name__}")
    return value


def _entry(name: str, spec: Any, data_start: int, path: str, max_bytes: int) -> TensorEntry:
    where = f"{path}: tensor {name!a}"
    if not isinstance(spec, dict) or spec.keys() != {"dtype", "shape", "data_offsets"}:
        got = sorted(spec) if isinstance(spec, dict) else type(spec).__name__
        raise FormatError(f"{where}: expected an object of dtype, shape and data_offsets, got {got!a}")
    dtype = DTYPES.get(spec["dtype"]) if isinstance(spec["dtype"], str) else None
    if dtype is None:
        raise FormatError(f"{where}: unknown dtype {spec['dtype']!a}, expected one of {', '.join(DTYPES)}")
    shape, offsets = spec["shape"], spec["data_offsets"]
    if not _naturals(shape) or len(shape) > _MAX_DIMENSIONS:
        raise FormatError(f"{where}: shape must be at most {_MAX_DIMENSIONS} integers >= 0, got {shape!a}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"{where}: data_offsets must be [begin, end] with 0 <= begin <= end, got {offsets!a}")
    # Zeros count as ones: [0, 2^62] holds no byte, yet its strides and every product with it overflow.
    extent = math.prod(max(size, 1) for size in shape) * dtype.itemsize
    if extent > max_bytes:
        raise FormatError(
            f"{where}: shape {shape} of {spec['dtype']} stands for {extent} bytes, at most {max_bytes} are accepted"
        )
    nbytes = math.prod(shape) * dtype.itemsize
    begin, end = offsets
    if end - begin != nbytes:
        raise FormatError(
            f"{where}: shape {shape} of {spec['dtype']} needs {nbytes} bytes, data_offsets give {end - begin}"
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + begin, nbytes)


def _naturals(value: Any) -> bool:
    # type() and not isinstance(): true is an int to Python.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
