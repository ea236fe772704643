"""hotswap: an adapter's values replaced where they are, so that compiled graphs and captured ones stay as they are."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peftrt.adapters.configs.lora import LoraConfig
from peftrt.adapters.lora_state import LoraState
from peftrt.adapters.reading import read_adapter, warn_of_differences
from peftrt.adapters.state import adapter_layers, expect_state, holding, saved_modules, unwrap
from peftrt.formats.errors import FormatError
from peftrt.nn import AdapterLinear


@torch.no_grad()
def hotswap(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    subfolder: str | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """Give a LoRA adapter of the model another one's values, read from a directory.

    The Parameters stay the same objects at the same addresses, with their shapes and scalings: ``torch.compile`` does
    not compile again, a CUDA graph replays with the new values, an optimizer keeps its state. A smaller rank leaves
    rows of A and columns of B zero; where scalings differ, B is multiplied by their ratio (one rounding, none where
    it is a power of two). Everything is read and checked first. Calls that run in other threads meanwhile may see some
    layers of either; :class:`peftrt.serving.AdapterPool` keeps them apart.

    Args:
        model: a model with an adapter of that name.
        path, subfolder, allow_nonfinite: as of :func:`peftrt.load`.
        name: of the adapter that is replaced.

    Raises:
        FormatError (a ValueError): as of :func:`peftrt.load`; also a larger rank, other modules than the adapter has,
            or DoRA in place of LoRA or the other way round.
        ValueError: no such adapter, it is not LoRA or began with a part of the base, or adapters are merged.
    """
    state = expect_state(model, "hotswap")
    state.expect_known([name], "hotswap")
    state.expect_unmerged("hotswap")
    model = unwrap(model)
    config = state.configs[name]
    if not isinstance(config, LoraConfig):
        raise ValueError(f"hotswap: adapter {name!r} ({type(config).__name__}) is not LoRA; use load with replace=True")
    layers = holding(adapter_layers(model, state), name)
    copies = holding(saved_modules(model, state), name)
    for place, layer in layers.items():
        if layer.principal_pair(name) is not None:
            raise ValueError(f"hotswap: adapter {name!r} holds a part of {place}; use load with replace=True")
    found = read_adapter(model, state, path, name, subfolder=subfolder, allow_nonfinite=allow_nonfinite)
    if not isinstance(found.config, LoraConfig) or not isinstance(found.parts, LoraState):
        raise FormatError(f"{found.directory}: {found.config.peft_type} cannot take the place of LoRA")
    _expect_same_places(layers, copies, found.parts, found.directory)
    values = {
        place: _values(layer, name, found.config.scaling_for(place), found.parts, place, found.directory)
        for place, layer in layers.items()
    }
    warn_of_differences(model, found, stacklevel=3)
    for place, layer in layers.items():
        for parameter, value in zip(layer.adapter(name).parameters, values[place], strict=True):
            parameter.copy_(value)
    for place, module in copies.items():
        module.copy_of(name).load_state_dict(found.parts.saved[place])


def _expect_same_places(
    layers: Mapping[str, AdapterLinear], copies: Mapping[str, nn.Module], parts: LoraState, source: str
) -> None:
    for have, come in ((layers, parts.pairs), (copies, parts.saved)):
        for place in sorted(have.keys() ^ come.keys()):
            where = "the file has none" if place in have else "the model's adapter has none"
            raise FormatError(f"{source}: module {place!a}: {where}; use load with replace=True")


def _values(
    layer: AdapterLinear, name: str, scaling: float, parts: LoraState, place: str, source: str
) -> tuple[Tensor, ...]:
    """What the layer's Parameters of the adapter become, in their shapes."""
    adapter = layer.adapter(name)
    lora_A, lora_B = parts.pairs[place]
    magnitude = parts.magnitudes.get(place)
    if (magnitude is None) != (adapter.magnitude is None):
        kinds = ("LoRA", "DoRA") if magnitude is None else ("DoRA", "LoRA")
        raise FormatError(f"{source}: module {place!a}: {kinds[0]} cannot take the place of {kinds[1]}")
    rank = lora_A.shape[0]
    if rank > adapter.r:
        raise FormatError(f"{source}: module {place!a} has rank {rank}, the model's adapter {name!r} has {adapter.r}")
    if scaling and not adapter.scaling:
        raise FormatError(f"{source}: module {place!a} has scaling {scaling}, the model's adapter {name!r} has 0")
    if scaling != adapter.scaling:
        lora_B = lora_B.float() * (scaling / adapter.scaling)
    padded_A = nn.functional.pad(lora_A, (0, 0, 0, adapter.r - rank))
    padded_B = nn.functional.pad(lora_B, (0, adapter.r - rank))
    return (padded_A, padded_B) if magnitude is None else (padded_A, padded_B, magnitude)
