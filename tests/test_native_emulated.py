"""The CPU kernels that this machine may not run: those of aarch64 under qemu, those of AVX-512 with SIMDe's intrinsics.

Debian and Ubuntu have both: ``apt-get install g++-aarch64-linux-gnu qemu-user-static libsimde-dev``. With SIMDe the
kernels' own code runs; the instructions do not.
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

import pytest

from peftrt import _build
from tests.native.build_fuzzer import SANITIZE, SEED, build_fuzzer, cases, run, works

SIMDE = Path(__file__).parent / "native" / "simde"
CROSS = ("aarch64-linux-gnu-g++",)
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
# The search for leaks stops the other threads of its process, which an emulator does not let it do.
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}

# The flags of each build; the compiler takes a minute or two for those that wait for --fuzz.
FLAGS = {
    "avx512": ("-O0",),
    "avx512, sanitized": SANITIZE,
    "aarch64, sanitized": SANITIZE,
    "aarch64, as shipped": _build.COMMON_FLAGS,
}
ONLY_WITH_FUZZ = {"avx512, sanitized", "aarch64, as shipped"}
SHARE = {"aarch64, sanitized": 8}  # one in so many cases: what the sanitizers take is emulated too
# With SIMDe AVX-512 is in the place of the one instruction set that every machine has.
ISAS = {name: ("portable",) if name.startswith("avx512") else _build.isa_names("aarch64") for name in FLAGS}


def avx512(directory: Path, csrc: Path, flags: tuple[str, ...]) -> list[str]:
    """The command that runs the fuzzer, whose only kernels are those of simd_avx512.h under the name ``portable``."""
    compiler = _build.find_compiler()
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs a C++ compiler for x86-64")
    if not works(compiler, (*flags, "-include", "simde/x86/avx512.h"), directory):
        pytest.skip(f"needs SIMDe and a compiler that knows {' '.join(flags)}")
    flags = (*flags, f"-I{SIMDE}", "-DPEFTRT_ISA_AVX512")
    return [str(build_fuzzer(directory, compiler, csrc, flags, "other"))]


def aarch64(directory: Path, csrc: Path, flags: tuple[str, ...]) -> list[str]:
    """The command that runs the fuzzer of aarch64 here."""
    emulator = next(filter(None, map(shutil.which, EMULATORS)), None)
    if emulator is None or shutil.which(CROSS[0]) is None:
        pytest.skip(f"needs {CROSS[0]} and {' or '.join(EMULATORS)}")
    # The C library of that machine lies beside its compiler.
    library = Path(run([*CROSS, "-print-file-name=libc.so.6"]).stdout.strip()).resolve()
    command = (emulator, "-L", str(library.parent.parent))
    if not works(CROSS, flags, directory, command, env=ENVIRONMENT):
        pytest.skip(f"{CROSS[0]} {' '.join(flags)} makes no program that {emulator} runs")
    return [*command, str(build_fuzzer(directory, CROSS, csrc, flags, "aarch64"))]


@pytest.fixture(scope="module")
def fuzzer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], int]:
    """The command that runs one build of the fuzzer, and how many cases to give it."""
    name, long, csrc = request.param, request.config.getoption("--fuzz"), _build.find_csrc()
    if name in ONLY_WITH_FUZZ and not long:
        pytest.skip("only with --fuzz: it compiles for a minute or two")
    if csrc is None:
        pytest.skip("no sources")
    build = avx512 if name.startswith("avx512") else aarch64
    command = build(tmp_path_factory.mktemp("emulated"), csrc, FLAGS[name])
    return command, cases(long, SHARE.get(name, 1))


@pytest.mark.parametrize(
    ("fuzzer", "isa"), [(name, isa) for name in FLAGS for isa in ISAS[name]], indirect=["fuzzer"], scope="module"
)
def test_no_report_and_no_wrong_value(fuzzer: tuple[list[str], int], isa: str) -> None:
    command, count = fuzzer
    result = run([*command, isa, SEED, str(count)], env=ENVIRONMENT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{count} cases, {isa}" in result.stdout
