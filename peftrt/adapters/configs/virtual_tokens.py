"""The configurations of virtual tokens, prefix tuning's and prompt tuning's: HF peft's field names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peftrt.adapters.configs.base import AdapterConfig, check_choice, check_count, check_names, check_switch
from peftrt.formats.errors import ConfigError

MAX_TOKENS = 65536
MAX_SIZE = 1 << 24
RANDOM, SAMPLE_VOCAB, TEXT = "RANDOM", "SAMPLE_VOCAB", "TEXT"


@dataclass(frozen=True, kw_only=True)
class VirtualTokensConfig(AdapterConfig):
    """The fields that both ways have. What is not given of the sizes is found from the model; what is, is checked.

    Args:
        num_virtual_tokens: T, at least 1; there is no default.
        token_dim: of a prefix H D, the numbers of a key; of a prompt d, those of an embedding.
        num_layers: L.
        num_attention_heads: of a prefix H, the heads of keys and values.
        num_transformer_submodules: 2 for an encoder-decoder, otherwise 1; a prompt may have 1 there too.
    """

    num_virtual_tokens: int = 0
    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    num_transformer_submodules: int | None = None

    # fields that are peftrt's own, written where they are not at their default; peft ignores them with a warning
    own_fields: ClassVar[tuple[str, ...]] = ()
    required: ClassVar[tuple[str, ...]] = ("num_virtual_tokens",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_virtual_tokens", self.num_virtual_tokens, MAX_TOKENS)
        for name, most in (("token_dim", MAX_SIZE), ("num_layers", MAX_TOKENS), ("num_attention_heads", MAX_TOKENS)):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), most)
        if self.num_transformer_submodules is not None:
            check_count("num_transformer_submodules", self.num_transformer_submodules, 2)

    def to_peft_dict(self, *, inference_mode: bool = True) -> dict[str, Any]:
        """The contents of ``adapter_config.json``; what peft saves is marked for inference."""
        values = super().to_peft_dict(inference_mode=inference_mode)
        for name in self.own_fields:
            if getattr(self, name) == type(self).__dataclass_fields__[name].default:
                del values[name]
        return values

    @classmethod
    def _amended(cls, fields: dict[str, Any]) -> dict[str, Any]:
        if isinstance(fields.get("modules_to_save"), list):
            # peft appends the names of heads, which may be there already
            fields["modules_to_save"] = _once(fields["modules_to_save"])
        return fields


@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(VirtualTokensConfig):
    """Keys and values of T virtual tokens, trained, in front of those of every self-attention of a model's decoder (or
    of all of a model that has none).

    The virtual tokens are seen by all others; through a sliding window, as the first tokens of a text are. Logits,
    labels and the model's cache are of the real tokens alone.

    Args:
        num_virtual_tokens: T; also the other sizes, see :class:`VirtualTokensConfig`.
        prefix_projection: keys and values are made by two linear maps with tanh between, which are trained with the
            T vectors they begin from; saved is what they make, as by peft.
        encoder_hidden_size: numbers between the two maps; ``token_dim`` where not given.
        init_weights: None (normal; projected, as torch's modules) or "zero".
        shift_positions: the first real token has position T, as in peft. False leaves positions alone, as AdapterHub
            does; peft gives such a prefix other results.
        attention_modules: paths, or their ends, of the self-attentions, for models in which they are not found.
        modules_to_save, task_type, base_model_name_or_path, revision, inference_mode: as of every configuration.

    Raises:
        ConfigError: a field of a wrong type or out of its range, named in the message.

    Source: Li & Liang 2021 (arXiv:2101.00190).
    """

    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init_weights: str | None = None
    shift_positions: bool = True
    attention_modules: Sequence[str] | None = None

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    own_fields: ClassVar[tuple[str, ...]] = ("shift_positions", "attention_modules")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_switch("prefix_projection", self.prefix_projection)
        check_switch("shift_positions", self.shift_positions)
        if self.encoder_hidden_size is not None:
            check_count("encoder_hidden_size", self.encoder_hidden_size, MAX_SIZE)
        if self.init_weights is not None:
            check_choice("init_weights", self.init_weights, ("zero",))
        if self.attention_modules is not None:
            self._keep("attention_modules", check_names("attention_modules", self.attention_modules) or None)


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(VirtualTokensConfig):
    """Embeddings of T virtual tokens, trained, in front of those of a text: of the encoder's, where there is one.

    Logits and labels are of the real tokens alone: unlike with peft, the first of them is not a target. Positions that
    are given count on from the prompt, so that a row means the same however a batch is padded; peft ignores them.

    Args:
        num_virtual_tokens: T; also the other sizes, see :class:`VirtualTokensConfig`.
        prompt_tuning_init: "RANDOM" (normal), "SAMPLE_VOCAB" (embeddings of random tokens) or "TEXT".
        prompt_tuning_init_text: of "TEXT": its tokens' embeddings, repeated or cut to T.
        tokenizer: for "TEXT": a Hugging Face tokenizer, or any callable from a text to token ids.
        tokenizer_name_or_path, tokenizer_kwargs: recorded, as in peft; nothing is loaded by them.
        stack_module: path, or its end, of the module that takes ``input_ids`` and ``inputs_embeds``, for models in
            which it is not found.
        modules_to_save, task_type, base_model_name_or_path, revision, inference_mode: as of every configuration.

    Raises:
        ConfigError: a field of a wrong type or out of its range, named in the message.

    Source: Lester et al. 2021 (arXiv:2104.08691).
    """

    prompt_tuning_init: str = RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: Mapping[str, Any] | None = None
    tokenizer: Any = field(default=None, repr=False, compare=False)
    stack_module: str | None = None

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    own_fields: ClassVar[tuple[str, ...]] = ("stack_module",)
    unsaved: ClassVar[tuple[str, ...]] = ("tokenizer",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("prompt_tuning_init", self.prompt_tuning_init, (RANDOM, SAMPLE_VOCAB, TEXT))
        self._keep("prompt_tuning_init", str(getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init)))
        for name in ("prompt_tuning_init_text", "tokenizer_name_or_path", "stack_module"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ConfigError(f"{name}: expected a string that is not empty, got {value!a}")
        if self.tokenizer_kwargs is not None and not isinstance(self.tokenizer_kwargs, Mapping):
            raise ConfigError(f"tokenizer_kwargs: expected a map, got {self.tokenizer_kwargs!a}")
        if self.prompt_tuning_init == TEXT and self.prompt_tuning_init_text is None:
            raise ConfigError("prompt_tuning_init_text: expected a text, since prompt_tuning_init is 'TEXT', got None")
        if self.tokenizer is not None and not callable(self.tokenizer):
            raise ConfigError(f"tokenizer: expected a callable, got {type(self.tokenizer).__name__}")

    def to_peft_dict(self, *, inference_mode: bool = True) -> dict[str, Any]:
        """The contents of ``adapter_config.json``; what peft saves is marked for inference."""
        values = super().to_peft_dict(inference_mode=inference_mode)
        named = self.tokenizer_name_or_path or getattr(self.tokenizer, "name_or_path", None)
        if self.prompt_tuning_init == TEXT and not (isinstance(named, str) and named):
            # peft refuses a text without a tokenizer's name; how the prompt began does not matter any more
            return {**values, "prompt_tuning_init": RANDOM, "prompt_tuning_init_text": None}
        return {
            **values,
            "tokenizer_name_or_path": named if self.prompt_tuning_init == TEXT else values["tokenizer_name_or_path"],
        }


def _once(names: list[Any]) -> list[Any]:
    return [name for place, name in enumerate(names) if name not in names[:place]]
