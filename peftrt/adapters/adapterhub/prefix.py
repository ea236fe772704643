"""Prefixes in AdapterHub's directories and in peftrt's configuration of prefix tuning.

Both put T keys and values before those of every layer. AdapterHub leaves the positions of the tokens as they are, HF
peft shifts them by T, so that the same numbers compute something else under the two: here they are read and written
with ``shift_positions=False``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftrt.adapters.adapterhub.places import Base
from peftrt.adapters.configs.base import check_count
from peftrt.formats.adapterhub_dir import HubKey
from peftrt.formats.errors import FormatError, UnsupportedError
from peftrt.formats.safe import MAX_BYTES

KEY = "prompt_embeddings"
_POOL, _SHARED = "prefix_tuning", "prefix_tuning.pool"
_PART = "self_prefix"
_FLAT = f"{_PART}.control_trans"
# of the MLP: an embedding of T tokens, and two layers
_MLP = (
    f"{_PART}.wte.weight",
    f"{_FLAT}.0.weight",
    f"{_FLAT}.0.bias",
    f"{_FLAT}.2.weight",
    f"{_FLAT}.2.bias",
)
_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}
_MAX_TOKENS = 1 << 20


def prefix_from_hub(
    fields: Mapping[str, Any], tensors: Mapping[HubKey, Tensor], base: Base, source: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """AdapterHub's prefixes as the fields of ``PrefixTuningConfig`` and its tensor [T, 2 L token_dim].

    Those that an MLP computes are computed here, once.

    Raises:
        UnsupportedError: prefixes of an encoder-decoder model, or of some layers only.
        FormatError: tensors that do not answer to the configuration or to the model.
    """
    parts = _own_parts(tensors, source)
    _refuse_places(fields, parts, base, source)
    check_count(f"{source}: prefix_length", fields["prefix_length"], _MAX_TOKENS)
    count, sizes = fields["prefix_length"], _sizes(base, source)
    width = 2 * sizes["num_layers"] * sizes["token_dim"]
    if fields["flat"]:
        _expect(parts, {_FLAT: (count * width,)}, source)
        prompt = parts[_FLAT].reshape(count, width)
    else:
        hidden, inner = getattr(base.config, "hidden_size", None), fields["bottleneck_size"]
        check_count(f"{source}: bottleneck_size", inner, _MAX_TOKENS)
        activation = _ACTIVATIONS.get(str(fields["non_linearity"]).lower())
        if activation is None:
            raise UnsupportedError(
                f"{source}: non_linearity = {fields['non_linearity']!a} is not supported in a prefix, expected one of "
                f"{', '.join(_ACTIVATIONS)}"
            )
        shapes = ((count, hidden), (inner, hidden), (inner,), (width, inner), (width,))
        _expect(parts, dict(zip(_MLP, shapes, strict=True)), source)
        if 4 * count * width > MAX_BYTES:
            raise FormatError(
                f"{source}: the prefix would have {4 * count * width} bytes, at most {MAX_BYTES} are accepted"
            )
        tokens, first, first_bias, second, second_bias = (parts[name].float() for name in _MLP)
        within = activation(torch.nn.functional.linear(tokens, first, first_bias))
        prompt = torch.nn.functional.linear(within, second, second_bias)
    values = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": count,
        **sizes,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "shift_positions": False,
    }
    return values, {KEY: prompt}


def prefix_to_hub(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> tuple[dict[str, Any], dict[tuple[str, str], Tensor]]:
    """A prefix as AdapterHub's flat one: the fields that are not at their defaults, and its tensor by place and leaf.

    Raises:
        UnsupportedError: its positions are shifted, as in HF peft; or the model is an encoder-decoder.
    """
    if values.get("shift_positions", True):
        raise UnsupportedError(
            "shift_positions: HF peft counts positions from behind the prefix, AdapterHub as if there were none: the "
            "same prefix would compute something else"
        )
    _sizes(base, "the model")
    prompt = tensors[KEY]
    fields = {"flat": True, "prefix_length": prompt.shape[0]}
    return fields, {(f"{base.own_prefix}{_POOL}", _FLAT): prompt.reshape(-1)}


def _refuse_places(fields: Mapping[str, Any], parts: Mapping[str, Tensor], base: Base, source: str) -> None:
    names = sorted({leaf.partition(".")[0] for leaf in parts})
    if names != [_PART] or getattr(base.config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{source}: {', '.join(names)}: prefixes of an encoder-decoder model are not supported: AdapterHub counts "
            "them among the relative positions, peftrt does not"
        )
    if fields["leave_out"]:
        raise UnsupportedError(
            f"{source}: leave_out = {fields['leave_out']!a} is not supported in a prefix: peftrt has one in every layer"
        )


def _own_parts(tensors: Mapping[HubKey, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors by leaf: AdapterHub has them in the model's state and once more in every layer's."""
    parts: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.group != "prefix_tunings" or not (_ends(key.place, _POOL) or _ends(key.place, _SHARED)):
            raise FormatError(f"{source}: tensor {key.leaf!a} of {key.place!a} is no part of a prefix")
        if not torch.equal(parts.setdefault(key.leaf, tensor), tensor):
            raise FormatError(f"{source}: tensor {key.leaf!a} of {key.place!a} differs from another layer's")
    return parts


def _ends(place: str, last: str) -> bool:
    return f".{place}".endswith(f".{last}")


def _sizes(base: Base, source: str) -> dict[str, int]:
    """The sizes of peft's configuration, as AdapterHub finds them in the model's."""
    config = base.config
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if not isinstance(hidden, int) or not isinstance(heads, int) or not base.layers:
        raise UnsupportedError(f"{source}: a prefix needs a model whose config has hidden_size and num_attention_heads")
    kept = getattr(config, "num_key_value_heads", None) or heads
    return {
        "token_dim": kept * (hidden // heads),
        "num_layers": len(base.layers),
        "num_attention_heads": kept,
    }


def _expect(parts: Mapping[str, Tensor], shapes: Mapping[str, tuple[Any, ...]], source: str) -> None:
    if parts.keys() != shapes.keys():
        missing = sorted(shapes.keys() - parts.keys()) or sorted(parts.keys() - shapes.keys())
        what = "is missing" if missing[0] in shapes else "is not expected"
        raise FormatError(f"{source}: tensor {missing[0]!a} {what} in the prefix")
    for name, shape in shapes.items():
        if tuple(parts[name].shape) != shape:
            raise FormatError(
                f"{source}: tensor {name!a} is {list(parts[name].shape)}, the configuration and the model say "
                f"{list(shape)}"
            )
