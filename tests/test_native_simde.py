"""The AVX-512 kernels on any x86-64 CPU: compiled with SIMDe's intrinsics (``apt-get install libsimde-dev``).

The kernels' own code runs, under AddressSanitizer and UndefinedBehaviorSanitizer; the instructions do not.
"""

from __future__ import annotations

import concurrent.futures
import os
import platform
import subprocess
from pathlib import Path

import pytest

from peftrt import _build

NATIVE = Path(__file__).parent / "native"
FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-O0", "-std=c++17", "-ffp-contract=off")
CASES = int(os.environ.get("PEFTRT_FUZZ_CASES", "200"))


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/native/fuzz_kernels.cpp, whose only kernels are those of simd_avx512.h under the name ``portable``."""
    compiler, csrc = _build.find_compiler(), _build.find_csrc()
    if compiler is None or csrc is None or platform.machine() != "x86_64":
        pytest.skip("no C++ compiler, no sources, or not x86-64")
    directory = tmp_path_factory.mktemp("simde")
    probe = directory / "probe.cpp"
    probe.write_text("#include <simde/x86/avx512.h>\nint main() { return 0; }\n")
    if _run(*compiler, *FLAGS, probe, "-o", directory / "probe").returncode != 0:
        pytest.skip("no SIMDe, or a compiler without sanitizers")
    common = [*compiler, *FLAGS, "-Wno-psabi", f"-I{NATIVE / 'simde'}", f"-I{csrc}"]
    common += ["-DPEFTRT_ISA=portable", "-DPEFTRT_ISA_AVX512"]
    sources = [NATIVE / "fuzz_kernels.cpp", *sorted((csrc / "cpu").glob("*.cpp"))]
    jobs = [[*common, "-c", source, "-o", directory / f"{source.stem}.o"] for source in sources]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for result in pool.map(lambda job: _run(*job), jobs):
            assert result.returncode == 0, result.stderr
    linked = _run(*common, "-pthread", *directory.glob("*.o"), "-o", directory / "fuzz_kernels")
    assert linked.returncode == 0, linked.stderr
    return directory / "fuzz_kernels"


def test_the_avx512_kernels_give_no_report_and_no_wrong_value(fuzzer: Path) -> None:
    result = _run(fuzzer, "portable", "20261121", str(CASES))
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{CASES} cases" in result.stdout
