"""Runs the files interpreted*.py where Triton interprets: the environment must say so before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import peftrt
from peftrt.ops import _triton
from peftrt.ops._backend import choose
from peftrt.ops._define import OPS
from tests.cases import nf4, randn

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.parametrize(
    "cases",
    [
        "interpreted.py",
        "interpreted_lora.py",
        "interpreted_multi_lora.py",
        "interpreted_batches.py",
        "interpreted_adamw.py",
        "interpreted_bottleneck.py",
    ],
)
def test_kernels_in_the_interpreter(cases: str, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("triton")
    environment, long = {**os.environ, "TRITON_INTERPRET": "1"}, request.config.getoption("--fuzz")
    if long:
        environment["PEFTRT_BATCHES"] = "2000"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / cases)]
    limit = None if long else 600
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
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


def on_cuda() -> tuple[Any, ...]:
    """A call's arguments on a device that need not be there."""
    w = nf4(8, 64)
    with FakeTensorMode():
        x = torch.empty(2, 64, device="cuda")
        tensors = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in w.tensors().values()]
    return (x, *tensors, *w.shape, w.block_size, None)


def test_cuda_is_offered_triton_before_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "_installed", lambda: True)
    monkeypatch.setattr(_triton, "_too_old", lambda device: None)
    choice = choose("nf4_linear", OPS["nf4_linear"].backends, "cuda", on_cuda())
    assert choice.backend is not None
    assert choice.backend.name == "triton"
    assert list(choice.reasons) == ["native"]
    assert choose("nf4_linear_dx", OPS["nf4_linear_dx"].backends, "cuda", on_cuda()[:-1]).backend.name == "triton"


def test_a_device_that_is_too_old_gets_the_reference_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "_installed", lambda: True)
    monkeypatch.setattr(_triton, "_too_old", lambda device: "needs compute capability 8.0, T4 has 7.5")
    choice = choose("nf4_linear", OPS["nf4_linear"].backends, "cuda", on_cuda())
    assert choice.backend is not None
    assert choice.backend.name == "reference"
    assert "triton: needs compute capability 8.0" in str(choice)
