"""Finding the CUDA library: the reasons why not, and which devices its machine code is for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from peftrt import _build
from peftrt.info import collect, text
from peftrt.ops import _native


@pytest.fixture(autouse=True)
def asked_again() -> Iterator[None]:
    """What is remembered for a process is forgotten before and after each test."""
    for function in (_native.load_cuda, _native._not_compiled_for):
        function.cache_clear()
    yield
    for function in (_native.load_cuda, _native._not_compiled_for):
        function.cache_clear()


def on(device: str) -> torch.Tensor:
    """Stands for a tensor on a device that may not be here: only its device is asked for."""
    return type("Somewhere", (), {"device": torch.device(device)})()  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),
        ("8.6", (8, 0), False),
        ("8.9", (9, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a", (9, 1), False),
        ("10.0", (10, 3), True),
        ("10.0f", (10, 3), True),
        ("10.0", (12, 0), False),
    ],
)
def test_which_devices_machine_code_is_for(arch: str, capability: tuple[int, int], runs: bool) -> None:
    assert _native.runs_on(arch, capability) is runs


def test_default_architectures_leave_no_device_from_8_0_to_10_3_out() -> None:
    for capability in ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3)):
        assert any(_native.runs_on(arch, capability) for arch in _build.CUDA_ARCHS.split()), capability


def test_reasons_before_the_library_is_asked_for() -> None:
    assert "not for cpu" in str(_native.cuda_unsupported(torch.zeros(1), torch.bfloat16))
    assert "not for torch.float64" in str(_native.cuda_unsupported(on("cuda"), torch.float64))


def test_a_torch_for_cpus_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "needs a torch that is built for CUDA" in str(_native.load_cuda())
    assert collect()["cuda"]["error"] in text(collect())


def test_a_library_that_is_not_built_is_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_build, "default_directory", lambda: tmp_path)
    assert "libpeftrt_cuda.so is missing" in str(_native.load_cuda())


def test_a_device_that_it_is_not_compiled_for_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.peftrt_cuda, "sm", lambda: "8.0 9.0a", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 5090")
    reason = _native._not_compiled_for(torch.device("cuda", 0))
    assert reason == "is compiled for compute capability 8.0, 9.0a, RTX 5090 has 12.0; PEFTRT_CUDA_ARCHS adds it"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert _native._not_compiled_for(torch.device("cuda", 1)) is None
