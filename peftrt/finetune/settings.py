"""What a fine-tuning run is told, as it stands in its directory's run.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from peftrt.finetune.adapter_files import check_adapter
from peftrt.finetune.errors import UserError
from peftrt.finetune.optimizers import PAGED
from peftrt.finetune.records import check_file
from peftrt.formats.sizes import expect_bytes

TASKS = ("classify", "causal-lm")
# A resumed run may be given these anew; all else decides what comes out.
FREE = ("save_every", "optim_budget")
# Settings that are a file of examples.
FILES = ("data", "eval_data", "ewc", "replay")
# What means nothing without another option, and what an adapter brings along.
NEEDS = {"ewc_lambda": "ewc", "ewc_samples": "ewc", "replay_share": "replay", "replay_size": "replay"}
OF_ADAPTER = ("r", "alpha", "rslora", "lora_dropout", "target_modules")


@dataclass(frozen=True)
class Settings:
    """The arguments of ``peftrt finetune``; each field is the option of that name."""

    model: str
    data: str
    task: str
    out: str
    r: int = 16
    alpha: float | None = None  # None is 2 r
    lora_dropout: float = 0.05
    target_modules: tuple[str, ...] = ("all-linear",)
    rslora: bool = False
    quantize: str = "nf4"
    lr: float = 2e-4
    epochs: int = 1
    steps: int | None = None
    batch_size: int = 8
    grad_accum: int = 1
    max_length: int | None = None  # None is 256, or the model's own limit where that is lower
    warmup: float = 0.05
    schedule: str = "cosine"
    optim: str = "adamw"
    optim_budget: str | None = None
    weight_decay: float = 0.0
    loraplus_ratio: float | None = None
    max_grad_norm: float = 1.0
    eval_data: str | None = None
    eval_share: float = 0.1
    text_column: str = "text"
    label_column: str = "label"
    seed: int = 0
    save_every: int = 200
    device: str = "auto"
    dtype: str = "auto"
    gradient_checkpointing: bool = False
    adapter: str | None = None
    ewc: str | None = None
    ewc_lambda: float = 10000.0
    ewc_samples: int = 200
    replay: str | None = None
    replay_share: float = 0.25
    replay_size: int = 1000

    def check(self) -> None:
        """Raise UserError for what is wrong with the settings alone, before anything is loaded."""
        for name in FILES:
            option, path = f"--{name.replace('_', '-')}", getattr(self, name)
            if path is not None:
                check_file(Path(path), option)
                if self.task == "classify" and path.lower().endswith(".txt"):
                    raise UserError(f"{option}: a .txt file has no labels: --task classify needs .jsonl or .csv")
        if looks_like_a_path(self.model) and not Path(self.model).is_dir():
            raise UserError(f"--model: no such directory: {self.model}")
        if Path(self.model).is_dir() and not (Path(self.model) / "config.json").is_file():
            raise UserError(f"--model: {self.model} has no config.json: expected a Hugging Face model's directory")
        if self.adapter is not None:
            check_adapter(Path(self.adapter), self.task)
        if self.ewc is not None and self.task == "classify" and self.adapter is None:
            raise UserError("--ewc needs --adapter to classify: a new head is drawn at random and has nothing to keep")
        if self.replay is not None and not 0 < self.replayed < self.batch_size:
            raise UserError(
                f"--replay-share {self.replay_share} of --batch-size {self.batch_size} must leave an example at least "
                "for both tasks"
            )
        if self.optim_budget is not None:
            if self.optim not in PAGED:
                raise UserError(f"--optim-budget needs --optim {' or '.join(PAGED)}, not {self.optim}")
            try:
                expect_bytes(self.optim_budget, "--optim-budget")
            except (TypeError, ValueError) as error:
                raise UserError(str(error)) from None

    @property
    def replayed(self) -> int:
        """Former examples in each batch."""
        return round(self.replay_share * self.batch_size) if self.replay is not None else 0

    def warmup_steps(self, steps: int) -> int:
        """``warmup`` under 1 is a share of the run, otherwise a number of steps."""
        return round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)

    @classmethod
    def of(cls, given: dict[str, Any]) -> Settings:
        """Settings of what was given on the command line; paths are made absolute, so that a resume finds them."""
        if "epochs" in given and "steps" in given:
            raise UserError("--epochs and --steps exclude each other")
        if "eval_data" in given and "eval_share" in given:
            raise UserError("--eval-data and --eval-share exclude each other")
        for name, main in NEEDS.items():
            if name in given and given.get(main) is None:
                raise UserError(f"--{name.replace('_', '-')} needs --{main}")
        for name in OF_ADAPTER:
            if name in given and given.get("adapter") is not None:
                raise UserError(f"--{name.replace('_', '-')} comes with --adapter: leave it away")
        values = dict(given)
        for name in (*FILES, "adapter", "out"):
            if values.get(name) is not None:
                values[name] = str(Path(values[name]).absolute())
        if looks_like_a_path(values["model"]) or Path(values["model"]).is_dir():
            values["model"] = str(Path(values["model"]).absolute())
        return cls(**values)

    @classmethod
    def resumed(cls, saved: dict[str, Any], given: dict[str, Any]) -> Settings:
        """The settings of a run that is resumed: those saved; an argument that contradicts them is an error."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(saved.keys() - known):
            raise UserError(f"--resume: the run was written by another version of peftrt: it has {unknown[0]!r}")
        try:
            settings = cls(**{**saved, "target_modules": tuple(saved["target_modules"])})
            begun = ("model", "data", "task", "out", "adapter", "ewc", "replay")
            merged = cls.of({**{name: getattr(settings, name) for name in begun}, **given})
        except (TypeError, KeyError) as error:
            raise UserError(f"--resume: the run's settings are incomplete: {error}") from None
        for name in given.keys() - {"out"}:
            before, now = getattr(settings, name), getattr(merged, name)
            if before != now and name not in FREE:
                option = "--" + name.replace("_", "-")
                raise UserError(f"--resume: the run has {option} {before}, not {now}: leave {option} away")
        changes = {name: given[name] for name in FREE if name in given}
        return cls(**{**asdict(settings), "out": merged.out, **changes})


def looks_like_a_path(model: str) -> bool:
    """A Hub id is ``name`` or ``owner/name``; everything else must be a directory."""
    return model.startswith(("/", ".", "~")) or model.count("/") > 1 or model.endswith("/")
