"""An optimizer's state in a file: streamed, with a checksum, and for an optimizer with pages of any size.

One safetensors file: ``state.<number>.<key>`` with the keys of the state dict, fp32 or codes; ``extra.<name>``; and
``sha256``, of every byte before it. Steps and hyper-parameters stand in the metadata, as JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftrt.formats.adamw_state import BLOCK, Moments
from peftrt.formats.errors import FormatError
from peftrt.formats.safe import MAX_TENSORS, PICKLE_SUFFIXES, TensorReader
from peftrt.formats.stream import Promise, verify_checksum, write_stream
from peftrt.formats.strict_json import loads_strict
from peftrt.optim.page_table import Segment
from peftrt.optim.state import (
    Owner,
    Steps,
    parameter_names,
    parameter_order,
    read_moments,
    write_state,
)
from peftrt.optim.state_forms import KEYS, expect_layout, pack_groups, read_groups

_CHECKSUM = "sha256"
_KIND = {"format": "pt", "kind": "peftrt.optim.PagedAdamW", "version": "1"}
# Against shapes whose products overflow: the file's own size bounds what is read, and state may be of any.
_MAX_BYTES = 1 << 46


def save(owner: Owner, path: str | os.PathLike[str], extra: Mapping[str, Tensor] | None = None) -> None:
    """Write a checkpoint, one parameter's moments at a time; ``SavedState.save`` tells of it."""
    if os.fspath(path).lower().endswith(PICKLE_SUFFIXES):
        raise FormatError(f"{path}: such a name is refused when it is read, as torch.save's; expected .safetensors")
    more = _extra(extra)
    groups = pack_groups(owner.param_groups)
    metadata = {**_KIND, "steps": json.dumps(owner.steps.tolist()), "param_groups": _json(groups)}

    def tensors() -> Iterator[Tensor]:
        for tensor, kept in read_moments(owner):
            shape = owner.parameters[tensor].shape
            # Taken out of the list, so that they are gone before the next parameter's are read.
            for number in range(len(kept)):
                yield kept.pop(0).view(shape) if number < 2 else kept.pop(0)
        yield from more.values()

    promises = [promise for tensor in parameter_order(owner.table) for promise in _promises(owner, tensor)]
    promises += [Promise(f"extra.{name}", tensor.dtype, tuple(tensor.shape)) for name, tensor in more.items()]
    write_stream(path, promises, tensors(), metadata, checksum=_CHECKSUM)


def load(owner: Owner, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Check a checkpoint, and then take it over, page by page; ``SavedState.load`` tells of it."""
    tensors = MAX_TENSORS + sum(len(keys) for keys in KEYS.values()) * len(owner.parameters)
    with TensorReader(path, max_tensors=tensors, max_bytes=_MAX_BYTES, allow_nonfinite=True) as reader:
        verify_checksum(reader, _CHECKSUM)
        groups, steps, names = _check(owner, reader)
        extra = {name.removeprefix("extra."): reader.read(name) for name in reader.entries if name.startswith("extra.")}

        def read(segment: Segment) -> Moments:
            first, blocks = segment.first // BLOCK, -(-segment.length // BLOCK)
            ranges = [(segment.first, segment.length)] * 2 + [(first, blocks)] * 2
            return Moments(
                *(reader.read_range(name, *where) for name, where in zip(names[segment.tensor], ranges, strict=False))
            )

        write_state(owner, steps, groups, read)
    return extra


def _promises(owner: Owner, tensor: int) -> Iterator[Promise]:
    if not owner.steps[tensor]:
        return
    shape = tuple(owner.parameters[tensor].shape)
    places = owner.table.places[tensor]
    bits = owner.table.pages[places[0][0]].kind.bits if places else 32
    blocks = (-(-torch.Size(shape).numel() // BLOCK),)
    for number, key in enumerate(KEYS[bits]):
        codes = bits == 8 and number < 2
        yield Promise(f"state.{tensor}.{key}", torch.uint8 if codes else torch.float32, shape if number < 2 else blocks)


def _extra(extra: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    more = dict(extra or {})
    for name, tensor in more.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"extra must map str to Tensor, got {name!r}: {type(tensor).__name__}")
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise FormatError(f"extra: {name!a} must be dense, with data, got {tensor.layout} on {tensor.device}")
    if len(more) >= MAX_TENSORS:
        raise FormatError(f"extra holds {len(more)} tensors, fewer than {MAX_TENSORS} can be read again")
    return more


def _json(groups: list[dict[str, Any]]) -> str:
    def plain(value: Any) -> Any:
        if isinstance(value, Tensor) and value.numel() == 1:
            return value.item()
        raise TypeError(f"param_groups: {value!r} cannot be written as JSON")

    try:
        return json.dumps(groups, default=plain, allow_nan=False, sort_keys=True)
    except ValueError as error:
        raise FormatError(f"param_groups cannot be written as JSON: {error}") from None


def _check(owner: Owner, reader: TensorReader) -> tuple[list[dict[str, Any]], Steps, dict[int, list[str]]]:
    """The groups, the steps, and for each parameter with state the names of its moments in the file."""
    came = {key: reader.metadata.get(key) for key in _KIND}
    if came != _KIND:
        raise FormatError(f"{reader.path}: expected a file with metadata {_KIND}, got {came}")
    saved, counts = (
        loads_strict(reader.metadata.get(key, "").encode(), f"{reader.path}: {key}")
        for key in ("param_groups", "steps")
    )
    try:
        groups, _ = read_groups(owner.param_groups, saved)
        count = len(owner.parameters)
        if not isinstance(counts, list) or len(counts) != count or not all(map(_is_step, counts)):
            raise ValueError(f"steps must be {count} whole numbers, got {counts!r:.200}")
        steps = np.array(counts, dtype=np.int64)
        return groups, steps, _moment_names(owner, reader, steps)
    except ValueError as error:
        raise FormatError(f"{reader.path}: {error}") from None


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _moment_names(owner: Owner, reader: TensorReader, steps: Steps) -> dict[int, list[str]]:
    called = parameter_names(owner)
    found: dict[int, list[str]] = {}
    for tensor in map(int, np.flatnonzero(steps)):
        keys = KEYS[8] if f"state.{tensor}.{KEYS[8][0]}" in reader.entries else KEYS[32]
        found[tensor] = [f"state.{tensor}.{key}" for key in keys]
        entries = {name: reader.entries[name] for name in found[tensor] if name in reader.entries}
        if len(entries) != len(keys):
            raise ValueError(f"state of {called[tensor]}: expected {', '.join(found[tensor])}, got {list(entries)}")
        expect_layout(entries, f"state of {called[tensor]}", owner.parameters[tensor].shape)
    known = {_CHECKSUM, *(name for names in found.values() for name in names)}
    for name in reader.entries:
        if name not in known and not name.startswith("extra."):
            raise ValueError(f"tensor {name!a} is neither a parameter's state nor extra")
    return found
