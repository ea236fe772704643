"""Prompt tuning: trained embeddings in front of those of the real tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftrt.nn.routing import AdapterSet
from peftrt.nn.virtual import Arguments, Served, VirtualTokens, argument_names


class Prompt(nn.Module):
    """The prompt of one adapter: ``weight [T * submodules, d]``, of which the first T rows are used, as by HF peft.

    Args:
        weight: its initial value.
        num_virtual_tokens: T.

    Source: Lester et al. 2021 (arXiv:2104.08691), section 2.
    """

    def __init__(self, weight: Tensor, num_virtual_tokens: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.num_virtual_tokens = num_virtual_tokens

    def forward(self) -> Tensor:
        """``[T, d]``."""
        return self.weight[: self.num_virtual_tokens]

    def extra_repr(self) -> str:
        """For ``print``."""
        return f"{self.num_virtual_tokens} tokens of {self.weight.shape[1]}"


class PromptTuning(VirtualTokens):
    """The prompts of a model, of which one acts at a time, or one for every entry of a batch.

    Where the stack of layers is given a text's beginning, it is given the prompt's embeddings in front of the tokens',
    with a mask and positions to match; the prompt's places are taken off what it returns, so that logits and labels
    have the length of the text. The model's own cache holds the prompt; in the steps after, mask and positions are
    prolonged alone. An encoder keeps the prompt's places, and its decoder's mask is prolonged.

    Args:
        owner: the model's adapters.
        stack: the module whose forward takes ``input_ids`` and ``inputs_embeds``.
        decoder: in an encoder-decoder, what looks at the stack's output.
        most: positions that the stack has; None: it is not limited.
        first_counts: what comes first in an entry is looked at by a pooler, inside the stack or behind it.
        keeps: the prompt's places stay in what the stack returns.
    """

    kind: ClassVar[str] = "prompt_tuning"

    def __init__(
        self,
        owner: AdapterSet,
        stack: nn.Module,
        decoder: nn.Module | None = None,
        most: int | None = None,
        first_counts: bool = False,
        keeps: bool = False,
    ) -> None:
        super().__init__(owner)
        self.names = argument_names(stack)
        self.decoder_names = () if decoder is None else argument_names(decoder)
        # in a list: the stack's child is not its parent
        self._decoder = [decoder]
        self.most = most
        self.first_counts = first_counts
        self.keeps = keeps

    def hook(self, model: nn.Module, host: nn.Module) -> None:
        """As of :class:`HookedAdapters`; the host is the stack."""
        (decoder,) = self._decoder
        host.register_forward_pre_hook(self._before, with_kwargs=True)
        if decoder is None and not self.keeps:
            host.register_forward_hook(self._after, with_kwargs=True)
        if decoder is not None:
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True)
        self._decoder = []

    def _before(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = Arguments(self.names, args, kwargs)
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        given = ids if embeds is None else embeds
        if given is None:
            return None
        served = self.serving_now(given.device, given)
        if served is None:
            return None
        cache, mask = call.get("past_key_values"), call.get("attention_mask")
        past = _past(cache)
        _expect_plain(cache, mask)
        if past:
            self._prolong(call, served, given, past)
            return call.both
        if embeds is None:
            embeds = module.get_input_embeddings()(ids)
        if self.most is not None and embeds.shape[1] + served.length > self.most:
            raise ValueError(
                f"prompt tuning: {embeds.shape[1]} tokens behind {served.length} virtual ones need more than the "
                f"{self.most} positions that the model has"
            )
        prompts = [self.adapter(name)().to(embeds) for name in served.names]
        prompt = prompts[0].expand(len(embeds), -1, -1) if served.slots is None else served.gather(prompts, 0)
        call.set("input_ids", None)
        call.set("inputs_embeds", torch.cat([prompt, embeds], dim=1))
        token_types = call.get("token_type_ids")
        if token_types is not None:
            call.set("token_type_ids", _zeros_in_front(token_types, served.length))
        self._set_mask(call, served, mask, len(embeds), embeds.shape[1])
        self._set_positions(call, served, torch.arange(served.length, device=embeds.device), embeds.shape[1], 0)
        if self.first_counts and served.counts is not None:
            _to_the_front(call, served)
        return call.both

    def _prolong(self, call: Arguments, served: Served, given: Tensor, past: int) -> None:
        """Mask and positions of tokens behind those that the cache holds."""
        mask, tokens = call.get("attention_mask"), past - served.length + given.shape[1]
        if tokens < given.shape[1] or (mask is not None and mask.shape[1] != tokens):
            covered = "" if mask is None else f", and the mask covers {mask.shape[1]}"
            raise ValueError(
                f"prompt tuning: the cache holds {past} tokens, {served.length} of them virtual, {given.shape[1]} come"
                f"{covered}: it was filled under another prompt, or its virtual tokens were counted as real ones"
            )
        self._set_mask(call, served, mask, len(given), tokens)
        self._set_positions(call, served, None, given.shape[1], past)

    def _set_mask(self, call: Arguments, served: Served, mask: Tensor | None, batch: int, tokens: int) -> None:
        seen = served.seen()
        if mask is None and seen is None:
            return
        if mask is None:
            self._expect_argument("attention_mask")
            assert seen is not None
            mask = torch.ones(batch, tokens, dtype=torch.int64, device=seen.device)
        call.set("attention_mask", _prolonged(mask, served))

    def _set_positions(self, call: Arguments, served: Served, virtual: Tensor | None, tokens: int, past: int) -> None:
        """Positions of the virtual tokens that come, and of the real ones behind them."""
        positions = call.get("position_ids")
        if positions is None:
            if served.counts is None or "position_ids" not in self.names:
                return  # they are counted from what is there; distances between keys need no more
            positions = torch.arange(tokens, device=served.counts.device)[None] + max(past - served.length, 0)
        shift: Any = served.length if served.counts is None else served.counts[:, None]
        positions = positions + shift
        if virtual is not None:
            before = virtual if served.counts is None else (virtual - served.length + shift).clamp(min=0)
            positions = torch.cat([before.to(positions).expand(*positions.shape[:-1], -1), positions], dim=-1)
        call.set("position_ids", positions)

    def _expect_argument(self, name: str) -> None:
        if name not in self.names:
            raise ValueError(f"prompt tuning: entries with prompts of several lengths need a stack that takes {name}")

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call = Arguments(self.names, args, kwargs)
        embeds, cache = call.get("inputs_embeds"), call.get("past_key_values")
        if embeds is None:
            return None
        served = self.serving_now(embeds.device, embeds)
        # what the cache holds now came with this call alone: it was a beginning
        if served is None or _past(cache) not in (0, embeds.shape[1]):
            return None
        length, whole = served.length, embeds.shape[1]
        if not self.first_counts or served.counts is None:
            return _without(output, lambda tensor: tensor[:, length:], whole)
        places = served.counts[:, None] + torch.arange(whole - length, device=embeds.device)
        return _without(output, lambda tensor: _taken(tensor, places), whole)

    def _before_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = Arguments(self.decoder_names, args, kwargs)
        encoded, mask = call.get("encoder_hidden_states"), call.get("encoder_attention_mask")
        if encoded is None:
            return None
        served = self.serving_now(encoded.device, encoded)
        if served is None or (mask is None and served.counts is None):
            return None
        _expect_plain(None, mask)
        if mask is None:
            mask = torch.ones(len(encoded), encoded.shape[1] - served.length, dtype=torch.int64, device=encoded.device)
        if mask.shape[1] + served.length != encoded.shape[1]:
            return None  # encoded without a prompt
        call.set("encoder_attention_mask", _prolonged(mask, served))
        return call.both


def _past(cache: Any) -> int:
    """Tokens that a cache holds."""
    return 0 if cache is None else int(cache.get_seq_length())


def _expect_plain(cache: Any, mask: Any) -> None:
    if getattr(cache, "is_compileable", False):
        raise TypeError(
            "prompt tuning: a cache of a fixed size has no room for the virtual tokens; use one that grows (the "
            "default), or prefix tuning"
        )
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        shape = f" {list(mask.shape)}" if isinstance(mask, Tensor) else ""
        raise TypeError(
            f"prompt tuning: the attention mask must be None or a tensor [batch, tokens], got {type(mask).__name__}"
            f"{shape}"
        )


def _to_the_front(call: Arguments, served: Served) -> None:
    """Move what an entry with fewer virtual tokens has in front, and nothing sees, behind it."""
    assert served.counts is not None
    embeds = call.get("inputs_embeds")
    turn = torch.arange(embeds.shape[1], device=embeds.device) + served.length - served.counts[:, None]
    for name in ("inputs_embeds", "attention_mask", "token_type_ids", "position_ids"):
        value = call.get(name)
        if value is not None:
            whole = value.expand(len(embeds), *value.shape[1:])
            call.set(name, _taken(whole, turn % embeds.shape[1]))


def _taken(tensor: Tensor, places: Tensor) -> Tensor:
    """For every entry the places named ``[batch, n]`` of ``tensor [batch, tokens, ...]``."""
    return tensor[torch.arange(len(tensor), device=tensor.device)[:, None], places]


def _prolonged(mask: Tensor, served: Served) -> Tensor:
    """A mask ``[batch, tokens]`` with the virtual tokens in front."""
    seen = served.seen()
    columns = mask.new_ones(len(mask), served.length) if seen is None else seen.to(mask)
    return torch.cat([columns, mask], dim=1)


def _zeros_in_front(ids: Tensor, length: int) -> Tensor:
    return torch.cat([ids.new_zeros(*ids.shape[:-1], length), ids], dim=-1)


def _without(output: Any, cut: Callable[[Tensor], Tensor], whole: int) -> Any:
    """A stack's output without the virtual tokens: a tensor, a tuple that begins with it, or an object with fields."""

    def each(value: Any) -> Any:
        if isinstance(value, Tensor):
            return cut(value) if value.dim() == 3 and value.shape[1] == whole else value
        return tuple(map(each, value)) if isinstance(value, tuple) else value

    if isinstance(output, Tensor):
        return cut(output)
    if isinstance(output, tuple):
        return each(output)
    if not hasattr(output, "last_hidden_state"):
        raise TypeError(
            f"prompt tuning: the stack must return a tensor [batch, tokens, hidden], a tuple that begins with one, or "
            f"an object with last_hidden_state, got {type(output).__name__}"
        )
    output.last_hidden_state = cut(output.last_hidden_state)
    hidden: Sequence[Tensor] | None = getattr(output, "hidden_states", None)
    if hidden is not None:
        output.hidden_states = each(tuple(hidden))
    return output
