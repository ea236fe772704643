"""A batch in which every row has its own adapter, or none: what a layer computes under ``peftrt.rows``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftrt import ops
from peftrt.formats.nf4 import NF4Weight
from peftrt.nn.ia3 import IA3Adapter
from peftrt.nn.principal import Term, in_one
from peftrt.nn.routing import Routing

if TYPE_CHECKING:
    from peftrt.nn.adapter_linear import AdapterLinear


def by_row(layer: AdapterLinear, x: Tensor, routing: Routing) -> Tensor:
    """``[batch, ..., K]`` to ``[batch, ..., N]``, each entry of the batch with the adapter that the routing names.

    Raises:
        ValueError: adapters are merged into the base, or the batch has another length than the routing.
    """
    routing = routing.of(x)
    if layer.merged is not None:
        raise ValueError(f"rows: adapters {sorted(layer.merged)} are merged into the base; unmerge first")
    table = routing.table(layer)
    if table is not None:
        return ops.multi_lora_linear(x, layer.base_weight(), table, routing.table_ids(x), layer.bias)
    slots = routing.held(layer.adapter_names)
    slot_ids = routing.slot_ids(slots, x)
    # What the base lacks for the rows of a slot, and what their adapter adds; the last are rows without an adapter.
    lacking = [layer.principal_terms({name: 1.0} if name else {}) for name in (*slots, None)]
    adding = [*(layer.terms({name: 1.0}) for name in slots), []]
    both = [[*terms, *rest] for terms, rest in zip(adding, lacking, strict=True)]
    if lacking[-1]:
        slot_ids = torch.where(slot_ids < 0, len(slots), slot_ids)
    factors: list[Tensor | IA3Adapter | None] = [layer.ia3(name) for name in slots]
    factors = [f or layer.row_scale(name, t) for f, name, t in zip(factors, slots, both, strict=False)]
    factors.append(None)
    dropouts = [max((t.dropout for t in terms), default=0.0) if layer.training else 0.0 for terms in adding]
    if not any(dropouts):
        return _with_terms(layer, x, layer.base_weight(), both, factors, slot_ids)
    whole = _with_terms(layer, x, layer.base_weight(), lacking, factors, slot_ids)
    drop = torch.tensor(dropouts, device=x.device)[slot_ids].view(*x.shape[:-1], 1)
    dropped = torch.where(torch.rand(x.shape, device=x.device) >= drop, x / (1 - drop).to(x.dtype), 0.0)
    # an adapter of IA3 is in the base's share
    others = [None if isinstance(f, IA3Adapter) else f for f in factors]
    return whole + _with_terms(layer, dropped.to(x.dtype), None, adding, others, slot_ids)


def _with_terms(
    layer: AdapterLinear,
    x: Tensor,
    weight: Tensor | NF4Weight | None,
    terms: list[list[Term]],
    factors: Sequence[Tensor | IA3Adapter | None],
    slot_ids: Tensor,
) -> Tensor:
    """The base's share, where a weight is given, and for every row the terms of its slot, times the slot's factors:
    DoRA's c, or those of an IA3 adapter.
    """

    def slot(pair: tuple[Tensor, Tensor, float] | None, factor: Tensor | IA3Adapter | None) -> ops.SlotAdapter:
        if isinstance(factor, IA3Adapter):
            return replace(factor.slot(layer.bias), pairs=(pair,))
        return ops.SlotAdapter((pair,), y_scale=factor)

    def stack() -> ops.AdapterTable:
        pairs = [in_one(entry) if entry else None for entry in terms]
        slots = [slot(pair, factor) for pair, factor in zip(pairs, factors, strict=True)]
        return ops.AdapterTable.stack(slots, splits=(layer.out_features,), k=layer.in_features)

    halves = [half for entry in terms for term in entry for half in (term.lora_A, term.lora_B)]
    tensors = [*halves, *(f.ia3_l if isinstance(f, IA3Adapter) else f for f in factors if f is not None)]
    if not tensors:
        return layer._base(x)
    if layer.training or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        table = stack()
    else:
        settings = tuple(tuple((term.scaling, term.lora_A.shape[0]) for term in entry) for entry in terms)
        kinds = tuple((type(f), getattr(f, "feedforward", None)) for f in factors)
        biases = [] if layer.bias is None else [layer.bias]
        table = layer._tables.get("rows", [*tensors, *biases], (settings, kinds), stack)
    return ops.multi_lora_linear(x, weight, table, slot_ids, None if weight is None else layer.bias)
