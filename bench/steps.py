"""A long run as steps: each a process with a time limit, all output in one log, outcomes kept whatever comes next."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

# What bench.run_cells and the run that started it agree on: exit statuses, and how a line begins that names a cell
# which is about to be measured.
CELLS_FAILED, DEVICE_LOST = 1, 3
STARTED = "cell "

GRACE = 5.0  # seconds between asking a process to end and ending it


class Stopped(BaseException):
    """The run was asked to end. ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def stop_on_signals() -> None:
    """SIGTERM, SIGINT and SIGHUP raise ``Stopped``, once: what is done then is not to be interrupted again."""

    def stop(number: int, _: Any) -> None:
        for other in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)


class Log:
    """Lines that go to the terminal at once and, from when there is one, to a file."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._file: TextIO | None = None

    def into(self, path: Path) -> None:
        """From here on, and from the beginning, in ``path`` too."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf8")
        self._file.writelines(f"{line}\n" for line in self._lines)
        self._file.flush()

    def line(self, text: str = "") -> None:
        """Write one line, or several."""
        print(text, flush=True)
        self._lines.append(text)
        if self._file is not None:
            self._file.write(f"{text}\n")
            self._file.flush()


@dataclass
class Outcome:
    """How a step ended. ``status``: ok, failed, out of time, stalled, stopped or left out."""

    name: str
    status: str
    detail: str = ""
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, or why it was ended; and the last line it printed."""

    code: int | None
    why: str
    last: str
    seconds: float

    @property
    def status(self) -> str:
        """As an outcome has it."""
        if self.why:
            return self.why
        return "ok" if self.code == 0 else "failed"


def run(
    command: Sequence[str],
    log: Log,
    *,
    seconds: float,
    stall: float | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    hear: Callable[[str], None] = lambda line: None,
) -> Ended:
    """Run a command with its output in the log, at most ``seconds``, and at most ``stall`` without a word from it.

    It and all that it started are ended when its time is up, and when this process is told to stop.

    Args:
        hear: is given each line of output.
    """
    begun = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
        cwd=folder,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    heard, last, why = begun, "", ""
    try:
        while True:
            now = time.monotonic()
            if now - begun > seconds:
                why = "out of time"
                break
            if stall is not None and now - heard > stall:
                why = "stalled"
                break
            try:
                line = lines.get(timeout=0.2)
            except queue.Empty:
                continue
            if line is None:
                break
            heard, last = time.monotonic(), line.strip() or last
            log.line(line)
            hear(line)
    finally:
        _end(process)
    return Ended(None if why else process.returncode, why, last, time.monotonic() - begun)


def _read(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line.rstrip("\n"))
    lines.put(None)


def _end(process: subprocess.Popen[str]) -> None:
    """Wait for a process whose output has ended; ask one that goes on to end, then end its whole group."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(0.5)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):  # the group is gone, its children too
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
