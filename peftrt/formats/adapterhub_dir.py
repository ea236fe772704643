"""AdapterHub's adapter directories: ``adapter_config.json``, ``adapter.safetensors``.

The configuration's ``config`` says what the adapter is; beside it stand ``name``, which is part of every key of the
weights, ``version``, and ``model_type``, ``model_class``, ``model_name`` and ``hidden_size`` of the base.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from peftrt.formats.errors import AdapterNameError, ConfigError, FormatError
from peftrt.formats.names import check_adapter_name
from peftrt.formats.pair import ADAPTERHUB, CONFIG_NAME, PEFT, form_of, read_pair, write_pair
from peftrt.formats.safe import MAX_BYTES, MAX_TENSORS

VERSION = "adapters.1.3.0"
TEXTS = ("model_type", "model_class", "model_name")
# What AdapterHub writes beside an adapter that is no part of it: a prediction head.
HEADS = ("model_head.safetensors", "pytorch_model_head.bin", "head_config.json")

# What stands before an adapter's name in a key.
_GROUPS = ("adapters", "loras", "prefix_tunings")


class HubKey(NamedTuple):
    """A key of ``adapter.safetensors`` taken apart: ``<place>.<group>.<name>.<leaf>``.

    ``group`` is "adapters" (bottlenecks), "loras" or "prefix_tunings"; ``place`` is the module that holds it.
    """

    place: str
    group: str
    leaf: str


def is_adapterhub_dir(directory: str | os.PathLike[str]) -> bool:
    """Whether the weights in a directory are called as AdapterHub calls them, and none as HF peft does."""
    return form_of(os.fspath(directory)) is ADAPTERHUB


def read_adapterhub_dir(
    directory: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    max_tensors: int = MAX_TENSORS,
    max_bytes: int = MAX_BYTES,
    allow_nonfinite: bool = False,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the contents of ``adapter_config.json``, its own fields checked, and the tensors by their keys.

    Args:
        directory: the one that holds the files.
        root: where given, every file must lie under it once links are followed.
        max_tensors, max_bytes, allow_nonfinite: see ``peftrt.formats.safe.TensorReader``.

    Raises:
        MissingFileError: no adapter is there.
        UnsafeFileError: its weights are a pickle.
        FormatError: a file is not as it must be.
    """
    options = {"root": root, "max_tensors": max_tensors, "max_bytes": max_bytes, "allow_nonfinite": allow_nonfinite}
    values, tensors = read_pair(os.fspath(directory), ADAPTERHUB, options)
    _check_fields(values, os.path.join(os.fspath(directory), CONFIG_NAME))
    return values, tensors


def write_adapterhub_dir(
    path: str | os.PathLike[str], values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write an adapter at ``path`` so that AdapterHub loads it with ``use_safetensors=True``; one that is there is
    replaced whole or not at all.

    Args:
        path: the directory, made where missing; other files in it are left alone.
        values: the contents of ``adapter_config.json``.
        tensors: tensors by AdapterHub's keys.

    Raises:
        FormatError: ``path`` is a file, or holds an adapter as HF peft saves them or a pickle, which AdapterHub would
            load instead; a field is bad; a tensor cannot be stored.
        OSError: the disk is full or cannot be written; what was there before is intact.
    """
    _check_fields(values, os.path.join(os.fspath(path), CONFIG_NAME))
    write_pair(path, ADAPTERHUB, values, tensors, {})


def split_hub_key(key: str, name: str) -> HubKey:
    """Take a key apart.

    Args:
        key: e.g. ``bert.encoder.layer.0.attention.self.query.loras.fr.lora_A``.
        name: the adapter's.

    Raises:
        FormatError: the key has no such form, or belongs to another adapter.
    """
    for group in _GROUPS:
        place, found, leaf = f".{key}".partition(f".{group}.{name}.")
        if found and place and leaf:
            return HubKey(place[1:], group, leaf)
    raise FormatError(
        f"key {key!a} is not supported: expected <module> followed by {', '.join(f'.{g}.{name}.' for g in _GROUPS)}"
    )


def join_hub_key(place: str, group: str, name: str, leaf: str) -> str:
    """The inverse of ``split_hub_key``."""
    return f"{place}.{group}.{name}.{leaf}"


def _check_fields(values: Mapping[str, Any], source: str) -> None:
    if "peft_type" in values:
        raise FormatError(
            f"{source}: peft_type: a configuration of HF peft beside weights of AdapterHub; expected {PEFT.weights}"
        )
    if not isinstance(values.get("config"), Mapping | str):
        raise ConfigError(f"{source}: config: expected an object or the name of one, got {values.get('config')!a}")
    for field in ("name", "version"):
        if not isinstance(values.get(field), str):
            raise ConfigError(f"{source}: {field}: expected a string, got {values.get(field)!a}")
    try:
        check_adapter_name(values["name"])
    except AdapterNameError as error:
        raise AdapterNameError(f"{source}: name: {error}") from None
    for field in TEXTS:
        if not isinstance(values.get(field), str | None):
            raise ConfigError(f"{source}: {field}: expected a string, got {values[field]!a}")
    size = values.get("hidden_size")
    if size is not None and (type(size) is not int or size < 1):
        raise ConfigError(f"{source}: hidden_size: expected an integer from 1 on, got {size!a}")
