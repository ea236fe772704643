"""``python -m bench.run_cells``: a GPU's benchmarks without pytest, what marks name first, until the time is spent.

Every cell is stored as soon as it is measured. A cell that raises is stored as failed and the next one is run; where
the device is lost with it, the process ends with ``DEVICE_LOST`` and a new one goes on behind that cell.
"""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import (
    bench_bottleneck,
    bench_ia3_linear,
    bench_lora_linear,
    bench_multi_lora_linear,
    bench_nf4_dequantize,
    bench_nf4_linear,
    bench_nf4_quantize,
    bench_paged_adamw,
    bench_train_step,
    environment,
    marks,
    measure,
    results,
)
from bench.cells import Cell
from bench.harness import Runner, Session
from bench.measure import WrongResultError
from bench.order import by_marks, named
from bench.steps import CELLS_FAILED, DEVICE_LOST, STARTED

# In the order in which cells that no mark names are measured.
BENCHES: dict[str, tuple[Callable[[str, bool], list[Cell]], Callable[[Cell, Runner], None]]] = {
    "nf4_linear": (bench_nf4_linear.cells, bench_nf4_linear.bench_nf4_linear),
    "nf4_dequantize": (bench_nf4_dequantize.cells, bench_nf4_dequantize.bench_nf4_dequantize),
    "nf4_quantize": (bench_nf4_quantize.cells, bench_nf4_quantize.bench_nf4_quantize),
    "ia3_linear": (bench_ia3_linear.cells, bench_ia3_linear.bench_ia3_linear),
    "lora_linear": (bench_lora_linear.cells, bench_lora_linear.bench_lora_linear),
    "bottleneck": (bench_bottleneck.cells, bench_bottleneck.bench_bottleneck),
    "train_step": (bench_train_step.cells, bench_train_step.bench_train_step),
    "paged_adamw": (bench_paged_adamw.cells, bench_paged_adamw.bench_paged_adamw),
    "multi_lora_linear": (bench_multi_lora_linear.cells, bench_multi_lora_linear.bench_multi_lora_linear),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.run_cells", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where <op>.json go")
    parser.add_argument("--key", required=True, help="the run's name in the result files")
    parser.add_argument("--log", help="the run's log, for the result files to name")
    parser.add_argument("--op", action="append", choices=BENCHES, help="only this operation; may be repeated")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no cell after this much time")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that the benchmarks run, no more")
    parser.add_argument("--known", type=Path, help="folder of earlier results: what they missed goes first")
    parser.add_argument(
        "--failed", nargs=3, action="append", default=[], metavar=("OP", "CELL", "WHY"), help="store it as failed"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    options = parser.parse_args(arguments)
    device, log = options.device, {"log": options.log} if options.log else {}
    session = Session(device, options.folder, options.quick, options.budget, options.key, log)
    cells = {(cell.op, cell.id): cell for op in options.op or BENCHES for cell in BENCHES[op][0](device, options.quick)}
    for op, cell_id, why in options.failed:
        _store_failure(session, cells[op, cell_id], why)
    here = {"timer": session.timer.name, "device": environment.device_name(device)}
    wanted = marks.MARKS[marks.device_class(here)]
    known = results.read_all(options.known) if options.known else {}
    done = _done(options.folder, options.key)
    ordered = [cell for cell in by_marks(list(cells.values()), wanted, known) if (cell.op, cell.id) not in done]
    return _run(session, ordered, wanted)


def _done(folder: Path, key: str) -> set[tuple[str, str]]:
    """The cells that this run has stored before."""
    found: Mapping[str, Any] = results.read_all(folder) if folder.is_dir() else {}
    cells = [(op, cell_id, cell) for op, content in found.items() for cell_id, cell in content["cells"].items()]
    return {(op, cell_id) for op, cell_id, cell in cells if cell["run"] == key}


def _run(session: Session, cells: Sequence[Cell], wanted: Sequence[marks.Mark]) -> int:
    status, site = 0, None
    for i, cell in enumerate(cells):
        if session.out_of_time():
            print(f"out of time: {len(cells) - i} of {len(cells)} cells are left out", flush=True)
            break
        if not session.quick and session.device == "cuda":
            session.plan = measure.PLANS["cuda"] if named(cell, wanted) else measure.BRIEF
        if cell.site != site:
            _release(session.device)
            site = cell.site
        print(f"{STARTED}{cell.op} {cell.id}", flush=True)
        try:
            BENCHES[cell.op][1](cell, Runner(session, None, lambda line: print(line, flush=True)))
        except WrongResultError as red:
            print(f"{cell.op} {cell.id}: wrong result: {red}", flush=True)
            status = CELLS_FAILED
        except Exception as error:
            traceback.print_exc()
            status = CELLS_FAILED
            if not _alive(session.device):
                return DEVICE_LOST
            _store_failure(session, cell, measure.reason(error))
    return status


def _release(device: str) -> None:
    """A site's weights, their copies and graphs are given back before the next one's are made."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _alive(device: str) -> bool:
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _store_failure(session: Session, cell: Cell, why: str) -> None:
    session.store.put(cell.op, cell.id, {**cell.describe(), "failed": why})


if __name__ == "__main__":
    sys.exit(main())
