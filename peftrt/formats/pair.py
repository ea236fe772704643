"""A configuration and the weights that belong to it, in one directory: read as one, replaced as one.

Replacing an adapter takes two renames, so a marker file stands in the directory between them. A reader that meets the
marker waits and reads again: it gets the old adapter or the new one, never the weights of one with the configuration of
the other. A marker that stays belongs to a save that was killed; saving again removes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from peftrt.formats._files import RegularFile, commit, discard, stage, sync_directory
from peftrt.formats.errors import FormatError, MissingFileError, UnsafeFileError
from peftrt.formats.header import CONVERT_HINT
from peftrt.formats.safe import TensorReader, stage_tensors
from peftrt.formats.strict_json import loads_strict

CONFIG_NAME = "adapter_config.json"
MARKER_NAME = ".adapter_being_replaced"
MAX_CONFIG_BYTES = 4 << 20

_ATTEMPTS = 20
_WAIT_SECONDS = 0.05


class Form(NamedTuple):
    """How one library's directories look.

    Attributes:
        library: its name, for messages.
        weights: the safetensors file.
        pickle: what it calls its pickles.
        hint: how to convert one.
        excludes: files beside which the library would read something else than the pair.
    """

    library: str
    weights: str
    pickle: str
    hint: str
    excludes: tuple[str, ...]


PEFT = Form(
    "HF peft",
    "adapter_model.safetensors",
    "adapter_model.bin",
    CONVERT_HINT,
    ("adapter.safetensors", "pytorch_adapter.bin"),
)
ADAPTERHUB = Form(
    "AdapterHub",
    "adapter.safetensors",
    "pytorch_adapter.bin",
    # a prefix is in every layer's state there, and safetensors refuses tensors that share memory
    "it could run code when opened, so it is never read. Convert it where you trust its origin: "
    "safetensors.torch.save_file({key: tensor.clone() for key, tensor in torch.load(FILE, weights_only=True).items()}, "
    "'adapter.safetensors')",
    ("adapter_model.safetensors", "adapter_model.bin", "pytorch_adapter.bin"),
)


def form_of(directory: str) -> Form:
    """Whose directory it is, by the names of its files: HF peft's where nothing says otherwise."""
    peft, hub = (
        any(os.path.lexists(os.path.join(directory, name)) for name in (form.weights, form.pickle))
        for form in (PEFT, ADAPTERHUB)
    )
    return ADAPTERHUB if hub and not peft else PEFT


def read_pair(directory: str, form: Form, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the configuration's JSON object and the tensors; ``options`` are those of ``TensorReader``.

    Raises:
        MissingFileError: one of the two files is not there.
        UnsafeFileError: the weights are a pickle.
        FormatError: a file is not as it must be, or the pair stays half replaced.
    """
    marker = os.path.join(directory, MARKER_NAME)
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_WAIT_SECONDS)
        if os.path.lexists(marker):
            continue
        result = _read_once(directory, form, marker, options)
        if result is not None:
            return result
    raise FormatError(
        f"{directory}: the adapter is being replaced, or a save was killed half-way ({MARKER_NAME} is there): its "
        f"files may not belong together; save it again"
    )


def write_pair(
    path: str | os.PathLike[str],
    form: Form,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    texts: Mapping[str, str],
) -> None:
    """Write both files, or neither; one that is there is replaced whole or not at all.

    Args:
        path: the directory, made where missing; other files in it are left alone.
        form: of the directory.
        config: the JSON object.
        tensors: by key.
        texts: further files, name -> text, written last.

    Raises:
        FormatError: ``path`` is a file or holds one of the files that ``form`` excludes, the configuration is not JSON,
            a tensor cannot be stored.
        OSError: the disk is full or cannot be written; what was there before is intact.
    """
    directory = os.fspath(path)
    if os.path.lexists(directory) and not os.path.isdir(directory):
        raise FormatError(f"{directory}: expected a directory to save in, got a file")
    for other in form.excludes:
        if os.path.lexists(os.path.join(directory, other)):
            raise FormatError(
                f"{directory}: holds {other}, which does not go with what {form.library} would read: save to another "
                "directory, or remove it first"
            )
    text = _config_text(directory, config)
    missing = _missing_directories(directory)
    staged: dict[str, str] = {}
    try:
        os.makedirs(directory, exist_ok=True)
        for name, page in texts.items():
            staged[name] = _stage_text(os.path.join(directory, name), page)
        weights = os.path.join(directory, form.weights)
        staged[form.weights] = stage_tensors(weights, tensors, {"format": "pt"})
        staged[CONFIG_NAME] = _stage_text(os.path.join(directory, CONFIG_NAME), text)
        _swap(directory, form.weights, staged)
        for name in texts:
            commit(staged.pop(name), os.path.join(directory, name))
    except BaseException:
        for temporary in staged.values():
            discard(temporary)
        for made in missing:
            with contextlib.suppress(OSError):
                os.rmdir(made)
        raise


def _read_once(
    directory: str, form: Form, marker: str, options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
    config_path = os.path.join(directory, CONFIG_NAME)
    weights_path = os.path.join(directory, form.weights)
    with RegularFile(config_path, options["root"]) as file:
        if file.size > MAX_CONFIG_BYTES:
            raise FormatError(f"{config_path}: {file.size} bytes, at most {MAX_CONFIG_BYTES} are accepted")
        config = loads_strict(file.read(file.size, 0), config_path)
        file.verify_unchanged()
        if not isinstance(config, dict):
            raise FormatError(f"{config_path}: expected a JSON object, got {type(config).__name__}")
        if not os.path.lexists(weights_path):
            _explain_missing_weights(directory, form)
        with TensorReader(weights_path, **options) as reader:
            tensors = {key: reader.read(key) for key in reader.entries}
            # The marker is looked at first: a replacement that ends after this look changes one of the two files.
            settled = not os.path.lexists(marker) and file.is_current() and reader.file.is_current()
    return (config, tensors) if settled else None


def _explain_missing_weights(directory: str, form: Form) -> None:
    pickle = os.path.join(directory, form.pickle)
    if os.path.lexists(pickle):
        raise UnsafeFileError(f"{pickle}: the weights are a pickle: {form.hint}")
    raise MissingFileError(f"{os.path.join(directory, form.weights)}: no such file")


def _config_text(directory: str, config: Mapping[str, Any]) -> str:
    where = os.path.join(directory, CONFIG_NAME)
    try:
        return json.dumps(dict(config), indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise FormatError(f"{where}: the configuration cannot be written as JSON: {error}") from error


def _stage_text(path: str, text: str) -> str:
    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)

    return stage(path, write)


def _missing_directories(directory: str) -> list[str]:
    missing = []
    current = os.path.abspath(directory)
    while not os.path.lexists(current):
        missing.append(current)
        current = os.path.dirname(current)
    return missing


def _swap(directory: str, weights_name: str, staged: dict[str, str]) -> None:
    """Rename the staged files into place, with the marker up while the two that belong together differ."""
    weights, config = os.path.join(directory, weights_name), os.path.join(directory, CONFIG_NAME)
    marker = os.path.join(directory, MARKER_NAME)
    if os.path.lexists(config):
        with open(marker, "w", encoding="utf-8") as file:
            file.write("The adapter here is being replaced. If no process is doing that, save it again.\n")
        sync_directory(directory)
    backup = _link_beside(weights, staged[weights_name])
    mixed = False
    try:
        mixed = True
        commit(staged.pop(weights_name), weights)
        commit(staged.pop(CONFIG_NAME), config)
        mixed = False
    except BaseException:
        # The configuration is still the old one: put the old weights back beside it.
        if backup is not None:
            os.replace(backup, weights)
            mixed = False
        raise
    finally:
        if backup is not None:
            discard(backup)
        if not mixed:
            discard(marker)
        sync_directory(directory)


def _link_beside(path: str, temporary: str) -> str | None:
    """A second name for the file at ``path``, to put it back by; None where there is no file or no hard links."""
    backup = f"{temporary}-old"
    try:
        os.link(path, backup)
    except OSError:
        return None
    return backup
