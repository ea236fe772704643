"""An adapter's directory, read and held against a model before anything is changed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from peftrt.adapters.adapterhub import read_from_hub
from peftrt.adapters.configs.base import AdapterConfig
from peftrt.adapters.method import AdapterTensors, Method
from peftrt.adapters.methods import method_of_file
from peftrt.adapters.plan import Plan, expect_module, own_modules
from peftrt.adapters.saved import SavedModule, check_tensors
from peftrt.adapters.state import ModelAdapters, base_model_name
from peftrt.formats.adapterhub_dir import is_adapterhub_dir
from peftrt.formats.errors import FormatError, MissingFileError
from peftrt.formats.peft_dir import CONFIG_NAME, find_peft_dir, read_peft_dir
from peftrt.nn import AdapterLinear


class FoundAdapter(NamedTuple):
    """What a directory holds, and where in the model it belongs.

    Attributes:
        directory: with the two files themselves.
        values: the configuration's JSON object, in peft's form.
        tensors: by peft's keys.
        method: of the configuration.
        config, parts: the two, checked.
        plan: the modules of the model that the tensors belong to.
    """

    directory: str
    values: dict[str, Any]
    tensors: dict[str, Tensor]
    method: Method[Any, Any]
    config: AdapterConfig
    parts: AdapterTensors
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
    values, tensors = read_files(model, directory, root=root, allow_nonfinite=allow_nonfinite)
    method = method_of_file(values, os.path.join(directory, CONFIG_NAME))
    config, parts = method.parse(values, tensors, directory)
    plan = method.fit(model, config, state, parts, directory)
    plan.saved = _fit_saved(dict(own_modules(model)), parts, directory)
    return FoundAdapter(directory, values, tensors, method, config, parts, plan)


def read_files(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    allow_nonfinite: bool = False,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The contents of an ``adapter_config.json`` and the tensors, in peft's form whoever wrote them.

    Args:
        model: the base, which tells what AdapterHub's names mean; it is not changed.
        directory: with the two files themselves.
        root, allow_nonfinite: as of ``read_adapter``.

    Raises:
        FormatError: a file is bad, or AdapterHub's adapter does not fit the model or is not supported.
    """
    if is_adapterhub_dir(directory):
        return read_from_hub(model, directory, root=root, allow_nonfinite=allow_nonfinite)
    return read_peft_dir(directory, name="default", root=root, allow_nonfinite=allow_nonfinite)


def warn_of_differences(model: nn.Module, found: FoundAdapter, stacklevel: int) -> None:
    """Warn where the adapter was made over another base than the model; ``stacklevel``: as of the caller's own."""
    source = os.path.join(found.directory, CONFIG_NAME)
    told = [_other_base(model, found.config, source)]
    told += found.method.differences(model, found.config, found.parts, found.directory)
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


def _fit_saved(modules: Mapping[str, nn.Module], tensors: AdapterTensors, source: str) -> list[str]:
    """The modules of ``modules_to_save`` that the tensors belong to, every shape compared."""
    for path, saved in tensors.saved.items():
        module = expect_module(modules, path, source)
        if isinstance(module, AdapterLinear):
            raise FormatError(f"{source}: module {path!a} is saved whole, but the model's holds adapters")
        base = module.base if isinstance(module, SavedModule) else module
        try:
            check_tensors(base, saved)
        except ValueError as error:
            raise FormatError(f"{source}: module {path!a} of modules_to_save: {error}") from None
    return list(tensors.saved)


def _other_base(model: nn.Module, config: AdapterConfig, source: str) -> str | None:
    here, there = base_model_name(model), config.base_model_name_or_path
    if here and there and here.rstrip("/") != there.rstrip("/"):
        return f"{source}: made for the base {there!a}, the model is {here!a}"
    return None
