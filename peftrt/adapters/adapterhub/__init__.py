"""AdapterHub's directories and HF peft's said in each other's terms, where both compute the same.

Both are an object of JSON and named tensors, so that an adapter read from AdapterHub goes the same way from here as one
that peft saved, and one that is written comes the same way.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peftrt.adapters.adapterhub.bottleneck import bottleneck_from_hub, bottleneck_to_hub
from peftrt.adapters.adapterhub.fields import BOTTLENECK, LORA, PREFIX, read_hub_fields
from peftrt.adapters.adapterhub.ia3 import ia3_from_hub, ia3_to_hub
from peftrt.adapters.adapterhub.lora import lora_from_hub, lora_to_hub
from peftrt.adapters.adapterhub.places import Base
from peftrt.adapters.adapterhub.prefix import prefix_from_hub, prefix_to_hub
from peftrt.adapters.state import base_model_name
from peftrt.formats.adapterhub_dir import HEADS, VERSION, join_hub_key, read_adapterhub_dir, split_hub_key
from peftrt.formats.errors import FormatError, UnsupportedError, named
from peftrt.formats.peft_dir import CONFIG_NAME

# peft_type -> how it is written, the defaults of AdapterHub's configuration, and what holds the tensors there
_WRITERS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "LORA": (lora_to_hub, LORA, "loras"),
    "IA3": (ia3_to_hub, LORA, "loras"),
    "PREFIX_TUNING": (prefix_to_hub, PREFIX, "prefix_tunings"),
    "BOTTLENECK": (bottleneck_to_hub, BOTTLENECK, "adapters"),
}


def read_from_hub(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    allow_nonfinite: bool = False,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read an AdapterHub directory as the contents of peft's ``adapter_config.json`` and tensors by peft's keys.

    Args:
        model: the base, with or without data, which tells where the adapter's modules are; it is not changed.
        directory: with the two files themselves.
        root, allow_nonfinite: as of ``read_adapterhub_dir``.

    Raises:
        FormatError: a file is bad, the adapter does not fit the model, or it is not supported.

    Warns:
        UserWarning: a prediction head lies beside the adapter, which is not read.
    """
    directory = os.fspath(directory)
    values, tensors = read_adapterhub_dir(directory, root=root, allow_nonfinite=allow_nonfinite)
    for head in HEADS:
        if os.path.lexists(os.path.join(directory, head)):
            warnings.warn(f"{directory}: {head} is not read: a head is no part of the adapter", stacklevel=5)
            break
    fields = read_hub_fields(values, os.path.join(directory, CONFIG_NAME))
    base = Base(model, values.get("model_type"))
    keys = {}
    for key, tensor in tensors.items():
        with named(directory):
            keys[split_hub_key(key, values["name"])] = tensor
    if not keys:
        raise FormatError(f"{directory}: the adapter has no tensors")
    if fields["architecture"] is None:
        found, parts = bottleneck_from_hub(fields, keys, base, directory)
    elif fields["architecture"] == "prefix_tuning":
        found, parts = prefix_from_hub(fields, keys, base, directory)
    elif fields["composition_mode"] == "scale":
        found, parts = ia3_from_hub(fields, keys, base, directory)
    else:
        found, parts = lora_from_hub(fields, keys, base, directory)
    return {**found, "base_model_name_or_path": values.get("model_name") or None, "inference_mode": True}, parts


def to_hub(
    model: nn.Module, name: str, values: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What ``write_adapterhub_dir`` takes, from the contents of peft's ``adapter_config.json`` and tensors by its keys.

    Args:
        model: the base, with or without data.
        name: of the adapter, which becomes part of every key.
        values, tensors: known to fit each other and the model.

    Raises:
        UnsupportedError: the adapter cannot be said in AdapterHub's form; the message says why.
    """
    kind = values["peft_type"]
    if kind not in _WRITERS:
        raise UnsupportedError(f"AdapterHub has no form for peft_type {kind!a}; it has {', '.join(_WRITERS)}")
    if saved := values.get("modules_to_save"):
        raise UnsupportedError(f"modules_to_save = {list(saved)}: AdapterHub's adapters hold no modules in full")
    write, defaults, group = _WRITERS[kind]
    base = Base(model)
    changed, parts = write(values, tensors, base)
    return {
        "config": {**defaults, **changed},
        "hidden_size": getattr(base.config, "hidden_size", None),
        "model_class": base.class_name,
        "model_name": base_model_name(model) or values.get("base_model_name_or_path") or "",
        "model_type": base.model_type,
        "name": name,
        "version": VERSION,
    }, {join_hub_key(place, group, name, leaf): tensor for (place, leaf), tensor in parts.items()}
