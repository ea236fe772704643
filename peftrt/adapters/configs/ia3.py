"""IA3's configuration: HF peft's field names, checked when it is made, read from and written to peft's JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from peftrt.adapters.configs.base import check_switch
from peftrt.adapters.configs.pattern import compile_bounded
from peftrt.adapters.configs.targeted import TargetedConfig
from peftrt.formats.errors import ConfigError


@dataclass(frozen=True)
class IA3Config(TargetedConfig):
    """What to adapt with IA3: y = c * (x W^T + b), or y = (u * x) W^T + b of a feed-forward module.

    The fields are HF peft's. Lists may be given as any sequence or set of ``str``; they are kept as
    tuples. peft guesses both lists of modules by the model's type; here they are named. Liu et al. 2022
    (https://arxiv.org/abs/2205.05638), section 3.3, have the keys' and values' projections, and the second map of the
    feed-forward part: ``["k_proj", "v_proj", "down_proj"]`` and ``["down_proj"]`` on a Llama.

    Args:
        target_modules: names, each matching a module of that path or of that last part of the path; or one regular
            expression for whole paths; or "all-linear".
        feedforward_modules: those among them whose inputs are scaled: ends of paths, each of them one of
            ``target_modules``, or the end of one, where those are names too; or one regular expression for whole paths;
            ``()`` for none: outputs of all are scaled then, which is AdapterHub's form.
        exclude_modules: names or a regular expression of modules to leave out.
        fan_in_fan_out: the base stores [in, out], as GPT-2's Conv1D does.
        init_ia3_weights: True: all factors 1, which changes nothing; False: normal values (for tests).
        modules_to_save: names of modules that are trained and saved in full.
        task_type, base_model_name_or_path, revision, inference_mode: recorded, as in peft.

    Raises:
        ConfigError: a field of a wrong type or out of its range, named in the message.
    """

    target_modules: str | Sequence[str] | None = None
    feedforward_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    peft_type: ClassVar[str] = "IA3"
    required: ClassVar[tuple[str, ...]] = ("target_modules", "feedforward_modules")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_targets()
        if self.feedforward_modules is None:
            raise ConfigError("feedforward_modules: name those whose inputs are scaled, or () for none; got None")
        self._check_modules("feedforward_modules")
        targets, inner = self.target_modules, self.feedforward_modules
        if not isinstance(targets, str) and not isinstance(inner, str):
            # peft wants the same names; what it writes for "all-linear" has whole paths among the targets
            strays = [name for name in inner or () if not any(target.endswith(name) for target in targets or ())]
            if strays:
                raise ConfigError(f"feedforward_modules: {strays[0]!a} is not among target_modules")
        for name in ("fan_in_fan_out", "init_ia3_weights"):
            check_switch(name, getattr(self, name))

    def is_feedforward(self, path: str) -> bool:
        """Whether the factors of the module at ``path`` are its inputs', decided as peft does: a name is any end."""
        inner = self.feedforward_modules
        if isinstance(inner, str):
            return bool(compile_bounded(inner, "feedforward_modules").fullmatch(path))
        return path.endswith(tuple(inner or ()))
