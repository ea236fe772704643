"""add_weighted_adapter: a new adapter that is a weighted sum of others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftrt.adapters.attach import adapter_parameters, attach_adapter
from peftrt.adapters.configs.base import AdapterConfig
from peftrt.adapters.configs.ia3 import IA3Config
from peftrt.adapters.configs.lora import LoraConfig
from peftrt.adapters.ia3_state import IA3State
from peftrt.adapters.lora_state import LoraState
from peftrt.adapters.method import AdapterTensors
from peftrt.adapters.methods.lora import change_of
from peftrt.adapters.plan import Plan
from peftrt.adapters.state import (
    ModelAdapters,
    adapter_layers,
    all_or_nothing,
    check_new_name,
    expect_state,
    saved_modules,
    unwrap,
)
from peftrt.nn import LoRAEmbedding
from peftrt.nn.adapter import as_weights

COMBINATIONS = ("svd", "linear", "cat")
Pair = tuple[Tensor, Tensor]


@torch.no_grad()
def add_weighted_adapter(
    model: nn.Module,
    adapters: Mapping[str, float],
    name: str,
    *,
    combination_type: str | None = None,
    svd_rank: int | None = None,
) -> AdapterConfig:
    """Make a new adapter of others: frozen, not active, and independent of them from then on.

    IA3's are summed, ``l = sum_a w_a l_a``, "linear" by name. Of LoRA ``D = sum_a w_a s_a B_a A_a`` is what
    ``set_active(model, adapters)`` adds to a weight; the names are HF peft's:

    - "cat": D itself, of the sum of the ranks.
    - "svd": the matrix of rank ``svd_rank`` that is closest to D (Eckart and Young 1936), found by way of the factors,
      without D.
    - "linear": ``B = sum_a sqrt(|w_a s_a|) B_a`` and ``A = sum_a sgn(w_a s_a) sqrt(|w_a s_a|) A_a``; cheap, of the
      adapters' own rank, and D only where one adapter acts, for B A has products of one adapter's B and another's A.

    Args:
        model: a model with adapters.
        adapters: name -> weight w_a, which may be negative.
        name: of the new adapter.
        combination_type: "svd", "linear" or "cat"; by default "svd" for LoRA.
        svd_rank: of "svd"; by default the largest rank of the adapters, layer by layer.

    Returns:
        The new adapter's configuration, with lora_alpha = r.

    Raises:
        ValueError: an unknown name, no adapter, a weight that is not finite, an adapter of another method or of DoRA,
            ranks that differ where "linear" wants one, IA3's of other modules, several copies of one module of
            ``modules_to_save``, or adapters are merged.
        AdapterNameError: the new name is taken or cannot be used.
    """
    state = expect_state(model, "add_weighted_adapter")
    model = unwrap(model)
    check_new_name(name, state.configs)
    weights = as_weights(adapters)
    configs = _checked(state, weights, combination_type, svd_rank)
    saved = _saved(model, state, weights)
    config: AdapterConfig
    tensors: AdapterTensors
    if isinstance(configs[0], IA3Config):
        config, tensors = _summed(model, state, weights, configs[0], saved)
        paths, dtype = [*tensors.factors], next(iter(tensors.factors.values())).dtype
    else:
        config, tensors = _low_rank(model, state, weights, configs[0], saved, combination_type or "svd", svd_rank)
        paths, dtype = [*tensors.pairs], next(iter(tensors.pairs.values()))[0].dtype
    with all_or_nothing(model):
        plan = Plan(existing=paths, saved=list(saved))
        attach_adapter(model, state, name, config, plan, adapter_dtype=dtype, tensors=tensors)
        for parameter in adapter_parameters(model, state, name):
            parameter.requires_grad_(False)
    return config


def _checked(
    state: ModelAdapters, weights: Mapping[str, float], combination_type: str | None, svd_rank: int | None
) -> list[LoraConfig] | list[IA3Config]:
    """The configurations, all of one method."""
    where = "add_weighted_adapter"
    if combination_type not in (*COMBINATIONS, None):
        expected = ", ".join(map(repr, COMBINATIONS))
        raise ValueError(f"{where}: combination_type must be one of {expected}, got {combination_type!r}")
    by_svd = combination_type in ("svd", None)
    if svd_rank is not None and (not by_svd or type(svd_rank) is not int or svd_rank < 1):
        raise ValueError(f"{where}: svd_rank must be an integer of at least 1, for 'svd' alone, got {svd_rank!r}")
    if not weights:
        raise ValueError(f"{where}: adapters must name at least one")
    state.expect_known(weights, where)
    state.expect_unmerged(where)
    low_rank, factors = [], []
    for name in weights:
        config = state.configs[name]
        if isinstance(config, IA3Config):
            factors.append(config)
        elif not isinstance(config, LoraConfig):
            raise ValueError(f"{where}: adapter {name!r} ({type(config).__name__}) is not LoRA: it cannot be summed")
        elif config.use_dora:
            raise ValueError(f"{where}: adapter {name!r} is DoRA's: a magnitude multiplies the base's share too")
        else:
            low_rank.append(config)
    if low_rank and factors:
        raise ValueError(f"{where}: adapters of LoRA and of IA3 cannot be summed into one: {', '.join(weights)}")
    if factors and (combination_type not in ("linear", None) or svd_rank is not None):
        raise ValueError(f"{where}: adapters of IA3 are summed 'linear', got {combination_type!r}, svd_rank={svd_rank}")
    return low_rank or factors


def _low_rank(
    model: nn.Module,
    state: ModelAdapters,
    weights: Mapping[str, float],
    first: LoraConfig,
    saved: dict[str, dict[str, Tensor]],
    combination_type: str,
    svd_rank: int | None,
) -> tuple[LoraConfig, LoraState]:
    pairs: dict[str, Pair] = {}
    for path, layer in adapter_layers(model, state).items():
        held = [name for name in weights if name in layer.adapter_names]
        if held:
            scaled = [(change_of(layer, name), weights[name] * layer.adapter(name).scaling) for name in held]
            pairs[path] = _combined(path, scaled, combination_type, svd_rank)
    ranks = {path: pair[0].shape[0] for path, pair in pairs.items()}
    most = max(ranks.values())
    others: Any = {path: rank for path, rank in ranks.items() if rank != most}
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        target_modules=tuple(sorted(pairs)),
        fan_in_fan_out=first.fan_in_fan_out,
        rank_pattern=others,
        alpha_pattern=others,
        modules_to_save=tuple(saved) or None,
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
    )
    embeddings = {path for path in pairs if isinstance(model.get_submodule(path), LoRAEmbedding)}
    return config, LoraState(pairs=pairs, embeddings=embeddings, saved=saved)


def _summed(
    model: nn.Module,
    state: ModelAdapters,
    weights: Mapping[str, float],
    first: IA3Config,
    saved: dict[str, dict[str, Tensor]],
) -> tuple[IA3Config, IA3State]:
    """IA3's factors; those of one adapter and not of another would be 1 there, and what of a sum of weights is 1?"""
    factors: dict[str, Tensor] = {}
    for path, layer in adapter_layers(model, state).items():
        found = {name: adapter for name in weights if (adapter := layer.ia3(name)) is not None}
        if not found:
            continue
        if len(found) < len(weights) or len({adapter.ia3_l.shape for adapter in found.values()}) > 1:
            raise ValueError(
                f"add_weighted_adapter: {path} has factors of {', '.join(map(repr, found))}; adapters of IA3 are "
                "summed where they scale the same sides of the same modules"
            )
        total = sum(weights[name] * adapter.ia3_l.detach() for name, adapter in found.items())
        assert isinstance(total, Tensor)
        factors[path] = total
    inner = tuple(path for path in sorted(factors) if first.is_feedforward(path))
    whole = tuple(saved) or None
    config = replace(first, target_modules=tuple(sorted(factors)), feedforward_modules=inner, modules_to_save=whole)
    return config, IA3State(factors=factors, saved=saved)


def _combined(path: str, scaled: list[tuple[Pair, float]], combination_type: str, svd_rank: int | None) -> Pair:
    """A and B of one layer, whose scaling is 1."""
    if combination_type == "linear":
        ranks = {pair[0].shape[0] for pair, _ in scaled}
        if len(ranks) > 1:
            raise ValueError(f"add_weighted_adapter: 'linear' needs one rank, {path} has {sorted(ranks)}; use 'svd'")
        roots = [(pair, math.sqrt(abs(weight)), math.copysign(1.0, weight)) for pair, weight in scaled]
        lora_A = sum(sign * root * A for (A, _), root, sign in roots)
        lora_B = sum(root * B for (_, B), root, _ in roots)
        assert isinstance(lora_A, Tensor)
        assert isinstance(lora_B, Tensor)
        return lora_A, lora_B
    lora_A = torch.cat([weight * A for (A, _), weight in scaled])
    lora_B = torch.cat([B for (_, B), _ in scaled], dim=1)
    if combination_type == "cat":
        return lora_A, lora_B
    return closest(lora_A, lora_B, svd_rank or max(pair[0].shape[0] for pair, _ in scaled))


def closest(lora_A: Tensor, lora_B: Tensor, rank: int) -> Pair:
    """A [rank, K] and B [N, rank] whose product is the closest of that rank to that of the given ones.

    ``B A = Q_B (R_B R_A^T) Q_A^T``: the singular values of B A are those of the small matrix between.
    """
    dtype = lora_A.dtype
    q_B, r_B = torch.linalg.qr(lora_B.double())
    q_A, r_A = torch.linalg.qr(lora_A.double().t())
    u, s, vh = torch.linalg.svd(r_B @ r_A.t())
    size = min(rank, len(s))
    new_B, new_A = q_B @ (u[:, :size] * s[:size]), vh[:size] @ q_A.t()
    # a rank beyond what there is has nothing to hold
    new_A = nn.functional.pad(new_A, (0, 0, 0, rank - size))
    new_B = nn.functional.pad(new_B, (0, rank - size))
    return new_A.to(dtype).contiguous(), new_B.to(dtype).contiguous()


def _saved(model: nn.Module, state: ModelAdapters, weights: Mapping[str, float]) -> dict[str, dict[str, Tensor]]:
    """The copies of ``modules_to_save``, of which the adapters have one each at most."""
    found = {}
    for path, module in saved_modules(model, state).items():
        held = [name for name in weights if name in module.adapter_names]
        if len(held) > 1:
            raise ValueError(
                f"add_weighted_adapter: {', '.join(map(repr, held))} each have a copy of {path} (modules_to_save): "
                "whole modules cannot be summed"
            )
        if held:
            found[path] = {name: tensor.clone() for name, tensor in module.copy_of(held[0]).state_dict().items()}
    return found
