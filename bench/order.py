"""Which cells come first where the time may not suffice for all: those that marks name, what was missed before them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench import judging
from bench.cells import Cell
from bench.marks import Mark


def named(cell: Cell, marks: Iterable[Mark]) -> bool:
    """Whether a mark names the cell, beside those that ask the same of every cell."""
    described = cell.describe()
    return any(mark.covers(cell.op, described) for mark in marks if not mark.everywhere)


def by_marks(cells: Sequence[Cell], marks: Sequence[Mark], known: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
    """First one cell for each mark, then the other cells that marks name, then the rest.

    In the first two groups what ``known`` results missed, or what failed, goes before what they reached, by how much;
    apart from that marks and cells keep their order.
    """
    margins = _margins(known)
    wanted = [mark for mark in marks if not mark.everywhere]
    groups: list[list[Cell]] = [[], [], []]
    for mark in wanted:
        covered = [cell for cell in cells if mark.covers(cell.op, cell.describe()) and cell not in groups[0]]
        if covered:
            groups[0].append(min(covered, key=lambda cell: margins.get((cell.op, cell.id), 1.0)))
    for cell in cells:
        if cell not in groups[0]:
            groups[1 if named(cell, wanted) else 2].append(cell)

    def missed(cell: Cell) -> float:
        return min(margins.get((cell.op, cell.id), 1.0), 1.0)

    groups[0].sort(key=missed)
    groups[1].sort(key=missed)
    return [cell for group in groups for cell in group]


def _margins(known: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """The worst margin of each cell; 0 where it failed."""
    worst: dict[tuple[str, str], float] = {}
    for verdict in judging.judge(known):
        key = verdict.op, verdict.cell_id
        if verdict.mark.mean:
            continue  # of no one cell
        failed = "failed" in known[verdict.op]["cells"][verdict.cell_id]
        margin = verdict.margin if verdict.margin is not None else (0.0 if failed else 1.0)
        worst[key] = min(margin, worst.get(key, margin))
    return worst
