"""Where a model's self-attentions, its positions and its stacks of layers are, found by what they offer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftrt.formats.errors import ConfigError, UnsupportedError
from peftrt.nn.prefix import Attention
from peftrt.nn.virtual import argument_names

OFFER = (
    "a self-attention must take its cache as past_key_values, call update(keys, values, layer) of it with keys and "
    "values of [batch, heads, tokens, size] where it is not None, and take its mask as attention_mask or mask"
)
_CACHES = ("past_key_values", "past_key_value", "layer_past")
_MASKS = ("attention_mask", "mask")
# of attention to the output of an encoder
_CROSS = ("crossatt", "cross_att", "encdec", "encoder_attn", "encoder_attention")
# keys of their own, or all three in one
_KEYS = ("k_proj", "key", "k")
_FUSED = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "W_pack", "qkv", "in_proj")
_TABLES = ("wpe", "position_embeddings", "embed_positions", "position_embedding")


@dataclass(frozen=True)
class AttentionSites:
    """The self-attentions of a model that a prefix is put in front of.

    Attributes:
        host: path of the module that holds them all, and those of ``positions``.
        attentions: how each is called.
        positions: paths of the modules that are given positions.
        relative: positions are distances between keys and queries, which a prefix shifts by itself.
        heads, token_dim: of keys and values: H and H D.
        layers: L of a prefix.
    """

    host: str
    attentions: tuple[Attention, ...]
    positions: tuple[str, ...]
    relative: bool
    heads: int
    token_dim: int
    layers: int


@dataclass(frozen=True)
class Stack:
    """The stack of layers that a prompt is put in front of.

    Attributes:
        path: of the stack.
        decoder: path of what looks at its output, in an encoder-decoder.
        token_dim: d, of its embeddings.
        vocabulary: how many there are; None where that is not known.
        most: positions that it has; None where they are not limited by a table.
        first_counts: it sees both ways, and what comes first in an entry may stand for all of it.
        keeps: what is behind it looks at the first place, which is the prompt's, as in peft.
    """

    path: str
    decoder: str | None
    token_dim: int
    vocabulary: int | None
    most: int | None
    first_counts: bool
    keeps: bool


def find_attention(model: nn.Module, modules: dict[str, nn.Module], names: Sequence[str] | None) -> AttentionSites:
    """The self-attentions of a model's decoder, or of all of it where it has none.

    Args:
        model: the whole.
        modules: path -> module, of the model without what adapters put in.
        names: paths, or their ends, of self-attentions; None: found by what they offer.

    Raises:
        ConfigError: a name that matches nothing.
        UnsupportedError: none is found, or one does not offer what a prefix needs.
    """
    inside = stack_path(model, modules, "decoder") if is_encoder_decoder(model) else ""
    found: list[tuple[str, nn.Module, str, str]] = []
    for path, module in modules.items():
        if not path.startswith(inside and inside + "."):
            continue
        if names is not None and not _ends_in(path, names):
            continue
        taken = argument_names(module)
        cache = next((name for name in _CACHES if name in taken), None)
        mask = next((name for name in _MASKS if name in taken), None)
        if names is not None and (cache is None or mask is None):
            raise UnsupportedError(f"attention_modules: {path} is no self-attention: {OFFER}")
        if cache and mask and (names is not None or _is_self_attention(path, module)):
            found.append((path, module, cache, mask))
    for name in names or ():
        if not any(_ends_in(path, [name]) for path, *_ in found):
            raise ConfigError(f"attention_modules: {name!a} matches no module of the model")
    if not found:
        raise UnsupportedError(
            f"no self-attention that a prefix can be put in front of was found in this {type(model).__name__}: "
            f"{OFFER}; name them with attention_modules"
        )
    layers, count = _layers(model, [module for _, module, _, _ in found])
    attentions = []
    for (path, module, cache, mask), layer in zip(found, layers, strict=True):
        attentions.append(Attention(path, layer, argument_names(module), cache, mask))
    heads, token_dim = _sizes(model, {path: module for path, module, _, _ in found})
    place = host = _common([path for path, *_ in found], modules)
    # those nearest to the attentions: a model of several parts has positions of its images, too
    while place != inside and not [*_positions(modules, place)]:
        place = _common([place], modules)
    positions = tuple(_positions(modules, place))
    host = place if positions else host
    relative = any(hasattr(module, "relative_attention_bias") for _, module, _, _ in found)
    return AttentionSites(host, tuple(attentions), positions, relative, heads, token_dim, count)


def find_stack(model: nn.Module, modules: dict[str, nn.Module], name: str | None) -> Stack:
    """The stack of layers of a model; of an encoder-decoder the encoder's.

    Args:
        model: the whole.
        modules: path -> module, of the model without what adapters put in.
        name: path of the stack, or its end; None: found by what Hugging Face models offer.

    Raises:
        ConfigError: the name matches nothing, or several modules.
        UnsupportedError: there is none, or it does not offer what a prompt needs.
    """
    decoder = None
    if name is not None:
        paths = [path for path in modules if _ends_in(path, [name])]
        if len(paths) != 1:
            matched = f"matches {', '.join(paths[:4])}" if paths else "matches no module of the model"
            raise ConfigError(f"stack_module: {name!a} {matched}; expected one module")
        path = paths[0]
    elif is_encoder_decoder(model):
        path, decoder = stack_path(model, modules, "encoder"), stack_path(model, modules, "decoder")
    else:
        # OPT's head looks at the decoder, past the base model around it
        find = getattr(model, "get_decoder", None)
        candidates = [find() if callable(find) else None, getattr(model, "base_model", None), model]
        stack = next((each for each in candidates if isinstance(each, nn.Module) and _takes_prompts(each)), model)
        path = next((path for path, module in modules.items() if module is stack), "")
    stack = modules.get(path, model)
    if not _takes_prompts(stack):
        raise UnsupportedError(
            f"no stack of layers that a prompt can be put in front of: {path or 'the model'}, a "
            f"{type(stack).__name__}, must take input_ids and inputs_embeds, and have get_input_embeddings() that "
            "returns a table with an embedding_dim; name the one that does with stack_module"
        )
    embeddings = _input_embeddings(stack)
    tables = [getattr(modules[place], "num_embeddings", None) for place in _positions(modules, path)]
    most = min((size for size in tables if type(size) is int), default=None)
    vocabulary = getattr(embeddings, "num_embeddings", None)
    sees_ahead = decoder is None and not any(getattr(module, "is_causal", False) is True for module in stack.modules())
    keeps = sees_ahead and "SequenceClassification" in type(model).__name__
    width = embeddings.embedding_dim
    return Stack(path, decoder, width, vocabulary if type(vocabulary) is int else None, most, sees_ahead, keeps)


def _takes_prompts(stack: nn.Module) -> bool:
    width = getattr(_input_embeddings(stack), "embedding_dim", None)
    return type(width) is int and {"input_ids", "inputs_embeds"} <= {*argument_names(stack)}


def _input_embeddings(stack: nn.Module) -> Any:
    find = getattr(stack, "get_input_embeddings", None)
    try:
        return find() if callable(find) else None
    except NotImplementedError:
        return None


def layers_and_heads(model: nn.Module) -> tuple[int | None, int | None]:
    """How many layers and heads of attention a model's configuration names, for notes in a file."""
    config = getattr(model, "config", None)
    heads = _first(None, config, "num_attention_heads", "num_heads", "n_head", "encoder_attention_heads")
    return _first(None, config, "num_hidden_layers", "num_layers", "n_layer"), heads


def is_encoder_decoder(model: nn.Module) -> bool:
    """What a Hugging Face model's configuration says."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def stack_path(model: nn.Module, modules: dict[str, nn.Module], which: str) -> str:
    """Path of a model's encoder or decoder, as its ``get_encoder`` and ``get_decoder`` say; UnsupportedError else."""
    find = getattr(model, f"get_{which}", None)
    stack = find() if callable(find) else None
    for path, module in modules.items():
        if module is stack:
            return path
    raise UnsupportedError(f"the {which} of this {type(model).__name__} is not known: it must have get_{which}()")


def _is_self_attention(path: str, module: nn.Module) -> bool:
    children = module._modules
    if any(word in path.lower() for word in _CROSS) or getattr(module, "is_cross_attention", False):
        return False
    return any(name in children for name in (*_KEYS, *_FUSED))


def _layers(model: nn.Module, attentions: list[nn.Module]) -> tuple[list[int], int]:
    """Which layer of a prefix each attention takes, and how many a prefix has."""
    given = [getattr(module, "layer_idx", None) for module in attentions]
    layers = [index for index in given if type(index) is int]
    if len(layers) < len(given) or len(set(layers)) < len(layers):
        layers = list(range(len(attentions)))
    count = max(max(layers) + 1, _first(None, getattr(model, "config", None), "num_hidden_layers", "num_layers") or 0)
    if is_encoder_decoder(model):
        # peft lays the tensor twice end to end and gives each decoder layer four parts of it, of which it drops the two
        # that would be of cross-attention
        layers = [2 * layer % count for layer in layers]
    return layers, count


def _sizes(model: nn.Module, attentions: dict[str, nn.Module]) -> tuple[int, int]:
    """Heads of keys and values, and the numbers of all of them together."""
    sizes = {path: _size(model, path, module) for path, module in attentions.items()}
    if len(set(sizes.values())) > 1:
        (first, one), *rest = sizes.items()
        path, other = next((path, size) for path, size in rest if size != one)
        raise UnsupportedError(
            f"a prefix needs keys and values of one size: {first} has {one[0]} heads, {one[1]} numbers in all; {path} "
            f"has {other[0]} heads, {other[1]} numbers"
        )
    return next(iter(sizes.values()))


def _size(model: nn.Module, path: str, module: nn.Module) -> tuple[int, int]:
    config = getattr(module, "config", getattr(model, "config", None))
    queries = _first(module, config, "num_attention_heads", "num_heads", "n_heads", "n_head")
    heads = _first(module, config, "num_key_value_heads", "num_kv_heads", "kv_heads") or queries
    width = _first(module, config, "hidden_size", "d_model", "n_embd", "embed_dim")
    size = _first(module, config, "head_dim", "attention_head_size", "key_value_proj_dim", "d_kv")
    if size is None and width and queries:
        size = width // queries
    if not heads or not size:
        raise UnsupportedError(f"{path}: how many heads its keys have is not known; give it a num_heads and a head_dim")
    for name in _KEYS:
        projection = module._modules.get(name)
        wide = getattr(projection, "out_features", None)
        if type(wide) is int and wide != heads * size:
            raise UnsupportedError(
                f"{path}.{name} makes {wide} numbers, but {heads} heads of {size} are {heads * size}"
            )
    return heads, heads * size


def _first(module: nn.Module | None, config: Any, *names: str) -> int | None:
    for holder in (module, config):
        for name in names:
            value = getattr(holder, name, None)
            if type(value) is int and value > 0:
                return value
    return None


def _positions(modules: dict[str, nn.Module], inside: str) -> Iterator[str]:
    for path, module in modules.items():
        if not path.startswith(inside and inside + "."):
            continue
        name = path.rpartition(".")[2]
        rotary = "rotary" in type(module).__name__.lower() and "position_ids" in argument_names(module)
        if rotary or (name in _TABLES and isinstance(module, nn.Module) and hasattr(module, "num_embeddings")):
            yield path


def _ends_in(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.endswith("." + name) for name in names)


def _common(paths: list[str], modules: dict[str, nn.Module]) -> str:
    """The path of the module that holds all of these and runs them itself, as a list of layers does not."""
    shared = []
    for parts in zip(*(path.split(".")[:-1] for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    while shared and isinstance(modules[".".join(shared)], nn.ModuleList | nn.ModuleDict | nn.Sequential):
        shared.pop()
    return ".".join(shared)
