"""HF peft's adapter directories: ``adapter_config.json``, ``adapter_model.safetensors``, ``README.md``.

Replacing an adapter takes two renames, so a marker file stands in the directory between them. A reader that meets the
marker waits and reads again: it gets the old adapter or the new one, never the weights of one with the configuration of
the other. A marker that stays belongs to a save that was killed; saving again removes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from peftrt.formats._files import RegularFile, commit, discard, stage, sync_directory
from peftrt.formats._header import CONVERT_HINT
from peftrt.formats._json import loads_strict
from peftrt.formats.errors import FormatError, MissingFileError, UnsafeFileError
from peftrt.formats.names import require_inside, resolve_inside
from peftrt.formats.safe import MAX_BYTES, MAX_TENSORS, TensorReader, stage_tensors

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
README_NAME = "README.md"
MARKER_NAME = ".adapter_being_replaced"
MAX_CONFIG_BYTES = 4 << 20
KEY_PREFIX = "base_model.model."

_ATTEMPTS = 20
_WAIT_SECONDS = 0.05
_MAX_ENTRIES = 100_000

# What follows the module's path in a key, and the part of the adapter it is.
_SUFFIXES = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_B.bias": "lora_B.bias",
    ".lora_magnitude_vector": "lora_magnitude_vector",
    ".lora_embedding_A": "lora_embedding_A",
    ".lora_embedding_B": "lora_embedding_B",
    ".ia3_l": "ia3_l",
}
# peft writes an adapted embedding's or head's own tensors along.
_BASE = ".base_layer."


class PeftKey(NamedTuple):
    """A key of ``adapter_model.safetensors`` taken apart.

    ``path`` is the module's path in the base model; ``part`` is "lora_A", "lora_B", "lora_B.bias",
    "lora_magnitude_vector" (DoRA's), "lora_embedding_A", "lora_embedding_B", "ia3_l", "base" for a tensor of the
    adapted module itself, or "saved" for a parameter of a module in ``modules_to_save``; of the last two ``leaf`` is
    the name in that module.
    """

    path: str
    part: str
    leaf: str = ""


def split_key(key: str, modules_to_save: Sequence[str] = ()) -> PeftKey:
    """Take the key of an adapter of LoRA or IA3 apart.

    Args:
        key: e.g. ``base_model.model.encoder.layer.0.attention.self.query.lora_A.weight``.
        modules_to_save: the configuration's field; a module belongs to it where its path ends in an entry, as in peft.

    Raises:
        FormatError: the key is none of those, named in the message.
    """
    if key.startswith(KEY_PREFIX):
        rest = key[len(KEY_PREFIX) :]
        for suffix, part in _SUFFIXES.items():
            path = rest.removesuffix(suffix)
            if path and path != rest:
                return PeftKey(path, part)
        path, _, leaf = rest.rpartition(_BASE)
        if path and leaf and "." not in leaf:
            return PeftKey(path, "base", leaf)
        if (found := split_saved_key(key, modules_to_save)) is not None:
            return found
    raise FormatError(
        f"key {key!a} is not supported: expected {KEY_PREFIX}<module> followed by {', '.join(_SUFFIXES)}, or a "
        f"parameter of modules_to_save ({', '.join(modules_to_save) or 'none'})"
    )


def split_saved_key(key: str, modules_to_save: Sequence[str]) -> PeftKey | None:
    """Take the key of a parameter of ``modules_to_save`` apart; None for another key."""
    segments = key.removeprefix(KEY_PREFIX).split(".")
    for count in range(1, len(segments) if key.startswith(KEY_PREFIX) else 0):
        path = ".".join(segments[:count])
        if any(path.endswith(name) for name in modules_to_save):
            return PeftKey(path, "saved", ".".join(segments[count:]))
    return None


def join_key(path: str, part: str, leaf: str = "") -> str:
    """The inverse of ``split_key``."""
    if part in ("saved", "base"):
        return f"{KEY_PREFIX}{path}{_BASE if part == 'base' else '.'}{leaf}"
    for suffix, known in _SUFFIXES.items():
        if part == known:
            return f"{KEY_PREFIX}{path}{suffix}"
    raise FormatError(f"part {part!r} of an adapter is not one of {', '.join(_SUFFIXES.values())}, base, saved")


def read_peft_dir(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    root: str | os.PathLike[str] | None = None,
    max_tensors: int = MAX_TENSORS,
    max_bytes: int = MAX_BYTES,
    allow_nonfinite: bool = False,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return an adapter's configuration, as the JSON object it is, and its tensors by their keys in the file.

    Args:
        path: the directory that holds the files, or one that holds exactly one subfolder that does (peft saves an
            adapter that is not called "default" in a subfolder of its name).
        name: the subfolder to take where there are several; "default" is ``path`` itself.
        root: where given, every file must lie under it once links are followed.
        max_tensors, max_bytes, allow_nonfinite: see ``peftrt.formats.safe.TensorReader``.

    Raises:
        MissingFileError: no adapter is there.
        UnsafeFileError: its weights are a pickle.
        FormatError: a file is not as it must be, or the choice is ambiguous.
    """
    directory = find_peft_dir(path, name=name, root=root)
    options: dict[str, Any] = {
        "root": root,
        "max_tensors": max_tensors,
        "max_bytes": max_bytes,
        "allow_nonfinite": allow_nonfinite,
    }
    marker = os.path.join(directory, MARKER_NAME)
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_WAIT_SECONDS)
        if os.path.lexists(marker):
            continue
        result = _read_pair(directory, marker, options)
        if result is not None:
            return result
    raise FormatError(
        f"{directory}: the adapter is being replaced, or a save was killed half-way ({MARKER_NAME} is there): its "
        f"files may not belong together; save it again"
    )


def find_peft_dir(
    path: str | os.PathLike[str], *, name: str | None = None, root: str | os.PathLike[str] | None = None
) -> str:
    """Return the directory that holds ``adapter_config.json``; arguments and errors are those of ``read_peft_dir``."""
    top = os.fspath(path)
    if "\0" in top:
        raise FormatError(f"path {top!a} must not contain NUL")
    if root is not None:
        require_inside(root, top)
    if not os.path.isdir(top):
        if os.path.lexists(top):
            raise FormatError(f"{top}: expected an adapter's directory, got a file")
        raise MissingFileError(f"{top}: no such directory")
    if name is not None and name != "default":
        resolve_inside(top, name)
        if not _holds_adapter(os.path.join(top, name)):
            found = ", ".join(_subfolders(top)) or "none"
            raise MissingFileError(f"{top}: no adapter {name!a} in it; subfolders with an adapter: {found}")
        return os.path.join(top, name)
    if name == "default" or _holds_adapter(top):
        return top
    names = _subfolders(top)
    if len(names) == 1:
        return os.path.join(top, names[0])
    if names:
        raise FormatError(f"{top}: holds several adapters ({', '.join(names)}); say which one with name=")
    raise MissingFileError(f"{top}: no {CONFIG_NAME} in it or in a subfolder of it")


def write_peft_dir(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    readme: str | None = None,
) -> None:
    """Write an adapter at ``path`` so that HF peft 0.21 loads it; one that is there is replaced whole or not at all.

    Args:
        path: the directory, made where missing; other files in it are left alone.
        config: the contents of ``adapter_config.json``, with ``peft_type``.
        tensors: tensors by peft's keys.
        readme: the text of ``README.md``; where None, a short one with the base model's name.

    Raises:
        FormatError: ``path`` is a file, the configuration is not JSON or has no ``peft_type``, a tensor cannot be
            stored.
        OSError: the disk is full or cannot be written; what was there before is intact.
    """
    directory = os.fspath(path)
    if os.path.lexists(directory) and not os.path.isdir(directory):
        raise FormatError(f"{directory}: expected a directory to save in, got a file")
    text = _config_text(directory, config)
    missing = _missing_directories(directory)
    staged: dict[str, str] = {}
    try:
        os.makedirs(directory, exist_ok=True)
        page = default_readme(config) if readme is None else readme
        staged[README_NAME] = _stage_text(os.path.join(directory, README_NAME), page)
        staged[WEIGHTS_NAME] = stage_tensors(os.path.join(directory, WEIGHTS_NAME), tensors, {"format": "pt"})
        staged[CONFIG_NAME] = _stage_text(os.path.join(directory, CONFIG_NAME), text)
        _swap(directory, staged)
    except BaseException:
        for temporary in staged.values():
            discard(temporary)
        for made in missing:
            with contextlib.suppress(OSError):
                os.rmdir(made)
        raise


def default_readme(config: Mapping[str, Any]) -> str:
    """A model card in the form that the Hub and peft expect: the base model and the library in its front matter."""
    base = config.get("base_model_name_or_path")
    # A JSON string is a YAML string, whatever is in the name.
    front = ["library_name: peft"] if not base else [f"base_model: {json.dumps(base)}", "library_name: peft"]
    lines = ["---", *front, "---", "", "# Adapter", "", f"- Type: {config.get('peft_type')}"]
    lines.append(f"- Base model: {base or 'not recorded'}")
    lines += [f"- {key}: {config[key]}" for key in ("r", "lora_alpha", "task_type") if config.get(key) is not None]
    return "\n".join([*lines, "", "Saved by peftrt; HF peft and peftrt load this directory.", ""])


def _read_pair(
    directory: str, marker: str, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
    config_path = os.path.join(directory, CONFIG_NAME)
    weights_path = os.path.join(directory, WEIGHTS_NAME)
    with RegularFile(config_path, options["root"]) as file:
        if file.size > MAX_CONFIG_BYTES:
            raise FormatError(f"{config_path}: {file.size} bytes, at most {MAX_CONFIG_BYTES} are accepted")
        config = loads_strict(file.read(file.size, 0), config_path)
        file.verify_unchanged()
        if not isinstance(config, dict):
            raise FormatError(f"{config_path}: expected a JSON object, got {type(config).__name__}")
        if not os.path.lexists(weights_path):
            _explain_missing_weights(directory)
        with TensorReader(weights_path, **options) as reader:
            tensors = {key: reader.read(key) for key in reader.entries}
            # The marker is looked at first: a replacement that ends after this look changes one of the two files.
            settled = not os.path.lexists(marker) and file.is_current() and reader.file.is_current()
    return (config, tensors) if settled else None


def _explain_missing_weights(directory: str) -> None:
    if os.path.lexists(os.path.join(directory, PICKLE_NAME)):
        raise UnsafeFileError(f"{os.path.join(directory, PICKLE_NAME)}: the weights are a pickle: {CONVERT_HINT}")
    raise MissingFileError(f"{os.path.join(directory, WEIGHTS_NAME)}: no such file")


def _holds_adapter(directory: str) -> bool:
    return os.path.lexists(os.path.join(directory, CONFIG_NAME))


def _subfolders(top: str) -> list[str]:
    names = os.listdir(top)
    if len(names) > _MAX_ENTRIES:
        raise FormatError(
            f"{top}: {len(names)} entries, at most {_MAX_ENTRIES} are searched; name the adapter's directory"
        )
    return sorted(name for name in names if _holds_adapter(os.path.join(top, name)))


def _config_text(directory: str, config: Mapping[str, Any]) -> str:
    where = os.path.join(directory, CONFIG_NAME)
    if not isinstance(config.get("peft_type"), str):
        raise FormatError(f"{where}: 'peft_type' must be a string, got {config.get('peft_type')!r}")
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


def _swap(directory: str, staged: dict[str, str]) -> None:
    """Rename the staged files into place, with the marker up while the two that belong together differ."""
    weights, config = os.path.join(directory, WEIGHTS_NAME), os.path.join(directory, CONFIG_NAME)
    marker = os.path.join(directory, MARKER_NAME)
    if os.path.lexists(config):
        with open(marker, "w", encoding="utf-8") as file:
            file.write("The adapter here is being replaced. If no process is doing that, save it again.\n")
        sync_directory(directory)
    backup = _link_beside(weights, staged[WEIGHTS_NAME])
    mixed = False
    try:
        mixed = True
        commit(staged.pop(WEIGHTS_NAME), weights)
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
    commit(staged.pop(README_NAME), os.path.join(directory, README_NAME))


def _link_beside(path: str, temporary: str) -> str | None:
    """A second name for the file at ``path``, to put it back by; None where there is no file or no hard links."""
    backup = f"{temporary}-old"
    try:
        os.link(path, backup)
    except OSError:
        return None
    return backup
