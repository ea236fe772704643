"""Stored results held against the marks of their device: reached, or by how much missed, or why not measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from bench.cells import evaluate
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
            yield from _verdicts(name, mark, results)


def _verdicts(name: str, mark: Mark, results: Results) -> list[Verdict]:
    found = [_judge_cell(mark, *covered) for covered in _covered(name, mark, results)]
    return [_mean(mark, found)] if mark.mean and found else found


def _mean(mark: Mark, verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict on all cells together; those without figures are left out of it."""
    margins = [verdict.margin for verdict in verdicts if verdict.margin is not None]
    if not margins:
        return Verdict(mark, mark.op, "all", verdicts[0].got, None)
    assert mark.at_least is not None
    margin = geometric_mean(margins)
    got = f"{margin * mark.at_least:.3g}x over {len(margins)} of {len(verdicts)} cells"
    return Verdict(mark, mark.op, "all", got, margin)


def unmeasured(results: Results) -> list[Mark]:
    """The marks of the devices in ``results`` that no stored cell can be judged by."""
    found = {device_class(run) for content in results.values() for run in content["runs"].values()}
    pairs = [(name, mark) for name in MARKS if name in found for mark in MARKS[name]]
    return [mark for name, mark in pairs if not any(_covered(name, mark, results))]


def summary(marks: Sequence[Mark], results: Results, device: str) -> list[list[str]]:
    """One row a mark: operation, cells, mark, how many cells reached it, the worst of them, and the verdict on it."""
    return [[mark.op, mark.where, str(mark), *_summary(mark, results, device)] for mark in marks]


def _summary(mark: Mark, results: Results, device: str) -> tuple[str, str, str]:
    verdicts = _verdicts(device, mark, results)
    if not verdicts:
        return "", "", "not measured: no cell of it was run"
    count = f"{sum(verdict.reached for verdict in verdicts)} of {len(verdicts)}"
    worst = min(verdicts, key=lambda verdict: -1.0 if verdict.margin is None else verdict.margin)
    reason = f": {worst.got}" if worst.margin is None else ""
    return count, f"{worst.cell_id}: {worst.got}" if not reason else worst.cell_id, f"{worst}{reason}"


def _covered(name: str, mark: Mark, results: Results) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """The cells that a mark of the device class ``name`` speaks of, with their runs."""
    content = results.get(mark.op, {})
    for cell_id, cell in content.get("cells", {}).items():
        run = content["runs"][cell["run"]]
        if device_class(run) == name and mark.covers(mark.op, cell):
            yield cell_id, cell, run


def _judge_cell(mark: Mark, cell_id: str, cell: Mapping[str, Any], run: Mapping[str, Any]) -> Verdict:
    if "failed" in cell:
        return Verdict(mark, mark.op, cell_id, cell["failed"], None)
    own = cell["contenders"][OWN]
    if mark.versus == FLOOR:
        return Verdict(mark, mark.op, cell_id, *_against_the_floor(mark, own["share_of_floor"]))
    peer = _peer(mark, cell["contenders"])
    if "skipped" in peer:
        return Verdict(mark, mark.op, cell_id, f"skipped: {peer['skipped']}", None)
    if mark.at_least is not None:
        return Verdict(mark, mark.op, cell_id, f"{peer['ratio']:.3g}x", peer["ratio"] / mark.at_least)
    return Verdict(mark, mark.op, cell_id, *_at_most(mark, cell, own, peer, run))


def _against_the_floor(mark: Mark, share: float) -> tuple[str, float]:
    if mark.at_least is not None:
        return f"{share:.0%}", share / mark.at_least
    assert mark.at_most is not None
    return f"{1 / share:.3g}x", share * mark.at_most


def _peer(mark: Mark, contenders: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fastest of those that a mark names; the first of them where none was timed."""
    entries = [contenders.get(name, {"skipped": "not a contender"}) for name in mark.peers]
    timed = [entry for entry in entries if "skipped" not in entry]
    return min(timed, key=lambda entry: entry["ratio"]) if len(timed) > 1 else (timed or entries)[0]


def _at_most(
    mark: Mark, cell: Mapping[str, Any], own: Mapping[str, Any], peer: Mapping[str, Any], run: Mapping[str, Any]
) -> tuple[str, float | None]:
    """What was reached, and its margin, of a mark that allows so much time or memory."""
    assert mark.at_most is not None
    if mark.memory:
        if "peak_ratio" not in peer:
            return "no peak was measured", None
        return f"{1 / peer['peak_ratio']:.3g}x", mark.at_most * peer["peak_ratio"]
    if mark.added:
        return _added(mark.at_most, own, peer)
    allowance = mark.plus_us / 1e3
    if mark.plus_bytes:
        seconds = evaluate(mark.plus_bytes, cell) / (run["ceilings"]["copy_gb_s"] * 1e9)
        allowance += mark.at_most * seconds * 1e3
    return f"{1 / peer['ratio']:.3g}x", mark.at_most * peer["ratio"] + allowance / own["ms"]["p50"]


def _added(at_most: float, own: Mapping[str, Any], peer: Mapping[str, Any]) -> tuple[str, float | None]:
    """What each takes beyond its base."""
    if "added_ms" not in own or "added_ms" not in peer:
        return "a base was not measured", None
    ours, theirs = own["added_ms"], peer["added_ms"]
    if theirs <= 0:
        return "what the peer adds is too little to be seen", None
    # less than nothing is nothing, of which no share can be told
    return f"{max(ours, 0) / theirs:.3g}x", at_most * theirs / max(ours, 1e-3 * at_most * theirs)
