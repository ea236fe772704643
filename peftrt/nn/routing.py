"""Which adapter serves which row: the routing that a thread's forward passes run under."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftrt.nn import recompute

if TYPE_CHECKING:
    from peftrt.nn.adapter_linear import AdapterLinear
    from peftrt.ops import AdapterTable


class AdapterSet:
    """What the adapted layers of one model share: the identity that routings name, and the adapters' configurations."""

    def __init__(self) -> None:
        self.configs: dict[str, Any] = {}


class Routing:
    """One adapter, or None, for every entry of a batch.

    Args:
        names: one an entry.
        expand: how often each counts.

    Attributes:
        names: of the adapters, one an entry of the leading dimension, repeats included.
        once: the routing of the batch before its entries are repeated; None where they are not.
    """

    def __init__(self, names: Sequence[str | None], expand: int = 1) -> None:
        self.names = tuple(name for name in names for _ in range(expand))
        self.once = None if expand == 1 else Routing(names)
        # the backward it was made in: a checkpointed region may hold a block of its own
        self.made_in = recompute.backward_number()
        self._per_row: dict[tuple[Any, int, torch.device], Tensor] = {}
        self._per_entry: dict[tuple[Any, int, torch.device], Tensor] = {}

    @property
    def remembered(self) -> recompute.Names:
        """What the backward is told of the block, for layers that checkpointing runs again."""
        return self.names

    def of(self, batch: Tensor) -> Routing:
        """The routing of what a module is given: an encoder sees a batch before it is repeated for the beams."""
        once = self.once
        return self if once is None or not batch.dim() or batch.shape[0] != len(once.names) else once

    def table(self, layer: AdapterLinear) -> AdapterTable | None:
        """The table that serves the layer, with ids as of ``table_ids``; None: the layer's own adapters are stacked."""
        return None

    def table_ids(self, x: Tensor) -> Tensor:
        """int32 [M], the slot of each row of ``x [batch, ..., K]`` in the tables of ``table``; -1: the base.

        Raises:
            ValueError: the leading dimension of x is not the number of names.
        """
        raise NotImplementedError

    def held(self, candidates: Sequence[str]) -> tuple[str, ...]:
        """Those of ``candidates`` that serve an entry of the batch: the slots of a site, in order."""
        wanted = set(self.names)
        return tuple(name for name in candidates if name in wanted)

    def slot_ids(self, slots: tuple[str, ...], x: Tensor) -> Tensor:
        """int32 [M], one id a row of ``x [batch, ..., K]``; -1 where an entry's adapter is None or not among ``slots``.

        Raises:
            ValueError: the leading dimension of x is not the number of names.
        """

        def ids() -> list[int]:
            slot_of = {name: slot for slot, name in enumerate(slots)}
            return [-1 if name is None else slot_of.get(name, -1) for name in self.names]

        return self._ids_per_row(slots, ids, x)

    def expect_batch(self, x: Tensor) -> None:
        """Raise ValueError unless the leading dimension of ``x [batch, ...]`` is the number of names."""
        if x.dim() < 2 or x.shape[0] != len(self.names):
            shape = list(x.shape)
            raise ValueError(
                f"rows: {len(self.names)} names for a batch whose leading dimension is {shape[0]} (input {shape}): "
                "one name an entry is needed (expand=n repeats each for beams)"
            )

    def per_entry(self, values: Mapping[str, int], rest: int, device: torch.device) -> Tensor:
        """int64 [batch], the value of each entry's adapter; ``rest`` where it has none among ``values``."""
        place = (tuple(values.items()), rest, device)
        if place not in self._per_entry:
            numbers = [rest if name is None else values.get(name, rest) for name in self.names]
            self._per_entry[place] = torch.tensor(numbers).to(device)
        return self._per_entry[place]

    def _ids_per_row(self, key: Any, ids: Callable[[], list[int]], x: Tensor) -> Tensor:
        """The entries' ids, once for each row of theirs: one copy to the device for each key and length."""
        self.expect_batch(x)
        repeat = x.shape[1:-1].numel()
        place = (key, repeat, x.device)
        if place not in self._per_row:
            self._per_row[place] = torch.tensor(ids(), dtype=torch.int32).repeat_interleave(repeat).to(x.device)
        return self._per_row[place]


_routings: ContextVar[dict[int, Routing] | None] = ContextVar("peftrt_routings", default=None)
# Routings open in any thread. While there is none, a look-up costs one test, and torch.compile, which cannot trace a
# ContextVar, compiles layers without a graph break.
_open: dict[int, Routing] = {}


def current(owner: AdapterSet) -> Routing | None:
    """The routing that this thread's calls of the owner's layers run under; in a backward, that of their forward."""
    if not torch.compiler.is_compiling() and recompute.backward_number() != -1:
        return _in_backward(owner)
    if not _open:
        return None
    routings = _routings.get()
    return None if routings is None else routings.get(id(owner))


def _in_backward(owner: AdapterSet) -> Routing | None:
    """The routing of a layer that a checkpoint runs again: of a block in the region itself, or around its forward."""
    opened = (_routings.get() or {}).get(id(owner))
    if opened is not None and opened.made_in == recompute.backward_number():
        return opened
    names = recompute.recall(owner)
    if isinstance(names, recompute.ForwardOnly):
        raise RuntimeError(
            "a checkpointed layer runs again in the backward of a pool's batch, whose adapters may be gone: "
            "a pool serves; call the model under torch.no_grad(), or train with peftrt.rows"
        )
    return None if names is None else Routing(names)


def routed(owner: AdapterSet, names: Sequence[str | None], expand: int = 1) -> AbstractContextManager[Routing]:
    """Run the owner's layers with one adapter (or None) an entry of the batch, in this thread, until the block ends."""
    return opened(owner, Routing(names, expand))


@contextmanager
def opened(owner: AdapterSet, routing: Routing) -> Iterator[Routing]:
    """Run the owner's layers under a routing, in this thread, until the block ends."""
    token = _routings.set({**(_routings.get() or {}), id(owner): routing})
    _open[id(routing)] = routing
    span = recompute.begin(owner, routing.remembered)
    try:
        yield routing
    finally:
        recompute.end(span)
        del _open[id(routing)]
        _routings.reset(token)
