"""Which adapter serves which row: the routing that a thread's forward passes run under."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from peftrt.nn import recompute


class AdapterSet:
    """What the adapted layers of one model share: the identity that routings name, and the adapters' configurations."""

    def __init__(self) -> None:
        self.configs: dict[str, Any] = {}


class Routing:
    """One adapter, or None, for every entry of a batch.

    Attributes:
        names: of the adapters, one an entry of the leading dimension, repeats included.
    """

    def __init__(self, names: Sequence[str | None], expand: int = 1) -> None:
        self.names = tuple(name for name in names for _ in range(expand))
        # the backward it was made in: a checkpointed region may hold a block of its own
        self.made_in = recompute.backward_number()
        self._slot_ids: dict[tuple[tuple[str, ...], int, torch.device], Tensor] = {}

    def held(self, candidates: Sequence[str]) -> tuple[str, ...]:
        """Those of ``candidates`` that serve an entry of the batch: the slots of a site, in order."""
        wanted = set(self.names)
        return tuple(name for name in candidates if name in wanted)

    def slot_ids(self, slots: tuple[str, ...], x: Tensor) -> Tensor:
        """int32 [M], one id a row of ``x [batch, ..., K]``; -1 where an entry's adapter is None or not among ``slots``.

        Raises:
            ValueError: the leading dimension of x is not the number of names.
        """
        if x.dim() < 2 or x.shape[0] != len(self.names):
            shape = list(x.shape)
            raise ValueError(
                f"rows: {len(self.names)} names for a batch whose leading dimension is {shape[0]} (input {shape}): "
                "one name an entry is needed (expand=n repeats each for beams)"
            )
        repeat = x.shape[1:-1].numel()
        key = (slots, repeat, x.device)
        if key not in self._slot_ids:
            slot_of = {name: slot for slot, name in enumerate(slots)}
            ids = [-1 if name is None else slot_of.get(name, -1) for name in self.names]
            self._slot_ids[key] = torch.tensor(ids, dtype=torch.int32).repeat_interleave(repeat).to(x.device)
        return self._slot_ids[key]


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
    return None if names is None else Routing(names)


@contextmanager
def routed(owner: AdapterSet, names: Sequence[str | None], expand: int = 1) -> Iterator[Routing]:
    """Run the owner's layers with one adapter (or None) an entry of the batch, in this thread, until the block ends."""
    routing = Routing(names, expand)
    token = _routings.set({**(_routings.get() or {}), id(owner): routing})
    _open[id(routing)] = routing
    span = recompute.begin(owner, routing.names)
    try:
        yield routing
    finally:
        recompute.end(span)
        del _open[id(routing)]
        _routings.reset(token)
