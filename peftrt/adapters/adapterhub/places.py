"""Where AdapterHub puts adapters, and which modules of the plain model these are, by the structure of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from peftrt.adapters.plan import own_modules
from peftrt.formats.errors import FormatError

# Last parts of a module's path -> what AdapterHub's LoRA calls the module: one of attn_matrices, or the three of them
# in one weight, or the halves of a feed-forward block.
_LORA = {
    "attention.self.query": "q",
    "attention.self.key": "k",
    "attention.self.value": "v",
    "crossattention.self.query": "q",
    "crossattention.self.key": "k",
    "crossattention.self.value": "v",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "SelfAttention.q": "q",
    "SelfAttention.k": "k",
    "SelfAttention.v": "v",
    "EncDecAttention.q": "q",
    "EncDecAttention.k": "k",
    "EncDecAttention.v": "v",
    "attn.c_attn": "qkv",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "DenseReluDense.wi": "intermediate",
    "DenseReluDense.wi_1": "intermediate",
    "DenseReluDense.wo": "output",
    "mlp.c_fc": "intermediate",
    "mlp.c_proj": "output",
    "mlp.up_proj": "intermediate",
    "mlp.down_proj": "output",
}
# What ends like one of them and has no adapter.
_NOT_LORA = ("attention.output.dense", "crossattention.output.dense")
# In these AdapterHub calls the projection down "intermediate". Nothing but the model's type tells them from others of
# the same modules, which it adapts through an interface that has the names right.
_SWAPPED_TYPES = ("llama", "mistral")
_SWAPPED = {"mlp.up_proj": "output", "mlp.down_proj": "intermediate"}

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|block)\.\d+(?=\.|$)")

# The parts of a layer that have bottlenecks: AdapterHub's own module there, and the module whose output it changes.
_BESIDE = {
    "attention": ("attention_adapters", ("self_attn", "attn")),
    "feed_forward": ("output_adapters", ("mlp",)),
}
# Where it changes a module's class instead, the bottleneck comes behind a child of it: BERT's, and what tells T5's.
_BEHIND = "dropout"
_BERT = {"attention": "attention.output", "feed_forward": "output"}
_T5 = {"attention": "SelfAttention", "feed_forward": "DenseReluDense"}


class Bottleneck(NamedTuple):
    """Where a bottleneck is: AdapterHub's place in its keys, and the plain module whose output it changes.

    ``role`` is "attention" or "feed_forward".
    """

    layer: str
    role: str
    place: str
    site: str


class Base:
    """A model as AdapterHub's names refer to it.

    Args:
        model: the plain model, or one with adapters of peftrt; it may be without data.
        model_type: as Hugging Face's configurations have it; by default the model's own.

    Attributes:
        modules: its modules by path.
        config: as Hugging Face models have it; None where there is none.
        class_name, model_type: of the model.
        layers: path of a layer -> its number, which goes on from an encoder to its decoder.
    """

    def __init__(self, model: nn.Module, model_type: str | None = None) -> None:
        self.modules: dict[str, nn.Module] = dict(own_modules(model))
        self.config: Any = getattr(model, "config", None)
        self.class_name = type(model).__name__
        self.model_type: str | None = model_type or getattr(self.config, "model_type", None)
        prefix = getattr(model, "base_model_prefix", None)
        self._prefix = f"{prefix}." if isinstance(prefix, str) and prefix else ""
        found = (self.layer_of(path) for path in self.modules)
        self.layers = {layer: number for number, layer in enumerate(dict.fromkeys(filter(None, found)))}

    @property
    def own_prefix(self) -> str:
        """What the paths of the inner model begin with here: nothing, where this is the inner model."""
        return self._prefix if self._prefix.rstrip(".") in self.modules else ""

    def locate(self, place: str, source: str) -> str:
        """The path of a module that a key names, which has the inner model's prefix or lacks it.

        Raises:
            FormatError: there is no such module.
        """
        for path in self._names(place):
            if path in self.modules:
                return path
        raise FormatError(f"{source}: the model has no module {place!a}: made for another base?")

    def layer_of(self, path: str) -> str | None:
        """The path of the layer that a module lies in, or that it is."""
        found = _LAYER.search(path)
        return path[: found.end()] if found else None

    def is_left_out(self, path: str, leave_out: Iterable[int]) -> bool:
        """Whether the module lies in one of the layers of ``leave_out``."""
        layer = self.layer_of(path)
        return layer is not None and self.layers[layer] in leave_out

    def lora_name(self, path: str) -> str | None:
        """What AdapterHub's LoRA calls the module: q, k, v, qkv, intermediate, output; None where it has none there."""
        ended = f".{path}"
        if self.layer_of(path) is None or ended.endswith(tuple(f".{end}" for end in _NOT_LORA)):
            return None
        names = {**_LORA, **_SWAPPED} if self.model_type in _SWAPPED_TYPES else _LORA
        return next((name for end, name in names.items() if ended.endswith(f".{end}")), None)

    def site(self, place: str, source: str) -> str:
        """The plain module whose output the bottleneck at a key's ``place`` changes.

        Raises:
            FormatError: there is none.
        """
        sites = {found.place: found.site for found in self.bottlenecks()}
        for name in self._names(place):
            if name in sites:
                return sites[name]
        raise FormatError(f"{source}: the model has no place {place!a} for a bottleneck: made for another base?")

    def bottlenecks(self) -> Iterator[Bottleneck]:
        """Every bottleneck that such a model can have under AdapterHub, but for those of cross-attention."""
        for layer in self.layers:
            for role in _BESIDE:
                own, hosts = _BESIDE[role]
                for host in hosts:
                    if f"{layer}.{host}" in self.modules:
                        yield Bottleneck(layer, role, f"{layer}.{own}", f"{layer}.{host}")
                place = f"{layer}.{_BERT[role]}"
                if f"{place}.LayerNorm" in self.modules and f"{place}.{_BEHIND}" in self.modules:
                    yield Bottleneck(layer, role, place, f"{place}.{_BEHIND}")
                number = 0
                while (place := f"{layer}.layer.{number}") in self.modules:
                    if f"{place}.{_T5[role]}" in self.modules:
                        yield Bottleneck(layer, role, place, f"{place}.{_BEHIND}")
                    number += 1

    def _names(self, place: str) -> tuple[str, str, str]:
        return place, self._prefix + place, place.removeprefix(self._prefix)
