"""Runs interpreted.py where Triton interprets: the environment must say so before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import peftrt
from peftrt.ops import _triton
from tests.cases import nf4, randn

CASES = Path(__file__).with_name("interpreted.py")
ROOT = CASES.parents[2]


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_on_a_cpu_triton_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, w = randn(1, 64), nf4(8, 64)
    with peftrt.backend("triton"), pytest.raises(peftrt.BackendError, match=r"TRITON_INTERPRET=1|not installed"):
        peftrt.ops.nf4_linear(x, w)
    with peftrt.backend("triton"), pytest.raises(peftrt.BackendError, match=r"not for torch\.float64"):
        w.dequantize(torch.float64)


def test_where_triton_is_missing_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "_installed", lambda: False)
    x, w = randn(1, 64), nf4(8, 64)
    with peftrt.backend("triton"), pytest.raises(peftrt.BackendError, match="triton is not installed"):
        peftrt.ops.nf4_linear(x, w)


def test_importing_peftrt_imports_no_kernels() -> None:
    code = "import sys, peftrt; print([name for name in sys.modules if name.startswith('peftrt.kernels')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
