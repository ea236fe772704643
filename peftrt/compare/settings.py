"""What a comparison is told, as it stands in its directory's compare.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftrt.finetune.errors import UserError

VARIANTS = ("plain", "ewc", "replay")
# What may differ in a later call: it asks for more trainings, and leaves those that are done as they are.
FREE = ("methods", "seeds", "forgetting")


@dataclass(frozen=True)
class Settings:
    """The arguments of ``peftrt compare``; each field is the option of that name.

    Attributes:
        model, data: None for the demo's encoder and docstrings.
        second_label_column: the second task's labels, of the same texts; without them nothing can be forgotten.
        steps, batch_size: of every training alike.
        eval_limit: held-out examples that are measured at most.
        threads: of torch in every training; None leaves them.
    """

    model: str | None = None
    data: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    second_label_column: str | None = None
    eval_share: float = 0.2
    max_length: int | None = None
    steps: int = 200
    batch_size: int = 8
    eval_limit: int = 1000
    methods: tuple[str, ...] | None = None
    seeds: int = 3
    forgetting: tuple[str, ...] = ("full", "lora-16")
    device: str = "auto"
    threads: int | None = None

    @classmethod
    def of(cls, given: dict[str, Any]) -> Settings:
        """Settings of what was given on the command line; ``quick`` stands for few steps and examples, and one seed."""
        values = dict(given)
        if values.pop("quick", False):
            values = {"steps": 24, "eval_limit": 100, "seeds": 1, "forgetting": ("lora-16",), **values}
        for name in ("model", "data"):
            # a later call may come from elsewhere; a Hub id is no path
            if values.get(name) is not None and (name == "data" or Path(values[name]).is_dir()):
                values[name] = str(Path(values[name]).absolute())
        settings = cls(**values)
        if (settings.model is None) != (settings.data is None):
            raise UserError("--model and --data go together; without both, it is the demo's encoder and docstrings")
        if settings.model is None and settings.second_label_column is not None:
            raise UserError("--second-label-column needs --model and --data")
        return settings

    def fixed(self) -> dict[str, Any]:
        """What all trainings of a directory have in common."""
        return {name: value for name, value in asdict(self).items() if name not in FREE}
