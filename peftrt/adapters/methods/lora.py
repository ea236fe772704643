"""LoRA, rsLoRA and DoRA: low-rank changes of linear layers and embeddings."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftrt.adapters.configs.lora import LoraConfig
from peftrt.adapters.explaining import site_choice
from peftrt.adapters.fitting import expect_every_target, is_transposed, other_tensors, take_in
from peftrt.adapters.lora_state import LoraState, validate_lora_tensors
from peftrt.adapters.method import Method
from peftrt.adapters.plan import (
    Plan,
    check_initialisation,
    is_embedding,
    make_plan,
    own_modules,
    sizes,
)
from peftrt.adapters.report import AdaptedSite, dense_note, storage_of
from peftrt.adapters.state import ModelAdapters, adapter_layers, holding
from peftrt.formats.errors import FormatError
from peftrt.formats.peft_dir import CONFIG_NAME, join_key
from peftrt.nn import AdapterLinear, QLoRALinear
from peftrt.nn.initialisation import parse


class LoraMethod(Method[LoraConfig, LoraState]):
    """``y = c * (x W^T + s (drop(x) A^T) B^T) + b``; c is 1, or DoRA's."""

    config_type = LoraConfig
    wraps_layers = True
    changes_weights = True

    def plan(self, model: nn.Module, config: LoraConfig, state: ModelAdapters) -> Plan:
        """As of :class:`Method`."""
        return make_plan(model, config, state)

    def check(self, model: nn.Module, config: LoraConfig, plan: Plan, *, quantize: str | None, fuse: bool) -> None:
        """As of :class:`Method`: whether every module can begin as ``init_lora_weights`` says."""
        check_initialisation(model, config, plan, quantize)
        if fuse and quantize and plan.new and parse(config.init_lora_weights).takes_weight:
            raise ValueError(
                f"adapt: fuse does not go with init_lora_weights={config.init_lora_weights!r} and quantize"
            )

    def before_quantising(
        self, name: str, config: LoraConfig, adapter_dtype: torch.dtype
    ) -> Callable[[str], dict[str, Any]]:
        """As of :class:`Method`: adapters that begin with the weight see it as it was."""
        if not parse(config.init_lora_weights).takes_weight:
            return super().before_quantising(name, config, adapter_dtype)
        return lambda path: {"adapter_name": name, **_options(config, path, adapter_dtype)}

    def attach(
        self,
        model: nn.Module,
        state: ModelAdapters,
        name: str,
        config: LoraConfig,
        plan: Plan,
        adapter_dtype: torch.dtype,
        tensors: LoraState | None,
    ) -> None:
        """As of :class:`Method`."""
        for path in plan.paths:
            layer = model.get_submodule(path)
            assert isinstance(layer, AdapterLinear)
            if name not in layer.adapter_names:  # else it was begun before the weight was quantised
                options = _options(config, path, adapter_dtype)
                if tensors is not None or (options["init"] == "loftq" and not isinstance(layer, QLoRALinear)):
                    # a dense base loses nothing that LoftQ could make up for
                    options["init"] = True
                layer.add_adapter(name, **options)
            if tensors is not None:
                with torch.no_grad():
                    for parameter, value in zip(layer.adapter(name).parameters, tensors.of(path), strict=True):
                        parameter.copy_(value)

    def sort(self, config: LoraConfig, tensors: Mapping[str, Tensor], source: str) -> LoraState:
        """As of :class:`Method`."""
        return validate_lora_tensors(config, tensors, source)

    def fit(self, model: nn.Module, config: LoraConfig, state: ModelAdapters, tensors: LoraState, source: str) -> Plan:
        """As of :class:`Method`."""
        plan, modules = Plan(), dict(own_modules(model))
        for path, (lora_A, lora_B) in tensors.pairs.items():
            module = take_in(plan, modules, path, state, source)
            if is_embedding(module) != (path in tensors.embeddings):
                kind = "an embedding" if path in tensors.embeddings else "a linear layer"
                found = "an embedding" if is_embedding(module) else type(module).__name__
                raise FormatError(f"{source}: module {path!a}: the tensors are of {kind}, the module is {found}")
            n, k = sizes(module)
            if (lora_B.shape[0], lora_A.shape[1]) != (n, k):
                raise FormatError(
                    f"{source}: module {path!a}: lora_A is {list(lora_A.shape)} and lora_B {list(lora_B.shape)}, for "
                    f"a weight of [{lora_B.shape[0]}, {lora_A.shape[1]}]; the model's is [{n}, {k}]"
                )
        expect_every_target(model, modules, config, tensors.pairs, source)
        return plan

    def differences(self, model: nn.Module, config: LoraConfig, tensors: LoraState, source: str) -> list[str]:
        """As of :class:`Method`: another embedding or head, as peft writes them along; LoftQ's base."""
        told = other_tensors(model, tensors, source)
        if config.init_lora_weights == "loftq":
            reason = "it began with LoftQ and belongs to the NF4 base that was made with it: over another it means less"
            told.append(f"{os.path.join(source, CONFIG_NAME)}: {reason}")
        return told

    def contents(self, model: nn.Module, state: ModelAdapters, name: str) -> tuple[LoraConfig, dict[str, Tensor]]:
        """As of :class:`Method`; of one that began with PiSSA the change that it makes to the original weight."""
        config = state.configs[name]
        assert isinstance(config, LoraConfig)
        if config.init_lora_weights == "loftq":
            reason = "it belongs to the NF4 base that was made with it"
            warnings.warn(f"save: adapter {name!r} began with LoftQ: {reason}", UserWarning, stacklevel=3)
        layers = holding(adapter_layers(model, state), name)
        tensors: dict[str, Tensor] = {}
        for path, layer in layers.items():
            for part, half in zip(layer.fields[:2], change_of(layer, name), strict=True):
                tensors[join_key(path, part)] = half
            magnitude = layer.adapter(name).magnitude
            if magnitude is not None:
                tensors[join_key(path, "lora_magnitude_vector")] = magnitude.detach()
        if any(layer.principal_pair(name) for layer in layers.values()):
            config = config.with_doubled_ranks()
        if config.targets_all_linear:
            # what "all-linear" means depends on the reader's version and on the model's class: the modules are named,
            # as by peft
            config = replace(config, target_modules=tuple(sorted(layers)))
        return replace(config, fan_in_fan_out=config.fan_in_fan_out or is_transposed(layers.values())), tensors

    def sites(self, model: nn.Module, state: ModelAdapters, name: str, plan: Plan) -> list[AdaptedSite]:
        """As of :class:`Method`."""
        found = []
        for path in plan.paths:
            layer = model.get_submodule(path)
            assert isinstance(layer, AdapterLinear)
            adapter, storage = layer.adapter(name), storage_of(layer)
            sizes = (layer.in_features, layer.out_features, adapter.r, adapter.scaling)
            found.append(AdaptedSite(path, *sizes, storage, dense_note(plan, state, path), site_choice(layer)))
        return found


def _options(config: LoraConfig, path: str, adapter_dtype: torch.dtype) -> dict[str, Any]:
    """What ``add_adapter`` is told for the module at ``path``."""
    return {
        "r": config.rank_for(path),
        "lora_alpha": config.alpha_for(path),
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "init": config.init_lora_weights,
        "loftq_config": config.loftq_config,
        "adapter_dtype": adapter_dtype,
    }


def change_of(layer: AdapterLinear, name: str) -> tuple[Tensor, Tensor]:
    """A and B of the change that an adapter makes to the layer's original weight."""
    adapter, pair = layer.adapter(name), layer.principal_pair(name)
    if pair is None:
        return adapter.lora_A.detach(), adapter.lora_B.detach()
    # s (B A - B0 A0): the adapter began with a part of the weight, which is no change
    return torch.cat([adapter.lora_A.detach(), pair[0]]), torch.cat([adapter.lora_B.detach(), -pair[1]], dim=1)
