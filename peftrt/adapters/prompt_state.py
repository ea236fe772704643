"""The tensors of prefix and prompt tuning: one of virtual tokens, and whole modules beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from peftrt.adapters.configs.virtual_tokens import VirtualTokensConfig
from peftrt.adapters.fitting import expect_float
from peftrt.formats.errors import FormatError
from peftrt.formats.peft_dir import KEY_PREFIX, split_saved_key

KEY = "prompt_embeddings"
# what stands before a path here, where LoRA's keys have KEY_PREFIX
SAVED_PREFIX = "base_model."


@dataclass
class PromptState:
    """An adapter's tensors.

    Attributes:
        embeddings: ``[rows, columns]``, of the virtual tokens.
        saved: path of a module in ``modules_to_save`` -> its parameters and buffers by name.
    """

    embeddings: Tensor
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def validate_prompt_tensors(config: VirtualTokensConfig, tensors: Mapping[str, Tensor], source: str) -> PromptState:
    """Sort an adapter's tensors, once they are known to fit the configuration.

    Args:
        config: the adapter's configuration.
        tensors: peft's keys -> tensors.
        source: the file, named in errors.

    Raises:
        FormatError: a key of no known form, no ``prompt_embeddings``, or one whose dtype or number of dimensions does
            not fit.
    """
    if KEY not in tensors:
        raise FormatError(f"{source}: there is no key {KEY!a}; keys: {', '.join(map(ascii, [*tensors][:8])) or 'none'}")
    embeddings = tensors[KEY]
    expect_float(embeddings, KEY, source)
    if embeddings.ndim != 2 or 0 in embeddings.shape:
        shape = list(embeddings.shape)
        raise FormatError(f"{source}: key {KEY!a}: expected a matrix that is not empty, got {shape}")
    state = PromptState(embeddings)
    names = tuple(config.modules_to_save or ())
    for key in tensors.keys() - {KEY}:
        rest = key.removeprefix(SAVED_PREFIX)
        saved = split_saved_key(KEY_PREFIX + rest, names) if rest != key else None
        if saved is None:
            raise FormatError(
                f"{source}: key {key!a} is not supported: expected {KEY!a}, or {SAVED_PREFIX}<module> followed by a "
                f"parameter of modules_to_save ({', '.join(names) or 'none'})"
            )
        state.saved.setdefault(saved.path, {})[saved.leaf] = tensors[key]
    return state


def expect_shape(state: PromptState, rows: int, columns: int, source: str, why: str) -> None:
    """Raise FormatError unless ``prompt_embeddings`` is ``[rows, columns]``."""
    if state.embeddings.shape != (rows, columns):
        raise FormatError(
            f"{source}: key {KEY!a}: expected [{rows}, {columns}], {why}, got {list(state.embeddings.shape)}"
        )
