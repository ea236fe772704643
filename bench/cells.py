"""A cell: one operation on one size, with the bytes and operations that it cannot do without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bench.shapes import RANK, Site

# Codes, nested scale codes (one in 64 weights) and their fp32 scales (one in 64 x 256).
NF4_BYTES = "N*K*(1/2 + 1/64 + 1/4096)"

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Cell:
    """Attributes:

    op: the operation, which names the result file.
    part: what is run of it: ``"forward"``, ``"dx"``, ``"out"`` ...
    site, M: the size; M is 0 where the operation has no rows.
    dtype: of the activations, or of the decoded weight.
    bytes, flops: formulas over N, K, M, R and the dtype's size s: the traffic with main memory and the arithmetic
        that no implementation can avoid.
    letters: what else they are over, by name.
    moved: a formula for the bytes that go from where pages lie to the device, and as many back; empty for none.
    """

    op: str
    part: str
    site: Site
    M: int
    dtype: torch.dtype
    bytes: str
    flops: str
    letters: tuple[tuple[str, int], ...] = ()
    moved: str = ""

    @property
    def id(self) -> str:
        """The cell's key in its result file."""
        rows = f"-M{self.M}" if self.M else ""
        return f"{self.part}-{DTYPE_NAMES[self.dtype]}-{self.site}{rows}"

    def evaluate(self, formula: str) -> float:
        """The value of one of the cell's formulas."""
        return evaluate(formula, self.describe_size())

    def describe_size(self) -> dict[str, Any]:
        """What the formulas are over, as a result file holds it."""
        size: dict[str, Any] = {"N": self.site.N, "K": self.site.K}
        if self.M:
            size["M"] = self.M
        return size | dict(self.letters) | {"dtype": DTYPE_NAMES[self.dtype]}

    def describe(self) -> dict[str, Any]:
        """What a result file holds of the cell itself."""
        return {
            "part": self.part,
            **self.describe_size(),
            "bytes": {"formula": self.bytes, "value": round(self.evaluate(self.bytes))},
            "flops": {"formula": self.flops, "value": round(self.evaluate(self.flops))},
            **({"moved": {"formula": self.moved, "value": round(self.evaluate(self.moved))}} if self.moved else {}),
        }


def evaluate(formula: str, size: Mapping[str, Any]) -> float:
    """The value of a formula over a cell's size, as :meth:`Cell.describe` has it."""
    itemsize = next(dtype.itemsize for dtype, name in DTYPE_NAMES.items() if name == size["dtype"])
    letters = {"M": 0, "R": RANK, **{name: value for name, value in size.items() if len(name) == 1}, "s": itemsize}
    return eval(formula, {"__builtins__": {}}, letters)
