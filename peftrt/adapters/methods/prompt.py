"""Prompt tuning: trained embeddings in front of those of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftrt.adapters.attention import Stack, find_stack, is_encoder_decoder, layers_and_heads
from peftrt.adapters.configs.virtual_tokens import SAMPLE_VOCAB, TEXT, PromptTuningConfig
from peftrt.adapters.explaining import SiteChoice
from peftrt.adapters.methods.virtual_tokens import VirtualTokensMethod
from peftrt.adapters.plan import Plan, own_modules, plan_saved
from peftrt.adapters.prompt_state import KEY, PromptState, expect_shape
from peftrt.adapters.report import AdaptedSite
from peftrt.adapters.state import ModelAdapters, holders
from peftrt.formats.errors import ConfigError, UnsupportedError, named
from peftrt.nn.prompt import Prompt, PromptTuning


class _Start(NamedTuple):
    """Where a prompt goes, and the tokens whose embeddings it begins with, or None."""

    stack: Stack
    ids: Sequence[int] | None


class PromptMethod(VirtualTokensMethod[PromptTuningConfig]):
    """A model's stack of layers over ``[P; embed(text)]``, with P trained."""

    config_type = PromptTuningConfig

    def plan(self, model: nn.Module, config: PromptTuningConfig, state: ModelAdapters) -> Plan:
        """As of :class:`Method`."""
        stack = _stack(model, config, state)
        start = _Start(stack, _initial_ids(config, stack.vocabulary))
        return Plan(hosts={stack.path: start}, saved=plan_saved(model, config))

    def attach(
        self,
        model: nn.Module,
        state: ModelAdapters,
        name: str,
        config: PromptTuningConfig,
        plan: Plan,
        adapter_dtype: torch.dtype,
        tensors: PromptState | None,
    ) -> None:
        """As of :class:`Method`."""
        ((path, (stack, ids)),) = plan.hosts.items()
        host: Any = model.get_submodule(path)
        holder = PromptTuning.at(host)
        if holder is None:
            decoder = None if stack.decoder is None else model.get_submodule(stack.decoder)
            holder = PromptTuning(state, host, decoder, stack.most, stack.first_counts, stack.keeps)
            holder.install(model, host)
        device = next(host.get_input_embeddings().parameters()).device
        if tensors is not None:
            weight = tensors.embeddings
        elif ids is None:
            weight = torch.randn(_rows(model, config), stack.token_dim, device=device)
        else:
            with torch.no_grad():
                weight = host.get_input_embeddings()(_repeated(ids, _rows(model, config)).to(device))
        weight = weight.detach().to(device=device, dtype=adapter_dtype, copy=True)
        holder.add_adapter(name, Prompt(weight, config.num_virtual_tokens))

    def fit(
        self, model: nn.Module, config: PromptTuningConfig, state: ModelAdapters, tensors: PromptState, source: str
    ) -> Plan:
        """As of :class:`Method`."""
        with named(source):
            stack = _stack(model, config, state)
        rows = _rows(model, config)
        parts = rows // config.num_virtual_tokens
        why = f"{config.num_virtual_tokens} virtual tokens of {parts} part(s) of the model and embeddings of its size"
        expect_shape(tensors, rows, stack.token_dim, source, why)
        return Plan(hosts={stack.path: _Start(stack, None)})

    def contents(
        self, model: nn.Module, state: ModelAdapters, name: str
    ) -> tuple[PromptTuningConfig, dict[str, Tensor]]:
        """As of :class:`Method`."""
        config = state.configs[name]
        assert isinstance(config, PromptTuningConfig)
        prompt = _holder(model, state).adapter(name)
        rows, token_dim = prompt.weight.shape
        layers, heads = layers_and_heads(model)
        config = replace(
            config,
            token_dim=token_dim,
            num_layers=config.num_layers or layers,
            num_attention_heads=config.num_attention_heads or heads,
            num_transformer_submodules=rows // prompt.num_virtual_tokens,
        )
        return config, {KEY: prompt.weight.detach()}

    def sites(self, model: nn.Module, state: ModelAdapters, name: str, plan: Plan) -> list[AdaptedSite]:
        """As of :class:`Method`: the stack, with the size of its embeddings and the virtual tokens."""
        tokens = _holder(model, state).adapter(name).num_virtual_tokens
        choice = SiteChoice(PromptTuning.kind, "torch")
        ((path, (stack, _)),) = plan.hosts.items()
        return [AdaptedSite(path, tokens, stack.token_dim, None, None, "", "", choice)]


def _holder(model: nn.Module, state: ModelAdapters) -> PromptTuning:
    return next(holder for holder in holders(model, state).values() if isinstance(holder, PromptTuning))


def _stack(model: nn.Module, config: PromptTuningConfig, state: ModelAdapters) -> Stack:
    """Where a prompt goes, once it fits the configuration."""
    stack = find_stack(model, dict(own_modules(model)), config.stack_module)
    if config.token_dim is not None and config.token_dim != stack.token_dim:
        raise ConfigError(f"token_dim: the model's embeddings have {stack.token_dim} numbers, got {config.token_dim}")
    if config.num_transformer_submodules == 2 and not is_encoder_decoder(model):
        raise UnsupportedError(
            f"num_transformer_submodules: this {type(model).__name__} is no encoder-decoder: expected 1, got 2"
        )
    if stack.most is not None and config.num_virtual_tokens >= stack.most:
        raise ConfigError(f"num_virtual_tokens: the model has {stack.most} positions, got {config.num_virtual_tokens}")
    for path, holder in holders(model, state).items():
        there = path.rpartition(".")[0]
        if isinstance(holder, PromptTuning) and there != stack.path:
            raise UnsupportedError(f"stack_module: prompts of this model are in front of {there or 'all of it'}")
    return stack


def _rows(model: nn.Module, config: PromptTuningConfig) -> int:
    """Of a prompt's tensor: peft has one more part for the decoder of an encoder-decoder, which is not used."""
    return config.num_virtual_tokens * (config.num_transformer_submodules or (2 if is_encoder_decoder(model) else 1))


def _initial_ids(config: PromptTuningConfig, vocabulary: int | None) -> Sequence[int] | None:
    """The tokens whose embeddings a prompt begins with; None: with random numbers.

    Raises:
        ConfigError: there is no tokenizer, or it answers with something else than ids of the vocabulary.
    """
    if config.prompt_tuning_init not in (SAMPLE_VOCAB, TEXT):
        return None
    if vocabulary is None:
        raise ConfigError(
            f"prompt_tuning_init: {config.prompt_tuning_init!r} needs a table of embeddings with num_embeddings"
        )
    if config.prompt_tuning_init == SAMPLE_VOCAB:
        rows = 2 * config.num_virtual_tokens
        drawn: list[int] = torch.randint(0, vocabulary, (rows,)).tolist()
        return drawn
    if config.tokenizer is None:
        raise ConfigError(
            "tokenizer: expected a tokenizer or a callable from a text to token ids, since prompt_tuning_init is "
            f"'TEXT' (none is loaded by tokenizer_name_or_path={config.tokenizer_name_or_path!a}), got None"
        )
    answer = config.tokenizer(config.prompt_tuning_init_text)
    ids = answer["input_ids"] if isinstance(answer, Mapping) else answer
    if isinstance(ids, Tensor):
        ids = ids.flatten().tolist()
    if not isinstance(ids, Sequence) or not all(type(each) is int and 0 <= each < vocabulary for each in ids):
        raise ConfigError(f"tokenizer: expected a list of token ids below {vocabulary}, got {ascii(ids)[:80]}")
    if not ids:
        raise ConfigError(f"tokenizer: expected ids of {config.prompt_tuning_init_text!a}, got none")
    return ids


def _repeated(ids: Sequence[int], rows: int) -> Tensor:
    """The ids over and over, cut to the number of rows."""
    return torch.tensor(ids).repeat(-(-rows // len(ids)))[:rows]
