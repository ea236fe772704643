"""A step's process ends when its time is up, when it falls silent, and when the run is told to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import steps


def _python(code: str, **options: float) -> tuple[steps.Ended, list[str]]:
    heard: list[str] = []
    limits = {"seconds": 60.0, **options}
    return steps.run([sys.executable, "-uc", code], steps.Log(), hear=heard.append, **limits), heard


def _ends(pid: int) -> bool:
    """Whether a process ends soon, or has ended; one that nobody waited for counts."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_what_a_process_prints_is_heard_and_its_status_kept() -> None:
    ended, heard = _python("import sys; print('out'); print('err', file=sys.stderr); print(); sys.exit(4)")
    assert (ended.status, ended.code, ended.last) == ("failed", 4, "err")
    assert heard == ["out", "err", ""]
    assert _python("pass")[0].status == "ok"


def test_a_process_that_dies_has_failed() -> None:
    ended, _ = _python("import os; os.kill(os.getpid(), 9)")
    assert (ended.status, ended.code) == ("failed", -9)


def test_a_process_ends_with_its_time_and_its_children_with_it() -> None:
    child = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    ended, heard = _python(f"{child}; print(p.pid); import time; time.sleep(60)", seconds=2.0)
    assert (ended.status, ended.code) == ("out of time", None)
    assert ended.seconds < 20
    assert _ends(int(heard[0]))


def test_a_process_that_ignores_the_request_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "GRACE", 0.5)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf'); time.sleep(60)"
    ended, heard = _python(code, seconds=2.0)
    assert (ended.status, heard) == ("out of time", ["deaf"])
    assert ended.seconds < 20


def test_silence_is_a_stall() -> None:
    ended, heard = _python("import time; print('begun'); time.sleep(60)", stall=1.5)
    assert (ended.status, heard) == ("stalled", ["begun"])


def test_a_log_has_the_lines_from_before_it_had_a_file(tmp_path: Path) -> None:
    log = steps.Log()
    log.line("first")
    log.into(tmp_path / "logs" / "run.log")
    log.line("second")
    assert (tmp_path / "logs" / "run.log").read_text() == "first\nsecond\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_ends_its_process_and_goes_on_to_its_end(number: int) -> None:
    code = """
import sys
from bench import steps
steps.stop_on_signals()
try:
    child = "import os, time; print('pid', os.getpid()); time.sleep(60)"
    steps.run([sys.executable, "-uc", child], steps.Log(), seconds=60)
except steps.Stopped as stopped:
    print("stopped by", stopped, flush=True)
    sys.exit(128 + stopped.number)
"""
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        assert run.stdout is not None
        child = int(run.stdout.readline().split()[1])
        os.kill(run.pid, number)
        assert run.stdout.read().strip() == f"stopped by {signal.Signals(number).name}"
        assert run.wait(30) == 128 + number
    assert _ends(child)
