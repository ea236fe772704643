"""``make gpu`` or ``python3 -m bench.gpu``: builds, tests and measures on a machine with a GPU, in minutes, offline.

From a bare checkout, with the Python that has torch; nothing is installed. Each step has a share of the time and may
fail without ending the others. The log, the steps' outcomes and every measured cell are written as they come, so that a
run that is stopped has lost nothing. The last thing it prints says for each mark whether it was reached.

Exit status: 0 where nothing failed, 1 where something did or did not end in time (a mark that is missed is no failure,
nor is a cell that was not begun), 2 where there is no GPU, 128 and the signal's number where it was stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import judging, marks, report, results, steps
from bench.steps import Log, Outcome, Stopped

ROOT = Path(__file__).resolve().parent.parent
OPS = (
    "nf4_linear",
    "nf4_dequantize",
    "nf4_quantize",
    "ia3_linear",
    "lora_linear",
    "bottleneck",
    "train_step",
    "paged_adamw",
    "multi_lora_linear",
)
EVERY_KERNEL = ("-m", "bench.every_kernel")

MARKERS = {"cuda": "gpu", "cpu": "not gpu"}

BUDGET = 460.0  # seconds; under 8 minutes with what the table takes
# The most that a step may take of the budget; what one leaves the next ones have. The benchmarks take what is left then
# but for the sanitizer's share, or a third of it where that is less.
SHARES = {"device": 0.2, "build": 0.25, "kernels": 0.12, "tests": 0.22}
SANITIZER_SHARE = 0.18
PROCESSES = 6  # that compile Triton's kernels at once
STALL = 90.0  # seconds without a word: a kernel that never ends
RESTARTS = 5  # of the benchmarks, behind cells that lost the device
NO_TESTS = 5  # pytest's exit status
SANITIZER_FOUND = 77  # an exit status that the program itself never has
PYTEST_RESULT = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


class Run:
    """One run: its options, its time, its log and what it has come to."""

    def __init__(self, options: argparse.Namespace, log: Log, site: Path) -> None:
        self.options, self.log = options, log
        self.outcomes: list[Outcome] = []
        self.facts: dict[str, Any] = {}
        self.folder: Path | None = None
        self.key = ""
        self._begun = time.monotonic()
        # Not the checkout itself: its kernels/ would become a package of that name, which other libraries look for.
        paths = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
        tools = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"))
        self.environment = {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "PATH": tools}
        # several processes share the cores: threads that spin while they wait would take them from the others
        self.environment["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
        if options.commit:
            self.environment["PEFTRT_COMMIT"] = options.commit

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.options.budget - (time.monotonic() - self._begun)

    @property
    def failed(self) -> bool:
        """Whether anything failed, a cell's result included."""
        return any(outcome.status not in ("ok", "left out") for outcome in self.outcomes)

    def wants(self, step: str) -> bool:
        """Whether the step was asked for: all are, unless some are named."""
        named = [name for name in self.options.only if name in STEPS]
        return not named or step in named

    @property
    def ops(self) -> list[str]:
        """The operations asked for."""
        return [name for name in self.options.only if name in OPS] or list(OPS)

    def process(self, command: Sequence[str], seconds: float, **options: Any) -> steps.Ended:
        """A step's process, in this run's environment."""
        extra = options.pop("environment", {})
        self.log.line(f"$ {' '.join(command)}   (at most {seconds:.0f} s)")
        return steps.run(
            command, self.log, seconds=seconds, environment={**self.environment, **extra}, folder=ROOT, **options
        )

    def python(self, *arguments: str) -> list[str]:
        """This interpreter with arguments."""
        return [sys.executable, *arguments]

    def seconds(self, step: str) -> float:
        """What a step may take now."""
        return max(min(SHARES[step] * self.options.budget, self.left), 1.0)

    def end(self, name: str, ended: steps.Ended, detail: str = "", **facts: Any) -> Outcome:
        """Keep a step's outcome."""
        detail = detail or ("" if ended.status == "ok" else ended.last)
        return self.keep(Outcome(name, ended.status, detail, round(ended.seconds, 1), facts))

    def keep(self, outcome: Outcome) -> Outcome:
        """Keep an outcome, and write what there is."""
        self.outcomes.append(outcome)
        self.write()
        return outcome

    def write(self) -> None:
        """Write the run's own file, whole or not at all."""
        if self.folder is None:
            return
        found = results.read_all(self.folder)
        wanted = marks.MARKS[self.device_class]
        content = {
            "key": self.key,
            "environment": self.facts,
            "options": {"only": self.options.only, "budget": self.options.budget, "quick": self.options.quick},
            "steps": [asdict(outcome) for outcome in self.outcomes],
            "marks": judging.summary(wanted, found, self.device_class),
        }
        path = self.folder / "logs" / f"{self.name}.json"
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(content, indent=1, default=str) + "\n")
        os.replace(draft, path)

    @property
    def name(self) -> str:
        """The run's key as a file name."""
        return re.sub(r"[^A-Za-z0-9.-]+", "-", self.key.replace(":", ""))

    @property
    def device_class(self) -> str:
        """Whose marks are judged."""
        timer = {"cuda": "cuda graph", "cpu": "perf_counter"}[self.options.device]
        return marks.device_class({"timer": timer, "device": self.facts["device"]})


def describe(run: Run) -> bool:
    """The device and all versions; from here on there is a folder to write to."""
    ended = run.process(run.python("-m", "bench.environment", run.options.device), run.seconds("device"))
    if ended.status != "ok":
        run.keep(Outcome("device", "failed", ended.last))
        return False
    run.facts = json.loads(ended.last)
    run.facts.pop("native", None)  # what was built before: the results' own runs say what they were measured with
    run.key = results.run_key(run.facts)
    run.folder = run.options.out / run.facts.pop("slug")
    run.log.into(run.folder / "logs" / f"{run.name}.log")
    names = [run.facts["device"], *(f"{name} {run.facts['versions'][name]}" for name in ("torch", "triton"))]
    run.end("device", ended, ", ".join(names))
    return True


def architecture(run: Run) -> dict[str, str]:
    """This device's alone, unless others are asked for: a fifth of the time that all of them take to compile."""
    capability = run.facts.get("capability")
    if capability is None or os.environ.get("PEFTRT_CUDA_ARCHS"):
        return {}
    # sm_90 has instructions that only code for no other device may use
    return {"PEFTRT_CUDA_ARCHS": "9.0a" if capability == "9.0" else capability}


def build(run: Run) -> None:
    """csrc for the CPU and for CUDA; the CPU's alone where CUDA's does not compile: Triton serves the GPU then."""
    ended = run.process(
        run.python("-m", "peftrt", "build", run.options.device), run.seconds("build"), environment=architecture(run)
    )
    if ended.status == "ok" or run.options.device == "cpu":
        run.end("build", ended)
    else:
        run.end("build", ended, f"native CUDA code is left out: {ended.last}")
        run.end("build, CPU alone", run.process(run.python("-m", "peftrt", "build", "cpu"), run.seconds("build")))
    run.process(run.python("-m", "peftrt", "info"), run.seconds("device"))


def kernels(run: Run) -> None:
    """Every kernel once, on tiny operands, against float64: what is broken shows here in seconds."""
    program = run.python(*EVERY_KERNEL, run.options.device, "--jobs", str(_processes()))
    ended = run.process(program, run.seconds("kernels"), stall=STALL)
    run.end("kernels", ended, ended.last)


def _processes() -> int:
    return min(PROCESSES, os.cpu_count() or 1)


def tests(run: Run) -> None:
    """tests/gpu, in several processes where pytest-xdist is there: most of the time goes into compiling kernels."""
    if not _installed("pytest"):
        run.keep(Outcome("tests", "left out", "pytest is not installed"))
        return
    folder = ROOT / "tests" / "gpu"
    files = [str(path) for op in run.ops for path in sorted(folder.glob(f"test_{op}*.py"))]
    command = ["-m", "pytest", "-v", "-rfE", "-m", MARKERS[run.options.device], "--tb=short", "--maxfail=30"]
    command += ["-p", "no:cacheprovider"]
    # another release's warning is no failure of what is tested
    command += ["-W", "default", *(files if files and len(run.ops) < len(OPS) else [str(folder)])]
    if run.options.fuzz:
        command.append("--fuzz")
    if _installed("xdist"):
        command += ["-n", str(_processes()), "--dist", "worksteal"]
    if _installed("pytest_timeout"):
        # by a thread that ends the process: no signal gets through to one that waits for a kernel
        command += ["--timeout", f"{STALL - 15:.0f}", "--timeout-method", "thread"]
    counts: dict[str, int] = {}

    def count(line: str) -> None:
        if "::" in line and not line.startswith(("FAILED", "ERROR")) and (found := PYTEST_RESULT.search(line)):
            counts[found[1].lower()] = counts.get(found[1].lower(), 0) + 1

    ended = run.process(run.python(*command), run.seconds("tests"), stall=STALL, hear=count)
    if ended.code == NO_TESTS:
        run.keep(Outcome("tests", "left out", "there are none"))
        return
    absent = [name for name in ("hypothesis", "xdist", "pytest_timeout") if not _installed(name)]
    words = [f"{number} {name}" for name, number in sorted(counts.items())]
    words += [f"without {', '.join(absent)}"] if absent else []
    run.end("tests", ended, ", ".join(words or [ended.last]), **counts)


def bench(run: Run) -> None:
    """All cells, what marks name first, until the time is spent but for the sanitizer's."""
    assert run.folder is not None
    reserve = min(SANITIZER_SHARE * run.options.budget, run.left / 3) if run.wants("sanitize") else 0.0
    lost: list[tuple[str, str, str]] = []
    for _ in range(RESTARTS + 1):
        budget = run.left - reserve - steps.GRACE
        if budget < 1:
            run.keep(Outcome("bench", "left out", "no time is left for it"))
            return
        ended, current = _cells(run, budget, lost)
        gone = ended.status == "stalled" or (ended.status == "failed" and ended.code != steps.CELLS_FAILED)
        if not gone or current is None:
            break
        why = "never ended" if ended.status == "stalled" else f"lost the device, or its process: {ended.last}"
        lost.append((*current, why))
        run.log.line(f"{' '.join(current)} {why}; the other cells go on without it")
    detail = "; ".join(f"{op} {cell}: {why}" for op, cell, why in lost)
    outcome = run.end("bench", ended, detail)
    if lost and outcome.status == "ok":
        outcome.status = "failed"
        run.write()


def _cells(run: Run, budget: float, lost: Sequence[tuple[str, str, str]]) -> tuple[steps.Ended, tuple[str, str] | None]:
    """One process that measures until its budget is spent; and the cell that it was at."""
    command = ["-m", "bench.run_cells", "--folder", str(run.folder), "--key", run.key, "--budget", f"{budget:.0f}"]
    command += ["--log", f"logs/{run.name}.log", "--device", run.options.device]
    for op in run.ops:
        command += ["--op", op]
    known = results.FOLDER / (run.folder.name if run.folder else "")
    command += ["--known", str(known)] if known.is_dir() else []
    command += ["--quick"] if run.options.quick else []
    for failure in lost:
        command += ["--failed", *failure]
    current: list[tuple[str, str] | None] = [None]

    def hear(line: str) -> None:
        if line.startswith(steps.STARTED) and len(words := line.split()) == 3:
            current[0] = words[1], words[2]

    # a cell that is begun in time may take a few seconds longer
    ended = run.process(run.python(*command), budget + 20, stall=STALL, hear=hear)
    return ended, current[0]


def sanitize(run: Run) -> None:
    """Every kernel once under compute-sanitizer: memory accesses, then races in shared memory."""
    tool = shutil.which("compute-sanitizer", path=run.environment["PATH"]) if run.options.device == "cuda" else None
    program = run.python(*EVERY_KERNEL, run.options.device)
    for check in ("memcheck", "racecheck"):
        if tool is None:
            run.keep(Outcome(check, "left out", "no compute-sanitizer is here, or no GPU"))
            continue
        seconds = run.left - 2 if check == "racecheck" else (run.left - 2) / 2
        if seconds < 5:
            run.keep(Outcome(check, "left out", "no time is left for it"))
            continue
        words: list[str] = []
        ended = run.process(
            [tool, "--tool", check, "--error-exitcode", str(SANITIZER_FOUND), "--print-limit", "20", *program],
            seconds,
            # a cached allocation would hide an access behind the end of the one before it
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            hear=lambda line, words=words: words.append(line) if line.startswith("=========") else None,
        )
        if any("Device not supported" in word for word in words):
            run.keep(Outcome(check, "left out", "compute-sanitizer does not support this device or driver"))
        else:
            run.end(check, ended, next((w.strip("= ") for w in reversed(words) if "SUMMARY" in w), ended.last))


STEPS: Mapping[str, Callable[[Run], None]] = {
    "build": build,
    "kernels": kernels,
    "tests": tests,
    "bench": bench,
    "sanitize": sanitize,
}


def table(run: Run) -> None:
    """The steps, then every mark: what was reached, by how much the worst cell missed it, why it was not measured."""
    log = run.log
    log.line("\n## Steps\n")
    rows = [[o.name, o.status, f"{o.seconds:.0f}", o.detail[:100]] for o in run.outcomes]
    for line in report.table(["step", "", "s", ""], rows):
        log.line(line)
    if run.folder is None:
        return
    found = results.read_all(run.folder)
    if found:
        report.draw(run.folder, plots=False)
    wanted = [mark for mark in marks.MARKS[run.device_class] if mark.op in run.ops]
    rows = judging.summary(wanted, found, run.device_class)
    log.line(f"\n## Marks of {run.facts['device']}\n")
    for line in report.table(["operation", "cells", "mark", "reached", "worst", ""], rows):
        log.line(line)
    log.line(f"\nwritten to {run.folder}")


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _site(folder: Path) -> Path:
    """A folder to import the checkout's packages from."""
    for name in ("peftrt", "bench"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go, as DIR/<device>/")
    parser.add_argument(
        "--only", nargs="+", default=[], choices=(*OPS, *STEPS), help="some operations, or some steps, or both"
    )
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--commit", help="what the results say they come from, where the checkout has no repository")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the script itself, with --quick"
    )
    parser.add_argument("--fuzz", action="store_true", help="all cases of the tests, not a sample")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, and nothing about speed")
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options, log = options_of(arguments), Log()
    steps.stop_on_signals()
    with tempfile.TemporaryDirectory() as folder:
        run, name = Run(options, log, _site(Path(folder))), "device"
        try:
            if not describe(run):
                return 2
            for name in filter(run.wants, STEPS):
                log.line(f"\n# {name}")
                STEPS[name](run)
        except Stopped as stopped:
            run.keep(Outcome("run", "stopped", f"by {stopped}, in step {name}"))
            table(run)
            return 128 + stopped.number
        table(run)
        return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
