"""The conventional ways to fine-tune: the output head alone, the head over kept features, and everything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from peftrt.adapters.configs.conventional import FeatureExtraction, FullFineTuning, OutputLayer
from peftrt.adapters.method import Method
from peftrt.adapters.plan import HEADS, Plan, close_names, is_under, output_head, own_modules, plan_saved
from peftrt.adapters.report import AdaptedSite
from peftrt.adapters.state import ModelAdapters, holding, saved_modules
from peftrt.formats.errors import ConfigError, FormatError, UnsupportedError, named
from peftrt.formats.peft_dir import split_key
from peftrt.formats.sizes import expect_bytes
from peftrt.nn import Features, HookedAdapters, NF4Linear, WholeModel
from peftrt.nn.features import Share

H = TypeVar("H", bound=OutputLayer)


@dataclass(frozen=True, eq=False)
class HeadTensors:
    """The tensors of trained modules.

    Attributes:
        saved: path of a module -> its parameters and buffers by name.
    """

    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class _Heads(Method[H, HeadTensors]):
    """Copies of whole modules, which ``modules_to_save`` makes, saves and loads; this finds them."""

    changes_weights = True

    def complete(self, model: nn.Module, config: H) -> H:
        """As of :class:`Method`: the head's name where none was given."""
        if config.modules_to_save:
            return config
        return replace(config, modules_to_save=(_find_head(model, config),))

    def plan(self, model: nn.Module, config: H, state: ModelAdapters) -> Plan:
        """As of :class:`Method`."""
        return Plan(saved=plan_saved(model, config))

    def attach(
        self,
        model: nn.Module,
        state: ModelAdapters,
        name: str,
        config: H,
        plan: Plan,
        adapter_dtype: torch.dtype,
        tensors: HeadTensors | None,
    ) -> None:
        """As of :class:`Method`: all that there is are modules of ``modules_to_save``."""

    def sort(self, config: H, tensors: Mapping[str, Tensor], source: str) -> HeadTensors:
        """As of :class:`Method`."""
        names = config.modules_to_save or ()
        found = HeadTensors()
        for key, tensor in tensors.items():
            with named(source):
                path, part, leaf = split_key(key, names)
            if part != "saved":
                raise FormatError(f"{source}: key {key!a} is of an adapter, the configuration is {config.peft_type}")
            found.saved.setdefault(path, {})[leaf] = tensor
        for name in names:
            if not any(path.endswith(name) for path in found.saved):
                raise FormatError(f"{source}: no tensor for modules_to_save entry {name!a}")
        return found

    def fit(self, model: nn.Module, config: H, state: ModelAdapters, tensors: HeadTensors, source: str) -> Plan:
        """As of :class:`Method`."""
        return Plan()

    def contents(self, model: nn.Module, state: ModelAdapters, name: str) -> tuple[H, dict[str, Tensor]]:
        """As of :class:`Method`: the paths by which they are found again, and nothing beside them."""
        config: Any = state.configs[name]
        paths = tuple(holding(saved_modules(model, state), name))
        return replace(config, modules=paths, modules_to_save=paths), {}

    def sites(self, model: nn.Module, state: ModelAdapters, name: str, plan: Plan) -> list[AdaptedSite]:
        """As of :class:`Method`: none, for what is trained whole is told apart."""
        return []


class OutputLayerMethod(_Heads[OutputLayer]):
    """The output head alone."""

    config_type = OutputLayer


class FeatureExtractionMethod(_Heads[FeatureExtraction]):
    """The output head alone, over features of the body that are kept."""

    config_type = FeatureExtraction

    def plan(self, model: nn.Module, config: FeatureExtraction, state: ModelAdapters) -> Plan:
        """As of :class:`Method`."""
        plan = super().plan(model, config, state)
        plan.hosts = dict.fromkeys(_bodies(model, plan.saved))
        for path in plan.hosts:
            host = model.get_submodule(path)
            if "forward" in host.__dict__ and Features.at(host) is None:
                raise UnsupportedError(f"{path}: the forward of this {type(host).__name__} was replaced already")
        return plan

    def fit(
        self, model: nn.Module, config: FeatureExtraction, state: ModelAdapters, tensors: HeadTensors, source: str
    ) -> Plan:
        """As of :class:`Method`."""
        there = dict(own_modules(model))
        # heads that the model lacks are told by who compares shapes
        return Plan(hosts=dict.fromkeys(_bodies(model, [path for path in tensors.saved if path in there])))

    def attach(
        self,
        model: nn.Module,
        state: ModelAdapters,
        name: str,
        config: FeatureExtraction,
        plan: Plan,
        adapter_dtype: torch.dtype,
        tensors: HeadTensors | None,
    ) -> None:
        """As of :class:`Method`: what is kept is shared out among the parts of the body."""
        most = expect_bytes(config.max_bytes, "max_bytes") // max(1, len(plan.hosts))
        for path in plan.hosts:
            host = model.get_submodule(path)
            features = Features.at(host)
            if features is None:
                features = Features(state)
                features.install(model, host)
            features.add_adapter(name, Share(most, config.device))


class FullFineTuningMethod(Method[FullFineTuning, HeadTensors]):
    """All of the model's Parameters, in their place."""

    config_type = FullFineTuning
    changes_weights = True
    alone = True

    def plan(self, model: nn.Module, config: FullFineTuning, state: ModelAdapters) -> Plan:
        """As of :class:`Method`."""
        for path, module in model.named_modules():
            if isinstance(module, NF4Linear):
                raise UnsupportedError(f"full fine-tuning: {path} is NF4, whose sixteen levels cannot be trained")
        return Plan(hosts={"": None})

    def check(self, model: nn.Module, config: FullFineTuning, plan: Plan, *, quantize: str | None, fuse: bool) -> None:
        """As of :class:`Method`."""
        if quantize is not None:
            raise UnsupportedError(f"quantize={quantize!r}: full fine-tuning trains every weight: leave it away")

    def attach(
        self,
        model: nn.Module,
        state: ModelAdapters,
        name: str,
        config: FullFineTuning,
        plan: Plan,
        adapter_dtype: torch.dtype,
        tensors: HeadTensors | None,
    ) -> None:
        """As of :class:`Method`."""
        whole = WholeModel(state)
        whole.install(model, model)
        whole.add_adapter(name, nn.Module())

    def parse(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> NoReturn:
        """As of :class:`Method`: there is no such file."""
        raise UnsupportedError(f"{source}: a model that was trained whole is no adapter: load it as a model")

    def fit(
        self, model: nn.Module, config: FullFineTuning, state: ModelAdapters, tensors: HeadTensors, source: str
    ) -> NoReturn:
        """As of :class:`Method`; ``parse`` has refused."""
        raise AssertionError(source)

    def sort(self, config: FullFineTuning, tensors: Mapping[str, Tensor], source: str) -> NoReturn:
        """As of :class:`Method`; ``parse`` has refused."""
        raise AssertionError(source)

    def contents(self, model: nn.Module, state: ModelAdapters, name: str) -> NoReturn:
        """As of :class:`Method`: what was trained is the model itself."""
        raise UnsupportedError(
            f"save: adapter {name!r} is full fine-tuning: what was trained is the model itself; write it with "
            "peftrt.export(model, path, dtype=...), which transformers loads"
        )

    def sites(self, model: nn.Module, state: ModelAdapters, name: str, plan: Plan) -> list[AdaptedSite]:
        """As of :class:`Method`: all of them, which needs no table."""
        return []


def _find_head(model: nn.Module, config: OutputLayer) -> str:
    """The path of the model's output head, found as the heads of tasks are."""
    paths = dict(own_modules(model))
    for names in HEADS.values():
        for name in names:
            if name in paths:
                return name
    head = output_head(model, config)
    for path, module in paths.items():
        if module is head:
            return path
    raise ConfigError(f"modules: the model has no head that could be found; name it{close_names('classifier', model)}")


def _bodies(model: nn.Module, heads: Sequence[str]) -> list[str]:
    """The outermost modules with Parameters that hold none of the heads: all that a head reads is computed by them."""

    def below(parent: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in parent.named_children():
            path = f"{prefix}{name}"
            if path in heads or isinstance(child, HookedAdapters):
                continue
            holds_head = any(is_under(head, [path]) for head in heads)
            if holds_head or isinstance(child, nn.ModuleList | nn.ModuleDict):
                yield from below(child, f"{path}.")
            elif next(child.parameters(), None) is not None:
                yield path

    found = list(below(model, ""))
    if not found:
        raise ConfigError(f"modules: {', '.join(heads)}: there is nothing before them whose output could be kept")
    return found
