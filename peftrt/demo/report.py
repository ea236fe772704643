"""The demo's table and picture."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

from peftrt.demo.results import Result, Score
from peftrt.finetune.plots import draw_losses, figure, save_figure
from peftrt.finetune.progress import human_bytes, human_time

if TYPE_CHECKING:
    from rich.console import Console

JSON, PLOT = "demo.json", "demo.png"
_TEXT = 26  # characters of a docstring that the table shows


def print_result(out: Console, result: Result, directory: Path) -> None:
    """The figures, for people."""
    from rich.markup import escape
    from rich.table import Table

    rows = {
        "classes": lambda task: str(len(task.classes)),
        "always the most frequent": lambda task: _score(task.majority),
        "linear probe, frozen encoder": lambda task: _score(task.probe),
        "4-bit encoder + LoRA": lambda task: f"[bold]{_score(task.adapted)}[/]",
        "parameters trained": lambda task: f"{task.trained_parameters:,}",
        "adapter and head on disk": lambda task: human_bytes(task.adapter_bytes),
        "training, one epoch": lambda task: human_time(sum(step.seconds for step in task.history)),
        "loaded by another process": lambda task: _difference(result.reload_difference[task.name]),
    }
    table = Table(f"{result.held_out_examples} held-out docstrings: accuracy (macro-F1)")
    for task in result.tasks:
        table.add_column(task.question, justify="right")
    for title, cell in rows.items():
        table.add_row(title, *(cell(task) for task in result.tasks))
    out.print(table)
    served = Table("one batch, an adapter a row", "tenant", "answer", "against alone")
    for row in result.served:
        served.add_row(
            escape(shorten(row.text, _TEXT, placeholder=" ...")),
            row.tenant or "-",
            row.answer,
            _difference(row.difference),
        )
    out.print(served)
    out.print(
        f"{human_time(result.seconds)} on {result.threads} threads, peak {human_bytes(result.peak_memory_bytes)}; "
        f"{directory / PLOT}, {directory / JSON}",
        soft_wrap=True,
    )


def draw(directory: Path, result: Result) -> None:
    """The losses of both tenants beside the comparison."""
    drawing, (left, right) = figure(12, 4, columns=2)
    for task in result.tasks:
        draw_losses(left, task.history, label=task.name)
    left.set_title("training, one epoch a tenant")
    left.legend()
    names = {
        "majority": "most frequent class",
        "probe": "linear probe on the frozen encoder",
        "adapted": "4-bit + LoRA",
    }
    for i, (field, label) in enumerate(names.items()):
        heights = [getattr(task, field).accuracy for task in result.tasks]
        bars = right.bar([place + 0.27 * (i - 1) for place in range(len(heights))], heights, 0.25, label=label)
        right.bar_label(bars, fmt="%.3f", fontsize=8)
    right.set_xticks(range(len(result.tasks)), [task.name for task in result.tasks])
    right.set_ylim(0, 1.15)
    right.set_ylabel("held-out accuracy")
    right.set_title("the same docstrings, held out")
    right.legend(fontsize=7, loc="upper right", ncols=3)
    save_figure(drawing, directory / PLOT)


def _score(score: Score) -> str:
    return f"{score.accuracy:.3f} ({score.macro_f1:.3f})"


def _difference(value: float) -> str:
    return "the same bits" if value == 0 else f"within {value:.0e}"
