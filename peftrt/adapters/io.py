"""save and load: adapters as the directories that HF peft writes and reads, and AdapterHub's."""

from __future__ import annotations

import dataclasses
import os

import torch
from torch import nn

from peftrt.adapters.activation import activate, detach
from peftrt.adapters.adapterhub import to_hub
from peftrt.adapters.attach import adapter_parameters, attach_adapter, wrap_dense
from peftrt.adapters.configs.base import AdapterConfig
from peftrt.adapters.methods import expect_room, method_of
from peftrt.adapters.reading import read_adapter, warn_of_differences
from peftrt.adapters.state import (
    ModelAdapters,
    all_or_nothing,
    base_model_name,
    check_new_name,
    expect_data,
    expect_state,
    find_state,
    holding,
    saved_modules,
    unwrap,
)
from peftrt.formats.adapterhub_dir import write_adapterhub_dir
from peftrt.formats.nf4 import FLOAT_DTYPES
from peftrt.formats.peft_dir import write_peft_dir

FORMATS = ("peft", "adapterhub")


def save(model: nn.Module, path: str | os.PathLike[str], *, name: str | None = None, format: str = "peft") -> None:
    """Write an adapter as a directory that HF peft 0.21 and peftrt load: ``adapter_config.json``,
    ``adapter_model.safetensors``; or as one that AdapterHub 1.3 and peftrt load: ``adapter_config.json``,
    ``adapter.safetensors``.

    The files are at ``path`` itself, whatever the adapter's name. An adapter that is there is replaced whole or not at
    all. One that began with PiSSA is written as the change of the original weight that it makes, of twice its rank, so
    that it can be loaded over the plain base; one that began with LoftQ is written as it is.

    Args:
        model: a model with adapters.
        path: the directory, made where missing.
        name: of the adapter; may be left out where there is one, or one is active. AdapterHub's files have it in them.
        format: "peft", or "adapterhub" for LoRA, IA3 on attention, prefixes whose positions are not shifted and
            bottlenecks, on models built as BERT, GPT-2, Llama or T5 are; AdapterHub loads it with
            ``use_safetensors=True``.

    Raises:
        ValueError: no such adapter, or none is named among several; UnsupportedError for one that AdapterHub's form
            has no words for, with what is in the way.
        OSError: the directory cannot be written; what was there is intact.

    Warns:
        UserWarning: the adapter began with LoftQ: it belongs to the NF4 base that was made with it.
    """
    if format not in FORMATS:
        raise ValueError(f"save: format must be one of {', '.join(map(repr, FORMATS))}, got {format!r}")
    state = expect_state(model, "save")
    name = _the_one(state, name, "save")
    model = unwrap(model)
    config = state.configs[name]
    method = method_of(config)
    config, tensors = method.contents(model, state, name)
    for module_path, module in holding(saved_modules(model, state), name).items():
        for leaf, tensor in module.copy_of(name).state_dict().items():
            tensors[method.saved_key(module_path, leaf)] = tensor
    base = base_model_name(model) or config.base_model_name_or_path
    values = dataclasses.replace(config, base_model_name_or_path=base).to_peft_dict()
    if format == "adapterhub":
        write_adapterhub_dir(path, *to_hub(model, name, values, tensors))
    else:
        write_peft_dir(path, values, tensors)


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    subfolder: str | None = None,
    trainable: bool = False,
    replace: bool = False,
    allow_nonfinite: bool = False,
    adapter_dtype: torch.dtype = torch.float32,
) -> AdapterConfig:
    """Read an adapter that HF peft, AdapterHub or peftrt saved, under a name, without activating it.

    A model without adapters gets them: its dense layers are wrapped, not quantised, and frozen. Everything is read and
    checked before the model is changed; after an error it is as it was.

    Args:
        model: any module; one adapted with ``quantize="nf4"`` too.
        path: a directory with ``adapter_config.json`` and ``adapter_model.safetensors``, or AdapterHub's
            ``adapter.safetensors``, or one whose only subfolder with them, or whose subfolder called ``name``, is
            meant (peft saves adapters not called "default" in subfolders).
        name: of the adapter in the model.
        subfolder: of ``path``, where it is none of those.
        trainable: whether it requires gradients.
        replace: take the place of an adapter of that name; whether it is active stays.
        allow_nonfinite: accept NaN and infinity.
        adapter_dtype: of the adapter's Parameters in the model.

    Returns:
        The adapter's configuration.

    Raises:
        FormatError (a ValueError): a file is bad, a module is not in the model, a shape does not fit (the message has
            both), or the configuration asks for something that is not supported.
        ValueError: the name is taken, or adapters are merged.

    Warns:
        UserWarning: the adapter was made for a base of another name, or for the NF4 base that LoftQ made with it; or
            the file holds an embedding or a head, as peft writes them along, that is not the model's, which is kept;
            or AdapterHub wrote a head beside it, which is not read.
    """
    if adapter_dtype not in FLOAT_DTYPES:
        raise TypeError(f"load: adapter_dtype must be fp32, bf16 or fp16, got {adapter_dtype!r}")
    state = find_state(model) or ModelAdapters()
    model = unwrap(model)
    check_new_name(name, [other for other in state.configs if not (replace and other == name)])
    state.expect_unmerged("load")
    expect_data(model, "load")
    found = read_adapter(model, state, path, name, subfolder=subfolder, allow_nonfinite=allow_nonfinite)
    config, plan = found.config, found.plan
    expect_room({other: kept for other, kept in state.configs.items() if other != name}, found.method, "load")
    warn_of_differences(model, found, stacklevel=3)
    with all_or_nothing(model):
        active = dict(state.active)
        first = not state.configs
        if name in state.configs:
            detach(model, state, name)
        wrap_dense(model, plan, state)
        if state.storage is None:
            state.storage = {"quantize": None}
        attach_adapter(model, state, name, config, plan, adapter_dtype=adapter_dtype, tensors=found.parts)
        mine = adapter_parameters(model, state, name)
        if first:
            model.requires_grad_(False)
        for parameter in mine:
            parameter.requires_grad_(trainable)
        activate(model, state, active)
    return config


def _the_one(state: ModelAdapters, name: str | None, where: str) -> str:
    if name is None:
        candidates = list(state.configs) if len(state.configs) == 1 else list(state.active)
        if len(candidates) != 1:
            raise ValueError(f"{where}: say which adapter with name=; there are: {', '.join(map(repr, state.configs))}")
        return candidates[0]
    state.expect_known([name], where)
    return name
