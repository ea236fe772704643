"""Which modules a configuration adapts, decided by their paths alone, as HF peft decides it."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from peftrt.adapters.configs.base import AdapterConfig
from peftrt.adapters.configs.lora import LoraConfig, pattern_key
from peftrt.adapters.configs.pattern import compile_bounded
from peftrt.adapters.configs.targeted import TargetedConfig


def matches(path: str, config: TargetedConfig) -> bool:
    """Whether the module at ``path`` is adapted.

    A string target must match the whole path; a name in a list must be the path or its end after a dot. "all-linear"
    takes every path that is not excluded: which modules are linear, and which is the head, only the caller can see.

    Args:
        path: the module's path in the base model, as in ``named_modules``.
        config: target_modules, exclude_modules, modules_to_save, layers_to_transform and layers_pattern of it count.

    Raises:
        ConfigError: a regular expression of the configuration takes too long on this path.
    """
    if is_excluded(path, config):
        return False
    targets = config.target_modules
    if isinstance(targets, str):
        return config.targets_all_linear or compile_bounded(targets, "target_modules").fullmatch(path)
    assert targets is not None
    if path in targets:
        return True
    return _ends_in_one_of(path, targets) and _layer_is_wanted(path, config)


def is_excluded(path: str, config: TargetedConfig) -> bool:
    """Whether ``exclude_modules`` names the module, or it is one of ``modules_to_save`` or lies in one."""
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        if compile_bounded(excluded, "exclude_modules").fullmatch(path):
            return True
    elif excluded and (path in excluded or _ends_in_one_of(path, excluded)):
        return True
    return any(
        compile_bounded(rf"(^|.*\.){name}($|\..*)", "modules_to_save").match(path)
        for name in config.modules_to_save or ()
    )


def saves_module(path: str, config: AdapterConfig) -> bool:
    """Whether the module at ``path`` is trained and saved whole: the path ends in an entry of ``modules_to_save``."""
    return any(path.endswith(name) for name in config.modules_to_save or ())


def unmatched_targets(config: TargetedConfig, paths: Iterable[str]) -> list[str]:
    """The entries of ``target_modules`` that none of ``paths`` (those that are adapted) answers to.

    A name that the configuration excludes itself is not counted; "all-linear" is unmatched only where ``paths`` is
    empty.
    """
    adapted = [path for path in paths if matches(path, config)]
    targets = config.target_modules
    if isinstance(targets, str):
        return [] if adapted else [targets]
    ends: set[str] = set()
    for path in adapted:
        segments = path.split(".")
        ends.update(".".join(segments[start:]) for start in range(len(segments)))
    return [name for name in targets or () if name not in ends and not is_excluded(name, config)]


def unmatched_patterns(config: LoraConfig, paths: Collection[str]) -> list[str]:
    """The keys of rank and alpha patterns that decide for none of ``paths``, as "rank_pattern['key']"."""
    result = []
    for field, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        used = {pattern_key(patterns, path, field) for path in paths} if patterns else set()
        result += [f"{field}[{key!r}]" for key in patterns if key not in used]
    return result


def _ends_in_one_of(path: str, names: Iterable[str]) -> bool:
    return path.endswith(tuple(f".{name}" for name in names))


def _layer_is_wanted(path: str, config: TargetedConfig) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or wanted == ():
        return True
    index = _layer_index(path, config)
    return index is not None and (index == wanted if isinstance(wanted, int) else index in wanted)


def _layer_index(path: str, config: TargetedConfig) -> int | None:
    """The first number in the path that stands as a layer's index does: after a list's name, before another part."""
    pattern = config.layers_pattern
    names = [pattern] if isinstance(pattern, str) else list(pattern or ())
    segments = path.split(".")
    # Without a pattern peft wants two parts before the number, with one only the list's own name.
    if not names or names == [""]:
        found = (part for part in segments[2:-1] if part.isdecimal())
        return next((int(part) for part in found), None)
    for name in names:
        before = compile_bounded(rf"(?:^|.*?\.){name}", "layers_pattern")
        for position in range(1, len(segments) - 1):
            if segments[position].isdecimal() and before.fullmatch(".".join(segments[:position])):
                return int(segments[position])
    return None
