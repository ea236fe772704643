"""``peftrt compare``: runs what is missing, one training after the other, and writes what came of all."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peftrt
from peftrt.compare import data
from peftrt.compare.cells import FOLDER, Cell, plan
from peftrt.compare.methods import choose
from peftrt.compare.report import print_table, write_report
from peftrt.compare.results import collect
from peftrt.compare.settings import Settings
from peftrt.finetune.checkpoint import write_json
from peftrt.finetune.errors import Interrupted, RunError, UserError
from peftrt.finetune.progress import Progress, console, human_time
from peftrt.finetune.trainer import Step

if TYPE_CHECKING:
    from rich.console import Console

JSON = "compare.json"


def compare(out: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Run ``peftrt compare``: go on with the comparison in ``out``, or begin one.

    Args:
        out: a directory that is new, empty, or a comparison's of the same settings.
        given: the options that were given, by the names of Settings' fields, and ``quick``.

    Returns:
        What is in compare.json.

    Raises:
        UserError, RunError, Interrupted: see ``peftrt.finetune.errors``.
    """
    out, terminal = out.absolute(), console()
    settings = Settings.of(given)
    methods = choose(settings.methods)
    _begin(out, settings, terminal)
    two = len(data.read_tasks(out)) > 1
    cells = plan(methods, settings.seeds, settings.forgetting if two else ())
    missing = [cell for cell in cells if not (out / cell.file).is_file()]
    if done := len(cells) - len(missing):
        terminal.print(f"{done} of {len(cells)} trainings are done already", soft_wrap=True)
    start = time.perf_counter()
    try:
        for number, cell in enumerate(missing, done + 1):
            _run(out, cell, settings, f"{number}/{len(cells)} {cell.name}", terminal)
    except KeyboardInterrupt:
        kept = sum((out / cell.file).is_file() for cell in cells)
        raise Interrupted(f"stopped; {kept} of {len(cells)} trainings are kept", _again(out, given)) from None
    found = collect(out, settings, methods, cells)
    write_json(out / JSON, found)
    write_report(out, found)
    print_table(terminal, found)
    terminal.print(
        f"{len(missing)} trainings in {human_time(time.perf_counter() - start)}; {out / 'compare.md'}, "
        f"{out / 'compare.png'}, {out / JSON}",
        soft_wrap=True,
    )
    return found


def _begin(out: Path, settings: Settings, terminal: Console) -> None:
    """Make the directory, or see that the comparison in it is the one that is asked for."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file")
    if (out / JSON).is_file():
        try:
            before = json.loads((out / JSON).read_text("utf-8"))["settings"]
        except (ValueError, KeyError) as error:
            raise UserError(f"--out: {out / JSON} is damaged: {error}") from None
        for name, value in _plain(settings.fixed()).items():
            if before.get(name) != value:
                option = "--" + name.replace("_", "-")
                raise UserError(f"--out: {out} holds trainings with {option} {before.get(name)}, not {value}")
    elif out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out: {out} is not empty, and holds no comparison ({JSON} is missing)")
    else:
        _prepare(out, settings, terminal)
    (out / FOLDER).mkdir(exist_ok=True)
    write_json(out / JSON, {"peftrt": peftrt.__version__, "settings": asdict(settings)})


def _prepare(out: Path, settings: Settings, terminal: Console) -> None:
    """Make the directory with the examples in it, or leave nothing behind."""
    before = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    terminal.print("reading the examples")
    try:
        data.prepare(settings, out)
    except BaseException:
        for name in (data.TENSORS, data.TASKS):
            (out / name).unlink(missing_ok=True)
        if not before:
            out.rmdir()
        raise


def _run(out: Path, cell: Cell, settings: Settings, title: str, terminal: Console) -> None:
    """One training in a process of its own, so that its memory and its speed are its own."""
    path = os.pathsep.join([str(Path(peftrt.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "peftrt.compare.worker", str(out), cell.name]
    environment = {**os.environ, "PYTHONPATH": path}
    steps = settings.steps * (2 if cell.variant else 1)
    said: dict[str, Any] = {}
    errors = out / FOLDER / f".{cell.name}.stderr"
    with errors.open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            _follow(process.stdout, Progress(terminal, title, steps, memory=lambda: said.get("memory", 0)), said)
            status = process.wait()
            log.seek(0)
            told = log.read().strip()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
            errors.unlink(missing_ok=True)
    if status:
        raise RunError(f"{cell.name}: {told.splitlines()[-1] if told else f'ended with status {status}'}")


def _follow(lines: Iterable[str], progress: Progress, said: dict[str, Any]) -> None:
    """Show the steps that a training tells of; the last is in ``said``."""
    with progress as bar:
        for number, line in enumerate(lines, 1):
            said.update(json.loads(line))
            bar.update(Step(number, said["loss"], 0.0, said["tokens"], said["seconds"]))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As they come back from a JSON file."""
    return json.loads(json.dumps(values))


def _again(out: Path, given: dict[str, Any]) -> str:
    words: list[str] = ["peftrt", "compare", "--out", str(out)]
    for name, value in given.items():
        option = "--" + name.replace("_", "-")
        if value is True:
            words.append(option)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            words += [option, ",".join(map(str, value))]
        elif value is not None and value is not False:
            words += [option, str(value)]
    return shlex.join(words)
