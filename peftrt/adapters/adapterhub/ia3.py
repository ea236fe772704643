"""(IA)^3 in AdapterHub's directories and in HF peft's.

AdapterHub scales the outputs of modules, their bias included. So does peft, except for those it calls feed-forward
modules, whose input it scales; conventionally these are the last of a feed-forward block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftrt.adapters.adapterhub.lora import (
    MATRICES,
    by_module,
    expect_modules,
    target_names,
    wanted_matrices,
    where_lora,
)
from peftrt.adapters.adapterhub.places import Base
from peftrt.adapters.configs.ia3 import IA3Config
from peftrt.formats.adapterhub_dir import HubKey
from peftrt.formats.errors import FormatError, UnsupportedError
from peftrt.formats.peft_dir import KEY_PREFIX
from peftrt.nn.source import is_conv1d

_SUFFIX = ".ia3_l"


def ia3_from_hub(
    fields: Mapping[str, Any], tensors: Mapping[HubKey, Tensor], base: Base, source: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """AdapterHub's (IA)^3 as peft's ``adapter_config.json`` and tensors.

    Raises:
        UnsupportedError: there is a rank, or a second factor.
        FormatError: tensors that do not answer to the configuration or to the model.
    """
    for field in ("r", "alpha"):
        if fields[field] != 1:
            raise UnsupportedError(f"{source}: {field} = {fields[field]!a} with composition_mode 'scale', expected 1")
    vectors = {path: parts["lora_B"] for path, parts in by_module(tensors, ("lora_B",), base, source).items()}
    expect_modules(vectors, fields, base, source)
    found: dict[str, Tensor] = {}
    for path, vector in vectors.items():
        if vector.shape[1] != 1:
            raise FormatError(f"{source}: module {path!a}: lora_B is {list(vector.shape)}, expected one column")
        if base.lora_name(path) == "qkv":
            matrices = wanted_matrices(fields)
            if len(vector) % len(matrices):
                raise FormatError(
                    f"{source}: module {path!a}: {len(vector)} factors are not {len(matrices)} times as many "
                    f"(attn_matrices {', '.join(matrices)})"
                )
            rows = len(vector) // len(matrices)
            wide = vector.new_ones(len(MATRICES) * rows, 1)
            for i, name in enumerate(matrices):
                first = MATRICES.index(name) * rows
                wide[first : first + rows] = vector[i * rows : (i + 1) * rows]
            vector = wide
        found[f"{KEY_PREFIX}{path}{_SUFFIX}"] = vector
    values = {
        "peft_type": "IA3",
        "target_modules": target_names(vectors, base),
        "feedforward_modules": [],
        "fan_in_fan_out": any(is_conv1d(base.modules[path]) for path in vectors),
    }
    return values, found


def ia3_to_hub(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> tuple[dict[str, Any], dict[tuple[str, str], Tensor]]:
    """peft's (IA)^3 as AdapterHub's: the fields that are not at their defaults, and the tensors by module and leaf.

    Raises:
        UnsupportedError: the adapter cannot be said in AdapterHub's form; the message says why.
    """
    config = IA3Config.from_peft_dict(values)
    vectors: dict[str, Tensor] = {}
    for key, vector in tensors.items():
        path = key.removeprefix(KEY_PREFIX).removesuffix(_SUFFIX)
        if config.is_feedforward(path):
            raise UnsupportedError(
                f"{path}: HF peft's (IA)^3 scales the input of a feed-forward module, AdapterHub's the output: the two "
                "differ"
            )
        vectors[path] = vector
    fields = where_lora(vectors, base)
    merged = [vector.chunk(len(MATRICES)) for path, vector in vectors.items() if base.lora_name(path) == "qkv"]
    if merged:
        scaled = [any(bool((parts[i] != 1).any()) for parts in merged) for i in range(len(MATRICES))]
        names = [name for name, is_scaled in zip(MATRICES, scaled, strict=True) if is_scaled]
        fields["attn_matrices"] = names or list(MATRICES)
    found = {}
    for path, vector in vectors.items():
        if base.lora_name(path) == "qkv":
            parts = dict(zip(MATRICES, vector.chunk(len(MATRICES)), strict=True))
            vector = torch.cat([parts[name] for name in fields["attn_matrices"]])
        found[path, "lora_B"] = vector
    return {**fields, "composition_mode": "scale", "init_weights": "ia3", "r": 1, "alpha": 1}, found
