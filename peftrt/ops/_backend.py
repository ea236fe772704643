"""Which backend runs an operation: the user's wish, and each backend's own word on what it cannot do."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

NAMES = ("native", "triton", "reference")
_EVERY_OP = "*"
_NOTHING: Mapping[str, str] = MappingProxyType({})


class BackendError(RuntimeError):
    """A backend was forced that cannot run the call."""


@dataclass(frozen=True)
class Backend:
    """One way to run an operation.

    Attributes:
        name: ``"native"``, ``"triton"`` or ``"reference"``.
        run: the implementation; takes the operation's arguments.
        unsupported: takes the same arguments; returns None, or the reason why ``run`` cannot take them.
        devices: device types that it is offered on by itself. Elsewhere it runs only where it is forced.
        strict: ``run`` itself refuses, before it does anything, every call that it cannot take: it may be tried first,
            and the checks that have better words are made when it has refused.
        slower: takes the same arguments; returns None, or the reason why a backend that is asked after this one is
            expected to be faster, and can take the call. Heeded where nothing is forced.
    """

    name: str
    run: Callable[..., Any]
    unsupported: Callable[..., str | None]
    devices: tuple[str, ...]
    strict: bool = False
    slower: Callable[..., str | None] | None = None

    def declines(self, *args: Any) -> str | None:
        """Why the call is better left to another backend, where none is forced; None where it is not."""
        return None if self.slower is None else self.slower(*args)


@dataclass(frozen=True)
class Choice:
    """The backend that serves a call, None where none can, and the reasons against those asked before it."""

    op: str
    backend: Backend | None
    reasons: Mapping[str, str]

    def __str__(self) -> str:
        against = "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items())
        chosen = self.backend.name if self.backend else "none"
        return f"{self.op}: {chosen}" + (f" (not {against})" if against else "")


_operations: set[str] = set()


def announce(op: str) -> None:
    """Make an operation's name known, so that a backend can be wished for it; a variant follows its operation."""
    _operations.add(op.partition(".")[0])


@functools.lru_cache(maxsize=8)
def _parse(setting: str) -> dict[str, str]:
    """``"reference"`` or ``"nf4_linear=native,lora_linear=reference"``, as the environment variable holds it."""
    wishes = {}
    for part in filter(None, (part.strip() for part in setting.split(","))):
        op, _, name = part.rpartition("=")
        _check_name(name, "PEFTRT_BACKEND")
        if op:
            _check_op(op, "PEFTRT_BACKEND")
        wishes[op or _EVERY_OP] = name
    return wishes


def _check_name(name: str, source: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{source}: backend must be one of {', '.join(NAMES)}, got {name!r}")


def _check_op(op: str, source: str) -> None:
    if op not in _operations:
        raise ValueError(f"{source}: no operation is called {op!r}; there are {', '.join(sorted(_operations))}")


_forced: ContextVar[Mapping[str, str] | None] = ContextVar("peftrt_forced_backend", default=None)


def wishes() -> Mapping[str, str]:
    """The backends forced in this context by operation, with ``"*"`` for all others."""
    here = _forced.get()
    if here is not None:
        return here
    setting = os.environ.get("PEFTRT_BACKEND")
    return _parse(setting) if setting else _NOTHING


@contextmanager
def forced(mapping: Mapping[str, str]) -> Iterator[None]:
    """Set the whole mapping of :func:`wishes`, as a backward does to run like its forward."""
    token = _forced.set(mapping)
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def backend(name: str | None = None, /, **by_op: str) -> Iterator[None]:
    """Force a backend for the operations run inside, in this thread, and for their backward passes.

    ``with peftrt.backend("reference"):`` forces it for all operations, ``with peftrt.backend(nf4_linear="native"):``
    for one. The environment variable ``PEFTRT_BACKEND`` (``reference`` or ``nf4_linear=native,lora_linear=reference``)
    does the same for a process.

    Raises:
        ValueError: an unknown backend or operation. (A forced backend that cannot run a call raises
            :class:`BackendError` when it is called, with the reason of each backend.)
    """
    for op, wish in by_op.items():
        _check_name(wish, f"backend({op}=...)")
        _check_op(op, "backend")
    if name is not None:
        _check_name(name, "backend")
        with forced({_EVERY_OP: name, **by_op}):  # for all: wishes from outside for single operations end here
            yield
    else:
        with forced({**wishes(), **by_op}):
            yield


def choose(op: str, backends: tuple[Backend, ...], device: str, args: tuple[Any, ...]) -> Choice:
    """The first backend that takes the call; where one is forced, that one or none."""
    mapping = wishes()
    # a variant such as nf4_dequantize.out is the same operation
    wish = (mapping.get(op.partition(".")[0]) or mapping.get(_EVERY_OP)) if mapping else None
    reasons: dict[str, str] = {}
    for candidate in backends:
        if wish is None and device not in candidate.devices:
            reasons[candidate.name] = f"runs on {' and '.join(candidate.devices)} tensors unless it is forced"
        elif wish is not None and candidate.name != wish:
            reasons[candidate.name] = f"{wish} is forced"
        else:
            reason = candidate.unsupported(*args)
            if reason is None and wish is None:
                reason = candidate.declines(*args)
            if reason is None:
                return Choice(op, candidate, reasons)
            reasons[candidate.name] = reason
    if wish is not None and wish not in reasons:
        reasons = {wish: "this operation has no such backend", **reasons}
    return Choice(op, None, reasons)
