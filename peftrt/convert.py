"""``peftrt convert``: HF peft's adapters as AdapterHub's and the other way round, where both compute the same."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peftrt.adapters.adapterhub import read_from_hub, to_hub
from peftrt.adapters.methods import method_of_file
from peftrt.adapters.state import ModelAdapters
from peftrt.finetune.errors import UserError, require
from peftrt.finetune.models import load_config
from peftrt.formats.adapterhub_dir import is_adapterhub_dir, read_adapterhub_dir, write_adapterhub_dir
from peftrt.formats.errors import FormatError, UnsupportedError, named
from peftrt.formats.peft_dir import CONFIG_NAME, KEY_PREFIX, find_peft_dir, read_peft_dir, write_peft_dir

TARGETS = ("peft", "adapterhub")

_LIBRARIES = {"peft": "HF peft", "adapterhub": "AdapterHub"}
# peft's task_type -> the class by which transformers finds the model with that head
_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_EVERY = ("AutoModel", *_AUTO.values())


def convert(source: str, target: str, *, to: str, model: str | None = None, name: str = "default") -> None:
    """Read the adapter in ``source`` and write it into ``target``.

    Args:
        source: a directory as HF peft or AdapterHub writes it.
        target: the directory to write.
        to: "peft" or "adapterhub".
        model: directory or Hub id of the base, or its ``config.json``: only that is read. By default the one that the
            adapter names.
        name: the adapter's in AdapterHub's files.

    Raises:
        UserError: a directory is bad, or the adapter cannot be said in the other form; the message says why.
    """
    with _told():
        try:
            directory = find_peft_dir(source)
            theirs = "adapterhub" if is_adapterhub_dir(directory) else "peft"
            if theirs == to:
                raise UserError(f"{directory}: an adapter of {_LIBRARIES[to]} already")
            convert_to = _to_peft if to == "peft" else _to_adapterhub
            what = convert_to(directory, target, model, name)
        except FormatError as error:
            raise UserError(str(error)) from None
    print(f"{target}: {what}, for {_LIBRARIES[to]}")


def _to_peft(directory: str, target: str, model: str | None, name: str) -> str:
    given, named = read_adapterhub_dir(directory)
    base = _skeleton(model, given.get("model_name"), given.get("model_class"), named)
    values, tensors = read_from_hub(base, directory)
    if values["peft_type"] == "BOTTLENECK":
        raise UnsupportedError(
            f"{directory}: HF peft has no bottleneck adapters; peftrt.load reads the directory as it is"
        )
    if values.get("shift_positions") is False:
        raise UnsupportedError(
            f"{directory}: HF peft counts positions from behind a prefix, AdapterHub as if there were none: the same "
            "prefix would compute something else; peftrt.load reads the directory as it is"
        )
    config = _checked(base, values, tensors, directory)
    write_peft_dir(target, config.to_peft_dict(), tensors)
    return _shown(values, tensors)


def _to_adapterhub(directory: str, target: str, model: str | None, name: str) -> str:
    values, tensors = read_peft_dir(directory, name="default")
    auto = _AUTO.get(values.get("task_type") or "")
    keys = (key.removeprefix(KEY_PREFIX) for key in tensors)
    base = _skeleton(model, values.get("base_model_name_or_path"), auto, keys)
    config = _checked(base, values, tensors, directory)
    with named(directory):
        written = to_hub(base, name, config.to_peft_dict(), tensors)
    write_adapterhub_dir(target, *written)
    return _shown(values, tensors)


def _checked(base: nn.Module, values: dict[str, Any], tensors: dict[str, torch.Tensor], directory: str) -> Any:
    """The configuration, once it fits the tensors and both fit the model."""
    method = method_of_file(values, os.path.join(directory, CONFIG_NAME))
    config, parts = method.parse(values, tensors, directory)
    method.fit(base, config, ModelAdapters(), parts, directory)
    return config


def _skeleton(model: str | None, recorded: Any, wanted: Any, keys: Iterable[str]) -> nn.Module:
    """The base without data, which has the names and shapes of its modules: with the head that the keys speak of.

    Args:
        model: what the user says.
        recorded: what the adapter says.
        wanted: the class that the adapter says, to be tried first.
        keys: paths of the adapter's modules and what follows them.
    """
    name = model or recorded
    if not isinstance(name, str) or not name:
        raise UserError("--model: the adapter does not say for what base it is: give its directory or config.json")
    transformers = require("transformers", "hf", "peftrt convert")
    config = load_config(name)
    roots = {key.partition(".")[0] for key in keys if "." in key}
    inner: nn.Module | None = None
    for class_name in (wanted, *(config.architectures or ()), *_EVERY):
        found: Any = getattr(transformers, class_name, None) if isinstance(class_name, str) else None
        with torch.device("meta"):
            if class_name in _EVERY and type(config) in found._model_mapping:
                inner = found.from_config(config)
            elif getattr(found, "config_class", None) is type(config):
                inner = found(config)
            else:
                continue
        if roots <= dict(inner.named_children()).keys():
            return inner
    if inner is None:
        raise UserError(f"--model: transformers has no model for {name!r} ({type(config).__name__})")
    return inner


def _shown(values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    count = len(tensors)
    return f"{values['peft_type']}, {count} tensor{'s' if count > 1 else ''}"


@contextmanager
def _told() -> Iterator[None]:
    """Warnings as lines of the command."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        print(f"peftrt: warning: {warning.message}", file=sys.stderr)
