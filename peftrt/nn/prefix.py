"""Prefix tuning: trained keys and values in front of those of every self-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from peftrt.nn.prefix_mask import expect_form, extended
from peftrt.nn.remembered import Remembered
from peftrt.nn.routing import AdapterSet
from peftrt.nn.virtual import Arguments, Served, VirtualTokens


class Prefix(nn.Module):
    """The keys and values of one adapter: T virtual tokens in each of L layers of H heads of D numbers.

    Flat they are ``[T, 2 L H D]``: for every token, keys and then values of each layer, as HF peft stores them. Trained
    are those themselves, a tensor a layer, or, projected, what they are made of:
    ``flat = tanh(E W1^T + b1) W2^T + b2`` with E ``[T, H D]``, W1 ``[P, H D]``, W2 ``[2 L H D, P]``.

    Args:
        num_virtual_tokens: T.
        num_layers: L.
        num_attention_heads: H, of keys and values.
        token_dim: H D.
        encoder_hidden_size: P; None: not projected.
        zero: begin with zeros (flat ones); otherwise normal, or as an ``nn.Embedding`` and two ``nn.Linear`` do.
        shift_positions: real tokens have positions from T on.
        dtype, device: of the Parameters.

    Source: Li & Liang 2021 (arXiv:2101.00190), section 4.2 and, for the projection, 4.3.
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        num_layers: int,
        num_attention_heads: int,
        token_dim: int,
        *,
        encoder_hidden_size: int | None = None,
        zero: bool = False,
        shift_positions: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.num_virtual_tokens = num_virtual_tokens
        self.num_attention_heads = num_attention_heads
        self.token_dim = token_dim
        self.shift_positions = shift_positions
        self._kept: Remembered[tuple[Tensor, Tensor]] = Remembered()
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.embedding: nn.Embedding | None = None
        if encoder_hidden_size is None:
            drawn = (torch.zeros if zero else torch.randn)(num_virtual_tokens, num_layers * 2 * token_dim, **options)
            self.layers = nn.ParameterList(part.clone() for part in drawn.split(2 * token_dim, dim=1))
            return
        self.embedding = nn.Embedding(num_virtual_tokens, token_dim, **options)
        self.hidden = nn.Linear(token_dim, encoder_hidden_size, **options)
        # one map a layer: a layer's gradient is then not of the size of all
        self.out = nn.ModuleList(nn.Linear(encoder_hidden_size, 2 * token_dim, **options) for _ in range(num_layers))
        if zero:
            for parameter in self.out.parameters():
                nn.init.zeros_(parameter)

    @classmethod
    def from_flat(cls, flat: Tensor, num_attention_heads: int, token_dim: int, **options: Any) -> Self:
        """A prefix with these values ``[T, 2 L H D]``, not projected."""
        tokens, width = flat.shape
        prefix = cls(tokens, width // (2 * token_dim), num_attention_heads, token_dim, zero=True, **options)
        with torch.no_grad():
            for parameter, part in zip(prefix.layers, flat.split(2 * token_dim, dim=1), strict=True):
                parameter.copy_(part)
        return prefix

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers if self.embedding is None else self.out)

    @torch.no_grad()
    def flat(self) -> Tensor:
        """``[T, 2 L H D]``."""
        return torch.cat([self._layer(layer) for layer in range(self.num_layers)], dim=1)

    def parameters_of(self, layers: set[int]) -> tuple[nn.Parameter, ...]:
        """What keys and values of some layers are made of."""
        if self.embedding is None:
            return tuple(parameter for layer, parameter in enumerate(self.layers.parameters()) if layer in layers)
        out = [parameter for layer, each in enumerate(self.out) if layer in layers for parameter in each.parameters()]
        return (*self.embedding.parameters(), *self.hidden.parameters(), *out)

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[H, T, D]`` of a layer; while nothing is trained, a projection is not made again."""
        if self.embedding is None:
            return self._heads(self.layers[layer])
        out = self.out[layer]
        made_of = [self.embedding.weight, *self.hidden.parameters(), *out.parameters()]
        if self.training or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in made_of)):
            return self._heads(self._layer(layer))
        return self._kept.get(str(layer), made_of, None, lambda: self._heads(self._layer(layer)))

    def _layer(self, layer: int) -> Tensor:
        if self.embedding is None:
            return self.layers[layer]
        projected: Tensor = self.out[layer](torch.tanh(self.hidden(self.embedding.weight)))
        return projected

    def _heads(self, of_layer: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = of_layer.view(self.num_virtual_tokens, 2, self.num_attention_heads, -1).permute(1, 2, 0, 3)
        return keys, values

    def train(self, mode: bool = True) -> Self:
        """As of ``nn.Module``."""
        self._kept.forget()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._kept.forget()
        return super()._apply(*args, **kwargs)

    def extra_repr(self) -> str:
        """For ``print``."""
        return f"{self.num_virtual_tokens} tokens, {self.num_attention_heads} heads, token_dim={self.token_dim}"


class Attention(NamedTuple):
    """How a self-attention is called.

    Attributes:
        path: in the model.
        layer: of a prefix, that it takes.
        names: of its forward's arguments.
        cache, mask: the arguments that are the cache of keys and values, and the attention mask.
    """

    path: str
    layer: int
    names: tuple[str, ...]
    cache: str
    mask: str


class PrefixTuning(VirtualTokens):
    """The prefixes of a model, of which one acts at a time, or one for every entry of a batch.

    Each self-attention is given, in place of its cache, one that answers with the prefix in front of what the cache
    holds, and a mask with columns for the prefix; the model's own cache never holds it. So checkpointing, generation,
    beams and caches of every kind work as without. Where positions are shifted, a hook of each module that looks
    positions up adds the number of virtual tokens.

    Args:
        owner: the model's adapters.
        attentions: self-attention -> how it is called.
        positions: modules that are given positions.
    """

    kind: ClassVar[str] = "prefix_tuning"

    def __init__(
        self, owner: AdapterSet, attentions: Mapping[nn.Module, Attention], positions: tuple[nn.Module, ...]
    ) -> None:
        super().__init__(owner)
        self.attentions = dict(attentions)
        # only to be hooked: an adapted layer may take a module's place, with its hooks
        self._positions = positions

    def hook(self, model: nn.Module, host: nn.Module) -> None:
        """As of :class:`HookedAdapters`."""
        host.register_forward_pre_hook(self._before, with_kwargs=True)
        for module in self.attentions:
            module.register_forward_pre_hook(self._before_attention, with_kwargs=True)
        for module in self._positions:
            module.register_forward_pre_hook(self._before_positions, with_kwargs=True)
        self._positions = ()

    def add_adapter(self, name: str, adapter: nn.Module) -> None:
        """Hold a prefix, not yet active; its name is new here. Layers of it that no attention takes are not trained."""
        super().add_adapter(name, adapter)
        adapter.requires_grad_(False)
        for parameter in self.adapter_parameters(name):
            parameter.requires_grad_(True)

    def adapter_parameters(self, name: str) -> tuple[nn.Parameter, ...]:
        """What is trained of a prefix."""
        return self.adapter(name).parameters_of({site.layer for site in self.attentions.values()})

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hold the batch against the names of ``peftrt.rows`` before positions of another length meet it."""
        routing = self.routing()
        if routing is not None:
            given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args, *kwargs.values()]
            batch = next((value for value in given if isinstance(value, Tensor)), None)
            if batch is not None:
                routing.expect_batch(batch)

    def _before_attention(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        site = self.attentions[module]
        call = Arguments(site.names, args, kwargs)
        x = call.get(site.names[0])
        served = self.serving_now(x.device, x)
        if served is None:
            return None
        cache = call.get(site.cache)
        cache = getattr(cache, "self_attention_cache", cache)
        mask = call.get(site.mask)
        expect_form(mask, site.path)
        call.set(site.mask, extended(mask, served, module, x, cache, kwargs.get("is_causal")))
        call.set(site.cache, PrefixedCache(cache, *self._keys_values(site.layer, served)))
        return call.both

    def _keys_values(self, layer: int, served: Served) -> tuple[Tensor, Tensor]:
        """``[1 or batch, H, T, D]``."""
        pairs = [self.adapter(name).keys_values(layer) for name in served.names]
        if served.slots is None:
            return pairs[0][0][None], pairs[0][1][None]
        return served.gather([keys for keys, _ in pairs], 1), served.gather([values for _, values in pairs], 1)

    def _before_positions(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        positions = _positions(module, args, kwargs)
        if positions is None:
            return None
        place, ids = positions
        device = next(module.parameters()).device if isinstance(ids, int) else ids.device
        shift = self._shift(device)
        if shift is None:
            return None
        if isinstance(ids, int) and not isinstance(shift, int):
            raise ValueError(
                f"prefix tuning: {type(module).__name__} counts the positions of all entries alike: those of a batch "
                "need prefixes of one length"
            )
        table = getattr(module, "num_embeddings", None)
        if isinstance(shift, int) and not isinstance(ids, int) and table is not None and ids.shape[-1] + shift > table:
            raise ValueError(
                f"prefix tuning: {ids.shape[-1]} tokens behind {shift} virtual ones need more than the {table} "
                "positions that the model has"
            )
        if isinstance(place, str):
            return args, {**kwargs, place: ids + shift}
        return (*args[:place], ids + shift, *args[place + 1 :]), kwargs

    def _shift(self, device: torch.device) -> int | Tensor | None:
        """What is added to positions ``[1 or batch, S]``: a number, or ``[batch, 1]``."""
        served = self.serving_now(device)
        if served is None:
            return None
        shifts = {}
        for name in served.names:
            adapter = self.adapter(name)
            shifts[name] = adapter.num_virtual_tokens if adapter.shift_positions else 0
        if not any(shifts.values()):
            return None
        if served.slots is None:
            return shifts[served.names[0]]
        routing = self.routing()
        assert routing is not None
        return routing.per_entry(shifts, 0, device)[:, None]


class PrefixedCache:
    """A cache of keys and values, as one self-attention sees it: the prefix is in front of what it holds.

    Args:
        cache: the model's, or None.
        keys, values: ``[1 or batch, H, T, D]``, in the dtype they are trained in.
    """

    def __init__(self, cache: Any, keys: Tensor, values: Tensor) -> None:
        self.cache = cache
        self.keys = keys
        self.values = values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, H, S, D]`` go into the cache; the answer is all that are to be looked at."""
        if self.cache is not None:
            key_states, value_states = self.cache.update(key_states, value_states, *args, **kwargs)
        return _in_front(self.keys, key_states, "keys"), _in_front(self.values, value_states, "values")

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        """Tokens before those of this call, the prefix included."""
        return self.keys.shape[2] + (0 if self.cache is None else self.cache.get_seq_length(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        if name == "cache":  # a copy in the making
            raise AttributeError(name)
        return getattr(self.cache, name)


def _in_front(prefix: Tensor, states: Tensor, what: str) -> Tensor:
    if states.dim() != 4 or (states.shape[1], states.shape[3]) != (prefix.shape[1], prefix.shape[3]):
        raise ValueError(
            f"prefix tuning: the attention's {what} are {list(states.shape)}; expected [batch, heads, tokens, size] "
            f"with the prefix's {prefix.shape[1]} heads of {prefix.shape[3]}"
        )
    return torch.cat([prefix.to(states).expand(len(states), -1, -1, -1), states], dim=2)


def _positions(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[int | str, Tensor | int] | None:
    """Where in a call positions are, and they: ``position_ids``, or the first whole numbers.

    A table with a forward of its own, as Bart's, may be given how many tokens came before in their place.
    """
    if isinstance(kwargs.get("position_ids"), Tensor):
        return "position_ids", kwargs["position_ids"]
    counts = isinstance(module, nn.Embedding) and type(module).forward is not nn.Embedding.forward
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in given:
        if counts and type(value) is int:
            return place, value
        if not counts and isinstance(value, Tensor) and not value.is_floating_point():
            return place, value
    return None
