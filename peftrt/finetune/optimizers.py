"""A run's optimizer, torch's AdamW or one whose state lies in pages, and its state in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftrt.finetune.errors import UserError
from peftrt.optim import PagedAdamW

# Bits of the state of those that page.
PAGED = {"paged-adamw": 32, "paged-adamw-8bit": 8}
OPTIMIZERS = ("adamw", *PAGED)
ENTRY = "optimizer."


@dataclass(frozen=True)
class Optim:
    """Which optimizer, and where its state lies.

    Attributes:
        name: one of ``OPTIMIZERS``.
        budget: what the state of one that pages may take of the device, in bytes or as "64MiB"; None for all it needs.
        backing: where the rest is: "host", or a directory.
    """

    name: str = "adamw"
    budget: int | str | None = None
    backing: str | Path = "host"

    @property
    def clips(self) -> bool:
        """Whether the optimizer clips gradients itself."""
        return self.name in PAGED

    def make(self, groups: list[dict[str, Any]], max_grad_norm: float) -> torch.optim.Optimizer:
        """The optimizer of these groups; 0 clips nothing.

        Raises:
            UserError: the budget is too small, or the Parameters cannot be had in pages.
            OSError: there is no room for the file.
        """
        if self.name not in PAGED:
            # Fused: a step over the demo's 74 small tensors takes 2.5 ms, tensor by tensor 9.6 (two threads, Zen 3,
            # November 2026).
            return torch.optim.AdamW(groups, fused=True)
        try:
            return PagedAdamW(
                groups,
                bits=PAGED[self.name],
                device_budget=self.budget,
                backing=self.backing,
                max_grad_norm=max_grad_norm or None,
            )
        except (TypeError, ValueError) as error:
            # it names arguments that the command does not have
            reason = str(error).removeprefix("PagedAdamW: ").removeprefix("device_budget ").partition("; page_size")[0]
            option = f"--optim {self.name}" if self.budget is None else f"--optim-budget {self.budget}"
            raise UserError(f"{option}: {reason}") from error


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What the state takes of the device."""
    if isinstance(optimizer, PagedAdamW):
        return optimizer.stats().device_bytes
    return sum(value.nbytes for entry in optimizer.state.values() for value in entry.values())


def saved_state(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """The state as ``optimizer.<key>.<name>``; ``names`` are those of the Parameters, group after group."""
    return {
        f"{ENTRY}{key}.{names[index]}": torch.as_tensor(value)
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }


def load_state(optimizer: torch.optim.Optimizer, names: Sequence[str], saved: Mapping[str, Tensor]) -> None:
    """Replace the state by what :func:`saved_state` returned.

    Raises:
        UserError: it is of other Parameters, or of an optimizer of another kind; nothing is changed.
    """
    index = {name: i for i, name in enumerate(names)}
    numbers = iter(range(len(names)))
    # as they are: rates are set in every step, and nothing else in a group changes
    groups = [{**group, "params": list(islice(numbers, len(group["params"])))} for group in optimizer.param_groups]
    state: dict[int, dict[str, Tensor]] = {}
    for entry, value in saved.items():
        if entry.startswith(ENTRY):
            key, _, name = entry.removeprefix(ENTRY).partition(".")
            state.setdefault(index[name], {})[key] = value
    try:
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"the checkpoint's optimizer does not fit: {' '.join(str(error).split())}") from error
