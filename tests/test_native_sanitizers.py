"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, over odd shapes and odd addresses."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
from pathlib import Path

import pytest

from peftrt import _build

# Unoptimised: half the time to compile, and nothing is folded away before it is checked.
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-O0")
CASES = int(os.environ.get("PEFTRT_FUZZ_CASES", "200"))


def _run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/native/fuzz_kernels.cpp with the kernels, compiled with sanitizers."""
    compiler, csrc = _build.find_compiler(), _build.find_csrc()
    if compiler is None or csrc is None:
        pytest.skip("no C++ compiler or no sources")
    directory = tmp_path_factory.mktemp("sanitized")
    probe = directory / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    if _run([*compiler, *SANITIZE, str(probe), "-o", str(directory / "probe")]).returncode != 0:
        pytest.skip("the compiler has no AddressSanitizer and UndefinedBehaviorSanitizer")
    common = [*compiler, "-std=c++17", "-Wno-psabi", "-ffp-contract=off", f"-I{csrc}", *SANITIZE]
    driver = Path(__file__).parent / "native" / "fuzz_kernels.cpp"
    jobs = [[*common, "-c", str(driver), "-o", str(directory / "driver.o")]]
    for unit in _build.kernel_units(csrc):
        jobs.append([*common, *unit.flags, "-c", str(unit.source), "-o", str(directory / f"{unit.name}.o")])
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for result in pool.map(_run, jobs):
            assert result.returncode == 0, result.stderr
    program = directory / "fuzz_kernels"
    linked = _run([*common, "-pthread", *map(str, directory.glob("*.o")), "-o", str(program)])
    assert linked.returncode == 0, linked.stderr
    return program


@pytest.mark.parametrize("isa", _build.isa_names())
def test_no_report_and_no_wrong_value(fuzzer: Path, isa: str) -> None:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    result = _run([str(fuzzer), isa, "20261121", str(CASES)], env=environment)
    if result.returncode == 3:
        pytest.skip(f"this CPU does not run {isa}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{CASES} cases, {isa}" in result.stdout
