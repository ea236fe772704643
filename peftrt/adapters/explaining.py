"""explain: which backend serves which site of a model, or one call, and why not the others."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peftrt import ops
from peftrt.adapters.state import unwrap
from peftrt.formats.nf4 import NF4Weight
from peftrt.nn import AdapterLinear, HookedAdapters, LoRAEmbedding, NF4Linear
from peftrt.ops._backend import Choice
from peftrt.ops._define import NAMESPACE, OPS

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


def collapse(path: str) -> str:
    """``model.layers.*.q_proj``: a path without the numbers of its layers."""
    return _INDEX.sub("*", path)


@dataclass(frozen=True)
class SiteChoice:
    """What serves one site.

    Attributes:
        op: the operation: ``lora_linear``, ``ia3_linear``, ``nf4_linear``, ``linear`` (torch's own) for a dense base
            without an active adapter, ``embedding`` (torch's own), with or without, or the kind of what acts from
            outside.
        backend: ``native``, ``triton``, ``reference``, or ``torch``.
        reasons: backend -> why it does not serve the site.
        first: what serves an operation that has to run before: the norms that DoRA divides by.
        layers: how many are multiplied in the call, see :func:`peftrt.fuse`.
        note: what there is to say beside that.
    """

    op: str
    backend: str
    reasons: dict[str, str] = field(default_factory=dict)
    first: SiteChoice | None = None
    layers: int = 1
    note: str = ""

    def __str__(self) -> str:
        against = "".join(f"; not {name}: {reason}" for name, reason in self.reasons.items())
        together = f", {self.layers} layers in one call" if self.layers > 1 else ""
        after = f"; after {self.first}" if self.first else ""
        return f"{self.op} by {self.backend}{together}{against}{after}" + (f": {self.note}" if self.note else "")


@dataclass(frozen=True)
class Explanation:
    """What serves every site of a model.

    Attributes:
        sites: path -> choice.
    """

    sites: dict[str, SiteChoice]

    def __str__(self) -> str:
        groups: dict[tuple[str, str], int] = {}
        for path, choice in self.sites.items():
            key = (collapse(path), str(choice))
            groups[key] = groups.get(key, 0) + 1
        lines = [
            f"{path}{f' ({number}x)' if number > 1 else ''}: {choice}" for (path, choice), number in groups.items()
        ]
        return "\n".join(lines) or "no layers of peftrt"


def explain(target: nn.Module | str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation | SiteChoice:
    """Say which backend serves a model's layers, or one call of an operation, and what speaks against the others.

    ``print(peftrt.explain(model))``, ``print(peftrt.explain("nf4_linear", x, weight))``. Nothing is computed.

    Args:
        target: a module, or an operation of ``peftrt.ops``, itself or by name.
        args, kwargs: the operation's arguments. For a module none: every layer is asked about one row of its base's
            dtype, with the adapters that are active.

    Returns:
        An object with a readable ``str()`` and fields for programs.

    Raises:
        TypeError, ValueError: as the call would raise; another target.
    """
    if isinstance(target, nn.Module):
        if args or kwargs:
            raise TypeError("explain: a module takes no further arguments; for one call, name the operation")
        found = unwrap(target).named_modules()
        kinds = AdapterLinear | NF4Linear | HookedAdapters
        layers = {path: module for path, module in found if isinstance(module, kinds)}
        return Explanation({path: site_choice(layer) for path, layer in layers.items()})
    if isinstance(target, str):
        return _call_choice(target, args, kwargs)
    name = getattr(target, "__name__", "")
    if name in OPS and getattr(ops, name, None) is target:
        return _call_choice(name, args, kwargs)
    raise TypeError(f"explain: expected a module or the name of an operation, got {type(target).__name__}")


def site_choice(layer: nn.Module) -> SiteChoice:
    """What serves one row through the layer, with the adapters that are active."""
    if isinstance(layer, HookedAdapters):
        call = layer.example()
        if call is None:
            return SiteChoice(layer.kind, "torch", note=layer.note())
        return _call_choice(call[0], call[1:], {})
    assert isinstance(layer, AdapterLinear | NF4Linear)
    if isinstance(layer, LoRAEmbedding):
        # a few rows are gathered: there is nothing for a kernel of its own to save
        return SiteChoice("embedding", "torch")
    weight = layer.base_weight()
    dtype = weight.dtype
    x = torch.empty(1, layer.in_features, dtype=dtype, device=weight.device)
    bias = layer.bias if layer.bias is None or layer.bias.dtype == dtype else layer.bias.to(dtype)
    if isinstance(layer, AdapterLinear) and layer.merged is None and not layer.is_bare(layer.active):
        choice = _adapted_choice(layer, x, weight, bias)
        fused = layer.fused is not None and layer.fused.weight() is not None
        return replace(choice, layers=len(layer.fused.layers)) if fused else choice  # type: ignore[union-attr]
    if isinstance(weight, NF4Weight):
        return _call_choice("nf4_linear", (x, weight, bias), {})
    return SiteChoice("linear", "torch")


def _adapted_choice(layer: AdapterLinear, x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None) -> SiteChoice:
    terms = [*layer.terms(layer.active), *layer.principal_terms(layer.active)]
    ia3 = layer.ia3(next(iter(layer.active), ""))
    if ia3 is not None and not terms:
        return _call_choice("ia3_linear", (x, weight, ia3.x_scale, ia3.y_scale, bias), {})
    term = terms[0]
    operands = (weight, term.lora_A, term.lora_B, term.scaling)
    options: dict[str, Any] = {"dropout_p": term.dropout if layer.training else 0.0, "seed": 0}
    if ia3 is not None:
        return _call_choice("lora_linear", (x, *operands, bias), {"row_scale": ia3.y_scale})
    magnitude = layer.adapter(next(iter(layer.active))).magnitude if layer.active else None
    if magnitude is None:
        return _call_choice("lora_linear", (x, *operands, bias), options)
    options["row_scale"] = magnitude
    return replace(
        _call_choice("lora_linear", (x, *operands, bias), options), first=_call_choice("lora_weight_norm", operands, {})
    )


class _Asked(Exception):  # noqa: N818 - it carries an answer
    def __init__(self, choice: Choice) -> None:
        self.choice = choice


class _Ask(TorchDispatchMode):
    """Calls of peftrt's operations end in the choice of their backend."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == NAMESPACE and name in OPS:
            raise _Asked(OPS[name].choice(*args))
        return func(*args, **(kwargs or {}))


def _call_choice(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SiteChoice:
    function = getattr(ops, name, None)
    if name not in OPS or not callable(function):
        there = ", ".join(name for name in sorted(OPS) if hasattr(ops, name))
        raise ValueError(f"explain: no operation is called {name!r}; there are {there}")
    try:
        with torch.no_grad(), _Ask():
            function(*args, **kwargs)
    except _Asked as asked:
        choice = asked.choice
        return SiteChoice(choice.op, choice.backend.name if choice.backend else "none", dict(choice.reasons))
    raise AssertionError(f"explain: {name} called no operation of peftrt")
