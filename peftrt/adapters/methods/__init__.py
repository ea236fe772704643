"""The ways of adapting a model, each in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftrt.adapters.configs.base import AdapterConfig
from peftrt.adapters.configs.peft_fields import expect_kind
from peftrt.adapters.method import Method
from peftrt.adapters.methods.bottleneck import BottleneckMethod
from peftrt.adapters.methods.conventional import FeatureExtractionMethod, FullFineTuningMethod, OutputLayerMethod
from peftrt.adapters.methods.ia3 import IA3Method
from peftrt.adapters.methods.lora import LoraMethod
from peftrt.adapters.methods.prefix import PrefixMethod
from peftrt.adapters.methods.prompt import PromptMethod

METHODS: tuple[Method[Any, Any], ...] = (
    LoraMethod(),
    BottleneckMethod(),
    PrefixMethod(),
    PromptMethod(),
    IA3Method(),
    OutputLayerMethod(),
    FeatureExtractionMethod(),
    FullFineTuningMethod(),
)


def method_of(config: AdapterConfig) -> Method[Any, Any]:
    """The method that a configuration is of.

    Raises:
        TypeError: it is of none.
    """
    for method in METHODS:
        if type(config) is method.config_type:
            return method
    known = ", ".join(f"peftrt.{method.config_type.__name__}" for method in METHODS)
    raise TypeError(f"config must be one of {known}, got {type(config).__name__}")


def expect_room(existing: Mapping[str, AdapterConfig], method: Method[Any, Any], where: str) -> None:
    """Raise ValueError where an adapter of ``method`` cannot be beside those that there are."""
    for name, config in existing.items():
        if method.alone or method_of(config).alone:
            whole = "the new one" if method.alone else f"adapter {name!r}"
            raise ValueError(
                f"{where}: {whole} is full fine-tuning, which changes the base that other adapters stand on: call "
                f"peftrt.remove(model, {name!r}) first"
            )


def method_of_file(values: Mapping[str, Any], source: str) -> Method[Any, Any]:
    """The method that an ``adapter_config.json`` is of.

    Raises:
        ConfigError, UnsupportedError: ``peft_type`` is missing or of none.
    """
    by_type = {method.config_type.peft_type: method for method in METHODS}
    return by_type[expect_kind(values, source, by_type)]
