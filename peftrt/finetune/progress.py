"""Shows how a run is going: a live bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from peftrt.finetune.errors import require
from peftrt.finetune.trainer import Step

if TYPE_CHECKING:
    import rich.progress
    from rich.console import Console

_LINES = 20  # about how many lines a run writes where there is no terminal
_SMOOTHING = 0.1


def peak_memory() -> int:
    """Bytes at the highest: of the GPU where one was used, else of the process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def human_bytes(count: float) -> str:
    """``1536`` as ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def human_time(seconds: float) -> str:
    """``75`` as ``1:15``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def console() -> Console:
    """The console that a command writes to: colours on a terminal, plain text elsewhere."""
    return require("rich.console", "hf", "the progress display").Console(highlight=False)


class Progress:
    """A run's progress, between ``with`` and its end::

        with Progress(console(), "training", steps=100) as progress:
            for step in trainer:
                progress.update(step)

    Args:
        out: where to; ``console()`` makes one.
        title: what is running.
        steps: how many in all.
        done: how many of them before this run.
        memory: the peak to show, where it is not this process's.
    """

    def __init__(
        self, out: Console, title: str, steps: int, done: int = 0, memory: Callable[[], int] = peak_memory
    ) -> None:
        self._memory = memory
        self._out = out
        self._title = title
        self._steps = steps
        self._first = done
        self._every = max(1, steps // _LINES)
        self._loss = 0.0
        self._tokens = 0
        self._seconds = 0.0
        self._bar = _bar(out) if out.is_terminal else None

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._steps, completed=self._first, **self._fields())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: Step) -> None:
        """Show a step that is done."""
        first = not self._seconds
        self._loss = step.loss if first else self._loss + _SMOOTHING * (step.loss - self._loss)
        self._tokens += step.tokens
        self._seconds += step.seconds
        if self._bar is not None:
            self._bar.update(self._task, completed=step.number, **self._fields())
        elif step.number % self._every == 0 or step.number == self._steps:
            fields = self._fields()
            left = (self._steps - step.number) * (time.perf_counter() - self._start) / (step.number - self._first)
            self._out.print(
                f"{self._title}: step {step.number}/{self._steps}  loss {fields['loss']}  {fields['speed']} tokens/s  "
                f"peak {fields['memory']}  {human_time(left)} left",
                soft_wrap=True,
            )

    def note(self, text: str) -> None:
        """Write a line above the bar."""
        self._out.print(text, soft_wrap=True)

    def _fields(self) -> dict[str, Any]:
        speed = self._tokens / self._seconds if self._seconds else 0.0
        loss = f"{self._loss:.4f}" if self._seconds else "-"
        return {"loss": loss, "speed": f"{speed:,.0f}", "memory": human_bytes(self._memory())}


def _bar(out: Console) -> rich.progress.Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss [cyan]{task.fields[loss]}"),
        TextColumn("[green]{task.fields[speed]}[/] tokens/s"),
        TextColumn("peak [magenta]{task.fields[memory]}"),
        TimeRemainingColumn(),
        console=out,
        expand=True,
    )
