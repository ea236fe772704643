"""What the methods share that change a model's own layers: a file's modules held against the model's."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from peftrt.adapters.configs.targeted import TargetedConfig
from peftrt.adapters.match import matches, unmatched_targets
from peftrt.adapters.plan import Plan, cannot_adapt, expect_module, is_embedding, is_linear, output_head
from peftrt.adapters.state import ModelAdapters
from peftrt.formats.errors import FormatError
from peftrt.formats.nf4 import FLOAT_DTYPES
from peftrt.nn import AdapterLinear, NF4Linear


class WithBases(Protocol):
    """Tensors beside which a file holds some of the adapted modules themselves.

    Attributes:
        bases: path -> tensors of the module by name.
    """

    @property
    def bases(self) -> dict[str, dict[str, Tensor]]: ...


def take_in(plan: Plan, modules: Mapping[str, nn.Module], path: str, state: ModelAdapters, source: str) -> nn.Module:
    """Put a module that a file has tensors for into the plan; FormatError where it cannot hold adapters."""
    module = expect_module(modules, path, source)
    reason = cannot_adapt(module, state)
    if reason is not None:
        raise FormatError(f"{source}: module {path!a} cannot be adapted: {reason}")
    (plan.existing if isinstance(module, AdapterLinear) else plan.new).append(path)
    return module


def expect_every_target(
    model: nn.Module, modules: Mapping[str, nn.Module], config: TargetedConfig, held: Container[str], source: str
) -> None:
    """Raise FormatError where the configuration names a module of the model that the file has no tensors for."""
    head = output_head(model, config)
    for path, module in modules.items():
        named = is_linear(module) or (is_embedding(module) and not config.targets_all_linear)
        if not path or path in held or not named or (config.targets_all_linear and module is head):
            continue
        if matches(path, config):
            raise FormatError(f"{source}: no tensors for {path!a}, which target_modules names: made for another base?")


def expect_float(tensor: Tensor, key: str, source: str) -> None:
    """Raise FormatError unless an adapter can have a tensor's dtype."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise FormatError(f"{source}: key {key!a}: expected float32, bfloat16 or float16, got {tensor.dtype}")


def is_transposed(layers: Iterable[AdapterLinear]) -> bool:
    """Whether a linear layer among them stores its weight as [in, out], which peft's ``fan_in_fan_out`` tells."""
    return any(layer._transposed and not is_embedding(layer) for layer in layers)


def expect_complete(config: TargetedConfig, held: Collection[str], bases: Mapping[str, object], source: str) -> None:
    """Raise FormatError where a file has a module's own tensors and no adapter of it, or none for a target."""
    if strays := sorted(bases.keys() - held):
        raise FormatError(f"{source}: module {strays[0]!a} has tensors of its own, but no adapter")
    if unmatched := unmatched_targets(config, held):
        raise FormatError(f"{source}: no tensor for target_modules entry {', '.join(map(ascii, unmatched[:8]))}")


def other_tensors(model: nn.Module, parts: WithBases, source: str) -> list[str]:
    """peft writes the tensors of adapted embeddings and heads along, and would load them over the model's."""
    told = []
    for path, tensors in parts.bases.items():
        module = model.get_submodule(path)
        if isinstance(module, NF4Linear) or (isinstance(module, AdapterLinear) and not module.is_bare({})):
            continue  # stored in another form
        for name, theirs in tensors.items():
            ours = getattr(module, name, None)
            if not isinstance(ours, Tensor) or not _same(ours.detach(), theirs):
                reason = (
                    f"another {path}.{name} than the model's, which is kept: the adapter was trained over the other"
                )
                told.append(f"{source}: holds {reason}")
    return told


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Equal once both are rounded to the dtype of either."""
    if ours.shape != theirs.shape:
        return False
    theirs = theirs.to(ours.device)
    return torch.equal(ours.to(theirs.dtype), theirs) or torch.equal(ours, theirs.to(ours.dtype))
