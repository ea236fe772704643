"""export: the model with its adapters in the weights, as a dense safetensors checkpoint under the original's keys."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftrt.adapters.merging import expect_changes_of_weights
from peftrt.adapters.saved import SavedModule
from peftrt.adapters.state import ModelAdapters, expect_data, find_state, unwrap
from peftrt.formats.checkpoint import INDEX_SUFFIX, SINGLE_NAME
from peftrt.formats.errors import FormatError
from peftrt.formats.nf4 import FLOAT_DTYPES, NF4Weight
from peftrt.formats.stream import Promise, write_stream
from peftrt.nn import AdapterLinear, HookedAdapters, NF4Linear
from peftrt.nn.adapter import as_weights

_CONFIG = "config.json"


class _Entry(NamedTuple):
    """A tensor to write.

    ``tie`` is the same for names of one tensor, ``origin`` for names of one tensor of the original.
    """

    promise: Promise
    make: Callable[[], Tensor]
    tie: Any
    origin: Any


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str | Mapping[str, float] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Write the merged dense model as safetensors, which ``from_pretrained`` of transformers loads where it is one of
    theirs.

    ``W + sum_a w_a s_a B_a A_a``, or ``c * (W + s B A)`` of a DoRA adapter, summed in fp32 and rounded once to
    ``dtype``, also over an NF4 base. The model is not changed, and one tensor at a time is in memory. Everything
    appears at ``path`` together, or nothing.

    Args:
        model: any module; without adapters, the dense weights of its NF4 layers are written.
        path: a directory that is not there, or holds no model.
        name: the adapter, or name -> weight; by default what is active or merged.
        dtype: of the weights; buffers keep theirs.
        max_shard_bytes: larger models are written in several files with an index.

    Raises:
        ValueError: an unknown name, another than the merged one, a DoRA adapter with others, or a model without data.
        FormatError: a model is there already.
        OSError: the disk is full or cannot be written.
    """
    if dtype not in (*FLOAT_DTYPES, torch.float64):
        raise TypeError(f"export: dtype must be a floating dtype, got {dtype!r}")
    state = find_state(model)
    model = unwrap(model)
    weights = _weights(state, name)
    expect_data(model, "export")
    target = os.path.abspath(os.fspath(path))
    _expect_free(target)
    entries, untied = _entries(model, weights, dtype)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=".tmp-export-", dir=os.path.dirname(target))
    try:
        os.chmod(temporary, 0o777 & ~_umask())
        _write_shards(temporary, entries, max_shard_bytes)
        _write_config(model, temporary, dtype, untied)
        _move(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _weights(state: ModelAdapters | None, name: str | Mapping[str, float] | None) -> dict[str, float]:
    if state is None:
        if name is not None:
            raise ValueError(f"export: no adapter {name!r}: the model has none")
        return {}
    if name is None:
        weights = dict(state.merged if state.merged is not None else state.active)
    else:
        weights = as_weights(name)
        state.expect_known(weights, "export")
    expect_changes_of_weights(state, weights, "export")
    if weights != state.merged:
        state.expect_unmerged("export")
    return weights


def _entries(model: nn.Module, weights: Mapping[str, float], dtype: torch.dtype) -> tuple[list[_Entry], bool]:
    """What to write, shared tensors once; and whether tensors that the original shares are two from now on."""
    kept: dict[Any, _Entry] = {}
    for entry in _walk(model, "", weights, dtype):
        kept.setdefault(entry.tie, entry)
    names = {entry.promise.name for entry in kept.values()}
    groups: dict[Any, int] = {}
    for entry in _walk(model, "", {}, dtype):
        groups[entry.origin] = groups.get(entry.origin, 0) + (entry.promise.name in names)
    return list(kept.values()), any(number > 1 for number in groups.values())


def _walk(module: nn.Module, prefix: str, weights: Mapping[str, float], dtype: torch.dtype) -> Iterator[_Entry]:
    """A module's tensors under the keys that the original model has."""
    if isinstance(module, SavedModule):
        held = [name for name in weights if name in module.adapter_names]
        if len(held) > 1:
            where = prefix.rstrip(".")
            raise ValueError(
                f"export: {where} is one of modules_to_save, of which only one adapter's copy can be exported"
            )
        yield from _walk(module.copy_of(held[0] if held else None), prefix, weights, dtype)
        return
    if isinstance(module, HookedAdapters):
        return
    if isinstance(module, AdapterLinear | NF4Linear):
        yield from _linear(module, prefix, weights, dtype)
        return
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield _plain(prefix + name, parameter, dtype if parameter.is_floating_point() else parameter.dtype)
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield _plain(prefix + name, buffer, buffer.dtype)
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{prefix}{name}.", weights, dtype)


def _plain(name: str, tensor: Tensor, dtype: torch.dtype) -> _Entry:
    return _Entry(Promise(name, dtype, tuple(tensor.shape)), lambda: tensor.detach().to(dtype), id(tensor), id(tensor))


def _linear(layer: Any, prefix: str, weights: Mapping[str, float], dtype: torch.dtype) -> Iterator[_Entry]:
    n, k = layer.out_features, layer.in_features
    held: dict[str, float] = {}
    bare = True
    if isinstance(layer, AdapterLinear) and layer.merged is None:
        held = {name: weight for name, weight in weights.items() if name in layer.adapter_names}
        bare = layer.is_bare(held)

    def make() -> Tensor:
        with torch.no_grad():
            if bare:
                base = layer.base_weight()
                wide = base.dequantize(torch.float32) if isinstance(base, NF4Weight) else base.detach()
                merged = wide.to(dtype)
            else:
                merged = layer.adapted_weight(held).to(dtype)
        return merged.t() if layer._transposed else merged

    shape = (k, n) if layer._transposed else (n, k)
    tie: Any = id(layer.weight) if bare else ("merged", id(layer))
    origin = layer.original_weight() if isinstance(layer, AdapterLinear) else layer.weight
    yield _Entry(Promise(f"{prefix}weight", dtype, shape), make, tie, id(origin))
    bias = layer.bias if bare else layer.adapted_bias(held)
    if bias is not None:
        yield _plain(f"{prefix}bias", bias, dtype)


def _write_shards(directory: str, entries: list[_Entry], max_shard_bytes: int) -> None:
    shards: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.promise.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.promise.nbytes
    stem = SINGLE_NAME.removesuffix(".safetensors")
    names = [f"{stem}-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE_NAME]
    for file, shard in zip(names, shards, strict=True):
        write_stream(os.path.join(directory, file), [e.promise for e in shard], (e.make() for e in shard))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(entry.promise.nbytes for entry in entries)},
            "weight_map": {
                entry.promise.name: file for file, shard in zip(names, shards, strict=True) for entry in shard
            },
        }
        _write_json(os.path.join(directory, stem + INDEX_SUFFIX), index)


def _write_config(model: nn.Module, directory: str, dtype: torch.dtype, untied: bool) -> None:
    """What transformers needs beside the weights; nothing for other models."""
    config: Any = getattr(model, "config", None)
    if not callable(getattr(config, "save_pretrained", None)):
        return
    config = copy.deepcopy(config)
    config.architectures = [type(model).__name__]
    if untied and getattr(config, "tie_word_embeddings", False):
        # an adapter was on one of two tied weights: they are two weights from now on
        config.tie_word_embeddings = False
    config.save_pretrained(directory)
    path = os.path.join(directory, _CONFIG)
    with open(path, encoding="utf-8") as file:
        fields = json.load(file)
    fields["torch_dtype" if "torch_dtype" in fields else "dtype"] = str(dtype).removeprefix("torch.")
    fields.pop("quantization_config", None)
    _write_json(path, fields)
    generation: Any = getattr(model, "generation_config", None)
    if callable(getattr(generation, "save_pretrained", None)):
        generation.save_pretrained(directory)


def _write_json(path: str, value: Any) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def _expect_free(target: str) -> None:
    if not os.path.lexists(target):
        return
    if not os.path.isdir(target):
        raise FormatError(f"{target}: expected a directory to export to, got a file")
    there = [
        name for name in os.listdir(target) if name == _CONFIG or name.endswith((".safetensors", INDEX_SUFFIX, ".bin"))
    ]
    if there:
        raise FormatError(
            f"{target}: holds a model already ({there[0]}); export to another directory, or remove it first"
        )


def _move(temporary: str, target: str) -> None:
    """Make the finished directory appear; where there is one, with a tokenizer say, its files join, weights first."""
    if not os.path.isdir(target):
        os.rename(temporary, target)
        return
    moved = []
    # The configuration comes last: without one there is no model.
    names = sorted(os.listdir(temporary), key=lambda name: (name.endswith(".json"), name == _CONFIG, name))
    try:
        for name in names:
            os.rename(os.path.join(temporary, name), os.path.join(target, name))
            moved.append(name)
    except BaseException:
        for name in moved:
            os.unlink(os.path.join(target, name))
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
