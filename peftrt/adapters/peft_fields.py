"""The fields of HF peft 0.21's LoraConfig that peftrt's has not: which values change nothing; others are refused."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from peftrt.formats.errors import ConfigError, UnsupportedError

# Field -> the values at which it has no effect. Anything else is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
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

# Ways to draw the initial A and B that leave the base as it is: the tensors of the file replace what they drew.
_INIT_WITHOUT_EFFECT = ("eva", "mica")

# What an unknown field may hold: a later peft writes its new fields at defaults that mean "off".
_OFF: tuple[Any, ...] = (None, False, [], {})

_REQUIRED = ("r", "target_modules")


def read_fields(values: Mapping[str, Any], source: str, known: frozenset[str]) -> dict[str, Any]:
    """Return the fields of ``values`` that are in ``known``, once nothing else in it would change the result.

    Args:
        values: the object in peft's ``adapter_config.json``.
        source: the file, named in errors.
        known: names of the fields to return.

    Raises:
        ConfigError: ``peft_type``, ``r`` or ``target_modules`` is missing.
        UnsupportedError: another ``peft_type``, or a field that is neither known nor at a neutral value.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: expected a JSON object, got {type(values).__name__}")
    kind = values.get("peft_type")
    if kind is None:
        raise ConfigError(f"{source}: peft_type is missing: not a configuration of HF peft")
    if kind != "LORA":
        raise UnsupportedError(f"{source}: peft_type {kind!a} is not supported, expected 'LORA'")
    for name in _REQUIRED:
        if values.get(name) is None:
            raise ConfigError(f"{source}: {name} is missing")
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if name in known:
            fields[name] = value
        elif name in CODE_FIELDS:
            warnings.warn(f"{source}: {name} is ignored: peftrt runs no code that a file names", stacklevel=3)
        elif name not in WITHOUT_EFFECT and not _is_one_of(value, NEUTRAL.get(name, _OFF)):
            what = "is not supported" if name in NEUTRAL else "is not a field that peftrt knows"
            raise UnsupportedError(f"{source}: {name} = {_shown(value)} {what} and may change the result")
    for name in ("rank_pattern", "alpha_pattern", "loftq_config"):
        # Older versions of peft wrote null for "none".
        if name in fields and fields[name] is None:
            fields[name] = {}
    if fields.get("use_dora", False) is None:
        fields["use_dora"] = False
    init = fields.get("init_lora_weights")
    if init in _INIT_WITHOUT_EFFECT:
        fields["init_lora_weights"] = True
    if isinstance(init, str) and init.startswith("pissa"):
        raise UnsupportedError(
            f"{source}: init_lora_weights {_shown(init)} is not supported in a file: its tensors belong to the base "
            "without its principal part; have peft convert them (save_pretrained with "
            "path_initial_model_for_weight_conversion), or save them with peftrt.save, which always does"
        )
    return fields


def _is_one_of(value: Any, accepted: tuple[Any, ...]) -> bool:
    # By type as well: 0 equals False, and is not what a switch that is off looks like.
    return any(type(value) is type(item) and value == item for item in accepted)


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
