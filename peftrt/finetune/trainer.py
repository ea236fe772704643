"""The training loop, as an iterator of steps: what happens between two steps is the caller's business."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftrt.finetune.errors import RunError, UserError
from peftrt.finetune.examples import Batch, Examples, Mixed, Order
from peftrt.finetune.optimizers import ENTRY, Optim, load_state, saved_state, state_bytes
from peftrt.optim import param_groups

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        steps: optimizer steps in all.
        lr: the highest learning rate.
        schedule: what follows the warm-up: "cosine" or "linear" to zero, or "constant".
        warmup: steps in which the rate rises to ``lr``.
        batch_size: examples a batch.
        grad_accum: batches a step.
        weight_decay: AdamW's, on all parameters but biases, norms and other vectors.
        max_grad_norm: gradients of a greater norm are scaled down to it; 0 leaves them alone.
        seed: of the batches' order.
        loraplus_ratio: LoRA+: what the rate of B is multiplied by.
    """

    steps: int
    lr: float
    schedule: str = "cosine"
    warmup: int = 0
    batch_size: int = 16
    grad_accum: int = 1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    loraplus_ratio: float = 1.0

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: a function of the step alone, so there is no state to save."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1.0 + math.cos(math.pi * done))
        return self.lr * (1.0 - done) if self.schedule == "linear" else self.lr


@dataclass(frozen=True)
class Step:
    """One optimizer step that is done: its number from 1, mean loss, learning rate, tokens and seconds; and what was
    added to the loss.
    """

    number: int
    loss: float
    rate: float
    tokens: int
    seconds: float
    penalty: float = 0.0


class Trainer:
    """Trains parameters on examples, one step at a time::

        for step in Trainer(parameters, loss, examples, plan):
            print(step.number, step.loss)

    The loss of a step is the mean over all targets of its batches, however they are cut. After every step the whole
    state is in :meth:`state`; a trainer that :meth:`restore` was called on goes on bit for bit as this one would
    have.

    Args:
        parameters: what is trained, by name.
        loss: takes a batch; returns the sum of its targets' losses, fp32 ``[]``.
        examples: what is trained on.
        plan: how.
        device: where the batches go.
        optim: which optimizer; which state it has is part of :meth:`state`, where it lies is not.
        order: the examples of every batch; by default all of them, shuffled anew every epoch.
        penalty: what is added to the loss of every step, fp32 ``[]``.

    Raises:
        UserError: the optimizer cannot be had.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        loss: Callable[[Batch], Tensor],
        examples: Examples,
        plan: Plan,
        device: torch.device | str = "cpu",
        optim: Optim | None = None,
        order: Order | Mixed | None = None,
        penalty: Callable[[], Tensor] | None = None,
    ) -> None:
        self.parameters = dict(parameters)
        self.plan = plan
        self.history: list[Step] = []
        self._loss = loss
        self._examples = examples
        self._device = torch.device(device)
        self._order = order or Order(examples.lengths, plan.batch_size, plan.seed)
        self._penalty = penalty
        groups = param_groups(
            self.parameters, 1.0, loraplus_lr_ratio=plan.loraplus_ratio, weight_decay=plan.weight_decay
        )
        self._factors = [group["lr"] for group in groups]
        name_of = {parameter: name for name, parameter in self.parameters.items()}
        self._names = [name_of[parameter] for group in groups for parameter in group["params"]]
        self._optim = Optim() if optim is None else optim
        self._optimizer = self._optim.make(groups, plan.max_grad_norm)

    @property
    def step(self) -> int:
        """How many steps are done."""
        return len(self.history)

    @property
    def optimizer_bytes(self) -> int:
        """What the optimizer's state takes of the device."""
        return state_bytes(self._optimizer)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self._order.batches_per_epoch / self.plan.grad_accum)

    def __iter__(self) -> Iterator[Step]:
        while self.step < self.plan.steps:
            yield self._advance()

    def _advance(self) -> Step:
        start = time.perf_counter()
        batches = self._batches(self.step)
        targets = sum(batch.targets for batch in batches)
        losses = torch.zeros((), device=self._device)
        for batch in batches:
            loss = self._loss(batch.to(self._device)) / targets
            loss.backward()
            losses += loss.detach()
        number, total, penalty = self.step + 1, float(losses), self._add_penalty()
        if not math.isfinite(total):
            self._optimizer.zero_grad(set_to_none=True)
            raise RunError(f"the loss is {total} at step {number}: try a smaller --lr, or a longer --warmup")
        if not math.isfinite(penalty):
            self._optimizer.zero_grad(set_to_none=True)
            raise RunError(f"the penalty is {penalty} at step {number}: try a smaller --ewc-lambda, or a smaller --lr")
        if self.plan.max_grad_norm > 0 and not self._optim.clips:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.plan.max_grad_norm)
        rate = self.plan.rate(self.step)
        for group, factor in zip(self._optimizer.param_groups, self._factors, strict=True):
            group["lr"] = rate * factor
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        tokens = sum(batch.tokens for batch in batches)
        step = Step(number, total, rate, tokens, time.perf_counter() - start, penalty)
        self.history.append(step)
        return step

    def _add_penalty(self) -> float:
        """Add the penalty's gradient, once a step, however many batches it has."""
        if self._penalty is None:
            return 0.0
        penalty = self._penalty()
        penalty.backward()
        return float(penalty.detach())

    def _batches(self, step: int) -> list[Batch]:
        """The batches of a step; the last step of an epoch takes what is left of it."""
        epoch, place = divmod(step, self.steps_per_epoch)
        count = self._order.batches_per_epoch
        first = place * self.plan.grad_accum
        last = min(first + self.plan.grad_accum, count)
        return [self._examples.batch(self._order[epoch * count + i]) for i in range(first, last)]

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on, as tensors: parameters, moments, random state, and the history."""
        state = {f"parameter.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        state |= saved_state(self._optimizer, self._names)
        state["random.cpu"] = torch.get_rng_state()
        if self._device.type == "cuda":
            state["random.cuda"] = torch.cuda.get_rng_state(self._device)
        rows = [[step.loss, step.rate, step.tokens, step.seconds] for step in self.history]
        state["history"] = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)
        if self._penalty is not None:
            state["penalties"] = torch.tensor([step.penalty for step in self.history], dtype=torch.float64)
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what :meth:`state` returned.

        Raises:
            UserError: the state is of other parameters; nothing is changed.
        """
        _check_state(state, self.parameters)
        load_state(self._optimizer, self._names, state)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[f"parameter.{name}"])
        torch.set_rng_state(state["random.cpu"])
        if self._device.type == "cuda" and "random.cuda" in state:
            torch.cuda.set_rng_state(state["random.cuda"], self._device)
        rows = state["history"].tolist()
        penalties = state["penalties"].tolist() if "penalties" in state else [0.0] * len(rows)
        pairs = zip(rows, penalties, strict=True)
        self.history = [Step(i + 1, r[0], r[1], int(r[2]), r[3], penalty) for i, (r, penalty) in enumerate(pairs)]


def steps_per_epoch(examples: int, batch_size: int, grad_accum: int) -> int:
    """How many optimizer steps one pass over the examples takes."""
    return math.ceil(math.ceil(examples / batch_size) / grad_accum)


def _check_state(state: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    missing = [name for name in ("random.cpu", "history") if name not in state]
    if missing:
        raise UserError(f"the checkpoint has no {missing[0]!r}")
    saved = {name.removeprefix("parameter."): value for name, value in state.items() if name.startswith("parameter.")}
    for name in sorted(saved.keys() ^ parameters.keys()):
        where = "only in the checkpoint" if name in saved else "not in the checkpoint"
        raise UserError(f"the checkpoint is of another model: {name} is {where}")
    for name, parameter in parameters.items():
        if saved[name].shape != parameter.shape or saved[name].dtype != parameter.dtype:
            expected, got = (
                f"{parameter.dtype} {list(parameter.shape)}",
                f"{saved[name].dtype} {list(saved[name].shape)}",
            )
            raise UserError(f"the checkpoint is of another model: {name} must be {expected}, got {got}")
    for entry, value in state.items():
        if entry.startswith(ENTRY):
            key, _, name = entry.removeprefix(ENTRY).partition(".")
            # of other keys the optimizer itself knows what shape they have
            whole = key in ("exp_avg", "exp_avg_sq")
            if name not in parameters or (whole and value.shape != parameters[name].shape):
                raise UserError(f"the checkpoint is of another model: {entry} does not fit")
