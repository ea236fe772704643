"""The trainings that a comparison is made of, each with a file for its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peftrt.compare.methods import HEAD, Method
from peftrt.compare.settings import VARIANTS

FOLDER = "trainings"


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        method: by its name.
        seed: from 0 on.
        variant: None for the first task alone; one of ``VARIANTS`` for the second after it.
    """

    method: str
    seed: int
    variant: str | None = None

    @property
    def name(self) -> str:
        """``lora-8.0``, or ``lora-8.0.ewc``."""
        return f"{self.method}.{self.seed}" + (f".{self.variant}" if self.variant else "")

    @property
    def file(self) -> str:
        """Where its result is, in the comparison's directory."""
        return f"{FOLDER}/{self.name}.json"

    @classmethod
    def of(cls, name: str) -> Cell:
        method, seed, *variant = name.split(".")
        return cls(method, int(seed), variant[0] if variant else None)


def plan(methods: Sequence[Method], seeds: int, forgetting: Sequence[str]) -> list[Cell]:
    """All trainings, seed after seed, so that a comparison that is stopped has something of every method."""
    chosen = {method.name: method for method in methods}
    cells = []
    for seed in range(seeds):
        cells += [Cell(name, seed) for name in chosen]
        # a head of its own for each task forgets nothing
        again = [name for name in forgetting if name in chosen and chosen[name].place != HEAD]
        cells += [Cell(name, seed, variant) for name in again for variant in VARIANTS]
    return cells
