"""Bottleneck adapters in AdapterHub's directories and in peftrt's: the same under other names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from peftrt.adapters.adapterhub.fields import DOUBLE, PARALLEL, SEQUENTIAL
from peftrt.adapters.adapterhub.places import Base
from peftrt.adapters.configs.base import check_number
from peftrt.formats.adapterhub_dir import HubKey
from peftrt.formats.errors import FormatError, UnsupportedError
from peftrt.formats.peft_dir import KEY_PREFIX
from peftrt.nn.bottleneck import INITS
from peftrt.ops import BOTTLENECK_ACTIVATIONS

# peftrt's placement -> AdapterHub's configuration of it, of which these fields are its meaning; others can be chosen
PLACEMENTS = {"houlsby": DOUBLE, "pfeiffer": SEQUENTIAL, "parallel": PARALLEL}
_MEANING = (
    "mh_adapter",
    "output_adapter",
    "original_ln_before",
    "original_ln_after",
    "residual_before_ln",
    "is_parallel",
)
# A parallel adapter is given the residual alone, whatever these say.
_OF_SEQUENCE = ("original_ln_before", "residual_before_ln")
_ROLES = {"attention": "mh_adapter", "feed_forward": "output_adapter"}
_LEAVES = {
    "adapter_down.0.weight": "down.weight",
    "adapter_down.0.bias": "down.bias",
    "adapter_up.weight": "up.weight",
    "adapter_up.bias": "up.bias",
}
_PART = ".bottleneck."
# AdapterHub's names of activations that have another one here
_ACTIVATIONS = {"swish": "silu", "leakyrelu": "leaky_relu"}


def bottleneck_from_hub(
    fields: Mapping[str, Any], tensors: Mapping[HubKey, Tensor], base: Base, source: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """AdapterHub's bottleneck as the fields of ``BottleneckConfig`` and tensors by peftrt's keys.

    Raises:
        UnsupportedError: it lies elsewhere than peftrt's three, or computes something else.
        FormatError: tensors that do not answer to the model.
    """
    placement = _placement(fields, source)
    check_number(f"{source}: reduction_factor", fields["reduction_factor"])
    if fields["dropout"]:
        raise UnsupportedError(f"{source}: dropout = {fields['dropout']} is not supported in a bottleneck")
    if isinstance(fields["scaling"], str):
        raise UnsupportedError(f"{source}: scaling = {fields['scaling']!a} is not supported, expected a number")
    check_number(f"{source}: scaling", fields["scaling"])
    activation = str(fields["non_linearity"]).lower()
    activation = _ACTIVATIONS.get(activation, activation)
    if activation not in BOTTLENECK_ACTIVATIONS:
        known = ", ".join((*BOTTLENECK_ACTIVATIONS, *_ACTIVATIONS))
        raise UnsupportedError(
            f"{source}: non_linearity = {fields['non_linearity']!a} is not supported, expected one of {known}"
        )
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.group != "adapters" or key.leaf not in _LEAVES:
            raise FormatError(
                f"{source}: tensor {key.leaf!a} of {key.place!a} is not supported, expected {', '.join(_LEAVES)}"
            )
        name = f"{KEY_PREFIX}{base.site(key.place, source)}{_PART}{_LEAVES[key.leaf]}"
        if name in found:
            raise FormatError(f"{source}: tensor {key.leaf!a} of {key.place!a} is there with a prefix and without")
        found[name] = tensor
    values = {
        "peft_type": "BOTTLENECK",
        "placement": placement,
        "reduction_factor": fields["reduction_factor"],
        "activation": activation,
        "scaling": fields["scaling"],
        **_left_out(fields, base),
    }
    if fields["init_weights"] in INITS:
        values["init"] = fields["init_weights"]
    return values, found


def bottleneck_to_hub(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> tuple[dict[str, Any], dict[tuple[str, str], Tensor]]:
    """peftrt's bottleneck as AdapterHub's: the fields that are not at their defaults, and tensors by place and leaf.

    Raises:
        UnsupportedError: it cannot be said in AdapterHub's form; the message says why.
    """
    places = {one.site: one.place for one in base.bottlenecks()}
    leaves = {ours: theirs for theirs, ours in _LEAVES.items()}
    found = {}
    for key, tensor in tensors.items():
        site, _, leaf = key.removeprefix(KEY_PREFIX).partition(_PART)
        if site not in places:
            raise UnsupportedError(f"AdapterHub has no bottleneck behind {site}")
        found[places[site], leaves[leaf]] = tensor
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    fields = {
        **PLACEMENTS[values["placement"]],
        "reduction_factor": values["reduction_factor"],
        "non_linearity": names.get(values["activation"], values["activation"]),
        # AdapterHub takes no integer
        "scaling": float(values["scaling"]),
        "init_weights": values["init"],
    }
    return {**fields, "leave_out": _layers_without({place for place, _ in found}, fields, base)}, found


def _placement(fields: Mapping[str, Any], source: str) -> str:
    """Which of the three the fields describe."""
    for name, theirs in PLACEMENTS.items():
        said = [field for field in _MEANING if not (fields["is_parallel"] and field in _OF_SEQUENCE)]
        if all(fields[field] == theirs[field] for field in said):
            return name
    shown = ", ".join(f"{field} = {fields[field]!a}" for field in _MEANING)
    raise UnsupportedError(
        f"{source}: {shown}: supported are {', '.join(PLACEMENTS)}, which AdapterHub calls double_seq_bn, seq_bn and "
        "par_bn"
    )


def _left_out(fields: Mapping[str, Any], base: Base) -> dict[str, Any]:
    """The layers without: by number, or by their modules where AdapterHub's numbers go on from encoder to decoder."""
    numbers = [number for number in fields["leave_out"] if number in base.layers.values()]
    stacks = {layer.rpartition(".")[0] for layer in base.layers}
    if not numbers or len(stacks) == 1:
        return {"leave_out": numbers}
    return {"exclude_modules": [one.site for one in base.bottlenecks() if base.layers[one.layer] in numbers]}


def _layers_without(places: Iterable[str], fields: Mapping[str, Any], base: Base) -> list[int]:
    """``leave_out``, once every other layer has all that the configuration says.

    Raises:
        UnsupportedError: a layer has a part of it.
    """
    expected: dict[str, set[str]] = {layer: set() for layer in base.layers}
    for one in base.bottlenecks():
        if fields[_ROLES[one.role]]:
            expected[one.layer].add(one.place)
    without = [layer for layer, wanted in expected.items() if not wanted.intersection(places)]
    for layer, wanted in expected.items():
        if layer not in without and (missing := sorted(wanted.difference(places))):
            raise UnsupportedError(
                f"AdapterHub has the same bottlenecks in each layer that it adapts: there is none at {missing[0]}"
            )
    return [base.layers[layer] for layer in without]
