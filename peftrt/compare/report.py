"""A comparison for people: a table on the terminal and in Markdown, and plots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftrt.finetune.plots import figure, save_figure
from peftrt.finetune.progress import human_bytes

if TYPE_CHECKING:
    from rich.console import Console

MARKDOWN, PLOT = "compare.md", "compare.png"

Row = dict[str, Any]
COLUMNS: dict[str, Callable[[Row], str]] = {
    "method": lambda row: row["method"],
    "accuracy": lambda row: _spread(row, "accuracy"),
    "trained": lambda row: f"{100 * row['trainable_share']:.3g}%",
    "memory": lambda row: human_bytes(row["peak_bytes"]),
    "steps/s": lambda row: f"{row['steps_per_second']:.2f}",
    "file": lambda row: human_bytes(row["file_bytes"]),
    "latency": lambda row: f"{row['added_latency']:+.0%}",
    "rate": lambda row: f"{row['lr']:g}",
}
FORGETTING: dict[str, Callable[[Row], str]] = {
    "method": lambda row: row["method"],
    "with": lambda row: row["variant"],
    "before": lambda row: _spread(row, "before"),
    "after": lambda row: _spread(row, "after"),
    "forgotten": lambda row: _spread(row, "forgotten"),
    "second": lambda row: _spread(row, "second"),
}


def print_table(out: Console, found: dict[str, Any]) -> None:
    """The rows, on the terminal."""
    from rich import box
    from rich.table import Table

    for columns, rows in ((COLUMNS, found["methods"]), (FORGETTING, found["forgetting"])):
        if rows:
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
            for number, title in enumerate(columns):
                table.add_column(title, justify="left" if number == 0 else "right", no_wrap=True)
            for row in rows:
                table.add_row(*(cell(row) for cell in columns.values()))
            out.print(table)


def write_report(directory: Path, found: dict[str, Any]) -> None:
    """``compare.md`` and ``compare.png``."""
    (directory / MARKDOWN).write_text(markdown(found), "utf-8")
    draw(directory / PLOT, found)


def markdown(found: dict[str, Any]) -> str:
    """The rows as a page of Markdown, with what they were measured on."""
    settings = found["settings"]
    what = f"{settings['model']} on {settings['data']}" if settings["model"] else "the demo's encoder on docstrings"
    seeds = max(row["seeds"] for row in found["methods"])
    lines = [
        "# Ways to fine-tune, compared",
        "",
        f"{what}: {settings['steps']} steps of {settings['batch_size']} examples, {seeds} seed{'s' * (seeds > 1)}, "
        f"{found['threads']} thread{'s' * (found['threads'] > 1)}, torch {found['torch']}. Accuracy on held-out "
        "examples, its spread over seeds after the ±; share of the parameters trained; peak memory of a training in a "
        "process of its own, above what it held before it had a model; size of the files; what a forward of the "
        "adapted model takes more than the published one's, in fp32, in turn; learning rate.",
        "",
        *_grid(COLUMNS, found["methods"]),
    ]
    if found["forgetting"]:
        lines += [
            "",
            "## Forgetting",
            "",
            "The first task's accuracy before and after the second was learnt, what was forgotten, and the second's "
            "accuracy; each task has a head of its own. A method that trains only the head forgets nothing.",
            "",
            *_grid(FORGETTING, found["forgetting"]),
        ]
    return "\n".join(lines) + "\n"


def draw(path: Path, found: dict[str, Any]) -> None:
    """Accuracy against what is trained, and memory and speed of each method; forgetting, where there is some."""
    rows, forgotten = found["methods"], found["forgetting"]
    columns = 3 if forgotten else 2
    drawing, axes = figure(6 * columns, 4.5, columns=columns)
    for number, row in enumerate(sorted(rows, key=lambda row: row["trainable_share"])):
        share, accuracy = 100 * row["trainable_share"], row["accuracy"]
        axes[0].errorbar(share, accuracy, row["accuracy_spread"], fmt="o", capsize=3)
        # above and below in turn: some train equally much, and do equally well
        place = (4, 4 if number % 2 else -10)
        axes[0].annotate(row["method"], (share, accuracy), xytext=place, textcoords="offset points", fontsize=7)
    axes[0].set_xscale("log")
    axes[0].set_xlabel("% of the parameters trained")
    axes[0].set_ylabel("held-out accuracy")
    axes[0].set_title("accuracy")
    places = range(len(rows))
    bars = axes[1].barh(places, [row["peak_bytes"] / 1e6 for row in rows], color="tab:gray", alpha=0.6)
    axes[1].bar_label(bars, [f"{row['steps_per_second']:.1f} steps/s" for row in rows], fontsize=7, padding=2)
    axes[1].set_yticks(places, [row["method"] for row in rows], fontsize=7)
    axes[1].invert_yaxis()
    axes[1].margins(x=0.2)
    axes[1].set_xlabel("MB at the peak")
    axes[1].set_title("memory and speed of a training")
    if forgotten:
        labels = [f"{row['method']}\n{row['variant']}" for row in forgotten]
        heights, spreads = ([row[name] for row in forgotten] for name in ("forgotten", "forgotten_spread"))
        axes[2].bar(range(len(forgotten)), heights, yerr=spreads, capsize=3, color="tab:red", alpha=0.6)
        axes[2].set_xticks(range(len(forgotten)), labels, fontsize=7)
        axes[2].axhline(0, color="black", linewidth=0.5)
        axes[2].set_ylabel("accuracy lost")
        axes[2].set_title("the first task, after the second")
    save_figure(drawing, path)


def _grid(columns: dict[str, Callable[[Row], str]], rows: list[Row]) -> list[str]:
    table = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    shown = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in table]
    shown.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(line)} |" for line in shown]


def _spread(row: Row, name: str) -> str:
    spread = f" ± {row[name + '_spread']:.3f}" if row[name + "_spread"] else ""
    return f"{row[name]:.3f}{spread}"
