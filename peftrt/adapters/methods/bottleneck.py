"""Bottleneck adapters: Houlsby's, Pfeiffer's and parallel ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftrt.adapters.blocks import sub_layers
from peftrt.adapters.configs.bottleneck import BottleneckConfig
from peftrt.adapters.configs.lora import LoraConfig
from peftrt.adapters.explaining import site_choice
from peftrt.adapters.fitting import expect_float
from peftrt.adapters.match import is_excluded, matches, unmatched_targets
from peftrt.adapters.method import Method
from peftrt.adapters.plan import Plan, close_names, expect_module, is_linear, is_under, own_modules, plan_saved
from peftrt.adapters.report import AdaptedSite
from peftrt.adapters.state import ModelAdapters, holders, holding
from peftrt.formats.errors import ConfigError, FormatError, UnsupportedError, named
from peftrt.formats.peft_dir import KEY_PREFIX, split_saved_key
from peftrt.nn import AdapterLinear, NF4Linear
from peftrt.nn.bottleneck import FROM_RESIDUAL, Bottleneck, BottleneckSite, bottleneck_size

# Name in a file -> the Parameter.
_PARAMETERS = {
    "down.weight": "down_weight",
    "down.bias": "down_bias",
    "up.weight": "up_weight",
    "up.bias": "up_bias",
}
_INFIX = ".bottleneck."


class Host(NamedTuple):
    """A module behind which, or beside which, there is a bottleneck.

    Attributes:
        width: K.
        residual, norm: see :class:`BottleneckSite`.
    """

    width: int
    residual: str | None
    norm: str | None


@dataclass(frozen=True, eq=False)
class BottleneckState:
    """An adapter's tensors by module.

    Attributes:
        bottlenecks: path -> Parameter's name -> tensor.
        saved: as of :class:`peftrt.adapters.method.AdapterTensors`.
    """

    bottlenecks: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class BottleneckMethod(Method[BottleneckConfig, BottleneckState]):
    """``h' = h + s (act(u D^T + b_d) U^T + b_u)`` behind or beside sub-layers."""

    config_type = BottleneckConfig

    def plan(self, model: nn.Module, config: BottleneckConfig, state: ModelAdapters) -> Plan:
        """As of :class:`Method`."""
        plan = Plan(saved=plan_saved(model, config))
        hosts = _hosts(model, config).items()
        plan.hosts = {path: host for path, host in hosts if not is_under(path, plan.saved)}
        if not plan.hosts:
            raise ConfigError(f"{config.placement}: every place is excluded, left out, or in modules_to_save")
        return plan

    def attach(
        self,
        model: nn.Module,
        state: ModelAdapters,
        name: str,
        config: BottleneckConfig,
        plan: Plan,
        adapter_dtype: torch.dtype,
        tensors: BottleneckState | None,
    ) -> None:
        """As of :class:`Method`."""
        for path, host in plan.hosts.items():
            size = bottleneck_size(host.width, config.width_over_bottleneck)
            options: dict[str, Any] = {"activation": config.activation, "scaling": config.scaling, "init": config.init}
            device = _device_of(model, path)
            adapter = Bottleneck(host.width, size, **options, device=device, dtype=adapter_dtype)
            if tensors is not None:
                with torch.no_grad():
                    for parameter, value in tensors.bottlenecks[path].items():
                        getattr(adapter, parameter).copy_(value)
            self._site(model, state, path, host).add_bottleneck(name, adapter, config.source)

    def _site(self, model: nn.Module, state: ModelAdapters, path: str, host: Host) -> BottleneckSite:
        module = model.get_submodule(path)
        site = BottleneckSite.at(module)
        if site is None:
            site = BottleneckSite(state, host.residual, host.norm)
            site.install(model, module)
        return site

    def sort(self, config: BottleneckConfig, tensors: Mapping[str, Tensor], source: str) -> BottleneckState:
        """As of :class:`Method`."""
        found = BottleneckState()
        for key, tensor in tensors.items():
            path, infix, name = key.removeprefix(KEY_PREFIX).rpartition(_INFIX)
            if key.startswith(KEY_PREFIX) and infix and path and name in _PARAMETERS:
                expect_float(tensor, key, source)
                found.bottlenecks.setdefault(path, {})[_PARAMETERS[name]] = tensor
                continue
            saved = split_saved_key(key, tuple(config.modules_to_save or ()))
            if saved is None:
                raise FormatError(f"{source}: key {key!a} is neither a bottleneck's nor one of modules_to_save")
            found.saved.setdefault(saved.path, {})[saved.leaf] = tensor
        for path, parts in found.bottlenecks.items():
            for name, parameter in _PARAMETERS.items():
                if parameter not in parts:
                    raise FormatError(f"{source}: module {path!a} has no key {KEY_PREFIX}{path}{_INFIX}{name}")
        if not found.bottlenecks:
            raise FormatError(f"{source}: no key of a bottleneck ({KEY_PREFIX}<module>{_INFIX}down.weight ...)")
        return found

    def fit(
        self, model: nn.Module, config: BottleneckConfig, state: ModelAdapters, tensors: BottleneckState, source: str
    ) -> Plan:
        """As of :class:`Method`."""
        modules = dict(own_modules(model))
        with named(source):
            hosts = _hosts(model, config)
        for path in tensors.bottlenecks:
            expect_module(modules, path, source)
            if path not in hosts:
                raise FormatError(f"{source}: module {path!a} has tensors, but the configuration names no such place")
        for path, host in hosts.items():
            if path not in tensors.bottlenecks:
                raise FormatError(f"{source}: no tensors for {path!a}: made for another base?")
            size = bottleneck_size(host.width, config.width_over_bottleneck)
            wanted = {
                "down_weight": (size, host.width),
                "down_bias": (size,),
                "up_weight": (host.width, size),
                "up_bias": (host.width,),
            }
            for parameter, shape in wanted.items():
                given = tuple(tensors.bottlenecks[path][parameter].shape)
                if given != shape:
                    raise FormatError(
                        f"{source}: module {path!a}: {parameter} is {list(given)}; width {host.width} and "
                        f"reduction_factor {config.reduction_factor:g} make it {list(shape)}"
                    )
        return Plan(hosts=hosts)

    def contents(self, model: nn.Module, state: ModelAdapters, name: str) -> tuple[BottleneckConfig, dict[str, Tensor]]:
        """As of :class:`Method`."""
        config = state.configs[name]
        assert isinstance(config, BottleneckConfig)
        tensors = {}
        for path, site in holding(holders(model, state), name).items():
            if isinstance(site, BottleneckSite):
                for key, parameter in _PARAMETERS.items():
                    # the site's path ends as the infix does
                    tensors[f"{KEY_PREFIX}{path}.{key}"] = getattr(site.adapter(name), parameter).detach()
        return config, tensors

    def sites(self, model: nn.Module, state: ModelAdapters, name: str, plan: Plan) -> list[AdaptedSite]:
        """As of :class:`Method`."""
        found = []
        for path, host in plan.hosts.items():
            site = self._site(model, state, path, host)
            adapter: Bottleneck = site.adapter(name)
            size, scaling = adapter.bottleneck_features, adapter.scaling
            found.append(AdaptedSite(path, host.width, host.width, size, scaling, "", "", site_choice(site)))
        return found


def _hosts(model: nn.Module, config: BottleneckConfig) -> dict[str, Host]:
    return _blocks(model, config) if config.target_modules is None else _named(model, config)


def _blocks(model: nn.Module, config: BottleneckConfig) -> dict[str, Host]:
    """The sub-layers of a model's blocks that get a bottleneck."""
    layers = sub_layers(model)
    if not layers:
        raise UnsupportedError(
            f"{config.placement}: no blocks like Llama's, GPT-2's, BERT's, DistilBERT's, T5's or "
            "nn.TransformerEncoderLayer's are in the model; name the modules with target_modules"
        )
    wanted = [layer for layer in layers if layer.role in config.roles and layer.number not in config.leave_out]
    indices = {layer.number for layer in layers}
    if strange := [index for index in config.leave_out if index not in indices]:
        raise ConfigError(f"leave_out: no block has the index {strange[0]}; there are {_shown(sorted(indices))}")
    matcher = _matcher(config)
    return {
        layer.output: Host(layer.width, layer.residual, layer.norm)
        for layer in wanted
        if not is_excluded(layer.output, matcher)
    }


def _named(model: nn.Module, config: BottleneckConfig) -> dict[str, Host]:
    """The modules that ``target_modules`` names."""
    matcher = _matcher(config)
    found, matched = {}, []
    for path, module in own_modules(model):
        if matches(path, matcher):
            matched.append(path)
            residual = path if config.source == FROM_RESIDUAL else None
            found[_end(path, module)] = Host(_width(path, module), residual, None)
    for name in unmatched_targets(matcher, matched):
        raise ConfigError(f"target_modules: {name!r} matches no module of the model{close_names(name, model)}")
    return found


def _matcher(config: BottleneckConfig) -> LoraConfig:
    whole = config.modules_to_save
    targets = ".*" if config.target_modules is None else config.target_modules
    return LoraConfig(target_modules=targets, exclude_modules=config.exclude_modules, modules_to_save=whole)


def _width(path: str, module: nn.Module) -> int:
    """Features of a module's output: those of its last linear layer."""
    if isinstance(module, AdapterLinear | NF4Linear):
        return module.out_features
    last = next((m for m in reversed([*module.modules()]) if is_linear(m) or isinstance(m, nn.LayerNorm)), None)
    if last is None:
        raise UnsupportedError(f"target_modules: {path} has no linear layer that would tell how wide its output is")
    if isinstance(last, nn.LayerNorm):
        return last.normalized_shape[-1]
    size = getattr(last, "out_features", None)
    if size is None:
        assert isinstance(last.weight, Tensor)
        size = last.weight.shape[1]  # Conv1D
    return int(size)


def _end(path: str, module: nn.Module) -> str:
    """The module itself, or the last one of a Sequential, which would call a child that is none of its own."""
    while isinstance(module, nn.Sequential) and len(module):
        path, module = f"{path}.{len(module) - 1}", module[-1]
    return path


def _device_of(model: nn.Module, path: str) -> torch.device:
    """Where a sub-layer computes: its own Parameters, or those around it."""
    while True:
        parameter = next(model.get_submodule(path).parameters(), None)
        if parameter is not None or not path:
            return torch.device("cpu") if parameter is None else parameter.device
        path = path.rpartition(".")[0]


def _shown(indices: list[int]) -> str:
    return f"{indices[0]} to {indices[-1]}"
