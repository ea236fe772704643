"""``python -m peftrt.compare.worker DIR ID``: one training of a comparison, in a process of its own.

A line of JSON on the standard output for every step; the result goes into the training's file, whole.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from peftrt.compare.cells import Cell
from peftrt.compare.data import read_tasks
from peftrt.compare.forgetting import forget
from peftrt.compare.methods import METHODS
from peftrt.compare.settings import Settings
from peftrt.compare.training import train
from peftrt.finetune.checkpoint import write_json
from peftrt.finetune.errors import RunError, UserError
from peftrt.finetune.progress import peak_memory
from peftrt.finetune.trainer import Step


def main(directory: Path, name: str) -> int:
    """Run the training that the name says, of the comparison in a directory."""
    settings = Settings(**json.loads((directory / "compare.json").read_text("utf-8"))["settings"])
    cell = Cell.of(name)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    tasks = read_tasks(directory)

    def show(step: Step) -> None:
        said = {"loss": step.loss, "tokens": step.tokens, "seconds": step.seconds, "memory": peak_memory()}
        print(json.dumps(said), flush=True)

    try:
        method = METHODS[cell.method]
        if cell.variant is None:
            found = train(settings, method, cell.seed, tasks, show)
        else:
            found = forget(settings, method, cell.variant, cell.seed, tasks, show)
    except (RunError, UserError) as error:
        print(error, file=sys.stderr)
        return 1
    write_json(directory / cell.file, {"method": cell.method, "variant": cell.variant, "seed": cell.seed, **found})
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
