"""What a CPU with AVX2 is to reach: one list, judged against stored results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench.results import OWN

SMALLEST_SIDE = 2000  # below it a call's fixed cost decides


@dataclass(frozen=True)
class Mark:
    """``at_least`` times as fast as ``versus``, or a time of ``at_most`` times its plus ``plus_us`` microseconds.

    ``rows`` are the values of M that it holds for; with ``and_up`` the first of them and all above; empty for any.
    """

    op: str
    part: str
    dtype: str
    rows: tuple[int, ...]
    versus: str
    at_least: float | None = None
    at_most: float | None = None
    plus_us: float = 0.0
    and_up: bool = False

    def covers(self, op: str, cell: Mapping[str, Any]) -> bool:
        """Whether the mark speaks of this cell."""
        if (self.op, self.part, self.dtype) != (op, cell["part"], cell["dtype"]):
            return False
        if min(cell["N"], cell["K"]) < SMALLEST_SIDE:
            return False
        M = cell.get("M", 0)
        return not self.rows or M in self.rows or (self.and_up and self.rows[0] <= M)

    @property
    def where(self) -> str:
        """The cells that the mark speaks of."""
        rows = "/".join(str(M) for M in self.rows)
        return f"{self.part}-{self.dtype}" + (f"-M{rows}" if rows else "") + ("+" if self.and_up else "")

    def __str__(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:g}x {self.versus}"
        return f"<= {self.at_most:g}x {self.versus}" + (f" + {self.plus_us:g} µs" if self.plus_us else "")


def _linear(part: str, dtype: str, M: int, bitsandbytes: float, dense: float) -> tuple[Mark, Mark]:
    return (
        Mark("nf4_linear", part, dtype, (M,), "bitsandbytes", at_least=bitsandbytes),
        Mark("nf4_linear", part, dtype, (M,), "torch", at_least=dense),
    )


CPU_MARKS = (
    *_linear("forward", "fp32", 1, 42, 3.6),
    *_linear("forward", "fp32", 4, 25, 5.5),
    *_linear("forward", "fp32", 16, 9, 2.1),
    *_linear("forward", "fp32", 64, 4, 1.35),
    *_linear("forward", "fp32", 512, 1.3, 1.1),
    *_linear("forward", "bf16", 512, 7, 7),
    *_linear("dx", "fp32", 1, 25, 3),
    *_linear("dx", "fp32", 16, 7, 2),
    *_linear("dx", "fp32", 512, 1.3, 1.08),
    Mark("nf4_dequantize", "out", "fp32", (), "bitsandbytes", at_least=8),
    Mark("nf4_dequantize", "new", "fp32", (), "torch.zeros", at_most=1.2),
    *(
        mark
        for base in ("nf4", "dense")
        for mark in (
            Mark("lora_linear", f"{base}-forward", "fp32", (512,), "base", at_most=1.05, plus_us=5, and_up=True),
            Mark("lora_linear", f"{base}-train", "fp32", (), "base", at_most=1.1),
        )
    ),
    Mark("lora_linear", "nf4-train", "fp32", (16,), "peft+bitsandbytes", at_least=3),
    Mark("lora_linear", "nf4-train", "fp32", (256,), "peft+bitsandbytes", at_least=1.5),
)


@dataclass(frozen=True)
class Verdict:
    """A mark on one cell. ``margin`` is the ratio of what was reached to what is asked, None without figures."""

    mark: Mark
    op: str
    cell_id: str
    got: str
    margin: float | None

    def __str__(self) -> str:
        if self.margin is None:
            return "not measured"
        if self.margin >= 1:
            return "reached"
        return f"missed by {100 * (1 - self.margin):.0f} %"


def judge(results: Mapping[str, Mapping[str, Any]]) -> Iterator[Verdict]:
    """Every mark on every stored cell that it speaks of; ``results`` by operation."""
    for mark in CPU_MARKS:
        for cell_id, cell in _covered(mark, results):
            yield _judge_cell(mark, cell_id, cell)


def unmeasured(results: Mapping[str, Mapping[str, Any]]) -> list[Mark]:
    """The marks that no stored cell can be judged by."""
    return [mark for mark in CPU_MARKS if not any(_covered(mark, results))]


def _covered(mark: Mark, results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    content = results.get(mark.op, {})
    for cell_id, cell in content.get("cells", {}).items():
        on_cpu = content["runs"][cell["run"]]["timer"] == "perf_counter"
        if on_cpu and mark.covers(mark.op, cell):
            yield cell_id, cell


def _judge_cell(mark: Mark, cell_id: str, cell: Mapping[str, Any]) -> Verdict:
    if "failed" in cell:
        return Verdict(mark, mark.op, cell_id, f"wrong result: {cell['failed']}", None)
    peer = cell["contenders"].get(mark.versus, {"skipped": "not a contender"})
    if "skipped" in peer:
        return Verdict(mark, mark.op, cell_id, f"skipped: {peer['skipped']}", None)
    ratio = peer["ratio"]
    if mark.at_least is not None:
        return Verdict(mark, mark.op, cell_id, f"{ratio:.3g}x", ratio / mark.at_least)
    assert mark.at_most is not None
    allowance = mark.plus_us / 1e3 / cell["contenders"][OWN]["ms"]["p50"]
    return Verdict(mark, mark.op, cell_id, f"{1 / ratio:.3g}x", mark.at_most * ratio + allowance)
