"""The method: check every contender against the truth, then time them in turns, in one process."""

from __future__ import annotations

import math
import statistics
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bench import truth
from bench.results import OWN
from bench.timers import Call, Timed, Timer


@dataclass(frozen=True)
class Plan:
    """How much is measured. ``seconds`` is what a cell should take; the bounds on the rounds go before it."""

    min_rounds: int = 15
    max_rounds: int = 50
    seconds: float = 3.0
    turn_seconds: float = 5e-3  # short calls are repeated within a turn
    max_calls: int = 10
    warm_up_seconds: float = 0.2


# 15 alternations on a CPU, 50 on a GPU, as a published figure needs them; quick ones show only that the benchmarks run.
PLANS = {
    "cpu": Plan(),
    "cuda": Plan(min_rounds=50, max_rounds=100, seconds=1.0, turn_seconds=0.0, warm_up_seconds=0.05),
}
# A model's training step takes long enough to need no more rounds on a GPU either.
STEPS = Plan(seconds=10.0, turn_seconds=0.0, warm_up_seconds=1.0)
# For the cells of a GPU that no mark names: as many rounds as a published figure needs, and no more.
BRIEF = Plan(min_rounds=50, max_rounds=50, seconds=0.0, turn_seconds=0.0, warm_up_seconds=0.0)
QUICK = Plan(min_rounds=3, max_rounds=3, seconds=0.0, turn_seconds=0.0, warm_up_seconds=0.0)


@dataclass(frozen=True)
class Contender:
    """One way to do a cell's work.

    Attributes:
        calls: the work, once for each rotated copy of the operands; a call returns a tensor or a tuple of tensors.
        truth: what a call must return.
        tolerance: relative error that is allowed; 0 asks for the same values.
        backend: which of the package's backends serves the call, where that is known.
        captured: whether a GPU replays it from a graph.
        resident: bytes that it holds between calls. Where they are given, a call's peak is measured on top.
        over: the contender whose work it does and more; what it takes beyond that one is stored too.
    """

    calls: tuple[Call, ...]
    truth: tuple[Tensor, ...]
    tolerance: float
    backend: str | None = None
    captured: bool = True
    resident: int | None = None
    over: str | None = None


class WrongResultError(AssertionError):
    """A contender's result is wrong: nothing of the cell is timed."""


@dataclass
class Field:
    """A cell's contenders that passed their check, and the reasons of those that cannot be had."""

    contenders: dict[str, Contender] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def assemble(builders: Mapping[str, Callable[[], Contender]]) -> Field:
    """Build and check each contender. What a peer raises is its reason to be left out; what peftrt raises is raised.

    Raises:
        WrongResultError: a contender gives a wrong result.
    """
    found = Field()
    for name, build in builders.items():
        try:
            contender = build()
            found.errors[name] = check(name, contender)
            found.contenders[name] = contender
        except WrongResultError:
            raise
        except Exception as error:
            if name == OWN:
                raise
            found.skipped[name] = reason(error)
    return found


def reason(error: Exception) -> str:
    """The kind and the first line of an error, for a table."""
    text = str(error).strip() or "no message"
    return textwrap.shorten(f"{type(error).__name__}: {text.splitlines()[0]}", 120, placeholder=" ...")


def check(name: str, contender: Contender) -> float:
    """The largest relative error over a call's results.

    Raises:
        WrongResultError: it is above the contender's tolerance, or a shape is wrong.
    """
    results = contender.calls[0]()
    results = results if isinstance(results, tuple) else (results,)
    if len(results) != len(contender.truth):
        raise WrongResultError(f"{name}: {len(results)} results, expected {len(contender.truth)}")
    worst = 0.0
    for i, (actual, expected) in enumerate(zip(results, contender.truth, strict=True)):
        try:
            error = truth.relative_error(actual, expected)
        except ValueError as wrong:
            raise WrongResultError(f"{name}: result {i}: {wrong}") from None
        if not error <= contender.tolerance:
            raise WrongResultError(f"{name}: result {i}: relative error {error:.3g}, allowed {contender.tolerance:.3g}")
        worst = max(worst, error)
    return worst


class Race:
    """Contenders that take turns. One round is a turn of each; peftrt's is driven from outside, call by call.

    So pytest-benchmark can time the very calls that are recorded here: it runs :meth:`own` :attr:`own_calls` times
    a round and then :meth:`others`. :meth:`run` does the same without it.
    """

    def __init__(self, contenders: Mapping[str, Contender], timer: Timer, plan: Plan) -> None:
        self._timer = timer
        self._timed = {name: timer.prepare(c.calls, c.captured) for name, c in contenders.items()}
        self.peaks = {
            name: contender.resident + timer.peak(contender.calls[0])
            for name, contender in contenders.items()
            if contender.resident is not None
        }
        self._calls = {name: self._warm_up(timed, plan) for name, timed in self._timed.items()}
        self._open: list[float] = []
        self.samples: dict[str, list[float]] = {name: [] for name in contenders}
        self.notes = {name: timed.note for name, timed in self._timed.items() if timed.note is not None}
        round_seconds = sum(self._turn(name) * self._calls[name] * timed.batch for name, timed in self._timed.items())
        self.rounds = min(plan.max_rounds, max(plan.min_rounds, int(plan.seconds / round_seconds)))
        self.own_calls = self._calls[OWN]

    def _warm_up(self, timed: Timed, plan: Plan) -> int:
        """Run until caches, thread pools and compilers have settled; returns the number of calls in a turn."""
        end = time.perf_counter() + plan.warm_up_seconds
        seconds = [self._timer.time(timed) for _ in range(2)]
        while time.perf_counter() < end:
            seconds.append(self._timer.time(timed))
        return max(1, min(plan.max_calls, math.ceil(plan.turn_seconds / (min(seconds) * timed.batch))))

    def _turn(self, name: str) -> float:
        return statistics.fmean(self._timer.time(self._timed[name]) for _ in range(self._calls[name]))

    def own(self) -> None:
        """One call of peftrt's turn."""
        self._open.append(self._timer.time(self._timed[OWN]))

    def others(self) -> None:
        """Closes peftrt's turn; then every other contender has its own, in an order that alternates."""
        if len(self.samples[OWN]) == self.rounds:
            return  # pytest-benchmark asks for one result more than it times
        self.samples[OWN].append(statistics.fmean(self._open))
        self._open.clear()
        names = [name for name in self._timed if name != OWN]
        for name in names if len(self.samples[OWN]) % 2 else reversed(names):
            self.samples[name].append(self._turn(name))

    def run(self) -> None:
        """All rounds, without pytest-benchmark."""
        for _ in range(self.rounds):
            for _ in range(self.own_calls):
                self.own()
            self.others()


def summary(seconds: list[float]) -> dict[str, float]:
    """Minimum and percentiles in milliseconds, to four digits."""
    ordered = sorted(seconds)
    figures = {"min": ordered[0]} | {f"p{share}": percentile(ordered, share / 100) for share in (20, 50, 80)}
    return {name: digits(value * 1e3) for name, value in figures.items()}


def percentile(ordered: list[float], share: float) -> float:
    """Linear interpolation between the neighbours in an ordered list."""
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def digits(value: float, count: int = 4) -> float:
    """``value`` with ``count`` significant digits, so that files stay readable."""
    return float(f"{value:.{count}g}")


def report(race: Race, found: Field, floor: float) -> dict[str, Any]:
    """What a result file holds of each contender; ``floor`` in seconds.

    ``ratio`` is the median over the rounds of a peer's time over peftrt's, ``ratio_min`` that of the two minima,
    ``peak_ratio`` that of the peaks of memory; ``added_ms`` is the median over the rounds of a contender's time less
    that of the one it works over.
    """
    own = race.samples[OWN]
    entries: dict[str, Any] = {}
    for name, samples in race.samples.items():
        entry: dict[str, Any] = {"ms": summary(samples), "error": digits(found.errors[name], 2)}
        entry["share_of_floor"] = digits(floor / statistics.median(samples), 3)
        backend = found.contenders[name].backend
        if backend is not None:
            entry["backend"] = backend
        over = found.contenders[name].over
        if over in race.samples:
            beyond = statistics.median(time - less for time, less in zip(samples, race.samples[over], strict=True))
            entry["over"], entry["added_ms"] = over, digits(beyond * 1e3)
        if name in race.notes:
            entry["note"] = race.notes[name]
        if name in race.peaks:
            entry["peak_mb"] = digits(race.peaks[name] / 1e6)
        if name != OWN:
            entry["ratio"] = digits(statistics.median(theirs / ours for theirs, ours in zip(samples, own, strict=True)))
            entry["ratio_min"] = digits(min(samples) / min(own))
            if name in race.peaks and OWN in race.peaks:
                entry["peak_ratio"] = digits(race.peaks[name] / race.peaks[OWN])
        entries[name] = entry
    return entries | {name: {"skipped": reason} for name, reason in found.skipped.items()}
