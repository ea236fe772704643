"""The choice among backends: forcing, its scope, and what is said where none can run."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import peftrt
from peftrt import BackendError, ops
from peftrt.ops import _define
from peftrt.ops._backend import NAMES, wishes
from peftrt.ops._weight import weight_args
from tests.cases import NATIVE, nf4, randn
from tests.tolerances import assert_close

W = nf4(6, 64)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every (operation, backend) that runs, in order."""
    seen: list[tuple[str, str]] = []
    real = _define.choose

    def choose(op: str, *args: Any) -> Any:
        choice = real(op, *args)
        seen.append((op, choice.backend.name if choice.backend else "none"))
        return choice

    monkeypatch.setattr(_define, "choose", choose)
    return seen


def linear() -> Tensor:
    return ops.nf4_linear(torch.ones(2, 64), W)


def test_reference_is_forced(calls: list[tuple[str, str]]) -> None:
    with peftrt.backend("reference"):
        linear()
    assert calls == [("nf4_linear", "reference")]


@pytest.mark.parametrize("name", [NATIVE])
def test_native_comes_first_on_a_cpu(name: str, calls: list[tuple[str, str]]) -> None:
    linear()
    W.dequantize()
    assert calls == [("nf4_linear", name), ("nf4_dequantize", name)]


@pytest.mark.parametrize("name", [NATIVE])
def test_one_operation_is_forced_and_the_others_are_free(name: str, calls: list[tuple[str, str]]) -> None:
    with peftrt.backend(nf4_linear="reference"):
        linear()
        W.dequantize()
        ops.nf4_dequantize(W, out=torch.empty(6, 64))
    assert calls == [("nf4_linear", "reference"), ("nf4_dequantize", name), ("nf4_dequantize.out", name)]


@pytest.mark.parametrize("name", [NATIVE])
def test_the_innermost_wish_counts(name: str, calls: list[tuple[str, str]]) -> None:
    with peftrt.backend("reference"):
        with peftrt.backend(nf4_linear=name):
            linear()
            W.dequantize()
            with peftrt.backend("reference"):
                linear()
        linear()
    linear()
    used = [backend for _, backend in calls]
    assert used == [name, "reference", "reference", "reference", name]


@pytest.mark.parametrize("name", [NATIVE])
def test_environment_forces_and_the_context_overrules_it(
    name: str, calls: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFTRT_BACKEND", "reference")
    linear()
    with peftrt.backend(name):
        linear()
    monkeypatch.setenv("PEFTRT_BACKEND", f" nf4_linear=reference, nf4_dequantize={name} ")
    linear()
    W.dequantize()
    monkeypatch.setenv("PEFTRT_BACKEND", "")
    linear()
    assert [backend for _, backend in calls] == ["reference", name, "reference", name, name]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("fastest", "PEFTRT_BACKEND: backend must be one of native, triton, reference, got 'fastest'"),
        ("nf4_linear=fastest", "PEFTRT_BACKEND: backend must be one of .*, got 'fastest'"),
        ("nf4_liner=native", "PEFTRT_BACKEND: no operation is called 'nf4_liner'; there are .*nf4_linear"),
        ("nf4_linear=", "PEFTRT_BACKEND: backend must be one of .*, got ''"),
    ],
)
def test_a_bad_environment_is_told(setting: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTRT_BACKEND", setting)
    with pytest.raises(ValueError, match=message):
        linear()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="backend: backend must be one of native, triton, reference, got 'cuda'"):
        peftrt.backend("cuda").__enter__()
    with pytest.raises(ValueError, match=r"backend\(nf4_linear=...\): backend must be one of .*, got 'cuda'"):
        peftrt.backend(nf4_linear="cuda").__enter__()
    with pytest.raises(ValueError, match=r"backend: no operation is called 'nf4_matmul'; there are .*nf4_linear"):
        peftrt.backend(nf4_matmul="native").__enter__()
    assert not wishes()


def test_an_error_inside_ends_the_wish() -> None:
    with pytest.raises(KeyError), peftrt.backend("reference"):
        raise KeyError
    assert not wishes()


def test_a_forced_backend_that_cannot_run_says_why_for_each() -> None:
    x = torch.ones(2, 64, dtype=torch.float64)
    with peftrt.backend("native"), pytest.raises(BackendError) as refusal:
        ops.nf4_linear(x, W)
    message = str(refusal.value)
    assert "nf4_linear: no backend can run this call (float64[2, 64], uint8[6, 32]" in message
    assert "native: has kernels for fp32, bf16 and fp16, not for torch.float64" in message
    assert "reference: native is forced" in message


def test_a_backend_that_an_operation_lacks_is_told() -> None:
    with peftrt.backend("triton"), pytest.raises(BackendError) as refusal:
        torch.ops.peftrt.nf4_quantize(torch.ones(64), 64, True)
    assert "triton: this operation has no such backend" in str(refusal.value)
    assert "reference: triton is forced" in str(refusal.value)


def test_a_wish_is_its_threads_alone(calls: list[tuple[str, str]]) -> None:
    other: list[Any] = []
    with peftrt.backend("reference"):
        thread = threading.Thread(target=lambda: other.append(dict(wishes())))
        thread.start()
        thread.join()
        assert wishes() == {"*": "reference"}
    assert other == [{}]


@pytest.mark.parametrize("name", [NATIVE])
def test_backward_runs_like_its_forward(name: str, calls: list[tuple[str, str]]) -> None:
    """Also where it is called outside of the block, as usual, and on autograd's own thread of a device."""
    x = torch.ones(2, 64, requires_grad=True)
    with peftrt.backend("reference"):
        y = ops.nf4_linear(x, W)
    y.sum().backward()
    with peftrt.backend("reference"):
        free = ops.lora_linear(x, W, torch.ones(2, 64), torch.ones(6, 2), 1.0)
    with peftrt.backend(name):  # around the backward: the forward's wish counts
        free.sum().backward()
    assert {backend for op, backend in calls} == {"reference"}
    assert ("nf4_linear_dx", "reference") in calls
    calls.clear()
    ops.nf4_linear(x, W).sum().backward()
    assert calls == [("nf4_linear", name), ("nf4_linear_dx", name)]


@pytest.mark.parametrize("name", [NATIVE])
def test_a_second_backward_runs_like_its_forward(name: str, calls: list[tuple[str, str]]) -> None:
    x = randn(2, 64).requires_grad_()
    dy = randn(2, 6).requires_grad_()
    with peftrt.backend("reference"):
        y = ops.nf4_linear(x, W)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    dx.sum().backward()
    assert {backend for _, backend in calls} == {"reference"}
    assert_close(dy.grad, torch.ones(2, 64).double() @ W.dequantize().double().t())


def test_choice_can_be_asked_without_running() -> None:
    args = (torch.ones(2, 64, dtype=torch.float64), *weight_args("nf4_linear", W), None)
    choice = _define.OPS["nf4_linear"].choice(*args)
    assert choice.backend is not None
    assert choice.backend.name == "reference"
    assert "native: has kernels for fp32" in str(choice)
    with pytest.raises(ValueError, match="nf4_linear: x must be"):
        _define.OPS["nf4_linear"].choice(args[0][:, 1:], *args[1:])


def test_every_operation_has_a_reference() -> None:
    assert _define.OPS
    for op in _define.OPS.values():
        names = [backend.name for backend in op.backends]
        assert names[-1] == "reference", op.name
        assert set(names) <= set(NAMES)


def test_every_operation_documents_itself() -> None:
    """One sentence, arguments, what it raises, and the source."""
    for name in ops.__all__:
        function = getattr(ops, name)
        if name in {operation.partition(".")[0] for operation in _define.OPS}:
            for section in ("Args:", "Raises:", "Source:"):
                assert section in function.__doc__, f"{name}: {section}"
