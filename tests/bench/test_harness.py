"""A cell's way into its result file, with a stand-in for pytest-benchmark's fixture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import harness, measure, results
from bench.cells import Cell
from bench.measure import Contender
from bench.results import OWN
from bench.shapes import Site

CELL = Cell("an_op", "forward", Site(4, 4), 1, torch.float32, "s*N*K", "2*M*N*K")
ONE = torch.ones(3, dtype=torch.float64)


class Fixture:
    """What a benchmark uses of the fixture."""

    def __init__(self, disabled: bool = False) -> None:
        self.disabled, self.group, self.extra_info = disabled, None, {}

    def pedantic(
        self, target: Callable[[], Any], teardown: Callable[[], Any] | None = None, rounds: int = 1, iterations: int = 1
    ) -> None:
        for _ in range(rounds):
            for _ in range(iterations):
                target()
            if teardown is not None:
                teardown()


def _run(folder: Path, value: torch.Tensor, disabled: bool = False) -> dict[str, Any]:
    session = harness.Session("cpu", folder, quick=True, budget=None)
    contender = Contender((lambda: value,), (ONE,), 1e-6)
    harness.Runner(session, Fixture(disabled), print).run(CELL, {OWN: lambda: contender})
    return {op: content["cells"] for op, content in results.read_all(folder).items()}


def test_a_wrong_result_takes_the_place_of_the_figure(tmp_path: Path) -> None:
    assert _run(tmp_path, ONE)["an_op"][CELL.id]["contenders"][OWN]["error"] == 0.0
    with pytest.raises(measure.WrongResultError):
        _run(tmp_path, ONE + 1)
    stored = results.read(tmp_path / "an_op.json")["cells"][CELL.id]
    assert stored["failed"] == f"wrong result: {OWN}: result 0: relative error 1, allowed 1e-06"
    assert "contenders" not in stored


def test_disabled_benchmarks_are_checked_and_not_timed(tmp_path: Path) -> None:
    assert _run(tmp_path, ONE, disabled=True) == {}
    with pytest.raises(measure.WrongResultError):
        _run(tmp_path, ONE + 1, disabled=True)


def test_the_budget_ends() -> None:
    assert harness.Session("cpu", Path(), quick=True, budget=0.0).out_of_time()
    assert not harness.Session("cpu", Path(), quick=True, budget=3600.0).out_of_time()
    assert not harness.Session("cpu", Path(), quick=True, budget=None).out_of_time()
