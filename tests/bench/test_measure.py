"""The method: wrong results are not timed, absent peers are named, turns alternate, figures are what they say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench import measure
from bench.measure import Contender, Race, WrongResultError
from bench.peers import need
from bench.results import OWN
from bench.timers import CpuTimer, Timed

TRUTH = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)


def _contender(value: Tensor, tolerance: float = 1e-6) -> Contender:
    return Contender((lambda: value,), (TRUTH,), tolerance)


def _right() -> Contender:
    return _contender(TRUTH.float())


class LoggingTimer(CpuTimer):
    """A clock whose calls last as long as they say, and a log of who was called."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.log = seconds, []

    def time(self, timed: Timed) -> float:
        name = timed.run()
        self.log.append(name)
        return self.seconds[name]


def _race(seconds: dict[str, float], plan: measure.Plan) -> tuple[Race, LoggingTimer]:
    timer = LoggingTimer(seconds)
    contenders = {name: Contender((lambda name=name: name,), (), 0.0) for name in seconds}
    race = Race(contenders, timer, plan)
    timer.log.clear()
    return race, timer


def test_a_wrong_result_stops_the_cell() -> None:
    wrong = TRUTH.float().clone()
    wrong[1] += 1e-3
    with pytest.raises(WrongResultError, match=r"peer: result 0: relative error 0\.00025, allowed 1e-06"):
        measure.assemble({OWN: _right, "peer": lambda: _contender(wrong)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_wrong(value: float) -> None:
    with pytest.raises(WrongResultError, match="relative error inf"):
        measure.check("peer", _contender(torch.tensor([1.0, value, 4.0]), tolerance=0.5))


def test_another_shape_or_number_of_results_is_wrong() -> None:
    with pytest.raises(WrongResultError, match=r"shape \[1, 3\], expected \[3\]"):
        measure.check("peer", _contender(TRUTH[None]))
    pair = Contender((lambda: (TRUTH, TRUTH),), (TRUTH,), 0.0)
    with pytest.raises(WrongResultError, match="2 results, expected 1"):
        measure.check("peer", pair)


def test_the_error_is_relative_to_the_largest_value_and_zero_is_comparable() -> None:
    assert measure.check("peer", _contender(TRUTH + 4e-7)) == pytest.approx(1e-7)
    zeros = torch.zeros(3, dtype=torch.float64)
    assert measure.check("peer", Contender((lambda: zeros,), (zeros,), 0.0)) == 0.0


def test_a_peer_that_cannot_be_had_is_left_out_with_its_reason() -> None:
    def missing() -> Contender:
        need("a_package_that_is_not_there")
        raise AssertionError("not reached")

    def failing() -> Contender:
        return Contender((_raise(NotImplementedError("no such kernel\nand a long story")),), (TRUTH,), 0.0)

    found = measure.assemble({OWN: _right, "missing": missing, "failing": failing})
    assert list(found.contenders) == [OWN]
    assert found.skipped["failing"] == "NotImplementedError: no such kernel"
    assert "a_package_that_is_not_there cannot be imported" in found.skipped["missing"]


def test_what_the_package_itself_raises_is_raised() -> None:
    with pytest.raises(NotImplementedError, match="ours"):
        measure.assemble({OWN: lambda: Contender((_raise(NotImplementedError("ours")),), (TRUTH,), 0.0)})


def _raise(error: Exception) -> Callable[[], Tensor]:
    def call() -> Tensor:
        raise error

    return call


def test_contenders_take_turns_in_alternating_order() -> None:
    plan = measure.Plan(min_rounds=3, max_rounds=3, turn_seconds=0.0, warm_up_seconds=0.0)
    race, timer = _race({OWN: 1.0, "a": 2.0, "b": 3.0}, plan)
    race.run()
    assert timer.log == [OWN, "a", "b", OWN, "b", "a", OWN, "a", "b"]
    assert race.samples == {OWN: [1.0] * 3, "a": [2.0] * 3, "b": [3.0] * 3}


def test_short_calls_are_repeated_within_a_turn() -> None:
    plan = measure.Plan(min_rounds=2, max_rounds=2, turn_seconds=0.01, max_calls=8, warm_up_seconds=0.0)
    race, timer = _race({OWN: 0.004, "slow": 0.02, "instant": 1e-6}, plan)
    race.run()
    assert race.own_calls == 3
    assert [timer.log.count(name) for name in (OWN, "slow", "instant")] == [2 * 3, 2 * 1, 2 * 8]


def test_rounds_fill_the_time_between_their_bounds() -> None:
    def rounds(seconds: float) -> int:
        plan = measure.Plan(min_rounds=15, max_rounds=50, seconds=3.0, turn_seconds=0.0, warm_up_seconds=0.0)
        return _race({OWN: seconds}, plan)[0].rounds

    assert [rounds(seconds) for seconds in (10.0, 0.1, 0.001)] == [15, 30, 50]


def test_a_call_after_the_last_round_records_nothing() -> None:
    plan = measure.Plan(min_rounds=2, max_rounds=2, turn_seconds=0.0, warm_up_seconds=0.0)
    race, _ = _race({OWN: 1.0, "a": 2.0}, plan)
    race.run()
    race.own()
    race.others()
    assert race.samples == {OWN: [1.0, 1.0], "a": [2.0, 2.0]}


def test_published_figures_have_enough_alternations() -> None:
    assert measure.PLANS["cpu"].min_rounds >= 15
    assert measure.PLANS["cuda"].min_rounds >= 50


def test_percentiles_interpolate() -> None:
    assert measure.summary([0.005, 0.001, 0.002, 0.004, 0.003]) == {"min": 1.0, "p20": 1.8, "p50": 3.0, "p80": 4.2}
    assert measure.summary([0.001]) == {"min": 1.0, "p20": 1.0, "p50": 1.0, "p80": 1.0}


def test_ratios_are_taken_round_by_round() -> None:
    plan = measure.Plan(min_rounds=3, max_rounds=3, turn_seconds=0.0, warm_up_seconds=0.0)
    race, _ = _race({OWN: 1.0, "a": 2.0}, plan)
    # a machine that slows down threefold in the middle slows both: the ratio of each round stays
    race.samples = {OWN: [0.1, 0.3, 0.3], "a": [0.2, 0.9, 0.6]}
    found = measure.Field({name: _right() for name in race.samples}, dict.fromkeys(race.samples, 0.0), {"b": "absent"})
    entries = measure.report(race, found, floor=0.15)
    assert entries["a"]["ratio"] == 2.0
    assert entries["a"]["ratio_min"] == 2.0
    assert entries[OWN]["share_of_floor"] == 0.5
    assert entries["b"] == {"skipped": "absent"}


def test_what_is_added_to_a_base_is_taken_round_by_round() -> None:
    race, _ = _race({OWN: 3.0, "base": 1.0, "peer": 2.0}, measure.QUICK)
    race.samples = {OWN: [3.0, 30.0, 5.0], "base": [1.0, 27.5, 2.0], "peer": [2.0, 2.0, 2.0]}
    over = {OWN: "base", "base": None, "peer": "an absent one"}
    contenders = {name: Contender((), (), 0.0, over=base) for name, base in over.items()}
    found = measure.Field(contenders, dict.fromkeys(over, 0.0))
    entries = measure.report(race, found, 1.0)
    assert (entries[OWN]["over"], entries[OWN]["added_ms"]) == ("base", 2500.0)
    assert not {"over", "added_ms"} & ({*entries["base"]} | {*entries["peer"]})
