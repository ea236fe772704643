"""The attention mask of a self-attention that has a prefix: columns for it, left of the model's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftrt.nn.virtual import Served


def expect_form(mask: Any, path: str) -> None:
    """Raise TypeError unless columns can be put in front of a mask."""
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() in (2, 4)):
        shape = f" {list(mask.shape)}" if isinstance(mask, Tensor) else ""
        raise TypeError(
            f"prefix tuning: {path}: the attention mask must be None or a tensor [batch, keys] or [batch, heads, "
            f"queries, keys], got {type(mask).__name__}{shape}; flex_attention is not supported"
        )


def extended(
    mask: Tensor | None, served: Served, module: nn.Module, x: Tensor, cache: Any, is_causal: bool | None
) -> Tensor | None:
    """The mask with the prefix's columns; None where None still means the same.

    Args:
        mask: bool, True where a key is seen; floating, added to the scores; ``[batch, keys]`` with other than 0 where a
            key is seen, as flash attention takes it; or None.
        served: the prefix of each entry.
        module: the self-attention; its ``is_causal``, its ``sliding_window`` and its configuration's
            ``_attn_implementation`` count.
        x: its input ``[batch, S, hidden]``.
        cache: its cache of keys and values, or None.
        is_causal: in place of the module's.

    Raises:
        TypeError: flash attention through a window, which would measure it from what the cache still holds.
    """
    seen = _seen(served, module, x, cache)
    if mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        # flash attention aligns its own causal mask with the last key
        causal = causal and x.shape[1] > 1 and not _flash(module)
        if seen is None and not causal:
            return None
        mask = _made(causal, module, x, cache)
    if mask.dim() == 2:
        columns = mask.new_ones(len(x), served.length) if seen is None else seen[:, 0].expand(len(x), -1).to(mask)
        return torch.cat([columns, mask], dim=1)
    mask = mask.expand(len(x), -1, -1, -1)
    if mask.dtype == torch.bool:
        columns = mask.new_ones(1, 1, served.length) if seen is None else seen
    else:
        columns = mask.new_zeros(1, 1, served.length)
        if seen is not None:
            columns = columns.masked_fill(~seen, torch.finfo(mask.dtype).min)
    return torch.cat([columns[:, None].expand(*mask.shape[:3], -1), mask], dim=3)


def _seen(served: Served, module: nn.Module, x: Tensor, cache: Any) -> Tensor | None:
    """bool ``[1 or batch, 1 or S, length]``, the places of the prefix that are seen; None: all."""
    seen = served.seen()
    if seen is not None:
        seen = seen[:, None]
    window = _window(module)
    if window is None:
        return seen
    if _flash(module):
        raise TypeError("prefix tuning: flash attention through a sliding window is not supported; use sdpa or eager")
    past = 0 if cache is None else cache.get_seq_length(getattr(module, "layer_idx", None) or 0)
    if seen is None and isinstance(past, int) and served.length + past + x.shape[1] <= window:
        return None
    # as if the prefix were the first tokens of the text: a query sees ``window`` places, its own included
    places = torch.arange(served.length, device=x.device)
    queries = torch.arange(x.shape[1], device=x.device)[:, None] + past + served.length
    near = (places > queries - window)[None]
    return near if seen is None else near & seen


def _window(module: nn.Module) -> int | None:
    """How many places a self-attention sees; None: all."""
    config = module.__dict__.get("config")
    window: Any = getattr(module, "sliding_window", None)
    if not hasattr(module, "sliding_window") and getattr(config, "layer_types", None) is None:
        window = getattr(config, "sliding_window", None)
    return window if type(window) is int else None


def _made(causal: bool, module: nn.Module, x: Tensor, cache: Any) -> Tensor:
    """The mask that None stands for, in the form that the module's implementation of attention takes."""
    queries, keys = x.shape[1], _keys(module, x, cache)
    if _flash(module):
        return torch.ones(len(x), keys, dtype=torch.bool, device=x.device)
    # None and several queries that see what is before them: the cache was empty, so the first key is the first query's
    mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=x.device)
    if causal:
        mask = mask.tril()
    if _implementation(module) == "sdpa":
        return mask
    zeros = torch.zeros((), dtype=x.dtype, device=x.device)
    return torch.where(mask, zeros, torch.finfo(x.dtype).min)


def _keys(module: nn.Module, x: Tensor, cache: Any) -> int:
    """How many keys the cache will answer with."""
    if cache is None:
        return x.shape[1]
    layer = getattr(module, "layer_idx", None) or 0
    sizes = getattr(cache, "get_mask_sizes", None)
    keys = cache.get_seq_length(layer) + x.shape[1] if sizes is None else sizes(x.shape[1], layer)[0]
    return int(keys)


def _implementation(module: nn.Module) -> str:
    return str(getattr(getattr(module, "config", None), "_attn_implementation", None))


def _flash(module: nn.Module) -> bool:
    return "flash" in _implementation(module)
