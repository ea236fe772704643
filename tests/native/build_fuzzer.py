"""Compiles fuzz_kernels.cpp with the kernels: for this machine or another, with sanitizers or without."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
from pathlib import Path

from peftrt import _build

SEED = "20261121"
# Unoptimised: half the time to compile, and nothing is folded away before it is checked.
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-O0")


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    """The finished process, whatever its exit status."""
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


def works(
    compiler: tuple[str, ...],
    flags: tuple[str, ...],
    directory: Path,
    emulator: tuple[str, ...] = (),
    **options: object,
) -> bool:
    """Whether an empty ``main`` compiles and links with these flags, and runs with these ``options`` of ``run``."""
    probe = directory / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    program = str(directory / "probe")
    built = run([*compiler, *flags, str(probe), "-o", program]).returncode == 0
    return built and run([*emulator, program], **options).returncode == 0


def build_fuzzer(
    directory: Path, compiler: tuple[str, ...], csrc: Path, flags: tuple[str, ...], machine: str | None = None
) -> Path:
    """The program, in ``directory``. ``flags`` are for compiler and linker, ``machine`` is that of ``kernel_units``."""
    common = [*compiler, "-std=c++17", "-Wno-psabi", "-ffp-contract=off", f"-I{csrc}", *flags]
    driver = Path(__file__).parent / "fuzz_kernels.cpp"
    jobs = [[*common, "-c", str(driver), "-o", str(directory / "driver.o")]]
    for unit in _build.kernel_units(csrc, machine=machine):
        jobs.append([*common, *unit.flags, "-c", str(unit.source), "-o", str(directory / f"{unit.name}.o")])
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for result in pool.map(run, jobs):
            assert result.returncode == 0, result.stderr
    program = directory / "fuzz_kernels"
    linked = run([*common, "-pthread", *map(str, directory.glob("*.o")), "-o", str(program)])
    assert linked.returncode == 0, linked.stderr
    return program


def cases(long: bool, share: int = 1) -> int:
    """How many cases to give the program: more in a long run, and one in ``share`` where each takes so much longer."""
    return max(1, int(os.environ.get("PEFTRT_FUZZ_CASES", "2000" if long else "200")) // share)
