"""LoRA in AdapterHub's directories and in HF peft's.

Both compute x W^T + (alpha / r) (x A^T) B^T. Where one weight holds queries, keys and values (GPT-2's ``c_attn``),
AdapterHub has a pair of rank r for each of the three that is adapted, A one below the other and B too; that is one pair
of rank 3 r whose B consists of blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftrt.adapters.adapterhub.places import Base
from peftrt.adapters.configs.base import check_count, check_number
from peftrt.adapters.configs.lora import LoraConfig
from peftrt.adapters.plan import is_linear
from peftrt.formats.adapterhub_dir import HubKey
from peftrt.formats.errors import FormatError, UnsupportedError
from peftrt.formats.peft_dir import join_key, split_key
from peftrt.nn.source import is_conv1d

MATRICES = ("q", "k", "v")
HALVES = {"intermediate": "intermediate_lora", "output": "output_lora"}


def lora_from_hub(
    fields: Mapping[str, Any], tensors: Mapping[HubKey, Tensor], base: Base, source: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """AdapterHub's LoRA as peft's ``adapter_config.json`` and tensors.

    Args:
        fields: the configuration, complete and supported.
        tensors: by key, of the adapter alone.
        base: the model.
        source: the directory, named in errors.

    Raises:
        FormatError: tensors that do not answer to the configuration or to the model.
    """
    check_count(f"{source}: r", fields["r"], 65536)
    check_number(f"{source}: alpha", fields["alpha"])
    pairs = by_module(tensors, ("lora_A", "lora_B"), base, source)
    expect_modules(pairs, fields, base, source)
    matrices = wanted_matrices(fields)
    count = len(matrices)
    found: dict[str, Tensor] = {}
    merged = [path for path in pairs if base.lora_name(path) == "qkv"]
    for path, parts in pairs.items():
        a, b = parts["lora_A"], parts["lora_B"]
        if path in merged:
            if b.shape[0] % count or a.shape[0] != count * b.shape[1]:
                raise FormatError(
                    f"{source}: module {path!a}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} are not {count} "
                    f"pairs of one rank (attn_matrices {', '.join(matrices)})"
                )
            b = _blocks(b, matrices)
        found[join_key(path, "lora_A")], found[join_key(path, "lora_B")] = a, b
    r, alpha = fields["r"], fields["alpha"]
    values: dict[str, Any] = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "lora_dropout": fields["dropout"]}
    if merged and len(merged) < len(pairs):
        name = merged[0].rpartition(".")[2]
        values |= {"rank_pattern": {name: count * r}, "alpha_pattern": {name: count * alpha}}
    elif merged:
        values |= {"r": count * r, "lora_alpha": count * alpha}
    values["target_modules"] = target_names(pairs, base)
    values["fan_in_fan_out"] = any(is_conv1d(base.modules[path]) for path in pairs)
    return values, found


def lora_to_hub(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> tuple[dict[str, Any], dict[tuple[str, str], Tensor]]:
    """peft's LoRA as AdapterHub's: the fields that are not at their defaults, and the tensors by module and leaf.

    Raises:
        UnsupportedError: the adapter cannot be said in AdapterHub's form; the message says why.
    """
    config = LoraConfig.from_peft_dict(values)
    if config.use_dora:
        raise UnsupportedError(
            "use_dora: AdapterHub takes the norm of W + B A without the scaling, and scales the bias too: it would "
            "compute something else"
        )
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, part, _ = split_key(key, tuple(config.modules_to_save or ()))
        if part not in ("lora_A", "lora_B"):
            raise UnsupportedError(f"{key}: AdapterHub's LoRA has no {part}")
        pairs.setdefault(path, {})[part] = tensor
    fields = where_lora(pairs, base)
    merged = [parts["lora_B"] for path, parts in pairs.items() if base.lora_name(path) == "qkv"]
    compact = _compact_matrices(merged)
    if merged:
        fields["attn_matrices"] = compact or list(MATRICES)
    found: dict[tuple[str, str], Tensor] = {}
    scalings: dict[tuple[int, float], str] = {}
    for path, parts in pairs.items():
        a, b, r = parts["lora_A"], parts["lora_B"], config.rank_for(path)
        # AdapterHub has no other scaling than alpha / r
        alpha = config.scaling_for(path) * r if config.use_rslora else config.alpha_for(path)
        if base.lora_name(path) == "qkv" and compact:
            r, alpha = r // len(compact), alpha / len(compact)
            b = _without_zeros(b, compact)
        elif base.lora_name(path) == "qkv":
            # B's rows are the blocks, each of them with all of A
            a = a.repeat(len(MATRICES), 1)
        found[path, "lora_A"], found[path, "lora_B"] = a, b
        scalings.setdefault((r, alpha), path)
    if len(scalings) > 1:
        (one, first), (two, second) = list(scalings.items())[:2]
        raise UnsupportedError(
            f"AdapterHub's LoRA has one r and one alpha for all modules; {first} has r {one[0]} and alpha {one[1]:g}, "
            f"{second} r {two[0]} and alpha {two[1]:g}"
        )
    ((r, alpha),) = scalings
    fields |= {"r": r, "alpha": int(alpha) if alpha == int(alpha) else alpha, "dropout": float(config.lora_dropout)}
    return fields, found


def by_module(
    tensors: Mapping[HubKey, Tensor], leaves: tuple[str, ...], base: Base, source: str
) -> dict[str, dict[str, Tensor]]:
    """The tensors by path and leaf; every module has all the leaves."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.group != "loras" or key.leaf not in leaves:
            raise FormatError(f"{source}: tensor {key.leaf!a} of {key.place!a}: expected {' and '.join(leaves)}")
        if tensor.ndim != 2 or 0 in tensor.shape:
            raise FormatError(
                f"{source}: tensor {key.leaf!a} of {key.place!a}: expected a matrix that is not empty, got "
                f"{tuple(tensor.shape)}"
            )
        parts = found.setdefault(base.locate(key.place, source), {})
        if key.leaf in parts:
            raise FormatError(f"{source}: tensor {key.leaf!a} of {key.place!a} is there with a prefix and without")
        parts[key.leaf] = tensor
    for path, parts in found.items():
        if missing := [leaf for leaf in leaves if leaf not in parts]:
            raise FormatError(f"{source}: module {path!a} has {', '.join(parts)} but no {missing[0]}")
    return found


def wanted_matrices(fields: Mapping[str, Any]) -> list[str]:
    """``attn_matrices`` in the order in which they lie in one weight; none without ``selfattn_lora``."""
    return [name for name in MATRICES if fields["selfattn_lora"] and name in fields["attn_matrices"]]


def expect_modules(found: Mapping[str, Any], fields: Mapping[str, Any], base: Base, source: str) -> None:
    """Hold the modules that have tensors against those that the configuration adapts in this model.

    Raises:
        UnsupportedError: a module of no known kind.
        FormatError: one has tensors and is not adapted, or the other way round.
    """
    matrices = wanted_matrices(fields)
    names = {*matrices, *(name for name, field in HALVES.items() if fields[field])}
    if matrices:
        names.add("qkv")
    for path in found:
        if base.lora_name(path) is None:
            raise UnsupportedError(
                f"{source}: module {path!a}: what AdapterHub calls it is not known; supported are models built as "
                "BERT, GPT-2, Llama or T5 are"
            )
    for path in base.modules:
        adapted = base.lora_name(path) in names and not base.is_left_out(path, fields["leave_out"])
        if adapted and path not in found:
            raise FormatError(
                f"{source}: no tensors for {path!a}, which the configuration adapts: made for another base?"
            )
        if path in found and not adapted:
            raise FormatError(f"{source}: module {path!a} has tensors, but the configuration does not adapt it")
    if not found:
        raise FormatError(f"{source}: the configuration adapts no module of the model")


def where_lora(found: Mapping[str, Any], base: Base) -> dict[str, Any]:
    """The fields of AdapterHub's configuration that say which modules are adapted.

    Raises:
        UnsupportedError: they cannot say it; the message has a module.
    """
    for path in found:
        if base.lora_name(path) is None:
            raise UnsupportedError(
                f"AdapterHub has no LoRA at {path}: it adapts queries, keys, values and the layers of a feed-forward "
                "block"
            )
    names = {base.lora_name(path) for path in found}
    left_out = set(range(len(base.layers))) - {base.layers[base.layer_of(path) or ""] for path in found}
    for path in base.modules:
        if base.lora_name(path) in names and path not in found and not base.is_left_out(path, left_out):
            raise UnsupportedError(
                f"AdapterHub adapts the same modules in each layer that it adapts: there is no adapter at {path}"
            )
    matrices = [name for name in MATRICES if name in names]
    return {
        "selfattn_lora": bool(matrices) or "qkv" in names,
        "leave_out": sorted(left_out),
        **({"attn_matrices": matrices} if matrices else {}),
        **{field: name in names for name, field in HALVES.items()},
    }


def target_names(paths: Mapping[str, Any], base: Base) -> list[str]:
    """``target_modules`` for these modules: their last names where no other module has one of them, else the paths."""
    names = {path.rpartition(".")[2] for path in paths}
    named = {path for path, module in base.modules.items() if path.rpartition(".")[2] in names and is_linear(module)}
    return sorted(names if named == set(paths) else paths)


def _blocks(b: Tensor, matrices: list[str]) -> Tensor:
    """B of all rows and of rank r times the number of matrices, from the rows of these alone."""
    rows, rank = b.shape[0] // len(matrices), b.shape[1]
    wide = b.new_zeros(len(MATRICES) * rows, len(matrices) * rank)
    for i, name in enumerate(matrices):
        first = MATRICES.index(name) * rows
        wide[first : first + rows, i * rank : (i + 1) * rank] = b[i * rows : (i + 1) * rows]
    return wide


def _compact_matrices(wide: list[Tensor]) -> list[str] | None:
    """The matrices whose blocks alone are not zero in every B; None where there is anything else in one."""
    if any(b.shape[0] % len(MATRICES) for b in wide):
        return None
    adapted = [any(bool(b.chunk(len(MATRICES))[i].any()) for b in wide) for i in range(len(MATRICES))]
    count = sum(adapted)
    if not count or any(b.shape[1] % count for b in wide):
        return None
    matrices = [name for name, is_adapted in zip(MATRICES, adapted, strict=True) if is_adapted]
    exact = (torch.equal(_blocks(_without_zeros(b, matrices), matrices), b) for b in wide)
    return matrices if all(exact) else None


def _without_zeros(wide: Tensor, matrices: list[str]) -> Tensor:
    """The inverse of ``_blocks``."""
    parts, rank = wide.chunk(len(MATRICES)), wide.shape[1] // len(matrices)
    blocks = [parts[MATRICES.index(name)][:, i * rank : (i + 1) * rank] for i, name in enumerate(matrices)]
    return torch.cat(blocks)
