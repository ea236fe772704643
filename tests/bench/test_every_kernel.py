"""The program for compute-sanitizer: it sees a wrong result, and its shares are all of its cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import every_kernel
from peftrt.ops import _native

pytestmark = pytest.mark.skipif(_native.load() is not None, reason=f"native kernels: {_native.load()}")


def _words(job: int, jobs: int) -> list[tuple[str, str]]:
    return [(name, words) for name, words, _ in every_kernel._calls("cuda", job, jobs)]


def test_the_shares_of_all_processes_are_all_cases() -> None:
    shares = [_words(job, 4) for job in range(4)]
    assert sorted(call for share in shares for call in share) == sorted(_words(0, 1))
    assert min(map(len, shares)) > 0


def test_every_dtype_and_every_range_of_rows_is_reached() -> None:
    rows = {(dtype, M) for size, M, dtype in every_kernel.CASES if size == every_kernel.ALIGNED}
    assert {M for dtype, M in rows if dtype == torch.bfloat16} >= {1, 8, 40, 130, 300, 2100}
    assert {dtype for dtype, _ in rows} == {torch.float32, torch.bfloat16, torch.float16}


def test_a_wrong_result_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original = every_kernel.ops.nf4_linear

    def wrong(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        y = original(x, *rest)
        y.view(-1)[-1] += 1
        return y

    assert every_kernel.run("cpu", 0, 8) == 0
    monkeypatch.setattr(every_kernel.ops, "nf4_linear", wrong)
    capsys.readouterr()
    assert every_kernel.run("cpu", 0, 8) == 1
    assert "wrong: relative error" in capsys.readouterr().out
