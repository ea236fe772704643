"""The CUDA kernels' own code on a CPU, with tests/native/cuda_emulator in the place of a GPU."""

from __future__ import annotations

import concurrent.futures
import os
from pathlib import Path

import pytest

from peftrt import _build
from tests.native.build_fuzzer import SANITIZE, SEED, cases, run, works

NATIVE = Path(__file__).parent / "native"
EMULATOR = NATIVE / "cuda_emulator"
# The architecture stands for how much shared memory there is: it decides on the table, the stages and the instances.
BUILDS = {
    "sm_90": ("-O1", "-DPEFTRT_EMULATED_ARCHITECTURE=90"),
    "sm_90, sanitized": (*SANITIZE, "-O1", "-DPEFTRT_EMULATED_ARCHITECTURE=90"),
    "sm_80": ("-O1", "-DPEFTRT_EMULATED_ARCHITECTURE=80"),
    "sm_86": ("-O1", "-DPEFTRT_EMULATED_ARCHITECTURE=86"),
}
ONLY_WITH_FUZZ = {"sm_90, sanitized", "sm_80", "sm_86"}
SHARE = 20  # one in so many cases: every lane of every warp is a fiber


def build_emulated(directory: Path, csrc: Path, flags: tuple[str, ...]) -> Path:
    """fuzz_cuda*.cpp with the kernels of csrc/cuda as C++ and those of csrc/cpu to compare with."""
    compiler = _build.find_compiler()
    if compiler is None or not works(compiler, flags, directory):
        pytest.skip(f"no C++ compiler, or one without {' '.join(flags)}")
    includes = [f"-I{path}" for path in (EMULATOR, NATIVE, csrc)]
    common = [*compiler, "-std=c++17", "-ffp-contract=off", "-Wno-psabi", "-Wno-unknown-pragmas", *includes, *flags]
    sources = [
        *sorted(EMULATOR.glob("*.cpp")),
        *sorted(NATIVE.glob("fuzz_cuda*.cpp")),
        *sorted((csrc / "cuda").glob("*.cu")),
    ]
    units = [(source.stem, source, ("-x", "c++")) for source in sources]
    units += [(f"cpu_{unit.name}", unit.source, unit.flags) for unit in _build.kernel_units(csrc, machine="other")]
    jobs = [[*common, *extra, "-c", str(source), "-o", str(directory / f"{name}.o")] for name, source, extra in units]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for result in pool.map(run, jobs):
            assert result.returncode == 0, result.stderr
    program = directory / "fuzz_cuda"
    linked = run([*common, *map(str, directory.glob("*.o")), "-o", str(program)])
    assert linked.returncode == 0, linked.stderr
    return program


@pytest.mark.parametrize("name", BUILDS)
def test_no_report_and_no_wrong_value(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    long, csrc = request.config.getoption("--fuzz"), _build.find_csrc()
    if name in ONLY_WITH_FUZZ and not long:
        pytest.skip("only with --fuzz: a minute each")
    if csrc is None:
        pytest.skip("no sources")
    program = build_emulated(tmp_path, csrc, BUILDS[name])
    count = cases(long, SHARE)
    result = run([str(program), SEED, str(count)])
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{count} cases" in result.stdout
