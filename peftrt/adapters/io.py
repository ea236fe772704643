"""save and load: adapters as the directories that HF peft writes and reads."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from peftrt.adapters.activation import activate, detach
from peftrt.adapters.attach import adapter_parameters, attach_adapter, wrap_dense
from peftrt.adapters.configs import LoraConfig
from peftrt.adapters.lora_state import LoraState, validate_lora_tensors
from peftrt.adapters.match import matches
from peftrt.adapters.plan import Plan, cannot_adapt, is_embedding, is_linear, output_head, sizes
from peftrt.adapters.saved import SavedModule, check_tensors
from peftrt.adapters.state import (
    ModelAdapters,
    adapter_layers,
    all_or_nothing,
    base_model_name,
    check_new_name,
    expect_data,
    expect_state,
    find_state,
    saved_modules,
    unwrap,
)
from peftrt.formats.errors import FormatError, MissingFileError
from peftrt.formats.nf4 import FLOAT_DTYPES
from peftrt.formats.peft_dir import CONFIG_NAME, find_peft_dir, join_key, read_peft_dir, write_peft_dir
from peftrt.nn import AdapterLinear, NF4Linear


def save(model: nn.Module, path: str | os.PathLike[str], *, name: str | None = None) -> None:
    """Write an adapter as a directory that HF peft 0.21 and peftrt load: ``adapter_config.json``,
    ``adapter_model.safetensors``.

    The files are at ``path`` itself, whatever the adapter's name. An adapter that is there is replaced whole or not at
    all. One that began with PiSSA is written as the change of the original weight that it makes, of twice its rank, so
    that it can be loaded over the plain base; one that began with LoftQ is written as it is.

    Args:
        model: a model with adapters.
        path: the directory, made where missing.
        name: of the adapter; may be left out where there is one, or one is active.

    Raises:
        ValueError: no such adapter, or none is named among several.
        OSError: the directory cannot be written; what was there is intact.

    Warns:
        UserWarning: the adapter began with LoftQ: it belongs to the NF4 base that was made with it.
    """
    state = expect_state(model, "save")
    name = _the_one(state, name, "save")
    model = unwrap(model)
    tensors: dict[str, Tensor] = {}
    layers = {path: layer for path, layer in adapter_layers(model, state).items() if name in layer.adapter_names}
    for module_path, layer in layers.items():
        lora_A, lora_B = _change(layer, name)
        for part, half in zip(layer.fields[:2], (lora_A, lora_B), strict=True):
            tensors[join_key(module_path, part)] = half
        magnitude = layer.adapter(name).magnitude
        if magnitude is not None:
            tensors[join_key(module_path, "lora_magnitude_vector")] = magnitude.detach()
    for module_path, module in saved_modules(model, state).items():
        if name in module.copy_names:
            for leaf, tensor in module.copy_of(name).state_dict().items():
                tensors[join_key(module_path, "saved", leaf)] = tensor
    config = state.configs[name]
    if any(layer.principal_pair(name) for layer in layers.values()):
        config = config.with_doubled_ranks()
    if config.init_lora_weights == "loftq":
        warnings.warn(
            f"save: adapter {name!r} began with LoftQ: it belongs to the NF4 base that was made with it",
            UserWarning,
            stacklevel=2,
        )
    if config.targets_all_linear:
        # what "all-linear" means depends on the reader's version and on the model's class: the modules are named, as by
        # peft
        config = replace(config, target_modules=tuple(sorted(layers)))
    transposed = any(layer._transposed and not is_embedding(layer) for layer in layers.values())
    base = base_model_name(model) or config.base_model_name_or_path
    config = replace(config, fan_in_fan_out=config.fan_in_fan_out or transposed, base_model_name_or_path=base)
    write_peft_dir(path, config.to_peft_dict(), tensors)


def _change(layer: AdapterLinear, name: str) -> tuple[Tensor, Tensor]:
    """A and B of the change that an adapter makes to the layer's original weight."""
    adapter, pair = layer.adapter(name), layer.principal_pair(name)
    if pair is None:
        return adapter.lora_A.detach(), adapter.lora_B.detach()
    # s (B A - B0 A0): the adapter began with a part of the weight, which is no change
    return torch.cat([adapter.lora_A.detach(), pair[0]]), torch.cat([adapter.lora_B.detach(), -pair[1]], dim=1)


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
) -> LoraConfig:
    """Read an adapter that HF peft or peftrt saved, under a name, without activating it.

    A model without adapters gets them: its dense layers are wrapped, not quantised, and frozen. Everything is read and
    checked before the model is changed; after an error it is as it was.

    Args:
        model: any module; one adapted with ``quantize="nf4"`` too.
        path: a directory with ``adapter_config.json`` and ``adapter_model.safetensors``, or one whose only subfolder
            with them, or whose subfolder called ``name``, is meant (peft saves adapters not called "default" in
            subfolders).
        name: of the adapter in the model.
        subfolder: of ``path``, where it is none of those.
        trainable: whether it requires gradients.
        replace: take the place of an adapter of that name; whether it is active stays.
        allow_nonfinite: accept NaN and infinity.
        adapter_dtype: of A, B and DoRA's magnitudes in the model.

    Returns:
        The adapter's configuration.

    Raises:
        FormatError (a ValueError): a file is bad, a module is not in the model, a shape does not fit (the message has
            both), or the configuration asks for something that is not supported.
        ValueError: the name is taken, or adapters are merged.

    Warns:
        UserWarning: the adapter was made for a base of another name, or for the NF4 base that LoftQ made with it; or
            the file holds an embedding or a head, as peft writes them along, that is not the model's, which is kept.
    """
    if adapter_dtype not in FLOAT_DTYPES:
        raise TypeError(f"load: adapter_dtype must be fp32, bf16 or fp16, got {adapter_dtype!r}")
    state = find_state(model) or ModelAdapters()
    model = unwrap(model)
    check_new_name(name, [other for other in state.configs if not (replace and other == name)])
    if state.merged is not None:
        raise ValueError(f"load: adapters {sorted(state.merged)} are merged into the base; call peftrt.unmerge first")
    expect_data(model, "load")
    directory = _directory(path, name, subfolder)
    values, tensors = read_peft_dir(directory, name="default", allow_nonfinite=allow_nonfinite)
    source = os.path.join(directory, CONFIG_NAME)
    config = LoraConfig.from_peft_dict(values, source)
    parts = validate_lora_tensors(config, tensors, directory)
    plan = _fit(model, config, state, parts, directory)
    _compare_base(model, config, source)
    _compare_tensors(model, parts, directory)
    if config.init_lora_weights == "loftq":
        told = "it began with LoftQ and belongs to the NF4 base that was made with it: over another it means less"
        warnings.warn(f"{source}: {told}", UserWarning, stacklevel=2)
    with all_or_nothing(model):
        active = dict(state.active)
        first = not state.configs
        if name in state.configs:
            detach(model, state, name)
        wrap_dense(model, plan, state)
        if state.storage is None:
            state.storage = {"quantize": None}
        attach_adapter(model, state, name, config, plan, adapter_dtype=adapter_dtype, tensors=parts)
        mine = adapter_parameters(model, name, plan)
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


def _directory(path: str | os.PathLike[str], name: str, subfolder: str | None) -> str:
    if subfolder is not None:
        return find_peft_dir(path, name=subfolder)
    try:
        return find_peft_dir(path)
    except MissingFileError:
        raise
    except FormatError:
        # several subfolders: the one that is called like the adapter
        if os.path.isdir(path) and os.path.lexists(os.path.join(path, name, CONFIG_NAME)):
            return find_peft_dir(path, name=name)
        raise


def _fit(model: nn.Module, config: LoraConfig, state: ModelAdapters, parts: LoraState, source: str) -> Plan:
    """The modules that the tensors belong to, every shape compared."""
    plan, modules = Plan(), {}
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not (inside and path.startswith(inside)):
            modules[path] = module
        if isinstance(module, SavedModule):
            inside = (*inside, path + ".")
    for path, (lora_A, lora_B) in parts.pairs.items():
        module = _expect_module(modules, path, source)
        reason = cannot_adapt(module, state)
        if reason is not None:
            raise FormatError(f"{source}: module {path!a} cannot be adapted: {reason}")
        if is_embedding(module) != (path in parts.embeddings):
            kind = "an embedding" if path in parts.embeddings else "a linear layer"
            found = "an embedding" if is_embedding(module) else type(module).__name__
            raise FormatError(f"{source}: module {path!a}: the tensors are of {kind}, the module is {found}")
        n, k = sizes(module)
        if (lora_B.shape[0], lora_A.shape[1]) != (n, k):
            raise FormatError(
                f"{source}: module {path!a}: lora_A is {list(lora_A.shape)} and lora_B {list(lora_B.shape)}, for "
                f"a weight of [{lora_B.shape[0]}, {lora_A.shape[1]}]; the model's is [{n}, {k}]"
            )
        (plan.existing if isinstance(module, AdapterLinear) else plan.new).append(path)
    head = output_head(model, config)
    for path, module in modules.items():
        named = is_linear(module) or (is_embedding(module) and not config.targets_all_linear)
        if not path or path in parts.pairs or not named or (config.targets_all_linear and module is head):
            continue
        if matches(path, config):
            raise FormatError(f"{source}: no tensors for {path!a}, which target_modules names: made for another base?")
    for path, tensors in parts.saved.items():
        module = _expect_module(modules, path, source)
        if isinstance(module, AdapterLinear):
            raise FormatError(f"{source}: module {path!a} is saved whole, but the model's holds LoRA adapters")
        base = module.base if isinstance(module, SavedModule) else module
        try:
            check_tensors(base, tensors)
        except ValueError as error:
            raise FormatError(f"{source}: module {path!a} of modules_to_save: {error}") from None
        plan.saved.append(path)
    return plan


def _expect_module(modules: Mapping[str, nn.Module], path: str, source: str) -> nn.Module:
    if path not in modules:
        raise FormatError(f"{source}: the model has no module {path!a}: made for another base?")
    return modules[path]


def _compare_base(model: nn.Module, config: LoraConfig, source: str) -> None:
    here, there = base_model_name(model), config.base_model_name_or_path
    if here and there and here.rstrip("/") != there.rstrip("/"):
        warnings.warn(f"{source}: made for the base {there!a}, the model is {here!a}", UserWarning, stacklevel=3)


def _compare_tensors(model: nn.Module, parts: LoraState, source: str) -> None:
    """peft writes the tensors of adapted embeddings and heads along, and would load them over the model's."""
    for path, tensors in parts.bases.items():
        module = model.get_submodule(path)
        if isinstance(module, NF4Linear) or (isinstance(module, AdapterLinear) and not module.is_bare({})):
            continue  # stored in another form
        for name, theirs in tensors.items():
            ours = getattr(module, name, None)
            if not isinstance(ours, Tensor) or not _same(ours.detach(), theirs):
                told = f"another {path}.{name} than the model's, which is kept: the adapter was trained over the other"
                warnings.warn(f"{source}: holds {told}", UserWarning, stacklevel=3)


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Equal once both are rounded to the dtype of either."""
    if ours.shape != theirs.shape:
        return False
    theirs = theirs.to(ours.device)
    return torch.equal(ours.to(theirs.dtype), theirs) or torch.equal(ours, theirs.to(ours.dtype))
