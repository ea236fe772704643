"""Prefix tuning: trained keys and values in front of those of every self-attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftrt.adapters.attention import AttentionSites, find_attention, is_encoder_decoder
from peftrt.adapters.configs.virtual_tokens import PrefixTuningConfig
from peftrt.adapters.explaining import SiteChoice
from peftrt.adapters.methods.virtual_tokens import VirtualTokensMethod
from peftrt.adapters.plan import Plan, own_modules, plan_saved
from peftrt.adapters.prompt_state import KEY, PromptState, expect_shape
from peftrt.adapters.report import AdaptedSite
from peftrt.adapters.state import ModelAdapters, holders
from peftrt.formats.errors import ConfigError, UnsupportedError, named
from peftrt.nn.prefix import Prefix, PrefixTuning


class PrefixMethod(VirtualTokensMethod[PrefixTuningConfig]):
    """Attention over ``[P_k; K]`` and ``[P_v; V]``, with P trained."""

    config_type = PrefixTuningConfig

    def plan(self, model: nn.Module, config: PrefixTuningConfig, state: ModelAdapters) -> Plan:
        """As of :class:`Method`."""
        sites = _sites(model, config, state)
        return Plan(hosts={sites.host: sites}, saved=plan_saved(model, config))

    def attach(
        self,
        model: nn.Module,
        state: ModelAdapters,
        name: str,
        config: PrefixTuningConfig,
        plan: Plan,
        adapter_dtype: torch.dtype,
        tensors: PromptState | None,
    ) -> None:
        """As of :class:`Method`."""
        ((path, sites),) = plan.hosts.items()
        host = model.get_submodule(path)
        holder = PrefixTuning.at(host)
        if holder is None:
            attentions = {model.get_submodule(site.path): site for site in sites.attentions}
            holder = PrefixTuning(state, attentions, tuple(model.get_submodule(path) for path in sites.positions))
            holder.install(model, host)
        options: dict[str, Any] = {"dtype": adapter_dtype, "device": next(host.parameters()).device}
        options["shift_positions"] = config.shift_positions
        if tensors is not None:
            prefix = Prefix.from_flat(tensors.embeddings, sites.heads, sites.token_dim, **options)
        else:
            hidden = (config.encoder_hidden_size or sites.token_dim) if config.prefix_projection else None
            sizes = (config.num_virtual_tokens, sites.layers, sites.heads, sites.token_dim)
            prefix = Prefix(*sizes, encoder_hidden_size=hidden, zero=config.init_weights == "zero", **options)
        holder.add_adapter(name, prefix)

    def fit(
        self, model: nn.Module, config: PrefixTuningConfig, state: ModelAdapters, tensors: PromptState, source: str
    ) -> Plan:
        """As of :class:`Method`."""
        with named(source):
            sites = _sites(model, config, state)
        columns, tokens = 2 * sites.layers * sites.token_dim, config.num_virtual_tokens
        why = f"{tokens} virtual tokens of keys and values of {sites.layers} layers of {sites.token_dim} numbers"
        expect_shape(tensors, tokens, columns, source, why)
        return Plan(hosts={sites.host: sites})

    def contents(
        self, model: nn.Module, state: ModelAdapters, name: str
    ) -> tuple[PrefixTuningConfig, dict[str, Tensor]]:
        """As of :class:`Method`; of a projected prefix what the projection makes."""
        config = state.configs[name]
        assert isinstance(config, PrefixTuningConfig)
        holder = _holder(model, state)
        prefix = holder.adapter(name)
        sizes = {"token_dim": prefix.token_dim, "num_attention_heads": prefix.num_attention_heads}
        config = replace(
            config,
            **sizes,
            num_layers=prefix.num_layers,
            num_transformer_submodules=2 if is_encoder_decoder(model) else 1,
            encoder_hidden_size=config.encoder_hidden_size or prefix.token_dim,
        )
        return config, {KEY: prefix.flat()}

    def sites(self, model: nn.Module, state: ModelAdapters, name: str, plan: Plan) -> list[AdaptedSite]:
        """As of :class:`Method`: each attention, with the numbers of its keys and the virtual tokens."""
        ((_, sites),) = plan.hosts.items()
        tokens = _holder(model, state).adapter(name).num_virtual_tokens
        choice = SiteChoice(PrefixTuning.kind, "torch")
        return [
            AdaptedSite(site.path, tokens, sites.token_dim, None, None, "", "", choice) for site in sites.attentions
        ]


def _holder(model: nn.Module, state: ModelAdapters) -> PrefixTuning:
    return next(holder for holder in holders(model, state).values() if isinstance(holder, PrefixTuning))


def _sites(model: nn.Module, config: PrefixTuningConfig, state: ModelAdapters) -> AttentionSites:
    """Where a prefix goes, once it fits the configuration."""
    sites = find_attention(model, dict(own_modules(model)), config.attention_modules)
    found = {"token_dim": sites.token_dim, "num_attention_heads": sites.heads, "num_layers": sites.layers}
    for field, size in found.items():
        given = getattr(config, field)
        if given is not None and given != size:
            raise ConfigError(f"{field}: the model's keys and values have {size}, got {given}")
    submodules = 2 if is_encoder_decoder(model) else 1
    if config.num_transformer_submodules not in (None, submodules):
        raise UnsupportedError(
            f"num_transformer_submodules: a prefix has {submodules} in this {type(model).__name__}, got "
            f"{config.num_transformer_submodules}"
        )
    if config.shift_positions and not (sites.positions or sites.relative):
        raise UnsupportedError(
            "shift_positions: where this model looks positions up was not found (expected a rotary embedding that "
            "takes position_ids, a table called wpe or position_embeddings, or a relative_attention_bias): pass "
            "shift_positions=False, which HF peft does not know"
        )
    if not config.shift_positions and sites.relative:
        raise UnsupportedError("shift_positions: distances between keys and queries always count a prefix; got False")
    for path in sites.positions:
        most = getattr(model.get_submodule(path), "num_embeddings", None)
        if config.shift_positions and most is not None and config.num_virtual_tokens >= most:
            raise ConfigError(f"num_virtual_tokens: {path} has {most} positions, got {config.num_virtual_tokens}")
    for holder in holders(model, state).values():
        if isinstance(holder, PrefixTuning):
            there = sorted(site.path for site in holder.attentions.values())
            if there != sorted(site.path for site in sites.attentions):
                raise UnsupportedError(f"attention_modules: prefixes of this model are in front of {', '.join(there)}")
    return sites
