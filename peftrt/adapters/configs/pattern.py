"""Regular expressions of configurations, matched within a bound.

``re`` has no limit: ``(a+)+$`` against a name of forty letters runs for hours, and a configuration may come from
anyone. The package ``regex`` reads the same syntax and takes a time limit.
"""

from __future__ import annotations

import functools
import re

import regex

from peftrt.formats.errors import ConfigError

MAX_PATTERN = 4096
MAX_NAME = 1024
SECONDS = 1.0  # a name; the patterns that people write take microseconds


class BoundedPattern:
    """A regular expression, in the syntax of ``re``, whose matching ends after ``SECONDS``.

    Args:
        text: the expression.
        source: what to call it in errors, e.g. "adapter_config.json: target_modules".

    Raises:
        ConfigError: it is not a regular expression, or longer than ``MAX_PATTERN`` characters.
    """

    def __init__(self, text: str, source: str) -> None:
        self.text = text
        self.source = source
        if len(text) > MAX_PATTERN:
            raise ConfigError(f"{source}: regular expression of {len(text)} characters, at most {MAX_PATTERN} accepted")
        try:
            re.compile(text)  # holds the expression to the syntax that peft reads, which regex extends
            self._pattern = regex.compile(text, flags=regex.VERSION0)
        except (re.error, regex.error, OverflowError, RecursionError, FutureWarning, DeprecationWarning) as error:
            raise ConfigError(f"{source}: {self._shown()} is not a regular expression: {error}") from None

    def fullmatch(self, name: str) -> bool:
        """Whether the whole of ``name`` matches, as ``re.fullmatch``; raises ConfigError where that takes too long."""
        return self._run("fullmatch", name)

    def match(self, name: str) -> bool:
        """Whether a beginning of ``name`` matches, as ``re.match``; raises ConfigError where that takes too long."""
        return self._run("match", name)

    def _run(self, method: str, name: str) -> bool:
        if len(name) > MAX_NAME:
            raise ConfigError(f"{self.source}: name of {len(name)} characters, at most {MAX_NAME} are matched")
        try:
            return getattr(self._pattern, method)(name, timeout=SECONDS) is not None
        except TimeoutError:
            raise ConfigError(f"{self.source}: {self._shown()} takes over {SECONDS:g} s to match {name!r}") from None

    def _shown(self) -> str:
        return ascii(self.text if len(self.text) <= 120 else self.text[:117] + "...")


@functools.lru_cache(maxsize=4096)
def compile_bounded(text: str, source: str) -> BoundedPattern:
    """``BoundedPattern(text, source)``, kept for the next call."""
    return BoundedPattern(text, source)
