"""A configuration and its weights are read as one and replaced as one, whichever library's directory they are in."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftrt.formats import pair
from peftrt.formats.errors import FormatError
from peftrt.formats.pair import ADAPTERHUB, CONFIG_NAME, MARKER_NAME, PEFT, Form
from peftrt.formats.safe import TensorReader, write_tensors
from tests.formats.directories import equal, snapshot

CONFIG = {"r": 2, "version": 0}
NOTES = {"notes.txt": "old"}

forms = pytest.mark.parametrize("form", [PEFT, ADAPTERHUB], ids=lambda form: form.library)


def matrix(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"matrix": torch.full((2, 3), value)}


def write(path: Path, form: Form = PEFT, version: int = 0, value: float = 1.0) -> None:
    pair.write_pair(path, form, {**CONFIG, "version": version}, matrix(value), NOTES)


def read(path: Path, form: Form = PEFT) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return pair.read_pair(os.fspath(path), form, {"root": None})


@forms
@pytest.mark.parametrize("which", ["weights", "configuration"])
def test_failed_rename_puts_the_old_pair_back(
    tmp_path: Path, form: Form, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, form)
    before = snapshot(tmp_path)
    failing = {"weights": form.weights, "configuration": CONFIG_NAME}[which]
    real, failed = os.replace, []

    def replace(source: str, target: str) -> None:
        if os.path.basename(target) == failing and not failed:
            failed.append(target)
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, form, 1, 2.0)
    assert failed
    assert snapshot(tmp_path) == before
    assert read(tmp_path, form)[0] == CONFIG


@forms
def test_save_killed_between_the_renames_is_noticed(
    tmp_path: Path, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair, "_ATTEMPTS", 2)
    write(tmp_path, form)
    (tmp_path / MARKER_NAME).write_text("")
    with pytest.raises(FormatError, match="killed half-way"):
        read(tmp_path, form)
    write(tmp_path, form, 1, 3.0)
    assert equal(read(tmp_path, form)[1], matrix(3.0))


@forms
def test_marker_stands_while_the_two_files_differ(tmp_path: Path, form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    real, marked = os.replace, {}

    def replace(source: str, target: str) -> None:
        marked[os.path.basename(target)] = (tmp_path / MARKER_NAME).exists()
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for expected in (False, True):
        write(tmp_path, form)
        assert list(marked) == [form.weights, CONFIG_NAME, *NOTES]
        assert marked[form.weights] is marked[CONFIG_NAME] is expected
        assert not (tmp_path / MARKER_NAME).exists()
        marked.clear()


def test_pair_replaced_while_it_loads_is_never_mixed(tmp_path: Path) -> None:
    write(tmp_path, value=0.0)
    stop = threading.Event()

    def replace() -> None:
        version = 0
        while not stop.is_set():
            version += 1
            write(tmp_path, version=version, value=float(version))
            stop.wait(0.002)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        seen = set()
        for _ in range(40):
            config, tensors = read(tmp_path)
            assert equal(tensors, matrix(float(config["version"])))
            seen.add(config["version"])
    finally:
        stop.set()
        thread.join()
    assert len(seen) > 1
    assert sorted(os.listdir(tmp_path)) == sorted([PEFT.weights, CONFIG_NAME, *NOTES])


def before_weights_are_opened(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    """Have ``action`` happen once, after a reader has read the configuration and before it opens the weights."""
    pending = [action]

    def reader(*args: Any, **kwargs: Any) -> TensorReader:
        if pending:
            pending.pop()()
        return TensorReader(*args, **kwargs)

    monkeypatch.setattr(pair, "TensorReader", reader)


def test_pair_replaced_between_configuration_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    before_weights_are_opened(monkeypatch, lambda: write(tmp_path, version=99, value=2.0))
    config, tensors = read(tmp_path)
    assert config == {**CONFIG, "version": 99}
    assert equal(tensors, matrix(2.0))


@pytest.mark.parametrize("begun", ["before_the_reader", "after_the_configuration_was_read"])
def test_reader_waits_while_only_the_weights_are_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: str
) -> None:
    write(tmp_path)
    new = {**CONFIG, "version": 99}

    def first_half() -> None:
        (tmp_path / MARKER_NAME).write_text("")
        write_tensors(tmp_path / PEFT.weights, matrix(2.0))

    def second_half(seconds: float) -> None:
        (tmp_path / "config.new").write_text(json.dumps(new))
        os.replace(tmp_path / "config.new", tmp_path / CONFIG_NAME)
        (tmp_path / MARKER_NAME).unlink()

    if begun == "before_the_reader":
        first_half()
    else:
        before_weights_are_opened(monkeypatch, first_half)
    monkeypatch.setattr(pair.time, "sleep", second_half)
    config, tensors = read(tmp_path)
    assert config == new
    assert equal(tensors, matrix(2.0))
