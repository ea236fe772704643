"""Regular expressions of configuration files: the same answers as ``re``, in bounded time."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from peftrt.adapters.configs.pattern import BoundedPattern
from peftrt.formats.errors import ConfigError

ATOMS = [
    "a",
    "b",
    ".",
    r"\.",
    "[ab]",
    "[^a]",
    r"\d",
    r"\w",
    r"\W",
    "[a-c.]",
    r"[\d_]",
    "^",
    "$",
    r"\b",
    r"\B",
    "()",
    "ab",
]
LOOKS = ["(?=a)", "(?!b)", "(?<=a)", "(?<!ab)", "(?=.*b)", "(?!)"]

EXPRESSIONS = st.recursive(
    st.sampled_from([*ATOMS, *LOOKS]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{1,3}", "{0,2}?", "{2,}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
        inner.map(lambda part: f"({part})"),
    ),
    max_leaves=6,
)


@given(EXPRESSIONS, st.lists(st.text("ab1_.\n", max_size=8), min_size=1, max_size=5))
@example(r"(a?){3}b", ["b", "aaab", "aaaab"])
@example(r"(?:a|ab)(?:c|bcd)", ["abcd", "abc", "acd"])
@example(r"(.*\.)?(q_proj|k_proj)$", ["x.q_proj", "q_proj", "xq_proj", "q_proj\n"])
@example(r"a\b|\Bb", ["", "a", "b", "ab"])
def test_answers_as_re(expression: str, names: list[str]) -> None:
    pattern = BoundedPattern(expression, "test")
    for name in names:
        assert pattern.match(name) == bool(re.match(expression, name)), (expression, name)
        assert pattern.fullmatch(name) == bool(re.fullmatch(expression, name)), (expression, name)


@pytest.mark.parametrize(
    "expression",
    [
        "(a+)+$",
        "(a|aa)+$",
        "(a|a?)+$",
        "((((a*)*)*)*)*b",
        "(.*a){20}b",
        ".*.*.*.*.*.*.*.*b",
        "(((a{0,1000}){0,1000}){0,1000})b",
        "((?:){1000}){1000}",
        "(?=(?=(?=.*b)*.*b)*.*b)*",
        "(?:(?=.*.*.*b)a|a)*b",
    ],
)
def test_expression_that_would_run_for_hours(expression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftrt.adapters.configs.pattern.SECONDS", 0.05)
    pattern = BoundedPattern(expression, "test")
    try:
        matched, refusal = pattern.fullmatch("a" * 200 + "!"), None
    except ConfigError as error:
        matched, refusal = False, str(error)
    assert not matched
    assert refusal is None or (expression in refusal and "takes over" in refusal)


@pytest.mark.parametrize(
    ("expression", "culprit"),
    [
        ("a(", "not a regular expression"),
        ("[", "not a regular expression"),
        ("(?<=a+)b", "not a regular expression"),
        ("a" * 5000, "5000 characters"),
        ("a{99999999999}", "regular expression"),
    ],
)
def test_expression_that_is_refused(expression: str, culprit: str) -> None:
    with pytest.raises(ConfigError, match="my_field") as caught:
        BoundedPattern(expression, "my_field")
    assert culprit in str(caught.value)
    assert len(str(caught.value)) < 400


def test_name_beyond_the_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match="2000 characters"):
        BoundedPattern("a*", "x").match("a" * 2000)
