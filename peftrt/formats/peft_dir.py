"""HF peft's adapter directories: ``adapter_config.json``, ``adapter_model.safetensors``, ``README.md``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from peftrt.formats.errors import FormatError, MissingFileError
from peftrt.formats.names import require_inside, resolve_inside
from peftrt.formats.pair import CONFIG_NAME, PEFT, read_pair, write_pair
from peftrt.formats.safe import MAX_BYTES, MAX_TENSORS

README_NAME = "README.md"
KEY_PREFIX = "base_model.model."

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
    options = {"root": root, "max_tensors": max_tensors, "max_bytes": max_bytes, "allow_nonfinite": allow_nonfinite}
    return read_pair(directory, PEFT, options)


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
    if not isinstance(config.get("peft_type"), str):
        where = os.path.join(os.fspath(path), CONFIG_NAME)
        raise FormatError(f"{where}: 'peft_type' must be a string, got {config.get('peft_type')!r}")
    page = default_readme(config) if readme is None else readme
    write_pair(path, PEFT, config, tensors, {README_NAME: page})


def default_readme(config: Mapping[str, Any]) -> str:
    """A model card in the form that the Hub and peft expect: the base model and the library in its front matter."""
    base = config.get("base_model_name_or_path")
    # A JSON string is a YAML string, whatever is in the name.
    front = ["library_name: peft"] if not base else [f"base_model: {json.dumps(base)}", "library_name: peft"]
    lines = ["---", *front, "---", "", "# Adapter", "", f"- Type: {config.get('peft_type')}"]
    lines.append(f"- Base model: {base or 'not recorded'}")
    lines += [f"- {key}: {config[key]}" for key in ("r", "lora_alpha", "task_type") if config.get(key) is not None]
    return "\n".join([*lines, "", "Saved by peftrt; HF peft and peftrt load this directory.", ""])


def _holds_adapter(directory: str) -> bool:
    return os.path.lexists(os.path.join(directory, CONFIG_NAME))


def _subfolders(top: str) -> list[str]:
    names = os.listdir(top)
    if len(names) > _MAX_ENTRIES:
        raise FormatError(
            f"{top}: {len(names)} entries, at most {_MAX_ENTRIES} are searched; name the adapter's directory"
        )
    return sorted(name for name in names if _holds_adapter(os.path.join(top, name)))
