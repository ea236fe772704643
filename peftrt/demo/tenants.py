"""A tenant: one adapter on the shared encoder, and a head of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

import peftrt
from peftrt.demo.encoder import embed
from peftrt.finetune.examples import Batch, Examples
from peftrt.finetune.progress import Progress, console
from peftrt.finetune.tasks import classify_loss, evaluating, predict
from peftrt.finetune.trainer import Plan, Step, Trainer, steps_per_epoch
from peftrt.formats.safe import read_tensors, write_tensors

HEAD = "head.safetensors"  # beside the adapter's files, which HF peft loads
RANK = 16
BATCH = 8
RATE = 1e-3


@dataclass
class Tenant:
    """An adapter of ``encoder`` by its name, the classes it tells apart, and the linear map to them."""

    name: str
    encoder: nn.Module
    classes: Sequence[str]
    head: nn.Linear = field(init=False)

    def __post_init__(self) -> None:
        self.head = nn.Linear(self.encoder.config.hidden_size, len(self.classes))  # type: ignore[arg-type, union-attr]

    def adapt(self) -> object:
        """Put the tenant's adapter on every linear layer of the encoder, whose weights become NF4 the first time."""
        config = peftrt.LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="FEATURE_EXTRACTION"
        )
        return peftrt.adapt(self.encoder, config, name=self.name, quantize="nf4")

    def start_from(self, weight: Tensor, bias: Tensor) -> None:
        """Let the head be a linear probe at first: the adapter is then trained for what the probe cannot do.

        Source: Kumar et al. 2022 (arXiv:2202.10054).
        """
        self.head.load_state_dict({"weight": weight, "bias": bias})

    def logits(self, batch: Batch) -> Tensor:
        return self.head(embed(self.encoder, batch))

    def train(self, examples: Examples) -> list[Step]:
        """One epoch."""
        steps = steps_per_epoch(len(examples), BATCH, 1)
        plan = Plan(steps, RATE, warmup=steps // 10, batch_size=BATCH)
        adapter = {name: p for name, p in self.encoder.named_parameters() if p.requires_grad}
        head = {f"head.{name}": p for name, p in self.head.named_parameters()}
        trainer = Trainer(adapter | head, lambda batch: classify_loss(self.logits(batch), batch), examples, plan)
        self.encoder.train()
        with Progress(console(), self.name, steps) as progress:
            for step in trainer:
                progress.update(step)
        self.encoder.eval()
        return trainer.history

    def predict(self, examples: Examples) -> NDArray[np.int64]:
        """The class of each example; its adapter must be the active one."""
        with evaluating(self.encoder):
            return predict(self.logits, examples, batch_size=64)

    @property
    def parameters(self) -> int:
        """Numbers that are trained: the adapter's and the head's."""
        mine = [p for p in self.encoder.parameters() if p.requires_grad] + list(self.head.parameters())
        return sum(p.numel() for p in mine)

    def save(self, directory: Path) -> None:
        peftrt.save(self.encoder, directory, name=self.name)
        write_tensors(directory / HEAD, self.head.state_dict())

    def load(self, directory: Path) -> None:
        """Put a saved adapter and head in the place of the fresh ones."""
        peftrt.load(self.encoder, directory, name=self.name, replace=True)
        self.head.load_state_dict(read_tensors(directory / HEAD))
