"""faults.md's kind of input for names and paths: refused by type, with the culprit in the message, nothing touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from peftrt.formats.errors import AdapterNameError, FormatError
from peftrt.formats.names import check_adapter_name, require_inside, resolve_inside


@pytest.mark.parametrize("name", ["fr", "tenant-7", "a b", "日本語", "_x", "0", "x" * 255, "é" * 127, "org:model@3"])
def test_usable_names_are_returned_unchanged(name: str) -> None:
    assert check_adapter_name(name, ["other"]) == name


@pytest.mark.parametrize(
    ("name", "culprit"),
    [
        ("", "empty"),
        ("..", "'.'"),
        ("v1.2", "v1.2"),
        ("/etc/passwd", "'/'"),
        ("a/b", "a/b"),
        ("a\\b", "must not contain"),
        ("a\0b", "U+0000"),
        ("a\nb", "U+000A"),
        ("a\tb", "U+0009"),
        ("abc\u202edcba", "RIGHT-TO-LEFT OVERRIDE"),
        ("abc\u200f", "RIGHT-TO-LEFT MARK"),
        ("a\u2066b", "U+2066"),
        ("a\u200bb", "ZERO WIDTH SPACE"),
        ("\ufeffa", "U+FEFF"),
        ("a\u2028b", "U+2028"),
        ("a\u00a0b", "NO-BREAK SPACE"),
        ("a\ud800", "surrogate"),
        ("x" * 256, "256 bytes"),
        ("é" * 128, "256 bytes"),
        ("x" * 4096, "4096 bytes"),
        (" a", "space"),
        ("a ", "space"),
        ("a  b", "space"),
        ("forward", "forward"),
        ("keys", "keys"),
        ("_modules", "_modules"),
        ("__class__", "__class__"),
    ],
)
def test_unusable_names_are_refused(name: str, culprit: str) -> None:
    with pytest.raises(AdapterNameError) as caught:
        check_adapter_name(name)
    assert culprit in str(caught.value)
    # What is printed must not itself carry control characters or run on for pages.
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", [None, 3, b"fr", ["fr"]])
def test_names_of_another_type_are_refused(name: object) -> None:
    with pytest.raises(TypeError, match=type(name).__name__):
        check_adapter_name(name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "existing"),
    [
        ("fr", "fr"),
        ("FR", "fr"),
        ("straße", "STRASSE"),
        ("caf\u00e9", "cafe\u0301"),
        ("ﬁ", "fi"),
        ("\u212b", "\u00e5"),
        ("\uff46\uff52", "fr"),
    ],
)
def test_names_that_collide_are_refused(name: str, existing: str) -> None:
    loaded = [existing, "other"]
    for one, two in ((name, existing), (existing, name)):
        with pytest.raises(AdapterNameError, match="in use"):
            check_adapter_name(one, [two, "other"])
    assert loaded == [existing, "other"]


def test_relative_paths_stay_inside(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("x")
    (tmp_path / "link").symlink_to("a")
    assert resolve_inside(tmp_path, "a/file") == tmp_path.resolve() / "a" / "file"
    assert resolve_inside(tmp_path, "link/file") == tmp_path.resolve() / "a" / "file"
    assert resolve_inside(tmp_path, "not/yet/there") == tmp_path.resolve() / "not" / "yet" / "there"


@pytest.mark.parametrize(
    ("relative", "culprit"),
    [
        ("../x", "'..'"),
        ("a/../../x", "'..'"),
        ("..\\x", "'..'"),
        ("/etc/passwd", "relative"),
        ("\\x", "relative"),
        ("", "empty"),
        ("a\0b", "U+0000"),
        ("a/\u202eb", "U+202E"),
        ("x" * 4096, "4096 bytes"),
    ],
)
def test_paths_that_leave_the_root_are_refused(tmp_path: Path, relative: str, culprit: str) -> None:
    with pytest.raises(AdapterNameError) as caught:
        resolve_inside(tmp_path, relative)
    assert culprit in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_symbolic_link_out_of_the_root_is_refused(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "root-outside"
    root.mkdir()
    outside.mkdir()
    (root / "link").symlink_to(outside)
    (root / "absolute").symlink_to("/etc")
    for name in ("link", "link/file", "absolute/passwd"):
        with pytest.raises(AdapterNameError, match="leads out of") as caught:
            resolve_inside(root, name)
        assert name in str(caught.value)
    with pytest.raises(FormatError, match="leads out of"):
        require_inside(root, outside)
    assert require_inside(root, root) == Path(os.path.realpath(root))
    with pytest.raises(AdapterNameError, match="NUL"):
        require_inside(root, "a\0b")
