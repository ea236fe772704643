"""What prefix and prompt tuning share: one tensor in a file, of the virtual tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

from peftrt.adapters.configs.virtual_tokens import VirtualTokensConfig
from peftrt.adapters.method import Method
from peftrt.adapters.prompt_state import SAVED_PREFIX, PromptState, validate_prompt_tensors

V = TypeVar("V", bound=VirtualTokensConfig)


class VirtualTokensMethod(Method[V, PromptState]):
    """Virtual tokens in front of a text's."""

    def sort(self, config: V, tensors: Mapping[str, Tensor], source: str) -> PromptState:
        """As of :class:`Method`."""
        return validate_prompt_tensors(config, tensors, source)

    def saved_key(self, path: str, leaf: str) -> str:
        """As of :class:`Method`."""
        return f"{SAVED_PREFIX}{path}.{leaf}"
