"""What a model knows about its adapters, where its layers with adapters are, and how a failed change is taken back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from peftrt.adapters.configs.base import AdapterConfig
from peftrt.adapters.saved import SavedModule
from peftrt.formats.errors import AdapterNameError
from peftrt.formats.names import check_adapter_name
from peftrt.nn import AdapterHolder, AdapterLinear, AdapterSet

_ATTRIBUTE = "_peftrt_adapters"

H = TypeVar("H", bound=AdapterHolder)


class ModelAdapters(AdapterSet):
    """The adapters of one model; every layer that holds a part of one has it as its ``owner``.

    Attributes:
        configs: name -> configuration, in the order in which the adapters came.
        storage: how the base of adapted layers is stored: ``quantize``, ``block_size``, ``double_quant``; None where no
            layer has been adapted yet.
        active: the active adapters and their weights.
        merged: those that are merged into the base; None where nothing is.
    """

    configs: dict[str, AdapterConfig]

    def __init__(self) -> None:
        super().__init__()
        self.storage: dict[str, Any] | None = None
        self.active: dict[str, float] = {}
        self.merged: dict[str, float] | None = None

    def expect_known(self, names: Iterable[str | None], where: str) -> None:
        """Raise ValueError for the first name that is no adapter's."""
        for name in names:
            if name is not None and name not in self.configs:
                there = ", ".join(map(repr, self.configs)) or "none"
                raise ValueError(f"{where}: no adapter {name!r} in the model; there are: {there}")

    def expect_unmerged(self, where: str) -> None:
        """Raise ValueError where adapters are merged."""
        if self.merged is not None:
            raise ValueError(
                f"{where}: adapters {sorted(self.merged)} are merged into the base; call peftrt.unmerge first"
            )


def check_new_name(name: str, existing: Iterable[str]) -> None:
    """Raise AdapterNameError unless a new adapter can be called so."""
    check_adapter_name(name, existing)
    if "@" in name:
        raise AdapterNameError(
            f"adapter name {name!a} must not contain '@', which separates it from a Parameter's name"
        )


def expect_data(model: nn.Module, where: str, hint: str = "") -> None:
    """Raise ValueError where a Parameter has no data."""
    empty = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if empty is not None:
        raise ValueError(f"{where}: {empty} is on the meta device, without data{hint}")


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile`` and ``DistributedDataParallel`` put around it."""
    while True:
        inner = model.__dict__.get("_modules", {}).get("_orig_mod")
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def find_state(model: nn.Module) -> ModelAdapters | None:
    """The model's adapters, None where it has never had one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    return unwrap(model).__dict__.get(_ATTRIBUTE)


def expect_state(model: nn.Module, where: str) -> ModelAdapters:
    """The model's adapters; an error where there are none."""
    state = find_state(model)
    if state is None or not state.configs:
        raise ValueError(f"{where}: the model has no adapters; call peftrt.adapt or peftrt.load with it first")
    return state


def attach_state(model: nn.Module, state: ModelAdapters) -> None:
    """Put the adapters' record on the model, where ``deepcopy`` and ``pickle`` take it along."""
    setattr(model, _ATTRIBUTE, state)


def holders(model: nn.Module, state: ModelAdapters) -> dict[str, AdapterHolder]:
    """Path -> module, for everything that holds a share of the adapters of ``state``."""
    return _of_kind(AdapterHolder, model, state)


def adapter_layers(model: nn.Module, state: ModelAdapters) -> dict[str, AdapterLinear]:
    """Path -> layer, for the layers that belong to ``state``."""
    return _of_kind(AdapterLinear, model, state)


def saved_modules(model: nn.Module, state: ModelAdapters) -> dict[str, SavedModule]:
    """Path -> module of ``modules_to_save``."""
    return _of_kind(SavedModule, model, state)


def holding(found: Mapping[str, H], name: str) -> dict[str, H]:
    """Those of ``found`` that hold a share of the adapter of that name."""
    return {path: module for path, module in found.items() if name in module.adapter_names}


def _of_kind(kind: type[H], model: nn.Module, state: ModelAdapters) -> dict[str, H]:
    found = unwrap(model).named_modules()
    return {path: module for path, module in found if isinstance(module, kind) and module.owner is state}


def base_model_name(model: nn.Module) -> str | None:
    """Where the base came from, as Hugging Face models record it."""
    config = getattr(unwrap(model), "config", None)
    name = getattr(config, "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def parents_of(model: nn.Module, child: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every (parent, attribute) under which a module is registered: a shared one has several."""
    places = []
    for parent in model.modules():
        places += [(parent, name) for name, module in parent._modules.items() if module is child]
    return places


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is registered."""
    for parent, name in parents_of(model, old):
        parent._modules[name] = new
        _leave_fast_path(model, parent)


def _leave_fast_path(model: nn.Module, parent: nn.Module) -> None:
    """torch's own encoder layers read their children's weights in eval(), past what those would compute."""
    if isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoder) and any(layer is parent for layer in module.layers):
                module.use_nested_tensor = False


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Put modules, Parameters, flags and the adapters' record back as they were if the block fails.

    Remembered are references, not copies of tensors: the block may replace Parameters and modules, not write into them.
    """
    before = [(module.__dict__, _contents(module.__dict__)) for module in model.modules()]
    state = find_state(model)
    if state is not None:
        before.append((state.__dict__, _contents(state.__dict__)))
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for attributes, (values, copies) in before:
            attributes.clear()
            attributes.update(values)
            for name, contents in copies.items():
                # the same object again: handles of hooks hold on to it
                values[name].clear()
                values[name].update(contents)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def _contents(attributes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The attributes, and copies of the dictionaries and sets among them."""
    return dict(attributes), {
        name: copy.copy(value) for name, value in attributes.items() if isinstance(value, dict | set)
    }
