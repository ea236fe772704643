"""The demo's table and picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peftrt.demo.results import Result
from peftrt.finetune.plots import draw_losses, figure, save_figure
from peftrt.finetune.progress import human_bytes, human_time

if TYPE_CHECKING:
    from rich.console import Console

JSON, PLOT = "demo.json", "demo.png"


def print_result(out: Console, result: Result, directory: Path) -> None:
    """The figures, for people."""
    from rich.table import Table

    table = Table(title=f"accuracy (macro-F1) on {result.held_out_examples} held-out docstrings")
    for column in ("task", "most frequent", "linear probe", "4-bit + LoRA", "trained", "on disk", "reloaded"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task in result.tasks:
        scores = (task.majority, task.probe, task.adapted)
        table.add_row(
            f"{task.name}: {task.question}",
            *(f"{score.accuracy:.3f} ({score.macro_f1:.3f})" for score in scores),
            f"{task.trained_parameters:,}",
            human_bytes(task.adapter_bytes),
            _difference(result.reload_difference[task.name]),
        )
    out.print(table)
    rows = Table(title="one batch, an adapter a row")
    for column in ("docstring", "tenant", "answer", "against alone"):
        rows.add_column(column, overflow="ellipsis", no_wrap=True)
    for row in result.served:
        rows.add_row(row.text, row.tenant or "-", row.answer, _difference(row.difference))
    out.print(rows)
    out.print(
        f"{human_time(result.seconds)} on {result.threads} threads, peak {human_bytes(result.peak_memory_bytes)}; "
        f"{directory / PLOT}, {directory / JSON}",
        soft_wrap=True,
    )


def draw(directory: Path, result: Result) -> None:
    """The losses of both tenants beside the comparison."""
    drawing, (left, right) = figure(11, 4, columns=2)
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
    right.legend(fontsize=8, loc="upper right", ncols=3)
    save_figure(drawing, directory / PLOT)


def _difference(value: float) -> str:
    return "the same bits" if value == 0 else f"within {value:.0e}"
