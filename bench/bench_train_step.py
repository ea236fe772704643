"""A training step of a whole model: QLoRA with its optimizer, against peft over bitsandbytes, peft over a dense model,
and the frozen model without adapters. Beside the time: tokens a second, and the peak of memory.
"""

from __future__ import annotations

from bench.cells import NF4_BYTES, Cell
from bench.harness import Runner
from bench.measure import STEPS
from bench.peers import peft_lora
from bench.results import OWN
from bench.whole_model import LLAMA, MINILM, TINY, Model, Step

FROZEN = "frozen"
ONE_BY_ONE = "one by one"  # peftrt without fuse


def _models(device: str, quick: bool) -> list[Model]:
    if quick:
        return [TINY]
    return [MINILM] if device == "cpu" else [LLAMA]


def cells(device: str, quick: bool) -> list[Cell]:
    """The products with the weights, forward and back, are what no step can do without."""
    traffic, arithmetic = f"2*({NF4_BYTES})", "4*M*N*K"
    return [
        Cell("train_step", model.part, model.site, model.batch * model.tokens, model.dtype, traffic, arithmetic)
        for model in _models(device, quick)
    ]


def bench_train_step(cell: Cell, runner: Runner) -> None:
    model = next(model for model in (MINILM, LLAMA, TINY) if model.part == cell.part)
    step = Step(model, runner.device)
    contenders = {
        OWN: step.own,
        ONE_BY_ONE: step.one_by_one,
        peft_lora.NAME_NF4: step.qlora_peer,
        peft_lora.NAME: step.lora_peer,
        FROZEN: step.frozen,
    }
    runner.run(cell, contenders, STEPS)
