"""The fields of HF peft 0.21's configurations that peftrt's lack: some values change nothing, others are refused."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from peftrt.formats.errors import ConfigError, UnsupportedError

# Field of LoraConfig -> the values at which it has no effect. Anything else is refused.
NEUTRAL_LORA: dict[str, tuple[Any, ...]] = {
    "megatron_config": (None, {}),
    "trainable_token_indices": (None, [], {}),
    "corda_config": (None, {}),
    "lora_ga_config": (None, {}),
    "velora_config": (None, {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "monteclora_config": (None, {}),
    "layer_replication": (None, []),
    "lora_bias": (False, None),
    "target_parameters": (None, []),
    "use_bdlora": (False, None),
    "arrow_config": (None, {}),
    "kasa_config": (None, {}),
    "ensure_weight_tying": (False, None),
}

# Read by nothing once the fields above are neutral, or notes about where the file came from.
WITHOUT_EFFECT = frozenset(
    {"peft_type", "peft_version", "auto_mapping", "megatron_core", "qalora_group_size", "eva_config", "runtime_config"}
)

# Fields by which other libraries have code of the file's author run.
CODE_FIELDS = frozenset({"auto_map", "custom_code", "trust_remote_code", "custom_pipelines"})

# What an unknown field may hold: a later peft writes its new fields at defaults that mean "off".
_OFF: tuple[Any, ...] = (None, False, [], {})


def read_fields(
    values: Mapping[str, Any],
    source: str,
    *,
    kind: str,
    known: Collection[str],
    required: Collection[str] = (),
    neutral: Mapping[str, tuple[Any, ...]] | None = None,
) -> dict[str, Any]:
    """Return the fields of ``values`` that are in ``known``, once nothing else in it would change the result.

    Args:
        values: the object in peft's ``adapter_config.json``.
        source: the file, named in errors.
        kind: the ``peft_type`` that it must have.
        known: names of the fields to return.
        required: fields that must be there.
        neutral: other field of peft's -> the values at which it has no effect.

    Raises:
        ConfigError: ``peft_type`` or a required field is missing.
        UnsupportedError: another ``peft_type``, or a field that is neither known nor at a neutral value.
    """
    expect_kind(values, source, (kind,))
    for name in required:
        if values.get(name) is None:
            raise ConfigError(f"{source}: {name} is missing")
    neutral = neutral or {}
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if name in known:
            fields[name] = value
        elif name in CODE_FIELDS:
            warnings.warn(f"{source}: {name} is ignored: peftrt runs no code that a file names", stacklevel=3)
        elif name not in WITHOUT_EFFECT and not _is_one_of(value, neutral.get(name, _OFF)):
            what = "is not supported" if name in neutral else "is not a field that peftrt knows"
            raise UnsupportedError(f"{source}: {name} = {shown(value)} {what} and may change the result")
    return fields


def expect_kind(values: Any, source: str, kinds: Collection[str]) -> str:
    """The ``peft_type`` of a configuration, which must be one of ``kinds``."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: expected a JSON object, got {type(values).__name__}")
    kind = values.get("peft_type")
    if kind is None:
        raise ConfigError(f"{source}: peft_type is missing: not a configuration of HF peft")
    if kind not in kinds:
        expected = ", ".join(map(repr, kinds))
        raise UnsupportedError(f"{source}: peft_type {kind!a} is not supported, expected {expected}")
    return kind


def _is_one_of(value: Any, accepted: tuple[Any, ...]) -> bool:
    # By type as well: 0 equals False, and is not what a switch that is off looks like.
    return any(type(value) is type(item) and value == item for item in accepted)


def shown(value: Any) -> str:
    """A value in an error, cut where it is long."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
