"""The sizes of a Hugging Face model, from its configuration alone: the model is built without data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftrt.adapters.plan import is_linear, sizes
from peftrt.estimate.shapes import PRESETS, Linear, Shape
from peftrt.finetune.errors import UserError, require
from peftrt.finetune.models import load_config

_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def find_shape(model: str, task: str | None = None, labels: int = 2) -> Shape:
    """A preset's sizes by its name, or those of the model in a directory.

    Args:
        model: one of ``PRESETS``, or a directory with a config.json.
        task: "classify" or "causal-lm"; by default what the configuration says that the model does. A preset is a
            language model.
        labels: outputs of a head that classifies.

    Raises:
        UserError: there is neither, transformers is not installed, or the model is no Transformer of a known form.
    """
    if model in PRESETS:
        if task == "classify":
            raise UserError(f"--task classify: {model} is a language model; give a directory with its config.json")
        return PRESETS[model]
    if not (Path(model) / "config.json").is_file():
        raise UserError(f"--model: {model} is neither a directory with a config.json nor one of {', '.join(PRESETS)}")
    return read_shape(Path(model), task, labels)


def read_shape(directory: Path, task: str | None, labels: int) -> Shape:
    """The sizes of the model that a config.json describes; see :func:`find_shape`."""
    transformers = require("transformers", "hf", "peftrt estimate")
    config = load_config(str(directory))
    if task is None:
        names = getattr(config, "architectures", None) or ()
        task = "causal-lm" if any("CausalLM" in name or "LMHead" in name for name in names) else "classify"
    text = config.get_text_config()
    for name in _NEEDED:
        if not isinstance(getattr(text, name, None), int):
            raise UserError(f"--model: {directory}: expected a Transformer's config.json, it has no {name}")
    config.num_labels = labels
    auto = transformers.AutoModelForCausalLM if task == "causal-lm" else transformers.AutoModelForSequenceClassification
    try:
        with torch.device("meta"):
            model = auto.from_config(config)
    except ValueError as error:
        raise UserError(f"--model: {directory}: {str(error).splitlines()[0]} (--task {task})") from error
    return shape_of(model, text, directory.name, 0 if task == "causal-lm" else labels)


def shape_of(model: nn.Module, config: Any, name: str, classes: int) -> Shape:
    """The sizes of a model with or without data; ``config`` is that of its text."""
    head = _head(model, classes)
    linears = []
    for path, module in model.named_modules():
        if is_linear(module) and not any(module is part for part in head):
            linears.append(Linear(path, *sizes(module)))
    shared = {id(parameter) for parameter in _embedding(model).parameters()}
    in_head = {id(p): p.numel() for module in head for p in module.parameters() if id(p) not in shared}
    heads = config.num_attention_heads
    # GPT-2 says nothing where it is four times the width
    width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    up = [linear for linear in linears if (linear.n, linear.k) == (width, config.hidden_size)]
    return Shape(
        name=name,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=width,
        vocabulary=config.vocab_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        gated=len(up) >= 2 * config.num_hidden_layers,
        fp32_norms=any("RMSNorm" in type(module).__name__ for module in model.modules()),
        linears=tuple(linears),
        head=sum(in_head.values()),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        classes=classes,
    )


def _embedding(model: Any) -> nn.Module:
    return model.get_input_embeddings()


def _head(model: Any, classes: int) -> list[nn.Module]:
    """The linear modules behind the body, tied to the embedding or not."""
    if not classes:
        return [model.get_output_embeddings()]
    body = model.base_model_prefix
    children = [module for name, module in model.named_children() if name != body]
    return [module for child in children for module in child.modules() if is_linear(module)]
