"""Regular expressions from configuration files, matched in bounded time.

`re` has no time limit: `(a+)+$` against a name of forty letters runs for hours. Here the expression is parsed by `re`
itself, so the syntax is the same, but matched by moving a set of positions through the parse tree: no position is tried
twice along a repetition, and the steps are counted. A set of positions is an integer, bit i for position i.

What decides whether `re` matches is decided alike (tests compare the two). Not supported, and refused by name:
back-references, conditionals, atomic groups, possessive repetition, flags.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from peftrt.formats.errors import ConfigError

MAX_PATTERN = 4096
MAX_GROUPS = 64
MAX_REPEAT = 1024
MAX_NAME = 1024
MAX_STEPS = 20_000

_CATEGORIES = {
    "CATEGORY_DIGIT": re.compile(r"\d"),
    "CATEGORY_NOT_DIGIT": re.compile(r"\D"),
    "CATEGORY_SPACE": re.compile(r"\s"),
    "CATEGORY_NOT_SPACE": re.compile(r"\S"),
    "CATEGORY_WORD": re.compile(r"\w"),
    "CATEGORY_NOT_WORD": re.compile(r"\W"),
}


class BoundedPattern:
    """A regular expression whose matching takes at most `MAX_STEPS` steps.

    Args:
        text: the expression, in Python's syntax.
        source: what to call it in errors, e.g. "adapter_config.json: target_modules".

    Raises:
        ConfigError: it is not a regular expression, too long, or uses what is not supported.
    """

    def __init__(self, text: str, source: str) -> None:
        self.text = text
        self.source = source
        if len(text) > MAX_PATTERN:
            raise ConfigError(f"{source}: regular expression of {len(text)} characters, at most {MAX_PATTERN} accepted")
        # Groups bound the depth of the recursion, here and in `re`'s parser.
        if re.sub(r"\\.", "", text, flags=re.DOTALL).count("(") > MAX_GROUPS:
            raise ConfigError(f"{source}: regular expression with more than {MAX_GROUPS} groups")
        try:
            tree = _parser.parse(text)
        except (re.error, OverflowError, RecursionError, FutureWarning, DeprecationWarning) as error:
            raise ConfigError(f"{source}: {self._shown()} is not a regular expression: {error}") from None
        if tree.state.flags & ~re.UNICODE:
            raise ConfigError(f"{source}: {self._shown()}: flags such as (?i) are not supported")
        self._nodes = list(tree)
        self._check(self._nodes)

    def fullmatch(self, name: str) -> bool:
        """Whether the whole of `name` matches, as `re.fullmatch`; raises `ConfigError` where that takes too long."""
        return bool(self._run(name) >> len(name) & 1)

    def match(self, name: str) -> bool:
        """Whether a beginning of `name` matches, as `re.match`; raises `ConfigError` where that takes too long."""
        return bool(self._run(name))

    def _run(self, name: str) -> int:
        if len(name) > MAX_NAME:
            raise ConfigError(f"{self.source}: name of {len(name)} characters, at most {MAX_NAME} are matched")
        return _Run(self, name).sequence(self._nodes, 1)

    def _check(self, nodes: Any) -> None:
        for operation, argument in nodes:
            kind = str(operation)
            if kind in ("MAX_REPEAT", "MIN_REPEAT"):
                low, high, body = argument
                if low > MAX_REPEAT or (high > MAX_REPEAT and high != _parser.MAXREPEAT):
                    raise ConfigError(f"{self.source}: {self._shown()} repeats more than {MAX_REPEAT} times")
                self._check(body)
            elif kind == "SUBPATTERN":
                if argument[1] or argument[2]:
                    raise ConfigError(f"{self.source}: {self._shown()}: flags such as (?i:...) are not supported")
                self._check(argument[3])
            elif kind == "BRANCH":
                for branch in argument[1]:
                    self._check(branch)
            elif kind in ("ASSERT", "ASSERT_NOT"):
                direction, body = argument
                low, high = body.getwidth()
                if direction < 0 and low != high:
                    raise ConfigError(f"{self.source}: {self._shown()} looks behind by a width that is not fixed")
                self._check(body)
            elif kind not in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT", "FAILURE"):
                what = kind.lower().replace("_", " ").replace("groupref", "back-reference")
                raise ConfigError(f"{self.source}: {self._shown()}: {what} is not supported in a configuration")

    def _shown(self) -> str:
        return ascii(self.text if len(self.text) <= 120 else self.text[:117] + "...")


@functools.lru_cache(maxsize=4096)
def compile_bounded(text: str, source: str) -> BoundedPattern:
    """`BoundedPattern(text, source)`, kept for the next call."""
    return BoundedPattern(text, source)


class _Run:
    """One expression against one name: positions in, positions out, steps counted."""

    def __init__(self, pattern: BoundedPattern, name: str) -> None:
        self.pattern = pattern
        self.name = name
        self.steps = 0
        self.all = (1 << (len(name) + 1)) - 1
        self.masks: dict[Any, int] = {}
        # Character -> the positions where it stands.
        self.places: dict[str, int] = {}
        for position, char in enumerate(name):
            self.places[char] = self.places.get(char, 0) | 1 << position

    def sequence(self, nodes: Any, starts: int) -> int:
        for operation, argument in nodes:
            if not starts:
                return 0
            starts = self.node(str(operation), argument, starts)
        return starts

    def node(self, kind: str, argument: Any, starts: int) -> int:
        self.step()
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, body = argument
            return self.repeat(low, high, body, starts)
        if kind == "SUBPATTERN":
            return self.sequence(argument[3], starts)
        if kind == "BRANCH":
            return functools.reduce(int.__or__, (self.sequence(branch, starts) for branch in argument[1]))
        if kind == "AT":
            return starts & self.boundary(str(argument))
        if kind in ("ASSERT", "ASSERT_NOT"):
            return self.look(argument[0], argument[1], starts, wanted=kind == "ASSERT")
        if kind == "FAILURE":
            return 0
        return (starts & self.characters(kind, argument)) << 1

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise ConfigError(
                f"{self.pattern.source}: {self.pattern._shown()} takes more than {MAX_STEPS} steps on a name of "
                f"{len(self.name)} characters"
            )

    def repeat(self, low: int, high: int, body: Any, starts: int) -> int:
        for _ in range(low):
            self.step()
            starts = self.sequence(body, starts)
            if not starts:
                return 0
        reached = new = starts
        rounds = low
        while new and rounds < high:
            self.step()
            new = self.sequence(body, new) & ~reached
            reached |= new
            rounds += 1
        return reached

    def look(self, direction: int, body: Any, starts: int, wanted: bool) -> int:
        kept = 0
        width = body.getwidth()[0] if direction < 0 else 0
        for position in range(len(self.name) + 1):
            if not starts >> position & 1:
                continue
            self.step()
            if direction > 0:
                found = bool(self.sequence(body, 1 << position))
            else:
                # `re` allows only a fixed width behind.
                found = position >= width and bool(self.sequence(body, 1 << (position - width)) >> position & 1)
            if found == wanted:
                kept |= 1 << position
        return kept

    def boundary(self, kind: str) -> int:
        name, end = self.name, 1 << len(self.name)
        if kind in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return 1
        if kind == "AT_END":
            return end | end >> 1 if name.endswith("\n") else end
        if kind == "AT_END_STRING":
            return end
        word = _CATEGORIES["CATEGORY_WORD"]
        inside = [False, *(bool(word.match(char)) for char in name), False]
        changes = sum(1 << i for i in range(len(name) + 1) if inside[i] != inside[i + 1])
        if kind == "AT_BOUNDARY":
            return changes
        # An empty name has no \B in Python before 3.14.
        return self.all & ~changes if name or re.match(r"\B", "") else 0

    def characters(self, kind: str, argument: Any) -> int:
        if kind == "LITERAL":
            return self.places.get(chr(argument), 0)
        # Nodes live as long as the expression, so an id stands for one node during this run.
        mask = self.masks.get(id(argument)) if kind == "IN" else self.masks.get((kind, argument))
        if mask is None:
            test = _character_test(kind, argument)
            mask = functools.reduce(int.__or__, (place for char, place in self.places.items() if test(char)), 0)
            self.masks[id(argument) if kind == "IN" else (kind, argument)] = mask
        return mask


def _character_test(kind: str, argument: Any) -> Callable[[str], bool]:
    if kind == "NOT_LITERAL":
        return lambda char: ord(char) != argument
    if kind == "ANY":
        return lambda char: char != "\n"

    def in_set(char: str) -> bool:
        negated = found = False
        for operation, value in argument:
            item = str(operation)
            if item == "NEGATE":
                negated = True
            elif item == "LITERAL":
                found = found or ord(char) == value
            elif item == "RANGE":
                found = found or value[0] <= ord(char) <= value[1]
            else:
                found = found or bool(_CATEGORIES[str(value)].match(char))
        return found != negated

    return in_set
