"""IA3: learned factors of what linear layers give, or are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from peftrt.adapters.configs.ia3 import IA3Config
from peftrt.adapters.explaining import site_choice
from peftrt.adapters.fitting import expect_every_target, is_transposed, other_tensors, take_in
from peftrt.adapters.ia3_state import IA3State, validate_ia3_tensors
from peftrt.adapters.method import Method
from peftrt.adapters.plan import Plan, close_names, is_embedding, make_plan, own_modules, sizes
from peftrt.adapters.report import AdaptedSite, dense_note, storage_of
from peftrt.adapters.state import ModelAdapters, adapter_layers, holding
from peftrt.formats.errors import ConfigError, FormatError, UnsupportedError
from peftrt.formats.peft_dir import join_key
from peftrt.nn import AdapterLinear
from peftrt.nn.lora_embedding import NO_IA3


class IA3Method(Method[IA3Config, IA3State]):
    """``y = c * (x W^T + b)``, or ``y = (u * x) W^T + b`` of a feed-forward module."""

    config_type = IA3Config
    wraps_layers = True
    changes_weights = True

    def plan(self, model: nn.Module, config: IA3Config, state: ModelAdapters) -> Plan:
        """As of :class:`Method`."""
        plan = make_plan(model, config, state)
        for path in plan.paths:
            if is_embedding(model.get_submodule(path)):
                raise UnsupportedError(f"target_modules: {path}: {NO_IA3}")
        inner = config.feedforward_modules
        for name in (inner,) if isinstance(inner, str) else inner or ():
            alone = replace(config, feedforward_modules=name if isinstance(inner, str) else (name,))
            if not any(alone.is_feedforward(path) for path in plan.paths):
                close = close_names(name, model)
                raise ConfigError(f"feedforward_modules: {name!r} matches no module that is adapted{close}")
        return plan

    def attach(
        self,
        model: nn.Module,
        state: ModelAdapters,
        name: str,
        config: IA3Config,
        plan: Plan,
        adapter_dtype: torch.dtype,
        tensors: IA3State | None,
    ) -> None:
        """As of :class:`Method`."""
        for path in plan.paths:
            layer = model.get_submodule(path)
            assert isinstance(layer, AdapterLinear)
            init = config.init_ia3_weights or tensors is not None
            adapter = layer.add_ia3(
                name, feedforward=config.is_feedforward(path), init=init, adapter_dtype=adapter_dtype
            )
            if tensors is not None:
                with torch.no_grad():
                    adapter.ia3_l.copy_(tensors.factors[path])

    def sort(self, config: IA3Config, tensors: Mapping[str, Tensor], source: str) -> IA3State:
        """As of :class:`Method`."""
        return validate_ia3_tensors(config, tensors, source)

    def fit(self, model: nn.Module, config: IA3Config, state: ModelAdapters, tensors: IA3State, source: str) -> Plan:
        """As of :class:`Method`."""
        plan, modules = Plan(), dict(own_modules(model))
        for path, factors in tensors.factors.items():
            module = take_in(plan, modules, path, state, source)
            if is_embedding(module):
                raise FormatError(f"{source}: module {path!a}: {NO_IA3}")
            n, k = sizes(module)
            expected = [1, k] if config.is_feedforward(path) else [n, 1]
            if list(factors.shape) != expected:
                raise FormatError(
                    f"{source}: module {path!a}: ia3_l is {list(factors.shape)}, the model's weight of [{n}, {k}] "
                    f"needs {expected}"
                )
        expect_every_target(model, modules, config, tensors.factors, source)
        return plan

    def differences(self, model: nn.Module, config: IA3Config, tensors: IA3State, source: str) -> list[str]:
        """As of :class:`Method`: another head, as peft writes it along."""
        return other_tensors(model, tensors, source)

    def contents(self, model: nn.Module, state: ModelAdapters, name: str) -> tuple[IA3Config, dict[str, Tensor]]:
        """As of :class:`Method`."""
        config = state.configs[name]
        assert isinstance(config, IA3Config)
        layers = holding(adapter_layers(model, state), name)
        tensors: dict[str, Tensor] = {}
        for path, layer in layers.items():
            adapter = layer.ia3(name)
            assert adapter is not None
            tensors[join_key(path, "ia3_l")] = adapter.ia3_l.detach()
        if config.targets_all_linear or not _named_alike(config):
            # what "all-linear" means depends on the reader's version and on the model's class; and peft wants the
            # feed-forward modules among the targets by the same names
            inner = tuple(path for path in sorted(layers) if config.is_feedforward(path))
            config = replace(config, target_modules=tuple(sorted(layers)), feedforward_modules=inner)
        return replace(config, fan_in_fan_out=config.fan_in_fan_out or is_transposed(layers.values())), tensors

    def sites(self, model: nn.Module, state: ModelAdapters, name: str, plan: Plan) -> list[AdaptedSite]:
        """As of :class:`Method`."""
        found = []
        for path in plan.paths:
            layer = model.get_submodule(path)
            assert isinstance(layer, AdapterLinear)
            sizes, note = (layer.in_features, layer.out_features), dense_note(plan, state, path)
            found.append(AdaptedSite(path, *sizes, None, None, storage_of(layer), note, site_choice(layer)))
        return found


def _named_alike(config: IA3Config) -> bool:
    """Whether peft would take the configuration's two lists of modules; a regular expression it does not compare."""
    targets, inner = config.target_modules, config.feedforward_modules
    return isinstance(targets, str) or isinstance(inner, str) or set(inner or ()) <= set(targets or ())
