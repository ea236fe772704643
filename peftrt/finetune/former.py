"""What a run does for a former task: elastic weight consolidation, replay, and a look at what is forgotten."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from peftrt.continual import EWC, ReplayBuffer
from peftrt.finetune.errors import UserError
from peftrt.finetune.examples import IGNORE, Batch, Examples
from peftrt.finetune.settings import Settings
from peftrt.finetune.tasks import Forward


def choose_replayed(examples: Examples, settings: Settings) -> Examples:
    """At most ``--replay-size`` of the former examples: to classify equally many of each class, as far as there are."""
    if settings.task == "classify":
        buffer = ReplayBuffer(settings.replay_size, "class-balanced", settings.seed)
        buffer.add(torch.arange(len(examples)), examples.classes)
    else:
        buffer = ReplayBuffer(settings.replay_size, seed=settings.seed)
        buffer.add(torch.arange(len(examples)))
    return examples.select(np.array(sorted(int(index) for index in buffer), np.int64))


def consolidate(model: Any, forward: Forward, examples: Examples, settings: Settings, device: torch.device) -> EWC:
    """Measure what the former task needs of the model as it is.

    What is measured is a function of the model, the examples and the seed: a run that is resumed measures it again.

    Raises:
        UserError: the model or the examples do not allow it.
    """
    order = np.random.Generator(np.random.PCG64([settings.seed, 2])).permutation(len(examples))
    chosen = examples.select(order[: settings.ewc_samples])
    batches = (chosen.batch(indices).to(device) for indices in chosen.by_length(settings.batch_size))
    losses = _classify_losses if settings.task == "classify" else _causal_lm_losses
    try:
        ewc = EWC(model, settings.ewc_lambda)
        ewc.consolidate(batches, lambda model, batch: losses(forward(batch), batch))
    except ValueError as error:
        raise UserError(f"--ewc: {str(error).removeprefix('EWC: ')}") from error
    return ewc


def _classify_losses(logits: Tensor, batch: Batch) -> Tensor:
    """The negative log-likelihood of each example's class, [B]."""
    return F.cross_entropy(logits.float(), batch.labels, reduction="none")


def _causal_lm_losses(logits: Tensor, batch: Batch) -> Tensor:
    """That of each example's tokens, summed, [B]."""
    losses = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), batch.labels[:, 1:], ignore_index=IGNORE, reduction="none"
    )
    return losses.sum(1)


def compared(before: dict[str, float], after: dict[str, float], examples: int) -> dict[str, Any]:
    """What metrics.json says of the former task."""
    change = {name: after[name] - before[name] for name in before}
    return {"eval_examples": examples, "before": before, "after": after, "change": change}
