"""Which layers of a model are called with the same input, by name, and their being multiplied in one call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from peftrt.adapters.plan import shared_weights
from peftrt.adapters.state import unwrap
from peftrt.nn import AdapterLinear, QLoRALinear
from peftrt.nn.fused import lay_together, quantize_together, why_apart
from peftrt.nn.source import is_conv1d

# Siblings of these names have one input: attention's, and a gated feed-forward's.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)


def siblings(paths: Sequence[str]) -> list[list[str]]:
    """The groups among ``paths`` of which every name is there, under one parent."""
    there, groups = set(paths), []
    for path in paths:
        parent, _, last = path.rpartition(".")
        for names in SIBLINGS:
            group = [f"{parent}.{name}" if parent else name for name in names]
            if last == names[0] and there.issuperset(group):
                groups.append(group)
    return groups


def fuse(model: nn.Module) -> dict[str, str | None]:
    """Have layers of one input, such as q, k and v, or gate and up, multiplied in one call.

    ``y = c * (x [W_q; W_k; W_v]^T + s (drop(x) [A_q; A_k; A_v]^T) B^T) + b``. Their weights are moved one below the
    other, with the same bits; layers, names, files and results stay what they are, but for dropout: all see the same
    zeros of x. NF4 weights can be moved where they were quantised together (``adapt(..., fuse=True)``). Call it again
    after the model was moved to another device or copied, which takes weights apart; each layer then computes for
    itself.

    Args:
        model: with adapters. Siblings are found by their names in Llama, BERT, T5 and their like.

    Returns:
        For every group, its paths with "+" between: None where it is one call now, else why it is not.
    """
    model = unwrap(model)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, AdapterLinear)}
    groups = siblings(list(layers))
    shared = shared_weights(model, [path for group in groups for path in group])
    found: dict[str, str | None] = {}
    for group in groups:
        reasons = [f"{path}: {shared[path]}" for path in group if path in shared]
        found[" + ".join(group)] = reasons[0] if reasons else lay_together([layers[path] for path in group])
    return found


def quantized_together(model: nn.Module, group: Sequence[str], storage: dict[str, Any]) -> list[Any] | None:
    """For each path of a group what makes a layer of its module, over NF4 weights that lie together; None where their
    sizes do not allow it.
    """
    modules = [model.get_submodule(path) for path in group]
    if any(is_conv1d(module) or not isinstance(module, nn.Linear) for module in modules):
        return None
    if why_apart(modules) is not None:
        return None
    weights = [module.weight.detach() for module in modules if isinstance(module, nn.Linear)]
    parts = quantize_together(weights, storage["block_size"], storage["double_quant"])
    return None if parts is None else [partial(QLoRALinear.from_quantized, weight=part) for part in parts]
