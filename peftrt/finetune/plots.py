"""Draws how a run went."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftrt.finetune.errors import require
from peftrt.finetune.trainer import Step

_WINDOW = 20  # steps at most that the smoothed curve looks back on


def figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A matplotlib figure and its axes, drawn without a display."""
    require("matplotlib", "hf", "a plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing, drawing.subplots(1, columns)


def draw_losses(axes: Any, history: Sequence[Step], label: str = "training", color: str | None = None) -> None:
    """The loss of every step, faint, and its running mean."""
    numbers, losses = [step.number for step in history], [step.loss for step in history]
    (line,) = axes.plot(numbers, losses, alpha=0.25, linewidth=1, color=color)
    axes.plot(numbers, running_mean(losses), color=line.get_color(), label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")


def running_mean(values: Sequence[float]) -> list[float]:
    """The mean of each value and the few before it: fewer near the start and in short runs."""
    window = max(1, min(_WINDOW, len(values) // 5))
    return [sum(values[max(0, i - window + 1) : i + 1]) / (i + 1 - max(0, i - window + 1)) for i in range(len(values))]


def save_figure(drawing: Any, path: Path) -> None:
    """Write a PNG whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        drawing.savefig(temporary, format="png", dpi=120)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def plot_run(path: Path, history: Sequence[Step], evaluations: Sequence[dict[str, float]], title: str) -> None:
    """The training loss, and the held-out loss where it was measured."""
    drawing, axes = figure(7, 4)
    draw_losses(axes, history)
    if evaluations:
        axes.plot([e["step"] for e in evaluations], [e["loss"] for e in evaluations], "o--", label="held out")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(drawing, path)
