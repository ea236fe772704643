"""Stored results held against the marks of their device: reached, or by how much missed, or why not measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.marks import FLOOR, MARKS, Mark, device_class
from bench.results import OWN

Results = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """A mark on one cell. ``margin`` is the ratio of what was reached to what is asked, None without figures."""

    mark: Mark
    op: str
    cell_id: str
    got: str
    margin: float | None

    @property
    def reached(self) -> bool:
        """Whether there are figures and they are good enough."""
        return self.margin is not None and self.margin >= 1

    def __str__(self) -> str:
        if self.margin is None:
            return "not measured"
        if self.reached:
            return "reached"
        # a miss by a hair is a miss: 0 % would read as none
        return f"missed by {max(100 * (1 - self.margin), 0.1):.2g} %"


def judge(results: Results) -> Iterator[Verdict]:
    """Every mark on every stored cell that it speaks of; ``results`` by operation."""
    for name, marks in MARKS.items():
        for mark in marks:
            for cell_id, cell in _covered(name, mark, results):
                yield _judge_cell(mark, cell_id, cell)


def unmeasured(results: Results) -> list[Mark]:
    """The marks of the devices in ``results`` that no stored cell can be judged by."""
    found = {device_class(run) for content in results.values() for run in content["runs"].values()}
    pairs = [(name, mark) for name in MARKS if name in found for mark in MARKS[name]]
    return [mark for name, mark in pairs if not any(_covered(name, mark, results))]


def summary(marks: Sequence[Mark], results: Results, device: str) -> list[list[str]]:
    """One row a mark: operation, cells, mark, how many cells reached it, the worst of them, and the verdict on it."""
    return [[mark.op, mark.where, str(mark), *_summary(mark, results, device)] for mark in marks]


def _summary(mark: Mark, results: Results, device: str) -> tuple[str, str, str]:
    verdicts = [_judge_cell(mark, cell_id, cell) for cell_id, cell in _covered(device, mark, results)]
    if not verdicts:
        return "", "", "not measured: no cell of it was run"
    count = f"{sum(verdict.reached for verdict in verdicts)} of {len(verdicts)}"
    worst = min(verdicts, key=lambda verdict: -1.0 if verdict.margin is None else verdict.margin)
    reason = f": {worst.got}" if worst.margin is None else ""
    return count, f"{worst.cell_id}: {worst.got}" if not reason else worst.cell_id, f"{worst}{reason}"


def _covered(name: str, mark: Mark, results: Results) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The cells that a mark of the device class ``name`` speaks of."""
    content = results.get(mark.op, {})
    for cell_id, cell in content.get("cells", {}).items():
        run = content["runs"][cell["run"]]
        if device_class(run) == name and mark.covers(mark.op, cell):
            yield cell_id, cell


def _judge_cell(mark: Mark, cell_id: str, cell: Mapping[str, Any]) -> Verdict:
    if "failed" in cell:
        return Verdict(mark, mark.op, cell_id, cell["failed"], None)
    own = cell["contenders"][OWN]
    if mark.versus == FLOOR:
        assert mark.at_least is not None
        return Verdict(mark, mark.op, cell_id, f"{own['share_of_floor']:.0%}", own["share_of_floor"] / mark.at_least)
    peer = cell["contenders"].get(mark.versus, {"skipped": "not a contender"})
    if "skipped" in peer:
        return Verdict(mark, mark.op, cell_id, f"skipped: {peer['skipped']}", None)
    if mark.memory:
        assert mark.at_most is not None
        if "peak_ratio" not in peer:
            return Verdict(mark, mark.op, cell_id, "no peak was measured", None)
        return Verdict(mark, mark.op, cell_id, f"{1 / peer['peak_ratio']:.3g}x", mark.at_most * peer["peak_ratio"])
    ratio = peer["ratio"]
    if mark.at_least is not None:
        return Verdict(mark, mark.op, cell_id, f"{ratio:.3g}x", ratio / mark.at_least)
    assert mark.at_most is not None
    allowance = mark.plus_us / 1e3 / own["ms"]["p50"]
    return Verdict(mark, mark.op, cell_id, f"{1 / ratio:.3g}x", mark.at_most * ratio + allowance)
