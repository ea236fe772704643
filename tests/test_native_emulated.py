"""The CPU kernels of aarch64, cross-compiled and run by qemu's user-mode emulation.

Debian and Ubuntu have both: ``apt-get install g++-aarch64-linux-gnu qemu-user-static``.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from peftrt import _build
from tests.native.build_fuzzer import CASES, SANITIZE, SEED, build_fuzzer, run, works

COMPILER = ("aarch64-linux-gnu-g++",)
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
# The search for leaks stops the other threads of its process, which an emulator does not let it do.
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
FLAGS = {"sanitized": SANITIZE, "as shipped": ("-O3",)}
SHARE = {"sanitized": 4, "as shipped": 1}  # of the cases: what the sanitizers take is emulated too


@pytest.fixture(scope="module", params=list(FLAGS))
def fuzzer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], int]:
    """The command that runs the fuzzer of aarch64 here, and how many cases to give it."""
    if request.param == "as shipped" and not request.config.getoption("--fuzz"):
        pytest.skip("only with --fuzz: it compiles for a minute")
    emulator, csrc = next(filter(None, map(shutil.which, EMULATORS)), None), _build.find_csrc()
    if emulator is None or shutil.which(COMPILER[0]) is None or csrc is None:
        pytest.skip(f"needs {COMPILER[0]} and {' or '.join(EMULATORS)}")
    # The C library of that machine lies beside its compiler.
    library = Path(run([*COMPILER, "-print-file-name=libc.so.6"]).stdout.strip()).resolve()
    command = (emulator, "-L", str(library.parent.parent))
    directory: Path = tmp_path_factory.mktemp("aarch64")
    if not works(COMPILER, FLAGS[request.param], directory, command, env=ENVIRONMENT):
        pytest.skip(f"{COMPILER[0]} {' '.join(FLAGS[request.param])} makes no program that {emulator} runs")
    program = build_fuzzer(directory, COMPILER, csrc, FLAGS[request.param], "aarch64")
    return [*command, str(program)], CASES // SHARE[request.param]


@pytest.mark.parametrize("isa", _build.isa_names("aarch64"))
def test_aarch64_gives_no_report_and_no_wrong_value(fuzzer: tuple[list[str], int], isa: str) -> None:
    command, cases = fuzzer
    result = run([*command, isa, SEED, str(cases)], env=ENVIRONMENT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{cases} cases, {isa}" in result.stdout
