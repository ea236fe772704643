"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, over odd shapes and odd addresses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from peftrt import _build
from tests.native.build_fuzzer import SANITIZE, SEED, build_fuzzer, cases, run, works


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/native/fuzz_kernels.cpp with the kernels, compiled with sanitizers."""
    compiler, csrc = _build.find_compiler(), _build.find_csrc()
    if compiler is None or csrc is None:
        pytest.skip("no C++ compiler or no sources")
    directory = tmp_path_factory.mktemp("sanitized")
    if not works(compiler, SANITIZE, directory):
        pytest.skip("the compiler has no AddressSanitizer and UndefinedBehaviorSanitizer")
    return build_fuzzer(directory, compiler, csrc, SANITIZE)


@pytest.mark.parametrize("isa", _build.isa_names())
def test_no_report_and_no_wrong_value(fuzzer: Path, isa: str, request: pytest.FixtureRequest) -> None:
    count = cases(request.config.getoption("--fuzz"))
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    result = run([str(fuzzer), isa, SEED, str(count)], env=environment)
    if result.returncode == 3:
        pytest.skip(f"this CPU does not run {isa}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{count} cases, {isa}" in result.stdout
