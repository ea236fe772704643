"""HookedAdapters: adapters that act on a module from outside, on what goes in or comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from peftrt.nn.adapter import as_weights
from peftrt.nn.holder import AdapterHolder
from peftrt.nn.routing import AdapterSet, Routing, current

_CHILD = "adapter@"
# torch's dictionaries of a module's hooks, and of what it remembers of each
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OF_HOOKS = (*_HOOKS, "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


class HookedAdapters(AdapterHolder):
    """The adapters of one kind at one module of a model, of which one acts at a time.

    It is a child of the module it acts on, its host, under the name ``kind``; so ``state_dict``, ``.to()``,
    ``deepcopy`` and ``pickle`` take it along, and the host keeps its class and its keys. Hooks are bound methods, which
    a copy of the model has of the copy. An adapter is a child module, ``adapter@fr`` of the one called "fr".

    Args:
        owner: the model's adapters.
    """

    kind: ClassVar[str]

    def __init__(self, owner: AdapterSet) -> None:
        super().__init__()
        self.owner = owner
        self._active: str | None = None

    def hook(self, model: nn.Module, host: nn.Module) -> None:
        """Register hooks, on the host and wherever else in the model something is to be seen."""
        raise NotImplementedError

    @classmethod
    def at(cls, host: nn.Module) -> Self | None:
        """The adapters of this kind that a module has, None where it has none."""
        found = host._modules.get(cls.kind)
        return found if isinstance(found, cls) else None

    def install(self, model: nn.Module, host: nn.Module) -> None:
        """Become a child of the host and hook it."""
        host.add_module(self.kind, self)
        self.train(host.training)
        self.hook(model, host)

    def uninstall(self, model: nn.Module, host: nn.Module) -> None:
        """Leave the host and the model as they were before ``install``."""
        for module in model.modules():
            for name in _HOOKS:
                for number, function in [*getattr(module, name).items()]:
                    if getattr(function, "__self__", None) is self:
                        for of_hooks in _OF_HOOKS:
                            getattr(module, of_hooks).pop(number, None)
        del host._modules[self.kind]

    def add_adapter(self, name: str, adapter: nn.Module) -> None:
        """Hold an adapter, not yet active; its name is new here."""
        adapter.train(self.training)
        self.add_module(_CHILD + name, adapter)

    def adapter(self, name: str) -> Any:
        """The adapter of that name."""
        return self._modules[_CHILD + name]

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Adapters that have a share here, in the order in which they came."""
        return tuple(name.removeprefix(_CHILD) for name in self._modules)

    def adapter_parameters(self, name: str) -> tuple[nn.Parameter, ...]:
        """What is trained of an adapter's share."""
        return tuple(self.adapter(name).parameters())

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter's share."""
        del self._modules[_CHILD + name]
        if self._active == name:
            self._active = None

    def set_active(self, names: str | Mapping[str, float] | None) -> None:
        """Choose the adapter that acts, or none.

        Raises:
            ValueError: several, or another weight than 1.
        """
        weights = as_weights(names)
        reason = self.why_inactive(weights)
        if reason is not None:
            raise ValueError(reason)
        self._active = next(iter(weights), None)

    def why_inactive(self, weights: Mapping[str, float]) -> str | None:
        """Why adapters that are held cannot act with these weights together; None where they can."""
        if len(weights) > 1 or any(weight != 1.0 for weight in weights.values()):
            shown = ", ".join(f"{name!r}: {weight}" for name, weight in weights.items())
            return f"holds a {self.kind} of each: one can be active, with weight 1; got {{{shown}}}"
        return None

    def example(self) -> tuple[Any, ...] | None:
        """The operation that serves one row through an adapter held here, by name, and its arguments; None: torch's."""
        return None

    def note(self) -> str:
        """What there is to say of the adapters here beside what serves them."""
        return ""

    @property
    def active(self) -> str | None:
        """The adapter that acts where no routing is open."""
        return self._active

    def routing(self) -> Routing | None:
        """The routing that this thread's calls run under."""
        return current(self.owner)

    def serving(self, routing: Routing) -> list[str | None]:
        """For each entry of the routing's batch the adapter held here that serves it, or None."""
        held = set(self.adapter_names)
        return [name if name in held else None for name in routing.names]


def entries_of(names: list[str | None], device: torch.device) -> Iterator[tuple[str | None, Tensor]]:
    """Each name once, with the places in a batch that it serves."""
    for name in dict.fromkeys(names):
        yield name, torch.tensor([i for i, other in enumerate(names) if other == name], device=device)


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input that a module was called with, given by place or by name."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def replaced(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A module's output with its tensor, or the first of several, changed."""
    if isinstance(output, Tensor):
        return change(output)
    return (change(output[0]), *output[1:])
