"""Prints estimates: a table of the methods side by side for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from peftrt.estimate.hugging_face import find_shape
from peftrt.estimate.memory import Estimate, Job, estimate
from peftrt.estimate.shapes import Shape
from peftrt.finetune.progress import console

ITEMS = ("weights", "adapter", "optimizer", "gradients", "activations", "fixed", "peak")


def show(model: str, task: str | None, labels: int, jobs: Sequence[Job], as_json: bool) -> None:
    """Print what each job takes of a model.

    Raises:
        UserError: there is no such model, or a job cannot be.
    """
    shape = find_shape(model, task, labels)
    found = [estimate(shape, job) for job in jobs]
    if as_json:
        print(json.dumps(_for_programs(shape, jobs, found), indent=2))
        return
    from rich import box
    from rich.table import Table

    out, first = console(), jobs[0]
    unit, name = (1e9, "GB") if max(one.peak for one in found) >= 1e9 else (1e6, "MB")
    table = Table(name, box=box.SIMPLE_HEAD, pad_edge=False)
    for one in found:
        table.add_column(one.method, justify="right")
    table.add_row("trained", *(_numbers(one.trainable) for one in found))
    for item in ITEMS:
        cells = [item, *(f"{getattr(one, item) / unit:,.2f}" for one in found)]
        table.add_row(*([f"[bold]{cell}[/]" for cell in cells] if item == "peak" else cells))
    again = ", gradient checkpointing" if first.gradient_checkpointing else ""
    out.print(
        f"{shape.name}, {_numbers(shape.parameters)} parameters; {first.batch_size} x {first.max_length} tokens a "
        f"batch in {first.dtype}{again}",
        soft_wrap=True,
    )
    out.print(table)
    sums = "both at once" if first.grad_accum > 1 else "the larger of both, for one goes while the other comes"
    out.print(f"1 {name} is 10^{9 if unit == 1e9 else 6} bytes. The peak has of gradients and activations {sums}.")


def _numbers(count: int) -> str:
    return f"{count / 1e9:,.1f} B" if count >= 1e9 else f"{count / 1e6:,.2f} M"


def _for_programs(shape: Shape, jobs: Sequence[Job], found: Sequence[Estimate]) -> dict[str, Any]:
    sizes = {name: value for name, value in asdict(shape).items() if name != "linears"}
    rows = [{**asdict(job), **one.to_dict()} for job, one in zip(jobs, found, strict=True)]
    return {"model": sizes, "estimates": rows}
