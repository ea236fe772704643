"""Method: what adapt, save and load ask of each way of adapting a model."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from peftrt.adapters.configs.base import AdapterConfig
from peftrt.adapters.plan import Plan
from peftrt.adapters.report import AdaptedSite
from peftrt.adapters.state import ModelAdapters
from peftrt.formats.peft_dir import CONFIG_NAME, join_key


class AdapterTensors(Protocol):
    """An adapter's tensors as its method sorts them.

    Attributes:
        saved: path of a module in ``modules_to_save`` -> its parameters and buffers by name.
    """

    @property
    def saved(self) -> dict[str, dict[str, Tensor]]: ...


C = TypeVar("C", bound=AdapterConfig)
T = TypeVar("T", bound=AdapterTensors)


class Method(ABC, Generic[C, T]):
    """One way of adapting models. Everything that changes a model is told a plan, which is checked before.

    Class attributes:
        config_type: the configuration by which ``adapt`` finds the method; ``peft_type`` of it is what a file says.
        wraps_layers: whether ``Plan.paths`` are linear layers or embeddings, in whose place come layers that hold
            adapters; otherwise the method acts from outside, and a plan's ``hosts`` say where.
        changes_weights: whether an adapter is a change of weights, which can be merged into them and exported.
        alone: whether no other adapter can be beside one, because it changes the base itself.
    """

    config_type: ClassVar[type[AdapterConfig]]
    wraps_layers: ClassVar[bool] = False
    changes_weights: ClassVar[bool] = False
    alone: ClassVar[bool] = False

    def complete(self, model: nn.Module, config: C) -> C:
        """The configuration with what the model decides, where it leaves that open."""
        return config

    @abstractmethod
    def plan(self, model: nn.Module, config: C, state: ModelAdapters) -> Plan:
        """Match the configuration with the model.

        Raises:
            ConfigError, UnsupportedError: something named is not there, or cannot be adapted; nothing was changed.
        """

    def check(self, model: nn.Module, config: C, plan: Plan, *, quantize: str | None, fuse: bool) -> None:
        """Raise or warn where the plan cannot be begun as the configuration says; by default it can.

        ``quantize`` and ``fuse`` are as of :func:`peftrt.adapt`.
        """

    def before_quantising(self, name: str, config: C, adapter_dtype: torch.dtype) -> Callable[[str], dict[str, Any]]:
        """What the layer that is quantised at a path is told of the adapter: nothing, unless that needs the weight."""
        return lambda path: {"r": None}

    @abstractmethod
    def attach(
        self,
        model: nn.Module,
        state: ModelAdapters,
        name: str,
        config: C,
        plan: Plan,
        adapter_dtype: torch.dtype,
        tensors: T | None,
    ) -> None:
        """Give every module of the plan its share of a new adapter: with these values, or initial ones.

        Layers that are to hold adapters are in their form by now. Modules of ``modules_to_save`` are not this method's.
        """

    def parse(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> tuple[C, T]:
        """An ``adapter_config.json`` and the tensors beside it, held against each other.

        Raises:
            FormatError: with ``source``, the directory, and the key or field.
        """
        config: Any = self.config_type.from_peft_dict(values, os.path.join(source, CONFIG_NAME))
        return config, self.sort(config, tensors, source)

    @abstractmethod
    def sort(self, config: C, tensors: Mapping[str, Tensor], source: str) -> T:
        """A file's tensors by module, once they are known to fit the configuration.

        Raises:
            FormatError: with ``source``, the directory, and the key.
        """

    @abstractmethod
    def fit(self, model: nn.Module, config: C, state: ModelAdapters, tensors: T, source: str) -> Plan:
        """Where in the model the tensors belong, every shape compared; ``saved`` is not this method's.

        Raises:
            FormatError: with ``source``, the module and both shapes.
        """

    def differences(self, model: nn.Module, config: C, tensors: T, source: str) -> list[str]:
        """What to warn of: the adapter means something else over this model than where it was made."""
        return []

    @abstractmethod
    def contents(self, model: nn.Module, state: ModelAdapters, name: str) -> tuple[C, dict[str, Tensor]]:
        """The configuration to write and the tensors by their keys in a file, without ``modules_to_save``."""

    def saved_key(self, path: str, leaf: str) -> str:
        """The key in a file of a tensor of a module in ``modules_to_save``."""
        return join_key(path, "saved", leaf)

    @abstractmethod
    def sites(self, model: nn.Module, state: ModelAdapters, name: str, plan: Plan) -> list[AdaptedSite]:
        """The modules that hold the adapter, for the report, in any order."""
