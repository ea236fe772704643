"""Whether a call is plain eager arithmetic, so that the dispatcher would only hand it on to its kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = frozenset({Tensor, torch.nn.Parameter})


def _probes() -> tuple[Callable[[], Any], ...] | None:
    """What says that a mode, a transform or a tracer listens; None where this torch has no such names."""
    try:
        probes = (
            torch._C._len_torch_dispatch_stack,  # FakeTensorMode, FlopCounterMode, make_fx …
            torch._C._functorch.peek_interpreter_stack,  # vmap, grad, jvp of torch.func
            torch._C._get_tracing_state,  # torch.jit.trace
        )
        assert forward_ad._current_level == -1
    except (AttributeError, AssertionError):
        return None
    return probes


_PROBES = _probes()


def unobserved(args: tuple[Any, ...]) -> bool:
    """Nothing traces, transforms or intercepts, and every tensor is a plain one."""
    if torch.compiler.is_compiling() or _PROBES is None:
        return False
    modes, transforms, tracing = _PROBES
    if modes() or transforms() is not None or tracing() is not None or forward_ad._current_level >= 0:
        return False
    return all(type(arg) in _PLAIN for arg in args if isinstance(arg, Tensor))


def recorded(args: tuple[Any, ...]) -> bool:
    """Autograd is to have the call's gradient."""
    return torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
