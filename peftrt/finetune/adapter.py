"""The adapter that a run trains: a new one, or one that a former run left in a directory."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

import peftrt
from peftrt.adapters.reading import read_adapter
from peftrt.adapters.state import ModelAdapters
from peftrt.finetune.errors import UserError
from peftrt.finetune.settings import Settings

_TASK_TYPES = {"classify": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}


def put_adapter(model: nn.Module, settings: Settings, whole: Sequence[str], note: Callable[[str], None]) -> Any:
    """Put the run's adapter on the model, in training; the base is quantised on the way where asked.

    Args:
        model: without adapters.
        settings: the run's.
        whole: modules that must be trained and saved whole.
        note: takes a line that the user should see.

    Returns:
        ``peftrt.adapt``'s report.

    Raises:
        UserError: it cannot be had.
    """
    quantize = None if settings.quantize == "none" else settings.quantize
    try:
        if settings.adapter is None:
            return peftrt.adapt(model, _new_config(settings, whole), quantize=quantize)
        return _go_on(model, settings, whole, quantize, note)
    except ValueError as error:
        option = "" if settings.adapter is None else "--adapter: "
        raise UserError(option + " ".join(str(error).split())) from error


def _new_config(settings: Settings, whole: Sequence[str]) -> peftrt.LoraConfig:
    targets = settings.target_modules
    return peftrt.LoraConfig(
        r=settings.r,
        lora_alpha=2 * settings.r if settings.alpha is None else settings.alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets[0] if targets == ("all-linear",) else targets,
        use_rslora=settings.rslora,
        modules_to_save=list(whole) or None,
        task_type=_TASK_TYPES[settings.task],
        base_model_name_or_path=settings.model,
    )


def _go_on(
    model: nn.Module, settings: Settings, whole: Sequence[str], quantize: str | None, note: Callable[[str], None]
) -> Any:
    directory = settings.adapter
    assert directory is not None
    config: Any = read_adapter(model, ModelAdapters(), directory, "default").config
    expected = _TASK_TYPES[settings.task]
    if config.task_type not in (None, expected):
        raise UserError(
            f"--adapter: {directory} was trained for {config.task_type}, --task {settings.task} is {expected}"
        )
    saved = tuple(config.modules_to_save or ())
    for path in whole:
        if not any(path == name or path.endswith(f".{name}") for name in saved):
            raise UserError(f"--adapter: {directory} has no {path}, which {settings.model} lacks as well")
    if hasattr(config, "init_lora_weights"):
        # the values are in the file: a beginning that looks at the base would change it
        config = dataclasses.replace(config, init_lora_weights=True)
    report = peftrt.adapt(model, config, quantize=quantize)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        peftrt.load(model, directory, trainable=True, replace=True)
    for warning in told:
        note(f"note: {warning.message}")
    return report
