"""An adapter's directory, read and held against a model before anything is changed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftrt.adapters.configs import LoraConfig
from peftrt.adapters.lora_state import LoraState, validate_lora_tensors
from peftrt.adapters.match import matches
from peftrt.adapters.plan import Plan, cannot_adapt, is_embedding, is_linear, output_head, sizes
from peftrt.adapters.saved import SavedModule, check_tensors
from peftrt.adapters.state import ModelAdapters, base_model_name
from peftrt.formats.errors import FormatError, MissingFileError
from peftrt.formats.peft_dir import CONFIG_NAME, find_peft_dir, read_peft_dir
from peftrt.nn import AdapterLinear, NF4Linear


class FoundAdapter(NamedTuple):
    """What a directory holds, and where in the model it belongs.

    Attributes:
        directory: with the two files themselves.
        values: the configuration's JSON object.
        tensors: by peft's keys.
        config, parts: the two, checked.
        plan: the modules of the model that the tensors belong to.
    """

    directory: str
    values: dict[str, Any]
    tensors: dict[str, Tensor]
    config: LoraConfig
    parts: LoraState
    plan: Plan


def read_adapter(
    model: nn.Module,
    state: ModelAdapters,
    path: str | os.PathLike[str],
    name: str,
    *,
    subfolder: str | None = None,
    root: str | os.PathLike[str] | None = None,
    allow_nonfinite: bool = False,
) -> FoundAdapter:
    """Read an adapter's directory and check it, its tensors against its configuration and both against the model.

    Args:
        model, state: an unwrapped model and its adapters; neither is changed.
        path, name, subfolder, allow_nonfinite: as of :func:`peftrt.load`.
        root: where given, every file must lie under it once links are followed.

    Raises:
        FormatError (a ValueError): as of :func:`peftrt.load`.
    """
    directory = _directory(path, name, subfolder, root)
    values, tensors = read_peft_dir(directory, name="default", root=root, allow_nonfinite=allow_nonfinite)
    config, parts = parse_adapter(directory, values, tensors)
    return FoundAdapter(directory, values, tensors, config, parts, _fit(model, config, state, parts, directory))


def parse_adapter(
    directory: str, values: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[LoraConfig, LoraState]:
    """What ``read_peft_dir`` gave as configuration and tensors by module; raises FormatError."""
    config = LoraConfig.from_peft_dict(values, os.path.join(directory, CONFIG_NAME))
    return config, validate_lora_tensors(config, tensors, directory)


def warn_of_differences(model: nn.Module, found: FoundAdapter, stacklevel: int) -> None:
    """Warn where the adapter was made over another base than the model; ``stacklevel``: as of the caller's own."""
    source = os.path.join(found.directory, CONFIG_NAME)
    told = [_other_base(model, found.config, source), *_other_tensors(model, found.parts, found.directory)]
    if found.config.init_lora_weights == "loftq":
        reason = "it began with LoftQ and belongs to the NF4 base that was made with it: over another it means less"
        told.append(f"{source}: {reason}")
    for message in told:
        if message is not None:
            warnings.warn(message, UserWarning, stacklevel=stacklevel)


def _directory(
    path: str | os.PathLike[str], name: str, subfolder: str | None, root: str | os.PathLike[str] | None
) -> str:
    if subfolder is not None:
        return find_peft_dir(path, name=subfolder, root=root)
    try:
        return find_peft_dir(path, root=root)
    except MissingFileError:
        raise
    except FormatError:
        # several subfolders: the one that is called like the adapter
        if os.path.isdir(path) and os.path.lexists(os.path.join(path, name, CONFIG_NAME)):
            return find_peft_dir(path, name=name, root=root)
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


def _other_base(model: nn.Module, config: LoraConfig, source: str) -> str | None:
    here, there = base_model_name(model), config.base_model_name_or_path
    if here and there and here.rstrip("/") != there.rstrip("/"):
        return f"{source}: made for the base {there!a}, the model is {here!a}"
    return None


def _other_tensors(model: nn.Module, parts: LoraState, source: str) -> list[str]:
    """peft writes the tensors of adapted embeddings and heads along, and would load them over the model's."""
    told = []
    for path, tensors in parts.bases.items():
        module = model.get_submodule(path)
        if isinstance(module, NF4Linear) or (isinstance(module, AdapterLinear) and not module.is_bare({})):
            continue  # stored in another form
        for name, theirs in tensors.items():
            ours = getattr(module, name, None)
            if not isinstance(ours, Tensor) or not _same(ours.detach(), theirs):
                reason = (
                    f"another {path}.{name} than the model's, which is kept: the adapter was trained over the other"
                )
                told.append(f"{source}: holds {reason}")
    return told


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Equal once both are rounded to the dtype of either."""
    if ours.shape != theirs.shape:
        return False
    theirs = theirs.to(ours.device)
    return torch.equal(ours.to(theirs.dtype), theirs) or torch.equal(ours, theirs.to(ours.dtype))
