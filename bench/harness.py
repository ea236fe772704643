"""Runs a cell: check, race, result file; inside pytest also pytest-benchmark's own record of peftrt's calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import ceilings, environment, measure, results
from bench.cells import DTYPE_NAMES, Cell
from bench.measure import Contender, Race
from bench.results import OWN
from bench.timers import Timer, timer_for
from peftrt import NF4Weight
from peftrt.ops._define import OPS
from peftrt.ops._weight import weight_args


class Session:
    """What the cells of one run share: device, timer, ceilings, result files and the time that is left."""

    def __init__(
        self,
        device: str,
        folder: Path,
        quick: bool,
        budget: float | None,
        key: str | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        """``key`` names the run, where it is part of a longer one; ``more`` is added to what it says of itself."""
        self.device, self.quick, self.folder = device, quick, folder
        self.timer: Timer = timer_for(device)
        self.plan = measure.QUICK if quick else measure.PLANS[device]
        self.measured = 0  # cells timed and stored by this run
        self._end = None if budget is None else time.monotonic() + budget
        self._key, self._more = key, dict(more or {})
        self._store: results.Store | None = None
        self._ceilings: ceilings.Ceilings | None = None

    def out_of_time(self) -> bool:
        """Whether the run's budget is spent."""
        return self._end is not None and time.monotonic() > self._end

    @property
    def ceilings(self) -> ceilings.Ceilings:
        """Measured once, before the first cell."""
        if self._ceilings is None:
            with self.timer.scope():
                self._ceilings = ceilings.measure(self.device, self.timer, self.quick)
        return self._ceilings

    @property
    def store(self) -> results.Store:
        """The result files; the run's name holds when it began and from which commit."""
        if self._store is None:
            facts = environment.describe(self.device)
            facts |= {"ceilings": asdict(self.ceilings), "timer": self.timer.name, "quick": self.quick}
            self._store = results.Store(self.folder, self._key or results.run_key(facts), facts | self._more)
        return self._store


class Runner:
    """One cell's run; a benchmark gets it as the fixture ``runner``.

    ``benchmark`` is pytest-benchmark's fixture, or None: the rounds are then run without it.
    """

    def __init__(self, session: Session, benchmark: Any, say: Callable[[str], None]) -> None:
        self._session, self._benchmark, self._say = session, benchmark, say
        self.device, self.timer = session.device, session.timer

    def run(
        self, cell: Cell, builders: Mapping[str, Callable[[], Contender]], plan: measure.Plan | None = None
    ) -> None:
        """Check all contenders, time them in turns, and store the cell. ``plan``: in the place of the session's.

        pytest-benchmark times the same calls of peftrt's that are stored. Under ``--benchmark-disable`` the contenders
        are checked and nothing is timed.

        Raises:
            WrongResultError: a wrong result; the stored cell says so in place of its figures.
        """
        with self.timer.scope():
            self._run(cell, builders, self._session.plan if plan is None or self._session.quick else plan)

    def _run(self, cell: Cell, builders: Mapping[str, Callable[[], Contender]], plan: measure.Plan) -> None:
        store = self._session.store
        try:
            found = measure.assemble(builders)
        except measure.WrongResultError as red:
            store.put(cell.op, cell.id, {**cell.describe(), "failed": f"wrong result: {red}"})
            raise
        if self._benchmark is not None and self._benchmark.disabled:
            self._benchmark.pedantic(lambda: None)
            return
        race = Race(found.contenders, self.timer, plan)
        if self._benchmark is None:
            race.run()
        else:
            self._benchmark.group = f"{cell.op} {cell.part} {DTYPE_NAMES[cell.dtype]}"
            self._benchmark.pedantic(race.own, teardown=race.others, rounds=race.rounds, iterations=race.own_calls)
        formulas = (cell.bytes, cell.flops, cell.moved or "0")
        floor = self._session.ceilings.floor(*(cell.evaluate(formula) for formula in formulas))
        entries = measure.report(race, found, floor)
        if self._benchmark is not None:
            self._benchmark.extra_info.update(entries)
        content = {**cell.describe(), "floor_ms": measure.digits(floor * 1e3), "rounds": race.rounds}
        store.put(cell.op, cell.id, {**content, "contenders": entries})
        self._session.measured += 1
        self._say(_line(cell, entries))


def _line(cell: Cell, entries: Mapping[str, Any]) -> str:
    parts = [f"{cell.op} {cell.id}: {entries[OWN]['ms']['p50']:.4g} ms"]
    for name, entry in entries.items():
        if name != OWN:
            parts.append(f"{name} skipped" if "skipped" in entry else f"{name} {entry['ratio']:.3g}x")
    return ", ".join(parts)


def backend_of(op: str, *args: Any) -> str:
    """Which backend serves an operation on these arguments of its schema; an NF4Weight stands for its own."""
    flat = [part for arg in args for part in (weight_args(op, arg) if isinstance(arg, NF4Weight) else (arg,))]
    backend = OPS[op].choice(*flat).backend
    return backend.name if backend else "none"
