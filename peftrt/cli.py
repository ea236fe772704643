"""The ``peftrt`` command: reads the arguments and calls what does the work."""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import peftrt
from peftrt.finetune.errors import Interrupted, RunError, UserError
from peftrt.finetune.optimizers import OPTIMIZERS
from peftrt.finetune.settings import TASKS, Settings

_DEFAULTS = {field.name: field.default for field in fields(Settings)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: without the program's name; those of the process by default.

    Returns:
        The exit status: 0, 1 where the run failed, 2 where the user made a mistake, 130 after Ctrl-C.
    """
    try:
        options = vars(_parser().parse_args(arguments))
        command: Callable[..., int | None] = options.pop("command")
        return command(options) or 0
    except UserError as error:
        return _fail(error, 2)
    except RunError as error:
        return _fail(error, 1)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error, 1)
    except Interrupted as stop:
        print(f"peftrt: {stop}", file=sys.stderr)
        if stop.resume:
            print(f"go on with: {stop.resume}", file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        print("peftrt: stopped", file=sys.stderr)
        return 128 + signal.SIGINT


def _fail(error: object, status: int) -> int:
    print(f"peftrt: error: {error}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """One line for a mistake, with the name that was probably meant."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_args(self, arguments: Any = None, namespace: Any = None) -> Any:
        options, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            parser = self._chosen(options)
            known = [name for action in parser._actions for name in action.option_strings]
            near = difflib.get_close_matches(unknown[0].partition("=")[0], known, 1)
            parser.error(f"unknown argument {unknown[0]}" + (f": did you mean {near[0]}?" if near else ""))
        return options

    def _chosen(self, options: argparse.Namespace) -> argparse.ArgumentParser:
        return getattr(options, "parser", self)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="peftrt", description="Fine-tune models with adapters over 4-bit weights, and serve them.")
    parser.add_argument("--version", action="version", version=f"peftrt {peftrt.__version__}")
    commands = parser.add_subparsers(metavar="command", required=True, parser_class=_Parser)
    _add_finetune(commands.add_parser("finetune", help="fine-tune a Hugging Face model on a file of examples"))
    _add_demo(commands.add_parser("demo", help="train and serve two adapters on a real model, offline, in minutes"))
    _add_compare(commands.add_parser("compare", help="train by every method, and put them side by side"))
    _add_estimate(commands.add_parser("estimate", help="what a run will take of the memory, before it is begun"))
    _add_convert(commands.add_parser("convert", help="an adapter of HF peft as one of AdapterHub, or the other way"))
    _add_info(commands.add_parser("info", help="what is built, for which devices, and which backend serves which op"))
    _add_build(commands.add_parser("build", help="compile the native code against the installed torch"))
    return parser


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Fine-tune a Hugging Face model. Writes a directory that HF peft loads, with metrics and a plot. "
        "Ctrl-C saves a checkpoint; --resume goes on from it as if nothing had happened."
    )
    parser.set_defaults(command=_finetune, parser=parser)

    def add(where: Any, name: str, help: str, **how: Any) -> None:
        default = _DEFAULTS.get(name[2:].replace("-", "_"))
        shown = " ".join(default) if isinstance(default, tuple) else default
        text = (
            f"{help} (default: {shown})"
            if isinstance(default, str | int | float | tuple) and default is not False
            else help
        )
        where.add_argument(name, default=argparse.SUPPRESS, help=text, **how)

    what = parser.add_argument_group("what")
    add(what, "--model", "directory or Hub id of the base model", metavar="DIR_OR_ID")
    add(what, "--data", "examples: .jsonl or .csv, or .txt for a language model", metavar="FILE")
    add(what, "--task", "what to train for", choices=TASKS)
    add(what, "--out", "directory to write", metavar="DIR")
    add(what, "--text-column", "column of the text", metavar="NAME")
    add(what, "--label-column", "column of the label", metavar="NAME")
    add(what, "--eval-data", "examples to evaluate on; without it a share of --data is held out", metavar="FILE")
    add(what, "--eval-share", "share of --data held out by a hash of the text; 0 for none", type=_share, metavar="X")
    add(
        what,
        "--max-length",
        "tokens an example has at most (default: 256, or the model's limit)",
        type=_count,
        metavar="N",
    )

    adapter = parser.add_argument_group("adapter")
    add(adapter, "--r", "rank", type=_count, metavar="N")
    add(adapter, "--alpha", "scaling is alpha / r (default: 2 r)", type=_positive, metavar="X")
    add(adapter, "--rslora", "scaling is alpha / sqrt(r)", action="store_true")
    add(adapter, "--lora-dropout", "dropout on the adapter's input", type=_share, metavar="X")
    add(adapter, "--target-modules", "names of the modules to adapt, or all-linear", nargs="+", metavar="NAME")
    add(adapter, "--quantize", "how the frozen weights are kept", choices=("nf4", "none"))

    former = parser.add_argument_group("a former task")
    add(former, "--adapter", "go on from the adapter in this directory, with its head and labels", metavar="DIR")
    add(former, "--ewc", "examples of the former task: what it needs is measured, and kept", metavar="FILE")
    add(former, "--ewc-lambda", "how firmly it is kept", type=_not_negative, metavar="X")
    add(former, "--ewc-samples", "examples to measure on", type=_count, metavar="N")
    add(former, "--replay", "examples of the former task, to train on again", metavar="FILE")
    add(former, "--replay-share", "share of every batch that is replayed", type=_share, metavar="X")
    add(former, "--replay-size", "examples chosen from the file; classes alike", type=_count, metavar="N")

    training = parser.add_argument_group("training")
    add(training, "--lr", "highest learning rate", type=_positive, metavar="X")
    add(training, "--schedule", "what follows the warm-up", choices=("cosine", "linear", "constant"))
    add(training, "--warmup", "steps to warm up in; under 1 a share of all", type=_not_negative, metavar="X")
    add(training, "--epochs", "passes over the data", type=_count, metavar="N")
    add(training, "--steps", "optimizer steps, instead of --epochs", type=_count, metavar="N")
    add(training, "--batch-size", "examples a batch", type=_count, metavar="N")
    add(training, "--grad-accum", "batches a step", type=_count, metavar="N")
    add(training, "--optim", "AdamW by torch, or with its state in pages, in 32 or 8 bits", choices=OPTIMIZERS)
    add(
        training,
        "--optim-budget",
        "memory for a paged state, such as 64MiB; the rest of it is in host memory, on a CPU in a file in --out",
        metavar="BYTES",
    )
    add(training, "--weight-decay", "AdamW's weight decay", type=_not_negative, metavar="X")
    add(training, "--loraplus-ratio", "LoRA+: B learns this many times as fast as A", type=_positive, metavar="X")
    add(training, "--max-grad-norm", "clip gradients to this norm; 0 for never", type=_not_negative, metavar="X")
    add(training, "--gradient-checkpointing", "compute activations twice to save memory", action="store_true")
    add(training, "--seed", "of everything random", type=_seed, metavar="N")
    add(training, "--device", "cpu, cuda, cuda:1 or auto", metavar="NAME")
    add(training, "--dtype", "what is computed in", choices=("auto", "fp32", "bf16"))

    run = parser.add_argument_group("run")
    add(run, "--save-every", "steps between checkpoints", type=_count, metavar="N")
    run.add_argument("--resume", action="store_true", help="go on with the run in --out; nothing else need be given")
    run.add_argument("--overwrite", action="store_true", help="replace the run in --out")


def _finetune(options: dict[str, Any]) -> None:
    parser = options.pop("parser")
    resume, overwrite = options.pop("resume"), options.pop("overwrite")
    needed = ("out",) if resume else ("model", "data", "task", "out")
    if missing := [f"--{name}" for name in needed if name not in options]:
        parser.error(f"missing {', '.join(missing)}")
    if resume and overwrite:
        parser.error("--resume and --overwrite exclude each other")
    if "target_modules" in options:
        names = ",".join(options["target_modules"]).split(",")
        options["target_modules"] = tuple(name for name in names if name)
    from peftrt.finetune.run import finetune

    finetune(options, resume=resume, overwrite=overwrite)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Two adapters on a real sentence encoder, in 4 bits, on this machine: trained on the docstrings of Python's "
        "own library, saved, loaded again, and served together in one batch. No network."
    )
    parser.set_defaults(command=_demo, parser=parser)
    parser.add_argument("--out", default="demo-out", metavar="DIR", help="directory to write (default: demo-out)")


def _demo(options: dict[str, Any]) -> None:
    # Before transformers is imported: it reads them once.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    from peftrt.demo.run import demo

    demo(Path(options["out"]))


def _add_compare(parser: argparse.ArgumentParser) -> None:
    from peftrt.compare.methods import METHODS
    from peftrt.compare.settings import Settings as Comparison

    parser.description = (
        "Train one task by each method with the same number of steps, and compare accuracy, memory, speed, size and "
        f"latency; then a second task, and what is forgotten of the first. Methods: {', '.join(METHODS)}. What is done "
        "is kept: a second call goes on with what is missing."
    )
    parser.set_defaults(command=_compare, parser=parser)
    defaults = {field.name: field.default for field in fields(Comparison)}

    def add(name: str, help: str, **how: Any) -> None:
        default = defaults.get(name[2:].replace("-", "_"))
        shown = ",".join(default) if isinstance(default, tuple) else default
        text = help if shown is None else f"{help} (default: {shown})"
        parser.add_argument(name, default=argparse.SUPPRESS, help=text, **how)

    add("--out", "directory to write (default: compare-out)", metavar="DIR")
    add("--model", "directory or Hub id (default: the demo's encoder)", metavar="DIR_OR_ID")
    add("--data", "labelled examples, .jsonl or .csv (default: Python's docstrings)", metavar="FILE")
    add("--task", "what to train for", choices=("classify",))
    add("--text-column", "column of the text", metavar="NAME")
    add("--label-column", "column of the label", metavar="NAME")
    add("--second-label-column", "of a second task, for what is forgotten", metavar="NAME")
    add("--eval-share", "share of --data held out by a hash of the text", type=_share, metavar="X")
    add("--max-length", "tokens an example has at most", type=_count, metavar="N")
    add("--methods", "which, with commas between (default: all)", type=_names, metavar="NAMES")
    add("--forgetting", "methods that learn a second task", type=_names, metavar="NAMES")
    add("--seeds", "trainings of each method", type=_count, metavar="N")
    add("--steps", "of every training", type=_count, metavar="N")
    add("--batch-size", "examples a step", type=_count, metavar="N")
    add("--eval-limit", "held-out examples to measure on at most", type=_count, metavar="N")
    add("--device", "cpu, cuda, cuda:1 or auto", metavar="NAME")
    add("--threads", "of every training (default: torch's)", type=_count, metavar="N")
    parser.add_argument("--quick", action="store_true", help="24 steps, one seed: at most 20 seconds a training")


def _compare(options: dict[str, Any]) -> None:
    # Before transformers is imported, here and in every training: it reads them once.
    os.environ |= {"TOKENIZERS_PARALLELISM": "false"}
    if "model" not in options:
        os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    from peftrt.compare.run import compare

    for name in ("parser", "task"):
        options.pop(name, None)
    compare(Path(options.pop("out", "compare-out")), {name: value for name, value in options.items() if value})


def _add_estimate(parser: argparse.ArgumentParser) -> None:
    from peftrt.estimate.memory import BYTES
    from peftrt.estimate.methods import METHODS
    from peftrt.estimate.shapes import PRESETS

    parser.description = (
        "What fine-tuning will take of the device's memory, from the model's sizes alone: no weight is loaded. "
        f"A model is a directory with a config.json, or one of {', '.join(PRESETS)}."
    )
    parser.set_defaults(command=_estimate, parser=parser)

    def add(name: str, help: str, default: Any = None, **how: Any) -> None:
        shown = " ".join(default) if isinstance(default, tuple) else default
        parser.add_argument(
            name, default=default, help=help if default is None else f"{help} (default: {shown})", **how
        )

    add("--model", "directory or preset", required=True, metavar="DIR_OR_NAME")
    add("--method", "how it is trained", ("full", "lora", "qlora"), nargs="+", choices=METHODS, metavar="NAME")
    add("--task", "what for (default: what the config.json says)", choices=TASKS)
    add("--labels", "classes of --task classify", 2, type=_count, metavar="N")
    add("--r", "LoRA's rank", 16, type=_count, metavar="N")
    add("--target-modules", "modules LoRA adapts, or all-linear", ("all-linear",), nargs="+", metavar="NAME")
    add("--reduction-factor", "hidden size over a bottleneck's (default: its placement's)", type=_positive, metavar="X")
    add("--virtual-tokens", "of prefix and prompt tuning", 20, type=_count, metavar="N")
    add("--quantize", "how frozen weights are kept (default: nf4 for qlora, else none)", choices=("nf4", "none"))
    add("--dtype", "of weights and activations; mixed keeps fp32 copies of what is trained", "bf16", choices=BYTES)
    add("--adapter-dtype", "of what is added", "fp32", choices=("fp32", "bf16"))
    add("--optim", "as of finetune", "adamw", choices=OPTIMIZERS)
    add("--optim-budget", "of the device, for a paged state, such as 64MiB", metavar="BYTES")
    add("--batch-size", "examples a batch", 1, type=_count, metavar="N")
    add("--max-length", "tokens an example has", 512, type=_count, metavar="N")
    add("--grad-accum", "batches a step", 1, type=_count, metavar="N")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="activations are computed twice")
    add("--device", "where it runs", "cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", action="store_true", help="for programs")


def _estimate(options: dict[str, Any]) -> None:
    from peftrt.estimate.memory import Job
    from peftrt.estimate.methods import Sizes
    from peftrt.estimate.show import show

    del options["parser"]
    names = ",".join(options.pop("target_modules")).split(",")
    model, task, labels = (options.pop(name) for name in ("model", "task", "labels"))
    methods, as_json = dict.fromkeys(options.pop("method")), options.pop("json")
    sizes = Sizes(options.pop("r"), tuple(names), options.pop("reduction_factor"), options.pop("virtual_tokens"))
    show(model, task, labels, [Job(method, sizes, **options) for method in methods], as_json)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    from peftrt.convert import TARGETS

    parser.description = (
        "Write an adapter of HF peft in AdapterHub's form, or the other way round. What the two compute differently is "
        "refused, with the reason. Of the base model only its configuration is read."
    )
    parser.set_defaults(command=_convert, parser=parser)
    parser.add_argument("source", metavar="SRC", help="directory of the adapter")
    parser.add_argument("target", metavar="DST", help="directory to write")
    parser.add_argument("--to", required=True, choices=TARGETS, help="whose form to write")
    parser.add_argument(
        "--model", metavar="DIR_OR_ID", help="base model, or its config.json (default: the one that the adapter names)"
    )
    parser.add_argument("--name", default="default", help="the adapter's in AdapterHub's files (default: default)")


def _convert(options: dict[str, Any]) -> None:
    from peftrt.convert import convert

    del options["parser"]
    convert(**options)


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.description = "What is built, for which devices, and which backend serves which operation."
    parser.set_defaults(command=_info, parser=parser)
    parser.add_argument("--json", action="store_true", help="for programs")


def _info(options: dict[str, Any]) -> None:
    from peftrt.info import show

    show(as_json=options["json"])


def _add_build(parser: argparse.ArgumentParser) -> None:
    from peftrt._build import MODES

    parser.description = "Compile the native code against the torch of this environment."
    parser.set_defaults(command=_build, parser=parser)
    parser.add_argument("mode", nargs="?", choices=MODES, help="what to build (default: $PEFTRT_BUILD, or auto)")
    parser.add_argument("--force", action="store_true", help="also where nothing has changed")


def _build(options: dict[str, Any]) -> int:
    from peftrt import _build

    return _build.main([*(["--force"] if options["force"] else []), *([options["mode"]] if options["mode"] else [])])


def _number(text: str, kind: Callable[[str], Any], good: Callable[[Any], bool], what: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    # NaN is not good either: every comparison with it is false.
    if value is None or not good(value):
        raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
    return value


def _count(text: str) -> int:
    return _number(text, int, lambda value: 1 <= value < 2**31, "a whole number from 1 on")


def _seed(text: str) -> int:
    return _number(text, int, lambda value: 0 <= value < 2**63, "a whole number from 0 on")


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError(f"expected names with commas between, got {text!r}")
    return names


def _share(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value < 1, "a number from 0 to below 1")


def _positive(text: str) -> float:
    return _number(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def _not_negative(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value < float("inf"), "a number from 0 on")
