"""A batch in which every row has its own adapter, or none: what a layer computes under ``peftrt.rows``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftrt import ops
from peftrt.formats.nf4 import NF4Weight
from peftrt.nn.adapter import expect_rows_can_mix
from peftrt.nn.principal import Term, in_one
from peftrt.nn.routing import Routing

if TYPE_CHECKING:
    from peftrt.nn.adapter_linear import AdapterLinear


def by_row(layer: AdapterLinear, x: Tensor, routing: Routing) -> Tensor:
    """``[batch, ..., K]`` to ``[batch, ..., N]``, each entry of the batch with the adapter that the routing names.

    Raises:
        ValueError: adapters are merged into the base, one is DoRA's, or the batch has another length than the routing.
    """
    if layer.merged is not None:
        raise ValueError(f"rows: adapters {sorted(layer.merged)} are merged into the base; unmerge first")
    slots = routing.held(layer.adapter_names)
    slot_ids = routing.slot_ids(slots, x)
    adapters = [layer.adapter(name) for name in slots]
    expect_rows_can_mix({name: a.magnitude is not None for name, a in zip(slots, adapters, strict=True)})
    dropouts = [adapter.lora_dropout if layer.training else 0.0 for adapter in adapters]
    # What the base lacks for the rows of a slot, and what their adapter adds; the last are rows without an adapter,
    # which id -1 finds.
    lacking = [layer.principal_terms({name: 1.0} if name else {}) for name in (*slots, None)]
    adding = [*(layer.terms({name: 1.0}) for name in slots), []]
    if not any(dropouts):
        both = [[*terms, *rest] for terms, rest in zip(adding, lacking, strict=True)]
        return _with_terms(layer, x, layer.base_weight(), both, slot_ids)
    whole = _with_terms(layer, x, layer.base_weight(), lacking, slot_ids)
    drop = torch.tensor([*dropouts, 0.0], device=x.device)[slot_ids].view(*x.shape[:-1], 1)
    dropped = torch.where(torch.rand(x.shape, device=x.device) >= drop, x / (1 - drop).to(x.dtype), 0.0)
    return whole + _with_terms(layer, dropped.to(x.dtype), None, adding, slot_ids)


def _with_terms(
    layer: AdapterLinear, x: Tensor, weight: Tensor | NF4Weight | None, terms: list[list[Term]], slot_ids: Tensor
) -> Tensor:
    """The base's share, where a weight is given, and for every row the terms of its slot."""
    filled = [slot for slot, entry in enumerate(terms) if entry]
    if not filled:
        return layer._base(x)
    table = ops.AdapterTable.stack([in_one(terms[slot]) for slot in filled])
    if filled != list(range(len(terms) - 1)):
        place = {slot: i for i, slot in enumerate(filled)}
        places = torch.tensor([place.get(slot, -1) for slot in range(len(terms))], dtype=torch.int32)
        slot_ids = places.to(x.device)[slot_ids]
    return ops.multi_lora_linear(x, weight, table, slot_ids, None if weight is None else layer.bias)
