"""Layers of one input, such as q, k and v, or gate and up, whose products are one call."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftrt import ops
from peftrt.formats.nf4 import NESTED_BLOCK_SIZE, NF4Weight
from peftrt.nn.adapter_linear import AdapterLinear
from peftrt.nn.principal import in_one
from peftrt.ops._backend import wishes
from peftrt.ops._eager import unobserved
from peftrt.ops._invariant import invariant

# How often in a row some result may be left behind.
_PATIENCE = 4


class _Results(NamedTuple):
    """What was computed of one x, until each layer has fetched its own."""

    x: weakref.ref[Tensor]
    version: int
    setting: tuple[Any, ...]
    of: dict[int, Tensor]


class Fused:
    """Layers that are called with the same x, one after the other, and whose weights lie one below the other in memory.

    The first that is called with an x multiplies it with all of their weights, and with the adapters of all, in one
    :func:`peftrt.ops.lora_linear`; the others hand out what they then find. Every layer stays one of its own: with its
    names in a state dict, its adapters and files, its hooks. Wherever the layers cannot go together (other adapters,
    rows of several adapters, something merged, ``torch.compile``, inference mode) each computes for itself; with
    dropout all see the same zeros of x. A result that nobody fetches is kept until the next x; where that happens again
    and again, as with layers that see several inputs after all, each computes for itself from then on.

    Args:
        layers: two or more, whose weights :func:`lay_together` has moved.
    """

    def __init__(self, layers: Sequence[AdapterLinear]) -> None:
        self.layers = tuple(layers)
        self._weight: tuple[tuple[Any, ...], Tensor | NF4Weight | None] | None = None
        self._held = threading.local()
        self._wasted = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["layers"])  # type: ignore[misc]

    def result(self, layer: AdapterLinear, x: Tensor) -> Tensor | None:
        """The layer's ``[..., N]`` of x; None where it is to compute for itself."""
        # what changes x between two calls must show: torch counts changes, but not of inference tensors
        if not unobserved((x,)) or x.is_inference() or self._wasted == _PATIENCE:
            return None
        if all(layer is not member for member in self.layers):  # a shallow copy, as a replica on another device is
            return None
        setting = _setting(x)
        held: _Results | None = getattr(self._held, "results", None)
        if held is not None and held.x() is x and held.version == x._version and held.setting == setting:
            found = held.of.pop(id(layer), None)
            if found is not None:
                self._wasted = self._wasted if held.of else 0
                return found
        self._wasted += held is not None and bool(held.of)
        self._held.results = None
        weight = self.weight()
        together = None if weight is None else self._product(x, weight)
        if together is None:
            return None
        # "unsafe" where parts overlap: these may each be changed in place, as a layer's own result may
        sizes = [member.out_features for member in self.layers]
        results = dict(zip(map(id, self.layers), together.unsafe_split_with_sizes(sizes, -1), strict=True))
        mine = results.pop(id(layer))
        self._held.results = _Results(weakref.ref(x), x._version, setting, results)
        return mine

    def weight(self) -> Tensor | NF4Weight | None:
        """All weights as one [N, K], a view; None where they do not lie together (any more)."""
        tensors = [p for layer in self.layers for p in layer.weight_parameters().values()]
        if any(tensor.is_inference() for tensor in tensors):
            return None
        marks = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
        if self._weight is None or self._weight[0] != marks:
            self._weight = marks, _together(self.layers)
        return self._weight[1]

    def _product(self, x: Tensor, weight: Tensor | NF4Weight) -> Tensor | None:
        """What all layers give of x, side by side; None where they do not act alike."""
        first, *others = self.layers
        biases = [layer.bias for layer in self.layers]
        if any(layer.merged is not None for layer in self.layers) or len({bias is None for bias in biases}) > 1:
            return None
        if any((layer.active, layer.training) != (first.active, first.training) for layer in others):
            return None
        if any(layer.ia3(name) is not None for layer in self.layers for name in layer.active):
            return None
        terms = [[*layer.terms(layer.active), *layer.principal_terms(layer.active)] for layer in self.layers]
        dropouts = {term.dropout if first.training else 0.0 for of_layer in terms for term in of_layer}
        if not all(terms) or len(dropouts) != 1:
            return None
        pairs = [in_one(of_layer) for of_layer in terms]
        if len({lora_A.shape[0] for lora_A, _, _ in pairs}) > 1:
            return None
        scales = [layer._row_scale(of_layer) for layer, of_layer in zip(self.layers, terms, strict=True)]
        scaling = pairs[0][2]
        if len({scale is None for scale in scales}) > 1 or not scaling:
            return None
        return ops.lora_linear(
            x,
            weight,
            torch.cat([A for A, _, _ in pairs]),
            torch.cat([B if own == scaling else B * (own / scaling) for _, B, own in pairs]),
            scaling,
            _below(biases),
            dropout_p=dropouts.pop(),
            row_scale=_below(scales),
            splits=[layer.out_features for layer in self.layers],
        )


def _below(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Parts one below the other; None where there is none."""
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def _setting(x: Tensor) -> tuple[Any, ...]:
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return torch.is_grad_enabled(), x.requires_grad, autocast, invariant(), tuple(sorted(wishes().items()))


def _follow(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors that lie one behind the other in one storage, as one along their first dimension."""
    first = tensors[0]
    end = first.storage_offset()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and tensor.is_contiguous() and tensor.storage_offset() == end):
            return None
        end += tensor.numel()
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def _together(layers: Sequence[AdapterLinear]) -> Tensor | NF4Weight | None:
    if why_apart(layers) is not None or _why_stored_apart(layers) is not None:
        return None
    weights = [layer.base_weight() for layer in layers]
    dense = [weight for weight in weights if isinstance(weight, Tensor)]
    if dense:
        return _follow(dense)
    nf4 = [weight for weight in weights if isinstance(weight, NF4Weight)]
    shape = (sum(w.shape[0] for w in nf4), nf4[0].shape[1])
    fields = [field for field in nf4[0].tensors() if field != "nested_offset"]
    found = {field: _follow([w.tensors()[field] for w in nf4]) for field in fields}
    offsets = [w.nested_offset for w in nf4 if w.nested_offset is not None]
    if any(tensor is None for tensor in found.values()) or not all(torch.equal(offsets[0], o) for o in offsets[1:]):
        return None
    stored: dict[str, Any] = found
    return replace(nf4[0], shape=shape, **stored)


def why_apart(layers: Sequence[nn.Module]) -> str | None:
    """Why layers, dense or with adapters, cannot be multiplied in one call whatever is done; None where they can."""
    if len({layer.weight.device for layer in layers}) > 1 or len({layer.weight.dtype for layer in layers}) > 1:
        return "they are of several devices or dtypes"
    if len({layer.in_features for layer in layers}) > 1:
        return "their inputs have several sizes"
    if len({layer.bias is None for layer in layers}) > 1:
        return "some have a bias and some none"
    return None


def _why_stored_apart(layers: Sequence[AdapterLinear]) -> str | None:
    """Why the weights, as they are stored, are not one when they lie one below the other."""
    weights = [layer.base_weight() for layer in layers]
    nf4 = [weight for weight in weights if isinstance(weight, NF4Weight)]
    if 0 < len(nf4) < len(weights) or len({(w.block_size, w.is_nested, w.dtype) for w in nf4}) > 1:
        return "their weights are of several forms"
    if any(math.prod(w.shape) % _unit(w.block_size, w.is_nested) for w in nf4[:-1]):
        return "a weight does not end with a whole block of scales"
    return None


def _unit(block_size: int, nested: bool) -> int:
    """Weights after which the next one has scales of its own."""
    return block_size * (NESTED_BLOCK_SIZE if nested else 1)


@torch.no_grad()
def quantize_together(weights: Sequence[Tensor], block_size: int, double_quant: bool) -> list[NF4Weight] | None:
    """NF4 weights that lie one below the other, quantised as one; None where their rows do not end with blocks.

    A weight's scales are then nested with the others' mean as their offset, in place of its own; each is a weight of
    its own all the same.
    """
    unit = _unit(block_size, double_quant)
    if any(weight.numel() % unit or weight.shape[1] % block_size for weight in weights):
        return None
    whole = NF4Weight.quantize(torch.cat(list(weights)), block_size, double_quant)
    parts, row = [], 0
    for weight in weights:
        end = row + weight.shape[0]
        runs = slice(4 * row * weight.shape[1] // unit, 4 * end * weight.shape[1] // unit)
        nested = None if whole.nested_absmax is None else whole.nested_absmax[runs]
        offset = None if whole.nested_offset is None else whole.nested_offset.clone()  # may be loaded one by one
        part = replace(whole, codes=whole.codes[row:end], absmax=whole.absmax[row:end], shape=tuple(weight.shape))
        parts.append(replace(part, nested_absmax=nested, nested_offset=offset))
        row = end
    return parts


@torch.no_grad()
def lay_together(layers: Sequence[AdapterLinear]) -> str | None:
    """Move the layers' weights one below the other, bits unchanged, and have them multiplied in one call.

    Returns:
        Why they stay apart, None where they do not: sizes that differ; NF4 weights whose scales are nested with several
        offsets, since each was quantised for itself; a weight that another module shares is not looked for.
    """
    reason = why_apart(layers) or _why_stored_apart(layers)
    if reason is not None:
        return reason
    if _together(layers) is None:
        offsets = [layer._parameters.get("weight_nested_offset") for layer in layers]
        if any(o is not None and not torch.equal(o, offsets[0]) for o in offsets):  # type: ignore[arg-type]
            return "they were quantised one by one: adapt with fuse=True quantises them together"
        if any(getattr(layer, "_transposed", False) for layer in layers):
            return "Conv1D stores columns"
        for name in [name for name in layers[0].weight_parameters() if name != "weight_nested_offset"]:
            old = [layer._parameters[name] for layer in layers]
            whole = torch.cat([p.detach() for p in old if p is not None])
            sizes = [p.shape[0] for p in old if p is not None]
            for layer, part in zip(layers, whole.split(sizes), strict=True):
                layer._parameters[name] = nn.Parameter(part, requires_grad=False)
    fused = Fused(layers)
    for layer in layers:
        layer.fused = fused
    return None
