"""The fields of AdapterHub 1.3's configurations: what they are called, what they are by default, what is supported."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

from peftrt.adapters.configs.base import check_names, check_switch
from peftrt.adapters.configs.peft_fields import CODE_FIELDS, shown
from peftrt.formats.errors import ConfigError, UnsupportedError

BOTTLENECK: dict[str, Any] = {
    "mh_adapter": None,
    "output_adapter": None,
    "reduction_factor": None,
    "non_linearity": None,
    "original_ln_before": False,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "init_weights": "bert",
    "init_weights_seed": None,
    "is_parallel": False,
    "scaling": 1.0,
    "use_gating": False,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "cross_adapter": False,
    "leave_out": [],
    "dropout": 0.0,
    "phm_layer": False,
    "phm_dim": 4,
    "factorized_phm_W": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "phm_c_init": "normal",
    "phm_init_range": 0.0001,
    "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "phm_rank": 1,
    "phm_bias": True,
    "stochastic_depth": 0.0,
}
LORA: dict[str, Any] = {
    "architecture": "lora",
    "selfattn_lora": True,
    "intermediate_lora": False,
    "output_lora": False,
    "leave_out": [],
    "r": 8,
    "alpha": 8,
    "dropout": 0.0,
    "attn_matrices": ["q", "v"],
    "composition_mode": "add",
    "init_weights": "lora",
    "init_weights_seed": None,
    "use_gating": False,
    "use_dora": False,
    "vera_d": None,
    "vera_b": None,
    "dtype": None,
}
PREFIX: dict[str, Any] = {
    "architecture": "prefix_tuning",
    "encoder_prefix": True,
    "cross_prefix": True,
    "leave_out": [],
    "flat": False,
    "prefix_length": 30,
    "bottleneck_size": 512,
    "non_linearity": "tanh",
    "dropout": 0.0,
    "use_gating": False,
    "shared_gating": True,
    "init_weights_seed": None,
}
_DEFAULTS = {None: BOTTLENECK, "lora": LORA, "prefix_tuning": PREFIX}

DOUBLE = {
    **BOTTLENECK,
    "mh_adapter": True,
    "output_adapter": True,
    "reduction_factor": 16,
    "non_linearity": "swish",
}
SEQUENTIAL = {
    **BOTTLENECK,
    "mh_adapter": False,
    "output_adapter": True,
    "reduction_factor": 16,
    "non_linearity": "relu",
    "original_ln_before": True,
}
PARALLEL = {
    **BOTTLENECK,
    "mh_adapter": False,
    "output_adapter": True,
    "reduction_factor": 2,
    "non_linearity": "relu",
    "init_weights": "mam_adapter",
    "is_parallel": True,
    "scaling": 4.0,
}
IA3 = {
    **LORA,
    "intermediate_lora": True,
    "r": 1,
    "alpha": 1,
    "attn_matrices": ["k", "v"],
    "composition_mode": "scale",
    "init_weights": "ia3",
}
# AdapterHub's names of whole configurations, the older ones first.
NAMED: dict[str, dict[str, Any]] = {
    "pfeiffer": SEQUENTIAL,
    "houlsby": DOUBLE,
    "parallel": PARALLEL,
    "scaled_parallel": {**PARALLEL, "scaling": "learned"},
    "pfeiffer+inv": {**SEQUENTIAL, "inv_adapter": "nice", "inv_adapter_reduction_factor": 2},
    "houlsby+inv": {**DOUBLE, "inv_adapter": "nice", "inv_adapter_reduction_factor": 2},
    "seq_bn": SEQUENTIAL,
    "double_seq_bn": DOUBLE,
    "par_bn": PARALLEL,
    "scaled_par_bn": {**PARALLEL, "scaling": "learned"},
    "seq_bn_inv": {**SEQUENTIAL, "inv_adapter": "nice", "inv_adapter_reduction_factor": 2},
    "double_seq_bn_inv": {**DOUBLE, "inv_adapter": "nice", "inv_adapter_reduction_factor": 2},
    "prefix_tuning": PREFIX,
    "prefix_tuning_flat": {**PREFIX, "flat": True},
    "lora": LORA,
    "ia3": IA3,
}

# Field -> the values at which it has no effect, for fields that are not translated. Others of the defaults have none
# once these have none, or say how training began.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "ln_before": (False, None),
    "ln_after": (False, None),
    "use_gating": (False, None),
    "inv_adapter": (None, False),
    "invertible_adapter": (None, False, {}),
    "cross_adapter": (False, None),
    "phm_layer": (False, None),
    "stochastic_depth": (0.0, 0, None),
    "use_dora": (False, None),
    "vera_d": (None,),
    "vera_b": (None,),
}
_OFF: tuple[Any, ...] = (None, False, [], {})
_SWITCHES = frozenset(
    {
        "mh_adapter",
        "output_adapter",
        "original_ln_before",
        "original_ln_after",
        "is_parallel",
        "selfattn_lora",
        "intermediate_lora",
        "output_lora",
        "flat",
        "encoder_prefix",
        "cross_prefix",
    }
)
_NAMES_OF_DTYPES = (None, "float32", "bfloat16", "float16")
# Up to this version LoRA's outputs were not scaled by alpha / r; AdapterHub then loads such adapters with alpha = r.
_UNSCALED_BEFORE = (1, 1, 0)
_VERSION = re.compile(r"adapters\.(\d{1,9})\.(\d{1,9})\.(\d{1,9})")


def read_hub_fields(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The fields of ``config``, complete, once nothing in them is other than peftrt computes it.

    Args:
        values: the contents of ``adapter_config.json``.
        source: the file, named in errors.

    Raises:
        ConfigError: a field is missing, of a wrong type, or the name of no configuration.
        UnsupportedError: another architecture, or a field that would change the result and is not supported.

    Warns:
        UserWarning: a LoRA of a version that did not scale, which is read as it was trained; a field that names code.
    """
    config = values["config"]
    if isinstance(config, str):
        if config not in NAMED:
            raise UnsupportedError(
                f"{source}: config {shown(config)} is not supported, expected one of {', '.join(NAMED)}"
            )
        config = NAMED[config]
    architecture = config.get("architecture")
    architecture = None if architecture == "bottleneck" else architecture
    if not isinstance(architecture, str | None) or architecture not in _DEFAULTS:
        known = ", ".join(repr(name) for name in _DEFAULTS)
        raise UnsupportedError(
            f"{source}: architecture {shown(architecture)} is not supported, expected one of {known}"
        )
    defaults = _DEFAULTS[architecture]
    _check_support(config, defaults, source)
    fields = {name: default if config.get(name) is None else config[name] for name, default in defaults.items()}
    fields["architecture"] = architecture
    for name, value in fields.items():
        if name in _SWITCHES:
            if value is None:
                raise ConfigError(f"{source}: {name} is missing")
            check_switch(f"{source}: {name}", value)
    _check_lists(fields, source)
    if architecture == "lora":
        _check_lora(fields, values["version"], source)
    return fields


def _check_support(config: Mapping[str, Any], defaults: Mapping[str, Any], source: str) -> None:
    for name, value in config.items():
        if name in CODE_FIELDS:
            warnings.warn(f"{source}: {name} is ignored: peftrt runs no code that a file names", stacklevel=7)
        elif name in _NEUTRAL or (name not in defaults and name != "architecture"):
            accepted = _NEUTRAL.get(name, _OFF)
            if not any(type(value) is type(item) and value == item for item in accepted):
                what = "is not supported" if name in _NEUTRAL else "is not a field that peftrt knows"
                raise UnsupportedError(f"{source}: {name} = {shown(value)} {what} and may change the result")


def _check_lists(fields: Mapping[str, Any], source: str) -> None:
    layers = fields["leave_out"]
    if not isinstance(layers, list) or not all(type(layer) is int and layer >= 0 for layer in layers):
        raise ConfigError(f"{source}: leave_out: expected a list of numbers of layers, got {shown(layers)}")
    dropout = fields["dropout"]
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ConfigError(f"{source}: dropout: expected a probability in [0, 1), got {shown(dropout)}")


def _check_lora(fields: dict[str, Any], version: str, source: str) -> None:
    for name in check_names(f"{source}: attn_matrices", fields["attn_matrices"]):
        if name not in ("q", "k", "v"):
            raise UnsupportedError(f"{source}: attn_matrices: {shown(name)} is not supported, expected q, k or v")
    if fields["composition_mode"] not in ("add", "scale"):
        mode = shown(fields["composition_mode"])
        raise UnsupportedError(f"{source}: composition_mode = {mode} is not supported, expected 'add' or 'scale'")
    if fields["dtype"] not in _NAMES_OF_DTYPES:
        raise UnsupportedError(f"{source}: dtype = {shown(fields['dtype'])} is not supported")
    found = _VERSION.match(version)
    old = found is not None and tuple(map(int, found.groups())) < _UNSCALED_BEFORE
    if old and fields["alpha"] != fields["r"]:
        warnings.warn(
            f"{source}: {version} did not scale by alpha / r; alpha = {shown(fields['alpha'])} is read as "
            f"{fields['r']}, as the adapter was trained",
            UserWarning,
            stacklevel=7,
        )
        fields["alpha"] = fields["r"]
