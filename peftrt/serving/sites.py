"""The layers of a model that a pool's adapters can act on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from peftrt.adapters.attach import wrap_dense
from peftrt.adapters.configs.lora import LoraConfig
from peftrt.adapters.plan import Plan, is_embedding, make_plan
from peftrt.adapters.state import ModelAdapters, attach_state, expect_data
from peftrt.formats.errors import UnsupportedError
from peftrt.formats.nf4 import FLOAT_DTYPES
from peftrt.nn import AdapterLinear, NF4Linear
from peftrt.serving.layout import Site


def make_sites(
    model: nn.Module,
    state: ModelAdapters,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None,
) -> tuple[Site, ...]:
    """Make the targets layers that can have adapters, weights as they are; the caller takes it back after errors.

    Args:
        model, state: unwrapped, and its adapters or a new record.
        target_modules, exclude_modules: as of LoraConfig.

    Raises:
        ConfigError: a target that matches nothing.
        UnsupportedError: an embedding, a layer of which PiSSA has taken a part, or one that cannot be replaced.
        ValueError: weights without data, on several devices, or with adapters merged into them.
    """
    expect_data(model, "AdapterPool")
    if state.merged is not None:
        raise ValueError(f"AdapterPool: adapters {sorted(state.merged)} are merged into the base; unmerge first")
    plan = make_plan(model, LoraConfig(target_modules=target_modules, exclude_modules=exclude_modules), state)
    _expect_plain(model, plan)
    wrap_dense(model, plan, state)
    if state.storage is None:
        state.storage = {"quantize": None}
    attach_state(model, state)
    return _number(model, set(plan.paths))


def _expect_plain(model: nn.Module, plan: Plan) -> None:
    devices: dict[torch.device, str] = {}
    for path in plan.paths:
        module = model.get_submodule(path)
        if is_embedding(module):
            raise UnsupportedError(f"target_modules: {path} is an embedding, which a pool does not serve")
        if isinstance(module, AdapterLinear) and not module.is_bare({}):
            raise UnsupportedError(
                f"target_modules: {path}: an adapter that began with PiSSA holds a part of its weight, for which a "
                "pool's tables have no room; save the adapter and load it over the plain base"
            )
        assert isinstance(module.weight, torch.Tensor)
        devices.setdefault(module.weight.device, path)
    if len(devices) > 1:
        shown = ", ".join(f"{path} on {device}" for device, path in devices.items())
        raise ValueError(f"AdapterPool: the layers must be on one device, got {shown}")


def _number(model: nn.Module, paths: set[str]) -> tuple[Site, ...]:
    found = [(path, module) for path, module in model.named_modules() if path in paths]
    sites = []
    for index, (path, layer) in enumerate(found):
        assert isinstance(layer, AdapterLinear)
        sites.append(Site(index, path, layer, layer.out_features, layer.in_features))
    return tuple(sites)


def common_dtype(sites: Sequence[Site]) -> torch.dtype:
    """The dtype that most of the layers compute in."""
    found = Counter(
        site.layer.weight_dtype if isinstance(site.layer, NF4Linear) else site.layer.weight.dtype for site in sites
    )
    return found.most_common(1)[0][0]


def expect_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, bf16 or fp16; TypeError for others."""
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"AdapterPool: dtype must be fp32, bf16 or fp16, got {dtype!r}")
    return dtype
