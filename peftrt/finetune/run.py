"""``peftrt finetune``: from a model's name and a file to an adapter's directory."""

from __future__ import annotations

import shlex
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import peftrt
from peftrt.continual import EWC
from peftrt.finetune import checkpoint, models
from peftrt.finetune.adapter import put_adapter
from peftrt.finetune.adapter_files import LABELS, adapter_files
from peftrt.finetune.checkpoint import CHECKPOINT, RUN, Interrupts, write_json
from peftrt.finetune.datasets import Dataset, load_dataset
from peftrt.finetune.errors import Interrupted, RunError, UserError
from peftrt.finetune.examples import Batch, Examples, Mixed
from peftrt.finetune.former import choose_replayed, compared, consolidate
from peftrt.finetune.optimizers import PAGED, Optim
from peftrt.finetune.plots import plot_run
from peftrt.finetune.progress import Progress, console, human_bytes, human_time, peak_memory
from peftrt.finetune.settings import FILES, Settings
from peftrt.finetune.tasks import (
    causal_lm_loss,
    classify_loss,
    evaluate_causal_lm,
    evaluate_classify,
    evaluating,
)
from peftrt.finetune.trainer import Plan, Trainer, steps_per_epoch

if TYPE_CHECKING:
    from rich.console import Console

METRICS, PLOT = "metrics.json", "loss.png"
WRITTEN = (RUN, CHECKPOINT, METRICS, PLOT, LABELS, "adapter_config.json", "adapter_model.safetensors", "README.md")


@dataclass
class Run:
    """One run of fine-tuning: everything that is loaded for it."""

    settings: Settings
    out: Console
    device: torch.device
    dtype: torch.dtype
    model: Any  # transformers has no types of its own to speak of
    tokenizer: Any
    data: Dataset
    report: Any
    digests: dict[str, str]
    base: str
    interrupts: Interrupts = field(default_factory=Interrupts)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    ewc: EWC | None = None
    former_before: dict[str, float] | None = None

    @classmethod
    def load(cls, settings: Settings, out: Console) -> Run:
        """Load data and model, adapt the model; nothing is written."""
        device = models.choose_device(settings.device)
        dtype = models.choose_dtype(settings.dtype, device)
        tokenizer = models.load_tokenizer(settings.model)
        limit = models.length_limit(models.load_config(settings.model), tokenizer)
        length = models.choose_length(settings.max_length, limit)
        digests = _digests(settings)
        data = load_dataset(settings, tokenizer, length, tokenizer.pad_token_id)
        torch.manual_seed(settings.seed)
        whole: list[str] = []
        if settings.task == "classify":
            model, whole = models.load_classifier(settings.model, data.labels, tokenizer.pad_token_id, dtype)
        else:
            model = models.load_causal_lm(settings.model, dtype)
        models.check_tokens(model, data.largest_token, settings.model)
        report = put_adapter(model.to(device), settings, whole, lambda line: out.print(line, soft_wrap=True))
        for parameter in model.parameters():
            # Under autocast a head in fp32 costs nothing, and small steps are not rounded away.
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        base = checkpoint.base_digest(model)
        return cls(settings, out, device, dtype, model, tokenizer, data, report, digests, base)

    @cached_property
    def trainer(self) -> Trainer:
        settings = self.settings
        each = steps_per_epoch(len(self.data.train), settings.batch_size - settings.replayed, settings.grad_accum)
        steps = settings.steps if settings.steps is not None else settings.epochs * each
        plan = Plan(
            steps=steps,
            lr=settings.lr,
            schedule=settings.schedule,
            warmup=settings.warmup_steps(steps),
            batch_size=settings.batch_size,
            grad_accum=settings.grad_accum,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            seed=settings.seed,
            loraplus_ratio=settings.loraplus_ratio or 1.0,
        )
        trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        backing = "host" if self.device.type == "cuda" or settings.optim_budget is None else Path(settings.out)
        optim = Optim(settings.optim, settings.optim_budget, backing)
        examples, order = self.data.train, None
        if "replay" in self.data.former:
            former = choose_replayed(self.data.former["replay"], settings)
            order = Mixed(examples.lengths, len(former), settings.batch_size, settings.replayed, settings.seed)
            examples = examples.joined(former)
        penalty = None if self.ewc is None else self.ewc.penalty
        return Trainer(trained, self.loss, examples, plan, self.device, optim, order, penalty)

    def forward(self, batch: Batch) -> Tensor:
        with self._precision():
            return self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits

    def loss(self, batch: Batch) -> Tensor:
        return (classify_loss if self.settings.task == "classify" else causal_lm_loss)(self.forward(batch), batch)

    def evaluate(self) -> bool:
        """Measure on what is held out, if there is any and that was not yet done at this step."""
        if self.data.evaluation is None or any(e["step"] == self.trainer.step for e in self.evaluations):
            return False

        self.evaluations.append({"step": self.trainer.step, **self.measure(self.data.evaluation)})
        return True

    def measure(self, examples: Examples) -> dict[str, float]:
        """What the model as it is makes of examples."""

        def forward(batch: Batch) -> Tensor:
            self.stop_if_asked()
            return self.forward(batch)

        measure = evaluate_classify if self.settings.task == "classify" else evaluate_causal_lm
        with evaluating(self.model):
            return measure(forward, examples, 2 * self.settings.batch_size, self.device)

    def look_back(self) -> None:
        """Before the first step: how well the former task is known, and what it needs of the model."""
        held_out = self.data.former_evaluation
        if held_out is not None and self.former_before is None:
            self.former_before = self.measure(held_out)
            self.out.print(f"former task: held out {_figures(self.former_before)}", soft_wrap=True)
        if "ewc" in self.data.former:
            self.ewc = consolidate(self.model, self.forward, self.data.former["ewc"], self.settings, self.device)
            kept = f"{self.ewc.samples[0]:,} examples, {human_bytes(self.ewc.nbytes)}"
            self.out.print(f"EWC: what the former task needs, measured on {kept}", soft_wrap=True)

    def stop_if_asked(self) -> None:
        """Raise Interrupted where a signal has come; a checkpoint of this step must be there."""
        if self.interrupts.caught:
            raise Interrupted(
                f"stopped after step {self.trainer.step} of {self.trainer.plan.steps}; the checkpoint is saved",
                _resume_command(Path(self.settings.out)),
                128 + self.interrupts.caught,
            )

    def _precision(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)


def finetune(given: dict[str, Any], *, resume: bool = False, overwrite: bool = False) -> None:
    """Run ``peftrt finetune``.

    Args:
        given: the options that were given, by the names of Settings' fields; ``out`` among them.
        resume: go on with the run in ``out``.
        overwrite: replace a run that is in ``out``.

    Raises:
        UserError, RunError, Interrupted: see ``peftrt.finetune.errors``.
    """
    directory = Path(given["out"]).absolute()
    saved = checkpoint.read_run(directory) if resume else {}
    if resume:
        settings = Settings.resumed(saved["settings"], given)
    else:
        settings = Settings.of(given)
        _check_directory(directory, overwrite)
    settings.check()
    out = console()
    if saved.get("finished"):
        out.print(f"{directory}: the run is finished; nothing to do", soft_wrap=True)
        return
    if saved and saved["data"] != (now := _digests(settings)):
        same = all(saved["data"].get(name) == digest for name, digest in now.items() if name in FILES)
        raise UserError(f"--resume: the {'adapter' if same else 'data'} has changed since the run began")
    begun = resume
    try:
        run = Run.load(settings, out)
        run.former_before = saved.get("former")
        run.look_back()
        if resume:
            _restore(run, directory, saved)
        else:
            _begin(run, directory)
            begun = True
        _describe(run)
        _train(run, directory)
        _finish(run, directory)
    except KeyboardInterrupt:
        if begun:
            raise Interrupted("stopped at once; the last checkpoint stands", _resume_command(directory)) from None
        raise Interrupted("stopped before training began: nothing was written") from None
    except (torch.OutOfMemoryError, MemoryError) as error:
        hint = "a smaller --batch-size with --grad-accum, a smaller --max-length or --gradient-checkpointing needs less"
        raise RunError(f"out of memory: {hint}") from error


def _describe(run: Run) -> None:
    trained = sum(parameter.numel() for parameter in run.trainer.parameters.values())
    frozen = sum(p.numel() * p.element_size() for p in run.model.parameters() if not p.requires_grad)
    held_out = len(run.data.evaluation) if run.data.evaluation else 0
    base = f"{Path(run.settings.model).name} ({human_bytes(frozen)} frozen, {run.settings.quantize} base"
    run.out.print(f"{base}), {trained:,} parameters trained on {run.device}", soft_wrap=True)
    labels = f", {len(run.data.labels)} labels" if run.data.labels else ""
    run.out.print(
        f"{len(run.data.train):,} examples to train on ({run.data.train.tokens:,} tokens), "
        f"{held_out:,} held out{labels}",
        soft_wrap=True,
    )
    if run.settings.optim in PAGED:
        held = human_bytes(run.trainer.optimizer_bytes)
        run.out.print(f"{run.settings.optim}: {held} of the device for the optimizer's state", soft_wrap=True)


def _train(run: Run, directory: Path) -> None:
    trainer, settings = run.trainer, run.settings
    run.model.train()
    with run.interrupts.remembered(), Progress(run.out, "training", trainer.plan.steps, trainer.step) as bar:
        _evaluate_epoch(run, directory, bar)
        for step in trainer:
            bar.update(step)
            epoch_ends = step.number % trainer.steps_per_epoch == 0 or step.number == trainer.plan.steps
            if run.interrupts.caught or epoch_ends or step.number % settings.save_every == 0:
                checkpoint.write_checkpoint(directory, trainer.state())
            run.stop_if_asked()
            _evaluate_epoch(run, directory, bar)


def _evaluate_epoch(run: Run, directory: Path, bar: Progress) -> None:
    """Measure where an epoch ends; also where a run was stopped between the end of an epoch and its measurement."""
    step = run.trainer.step
    at_end = step % run.trainer.steps_per_epoch == 0 or step == run.trainer.plan.steps
    if step and at_end and run.evaluate():
        bar.note(f"step {step}: held out {_figures(run.evaluations[-1])}")
        _write_run(run, directory)


def _finish(run: Run, directory: Path) -> None:
    """Write everything that the run was for; the checkpoint goes last, for until then it can all be had from it."""
    trainer = run.trainer
    # Read first by whoever loads the adapter, so written before it.
    run.tokenizer.save_pretrained(directory)
    if run.data.labels:
        write_json(directory / LABELS, list(run.data.labels))
    peftrt.save(run.model, directory)
    adapter = f"r = {run.settings.r}" if run.settings.adapter is None else f"from {Path(run.settings.adapter).name}"
    title = f"{Path(run.settings.model).name}, {run.settings.task}, {adapter}"
    plot_run(directory / PLOT, trainer.history, run.evaluations, title)
    seconds = sum(step.seconds for step in trainer.history)
    tokens = sum(step.tokens for step in trainer.history)
    metrics = {
        "task": run.settings.task,
        "steps": trainer.step,
        "train_examples": len(run.data.train),
        "eval_examples": len(run.data.evaluation) if run.data.evaluation else 0,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_bytes": peak_memory(),
        "optimizer_bytes": trainer.optimizer_bytes,
        "evaluation": run.evaluations[-1] if run.evaluations else None,
        "evaluations": run.evaluations,
        "history": [{"step": s.number, "loss": s.loss, "lr": s.rate, "tokens": s.tokens} for s in trainer.history],
        **_of_former_task(run),
    }
    write_json(directory / METRICS, metrics)
    _write_run(run, directory, finished=True)
    (directory / CHECKPOINT).unlink(missing_ok=True)
    out = run.out
    out.print(f"{trainer.step} steps in {human_time(seconds)}, {tokens / seconds:,.0f} tokens/s", soft_wrap=True)
    out.print(f"the adapter is in {directory}: peftrt.load(model, {str(directory)!r}), or HF peft", soft_wrap=True)


def _of_former_task(run: Run) -> dict[str, Any]:
    """Of metrics.json, where there was a former task."""
    metrics: dict[str, Any] = {}
    if run.ewc is not None:
        penalties = [step.penalty for step in run.trainer.history]
        metrics["ewc"] = {"samples": run.ewc.samples[0], "bytes": run.ewc.nbytes, "penalties": penalties}
    held_out, before = run.data.former_evaluation, run.former_before
    if held_out is not None and before is not None:
        after = run.measure(held_out)
        metrics["former"] = compared(before, after, len(held_out))
        run.out.print(f"former task: held out {_figures(after)}; before {_figures(before)}", soft_wrap=True)
    return metrics


def _begin(run: Run, directory: Path) -> None:
    before = directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        # The optimizer's pages may lie in the directory. What it cannot be had with is said before anything is removed.
        _ = run.trainer
    except BaseException:
        if not before:
            directory.rmdir()
        raise
    for name in WRITTEN:
        (directory / name).unlink(missing_ok=True)
    _write_run(run, directory)


def _restore(run: Run, directory: Path, saved: dict[str, Any]) -> None:
    if saved["base"] != checkpoint.base_digest(run.model):
        raise UserError(f"--resume: the model {run.settings.model} has changed since the run began")
    if (state := checkpoint.read_checkpoint(directory)) is not None:
        run.trainer.restore(state)
    run.evaluations = [e for e in saved["evaluations"] if e["step"] <= run.trainer.step]
    for name, now in _machine().items():
        if saved["machine"].get(name) != now:
            before = saved["machine"].get(name)
            run.out.print(f"note: {name} is {now}, it was {before}: the last bits may differ", soft_wrap=True)


def _write_run(run: Run, directory: Path, finished: bool = False) -> None:
    description = {
        "peftrt": peftrt.__version__,
        "finished": finished,
        "settings": asdict(run.settings),
        "data": run.digests,
        "base": run.base,
        "machine": _machine(),
        "evaluations": run.evaluations,
        "former": run.former_before,
    }
    write_json(directory / RUN, description)


def _machine() -> dict[str, Any]:
    """What the last bits of a result depend on beside the settings."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads()}


def _digests(settings: Settings) -> dict[str, str]:
    paths = {name: getattr(settings, name) for name in FILES}
    if settings.adapter is not None:
        directory = Path(settings.adapter)
        paths |= {f"adapter {name}": directory / name for name in adapter_files(directory, settings.task)}
    return {name: checkpoint.file_digest(Path(path)) for name, path in paths.items() if path is not None}


def _check_directory(directory: Path, overwrite: bool) -> None:
    if directory.is_file():
        raise UserError(f"--out: {directory} is a file")
    if not directory.exists() or not any(directory.iterdir()):
        return
    ours = (directory / RUN).is_file()
    if overwrite and not ours:
        raise UserError(f"--overwrite: {directory} is not empty and holds no run of peftrt: nothing was removed")
    if not overwrite:
        hint = ": --resume goes on with the run in it, --overwrite replaces it" if ours else ""
        raise UserError(f"--out: {directory} is not empty{hint}")


def _figures(evaluation: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in evaluation.items() if name != "step")


def _resume_command(directory: Path) -> str:
    return f"peftrt finetune --resume --out {shlex.quote(str(directory))}"
