"""The one registrar: schema, shape function, backends and gradient of an operation, and the choice among its backends.

Operations are declared through ``torch.library.Library``: a call on a CPU costs a third of what ``custom_op`` does.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftrt.ops import _eager
from peftrt.ops._backend import Backend, BackendError, Choice, announce, choose, forced, wishes
from peftrt.ops._invariant import invariant, set_invariant

NAMESPACE = "peftrt"
DEVICES = {"CPU": "cpu", "CUDA": "cuda"}
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_warned: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Op:
    """An operation's parts, as :func:`define` was given them."""

    name: str
    check: Callable[..., None]
    backends: tuple[Backend, ...]
    registered: Callable[..., Any]
    recorded: type[torch.autograd.Function] | None = None

    def __call__(self, *args: Any) -> Any:
        """Run the operation, past the dispatcher where nothing would listen to it there.

        The dispatcher with its Python kernels, the checks and the choice of a backend take 65 µs a call, a strict
        backend by itself 8: at M = 1 a layer may take no longer than that. Where a gradient is recorded, the dispatcher
        takes 130 µs for the forward alone, an autograd function of our own 50 (torch 2.13, Zen 3, November 2026).
        """
        if not _eager.unobserved(args):
            return self.registered(*args)
        if not _eager.recorded(args):
            return self.eager(*args)
        return self.registered(*args) if self.recorded is None else self.recorded.apply(*args)

    def eager(self, *args: Any) -> Any:
        """The result alone: no gradient, no dispatcher."""
        device = _device_of(args)
        strict = self.strict.get(device)
        if strict is not None and not wishes():
            try:
                if strict.declines(*args) is None:
                    return strict.run(*args)
            except (RuntimeError, AttributeError, ArithmeticError):  # it refused, or its library is not loaded
                pass
        return self.run(device, *args)

    @functools.cached_property
    def strict(self) -> Mapping[str, Backend]:
        """By device, the backend that is asked first there, where it is a strict one."""
        first = {device: next(b for b in self.backends if device in b.devices) for device in DEVICES.values()}
        return {device: backend for device, backend in first.items() if backend.strict}

    def run(self, device: str, *args: Any) -> Any:
        """Check, choose, run: what the dispatcher calls for ``device``."""
        self.check(*args)
        choice = choose(self.name, self.backends, device, args)
        if choice.backend is None:
            raise BackendError(_refusal(choice, args))
        if device == "cuda" and choice.backend.name == "reference" and not wishes():
            _warn_once(choice)
        if torch.is_autocast_enabled(device):
            # Dtypes were settled on the way in; autocast would round the fp32 products inside once more.
            with torch.autocast(device, enabled=False):
                return choice.backend.run(*args)
        return choice.backend.run(*args)

    def choice(self, *args: Any) -> Choice:
        """Which backend would serve this call, without running it; bad arguments raise as in the call."""
        self.check(*args)
        return choose(self.name, self.backends, _device_of(args), args)


OPS: dict[str, Op] = {}


def define(
    schema: str,
    *,
    check: Callable[..., None],
    fake: Callable[..., Any],
    backends: tuple[Backend, ...],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Op:
    """Register an operation as ``torch.ops.peftrt.<name>``.

    Args:
        schema: name, arguments and results in PyTorch's schema language.
        check: takes the arguments; raises TypeError or ValueError. Serves the real and the fake call, so that an error
            shows under ``torch.compile`` as it does in eager mode.
        fake: takes the arguments; returns empty results of the right shape, dtype and device.
        backends: in the order in which they are asked.
        setup_context, backward: as of ``torch.library.register_autograd``; tensors are saved through
            ``ctx.save_for_backward`` only, and ``backward`` is made of registered and torch operations. It runs with
            the backend that was forced around its forward, and as invariant.

    Returns:
        The operation; calling it is ``torch.ops.peftrt.<name>`` with less in between.
    """
    name = schema.partition("(")[0]
    announce(name)
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    packet, _, overload = name.partition(".")
    registered = getattr(getattr(torch.ops.peftrt, packet), overload or "default")
    recorded = None if backward is None else _gradient(name, setup_context, backward)
    op = OPS[name] = Op(name, check, backends, registered, recorded)

    def checked_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    torch.library.register_fake(f"{NAMESPACE}::{name}", checked_fake, lib=_LIBRARY)
    for key, device in DEVICES.items():
        _LIBRARY.impl(name, functools.partial(op.run, device), key)
    return op


def _gradient(
    name: str, setup_context: Callable[..., None] | None, backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """Registers the gradient with the dispatcher; returns the same as a function that passes it by."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.peftrt_wishes, ctx.peftrt_invariant = wishes(), invariant()
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    def run(ctx: Any, *grads: Any) -> Any:
        with forced(ctx.peftrt_wishes), set_invariant(ctx.peftrt_invariant):
            return backward(ctx, *grads)

    def forward(ctx: Any, *args: Any) -> Any:
        output = OPS[name].eager(*args)
        setup(ctx, args, output)
        return output

    torch.library.register_autograd(f"{NAMESPACE}::{name}", run, setup_context=setup, lib=_LIBRARY)
    parts = {"forward": staticmethod(forward), "backward": staticmethod(run)}
    return type(name, (torch.autograd.Function,), parts)


def _device_of(args: tuple[Any, ...]) -> str:
    first = args[0] if isinstance(args[0], Tensor) else next(arg for arg in args if isinstance(arg, Tensor))
    return "cpu" if first.is_cpu else first.device.type


def _refusal(choice: Choice, args: tuple[Any, ...]) -> str:
    inputs = ", ".join(f"{str(a.dtype).removeprefix('torch.')}{list(a.shape)}" for a in args if isinstance(a, Tensor))
    reasons = "".join(f"\n  {name}: {reason}" for name, reason in choice.reasons.items())
    return f"{choice.op}: no backend can run this call ({inputs}):{reasons}"


def _warn_once(choice: Choice) -> None:
    """On a GPU nobody should find out from a profile that the slow path ran."""
    text = str(choice)
    if (choice.op, text) not in _warned:
        _warned.add((choice.op, text))
        warnings.warn(f"peftrt runs a slow path on CUDA: {text}", RuntimeWarning, stacklevel=3)


def always(*_: Any) -> None:
    """``unsupported`` of a backend that takes every call."""


def reference_backend(run: Callable[..., Any]) -> Backend:
    """The plain torch backend: any device, any call that passed the check."""
    return Backend("reference", run, always, ("cpu", "cuda"))
