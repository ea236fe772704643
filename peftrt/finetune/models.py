"""Loads a Hugging Face model with the head that a task needs, and its tokenizer: safetensors only, no remote code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from peftrt.finetune.errors import UserError, require

DEFAULT_MAX_LENGTH = 256


def load_tokenizer(name: str) -> Any:
    """The tokenizer, with a padding token.

    Raises:
        UserError: transformers is not installed, or there is no such tokenizer.
    """
    transformers = require("transformers", "hf", "peftrt finetune")
    with _one_line(name, "tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError(f"--model: the tokenizer of {name} has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(name: str) -> Any:
    """The model's configuration."""
    transformers = require("transformers", "hf", "peftrt finetune")
    with _one_line(name, "configuration"):
        return transformers.AutoConfig.from_pretrained(name)


def length_limit(config: Any, tokenizer: Any) -> int | None:
    """The most tokens that the model takes, or None where it does not say."""
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions")]
    # A tokenizer without a limit has a number such as 10^30 there.
    limits.append(tokenizer.model_max_length if tokenizer.model_max_length < 1 << 30 else None)
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def choose_length(wanted: int | None, limit: int | None) -> int:
    """The length that examples are cut to.

    Raises:
        UserError: more is wanted than the model takes.
    """
    if wanted is None:
        return min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)
    if limit is not None and wanted > limit:
        raise UserError(f"--max-length {wanted}: the model takes at most {limit} tokens")
    return wanted


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bf16 on a GPU that has it, fp32 elsewhere."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def load_classifier(name: str, labels: tuple[str, ...], pad_id: int, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """A model that classifies, and the modules that must be trained and saved whole: its head, and what is new.

    Raises:
        UserError: there is no such model, or none of its kind that classifies.
    """
    transformers = require("transformers", "hf", "peftrt finetune")
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    model, info = _load(transformers.AutoModelForSequenceClassification, name, dtype, num_labels=len(labels), **names)
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = pad_id
    head = [
        child
        for child, module in model.named_children()
        if child != model.base_model_prefix and next(module.parameters(), None) is not None
    ]
    # What the checkpoint lacks was drawn at random just now: it means nothing unless it is saved with the adapter.
    new = {key.rpartition(".")[0] for key in info["missing_keys"]} | {
        key.rpartition(".")[0] for key in info["mismatched"]
    }
    return model, head + sorted(path for path in new if path.split(".")[0] not in head)


def load_causal_lm(name: str, dtype: torch.dtype) -> Any:
    """A language model.

    Raises:
        UserError: there is no such model, or its checkpoint lacks what a language model needs.
    """
    transformers = require("transformers", "hf", "peftrt finetune")
    model, info = _load(transformers.AutoModelForCausalLM, name, dtype)
    if missing := sorted({*info["missing_keys"], *info["mismatched"]}):
        raise UserError(f"--model: {name} is not a causal language model: its checkpoint has no {missing[0]}")
    model.config.use_cache = False
    return model


def check_tokens(model: Any, largest: int, name: str) -> None:
    """Raise UserError where the tokenizer makes tokens that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise UserError(f"--model: the tokenizer of {name} makes token {largest}, the model has {rows} embeddings")


def _load(auto: Any, name: str, dtype: torch.dtype, **options: Any) -> tuple[Any, dict[str, Any]]:
    with _one_line(name, "model"):
        model, info = auto.from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    info["mismatched"] = [entry[0] for entry in info["mismatched_keys"]]
    return model, info


@contextmanager
def _one_line(name: str, what: str) -> Iterator[None]:
    """transformers without its bars and reports; its errors as one line."""
    transformers = require("transformers", "hf", "peftrt finetune")
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # each format's reader has errors of its own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise UserError(f"--model: cannot load the {what} of {name!r}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
