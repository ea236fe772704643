"""SavedModule: a module of ``modules_to_save``, with a trainable copy for every adapter that has it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftrt.formats.nf4 import FLOAT_DTYPES
from peftrt.nn.adapter import as_weights
from peftrt.nn.holder import AdapterHolder
from peftrt.nn.hooked import entries_of
from peftrt.nn.routing import AdapterSet, Routing, current

_BASE = "base"
_COPY = "copy@"


class SavedModule(AdapterHolder):
    """A module and its trainable copies, one an adapter; forward runs the active adapter's, or the module itself.

    The module keeps its keys in a state dict; the copy of the adapter "fr" is under ``copy@fr``. Under a routing
    (``peftrt.rows``) the entries of a batch go to the copies of their adapters.

    Args:
        base: the module as it is in the model.
        owner: the model's adapters.
    """

    base: nn.Module

    def __init__(self, base: nn.Module, owner: AdapterSet) -> None:
        super().__init__()
        # add_module refuses a name that the class has as a property
        self._modules[_BASE] = base
        self.owner = owner
        self._chosen: str | None = None
        self.training = base.training
        self._register_state_dict_hook(_without_base)

    def add_copy(self, name: str, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Copy the module for an adapter; its tensors are replaced by those given, which must have the same names and
        shapes.

        Raises:
            ValueError: a name is missing or unknown, or a shape differs.
        """
        module = copy.deepcopy(self.base)
        if tensors is not None:
            check_tensors(module, tensors)
            module.load_state_dict(dict(tensors))
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self.add_module(_COPY + name, module)
        return module

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter's copy."""
        del self._modules[_COPY + name]
        if self._chosen == name:
            self._chosen = None

    def adapter_parameters(self, name: str) -> tuple[nn.Parameter, ...]:
        """What is trained of an adapter's copy."""
        return tuple(parameter for parameter in self.copy_of(name).parameters() if parameter.is_floating_point())

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Adapters that have a copy."""
        return tuple(name.removeprefix(_COPY) for name in self._modules if name.startswith(_COPY))

    def copy_of(self, name: str | None) -> nn.Module:
        """The copy of an adapter; the module itself for None and for adapters without one."""
        return self._modules.get(f"{_COPY}{name}") or self.base

    def set_active(self, names: str | Mapping[str, float] | None) -> None:
        """Let forward run an adapter's copy, or the module itself."""
        self._chosen = next(iter(as_weights(names)), None)

    def why_inactive(self, weights: Mapping[str, float]) -> str | None:
        """Why copies cannot act with these weights together; None where they can."""
        if len(weights) > 1 or any(weight != 1.0 for weight in weights.values()):
            shown = ", ".join(f"{name!r}: {weight}" for name, weight in weights.items())
            return f"of one of modules_to_save only one adapter's copy can be active, with weight 1; got {{{shown}}}"
        return None

    @property
    def chosen(self) -> nn.Module:
        """The module that forward runs outside of a routing."""
        return self.copy_of(self._chosen)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As of the module."""
        routing = current(self.owner)
        if routing is None:
            return self.chosen(*args, **kwargs)
        held = {name if name in self.adapter_names else None for name in routing.names}
        if len(held) == 1:
            return self.copy_of(held.pop())(*args, **kwargs)
        return self._by_entry(routing, args, kwargs)

    def _by_entry(self, routing: Routing, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run every copy on its entries of the batch, and put the results back in the batch's order."""
        first = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)), None)
        names = routing.names if first is None else routing.of(first).names
        batch, held = len(names), [name if name in self.adapter_names else None for name in names]
        if first is None or first.dim() == 0 or first.shape[0] != batch:
            shape = None if first is None else list(first.shape)
            raise ValueError(f"rows: {batch} names for a module of modules_to_save whose input has shape {shape}")

        def entries(value: Any, index: Tensor) -> Any:
            return value[index] if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch else value

        order, parts = [], []
        for name, index in entries_of(held, first.device):
            part = self.copy_of(name)(
                *(entries(arg, index) for arg in args), **{key: entries(arg, index) for key, arg in kwargs.items()}
            )
            if not isinstance(part, Tensor):
                raise TypeError(f"rows: a module of modules_to_save must return a tensor, got {type(part).__name__}")
            order.append(index)
            parts.append(part)
        if len({part.shape[1:] for part in parts}) > 1:
            shapes = ", ".join(str(list(part.shape[1:])) for part in parts)
            raise ValueError(
                f"rows: the adapters' copies of a module of modules_to_save return different shapes: {shapes}"
            )
        return torch.cat(parts)[torch.cat(order).argsort()]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == _BASE or "_modules" not in self.__dict__:
                raise
            # others look at a head's weight or sizes without calling it
            return getattr(self.chosen, name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(prefix + _COPY)]:
            state_dict[f"{prefix}{_BASE}.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _without_base(module: nn.Module, destination: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """The base's keys as they were before it had copies."""
    inside = f"{prefix}{_BASE}."
    for key in [key for key in destination if key.startswith(inside)]:
        destination[prefix + key.removeprefix(inside)] = destination.pop(key)


def check_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless ``tensors`` can be the module's state."""
    expected = module.state_dict()
    for name in [*expected, *tensors]:
        if name not in tensors:
            raise ValueError(f"{name!a} is missing")
        if name not in expected:
            raise ValueError(f"{name!a} is not a tensor of {type(module).__name__}; it has {', '.join(expected)}")
        if expected[name].shape != tensors[name].shape:
            raise ValueError(
                f"{name!a} has shape {list(tensors[name].shape)}, the model's has {list(expected[name].shape)}"
            )
        given, own = tensors[name].dtype, expected[name].dtype
        if given != own and not (given in FLOAT_DTYPES and own in FLOAT_DTYPES):
            raise ValueError(f"{name!a} is {given}, the model's is {own}")
