"""Virtual tokens: trained vectors in front of the real tokens of every entry of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftrt.nn.hooked import HookedAdapters


class Served(NamedTuple):
    """Which adapters put how many virtual tokens in front of a batch.

    Attributes:
        names: of the adapters that serve an entry.
        length: places in front of every entry: the largest number of virtual tokens.
        slots: int64 [batch], the place of each entry's adapter in ``names``, or ``len(names)``; None: the only one of
            ``names`` serves all.
        counts: int64 [batch], virtual tokens of each entry, which take the last of its places; None with ``slots``.
    """

    names: tuple[str, ...]
    length: int
    slots: Tensor | None = None
    counts: Tensor | None = None

    def seen(self) -> Tensor | None:
        """bool [batch, length], the places that virtual tokens take; None: all."""
        if self.counts is None:
            return None
        places = torch.arange(self.length, device=self.counts.device)
        return places >= self.length - self.counts[:, None]

    def gather(self, vectors: Iterable[Tensor], dim: int) -> Tensor:
        """The entries' virtual tokens ``[batch, ...]`` of the adapters', each with its tokens along ``dim``.

        Entries with fewer than ``length`` have zeros in front, which nothing may see.
        """
        padded = []
        for vector in vectors:
            missing = [*vector.shape]
            missing[dim] = self.length - vector.shape[dim]
            padded.append(torch.cat([vector.new_zeros(missing), vector], dim))
        assert self.slots is not None
        return torch.stack([*padded, torch.zeros_like(padded[0])])[self.slots]


class VirtualTokens(HookedAdapters):
    """Adapters that are virtual tokens; each is a module with ``num_virtual_tokens``."""

    def serving_now(self, device: torch.device, batch: Tensor | None = None) -> Served | None:
        """What this thread's call is served with; None where that is nothing.

        Args:
            device: of the tensors in the answer.
            batch: ``[batch, ...]``, where given held against the number of names of ``peftrt.rows``.
        """
        routing = self.routing()
        if routing is None:
            name = self.active
            return None if name is None else Served((name,), self.adapter(name).num_virtual_tokens)
        if batch is not None:
            routing = routing.of(batch)
            routing.expect_batch(batch)
        names = routing.held(self.adapter_names)
        if not names:
            return None
        counts = {name: self.adapter(name).num_virtual_tokens for name in names}
        if set(routing.names) == set(names) and len(names) == 1:
            return Served(names, counts[names[0]])
        slots = routing.per_entry({name: slot for slot, name in enumerate(names)}, len(names), device)
        return Served(names, max(counts.values()), slots, routing.per_entry(counts, 0, device))


class Arguments:
    """The arguments of a call, by place or by name, under the names that the called module's forward gives them."""

    def __init__(self, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.names = names
        self.args = [*args]
        self.kwargs = dict(kwargs)

    def get(self, name: str) -> Any:
        """An argument; None where it was not given."""
        if name in self.kwargs:
            return self.kwargs[name]
        place = self.names.index(name) if name in self.names else len(self.args)
        return self.args[place] if place < len(self.args) else None

    def set(self, name: str, value: Any) -> None:
        """Change an argument, or give it."""
        place = self.names.index(name) if name in self.names else len(self.args)
        if name not in self.kwargs and place < len(self.args):
            self.args[place] = value
        else:
            self.kwargs[name] = value

    @property
    def both(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a forward pre-hook returns."""
        return tuple(self.args), self.kwargs


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, in their order; of those that may be given by place."""
    parameters = inspect.signature(module.forward).parameters.values()
    return tuple(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)
