"""LoRA's configuration: HF peft's field names, checked when it is made, read from and written to peft's JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from peftrt.adapters.configs.base import (
    FP32_MAX,
    PLAIN_NAME,
    check_count,
    check_layers,
    check_names,
    check_number,
    check_switch,
)
from peftrt.adapters.configs.pattern import compile_bounded
from peftrt.adapters.configs.peft_fields import NEUTRAL_LORA, shown
from peftrt.adapters.configs.targeted import TargetedConfig
from peftrt.formats.errors import ConfigError, UnsupportedError
from peftrt.nn import initialisation

MAX_RANK = 65536

_MAX_PATTERNS = 16384
_MAX_EXPRESSIONS = 256

# Ways to draw the initial A and B that leave the base as it is: the tensors of a file replace what they drew.
_INIT_WITHOUT_EFFECT = ("eva", "mica")

_PLAIN_LAYER = re.compile(r"\w+(\.\w+)*")


@dataclass(frozen=True)
class LoraConfig(TargetedConfig):
    """What to adapt with LoRA, and how: y = x W^T + scaling * (x A^T) B^T with scaling = lora_alpha / r.

    The fields are HF peft's. Lists may be given as any sequence or set of ``str``; they are kept as tuples.

    Args:
        r: rank, 1 to 65536.
        lora_alpha: numerator of the scaling, finite.
        target_modules: names, each matching a module of that path or of that last part of the path; or one regular
            expression for whole paths; or "all-linear". There is no default: peft's depends on the model's type.
        lora_dropout: probability in [0, 1) that an element of the adapter's input is dropped in training.
        bias: "none"; peft's "all" and "lora_only" are not supported.
        fan_in_fan_out: the base stores [in, out], as GPT-2's Conv1D does.
        use_dora: the rows' magnitudes are trained apart: y = c * (x W^T + scaling * (x A^T) B^T) with c = m / ||W +
            scaling * B A|| (Liu et al. 2024, https://arxiv.org/abs/2402.09353).
        use_rslora: scaling = lora_alpha / sqrt(r) (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
        init_lora_weights: True (A Kaiming-uniform, B zero; Hu et al. 2021, https://arxiv.org/abs/2106.09685),
            "gaussian", "orthogonal", "pissa", "pissa_niter_<n>", "loftq", or False (both random); see
            ``peftrt.nn.initialisation``. PiSSA's and LoftQ's begin with the base weight and change the base.
        loftq_config: of "loftq": {"loftq_bits": 4, "loftq_iter": n}; n = 1 by default.
        rank_pattern, alpha_pattern: regular expression for the end of a path -> its own r or lora_alpha; the first that
            matches holds.
        layers_to_transform, layers_pattern: only layers of these indices; the name of the list of layers.
        modules_to_save: names of modules that are trained and saved in full.
        exclude_modules: names or a regular expression of modules to leave out.
        task_type, base_model_name_or_path, revision, inference_mode: recorded, as in peft.

    Raises:
        ConfigError: a field of a wrong type or out of its range, named in the message.
        UnsupportedError: a value that peft has and peftrt does not.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | Sequence[str] | None = None
    lora_dropout: float = 0.0
    bias: str = "none"
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    loftq_config: Mapping[str, int] = field(default_factory=dict)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None

    peft_type: ClassVar[str] = "LORA"
    required: ClassVar[tuple[str, ...]] = ("r", "target_modules")
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = NEUTRAL_LORA

    def __post_init__(self) -> None:
        super().__post_init__()
        _rank("r", self.r)
        check_number("lora_alpha", self.lora_alpha)
        self._check_targets()
        self._check_switches()
        self._check_patterns()
        self._check_layers()
        for path, rank, alpha in self._scalings():
            if not abs(_scaling(rank, alpha, self.use_rslora)) <= FP32_MAX:
                raise ConfigError(
                    f"lora_alpha{path} = {alpha} at rank {rank}: the scaling is beyond the range of float32"
                )

    def rank_for(self, path: str) -> int:
        """The rank of the module at ``path``: the first of ``rank_pattern`` that matches its end, else ``r``."""
        key = pattern_key(self.rank_pattern, path, "rank_pattern")
        return self.r if key is None else self.rank_pattern[key]

    def alpha_for(self, path: str) -> float:
        """``lora_alpha`` of the module at ``path``, ``alpha_pattern`` considered."""
        key = pattern_key(self.alpha_pattern, path, "alpha_pattern")
        return self.lora_alpha if key is None else self.alpha_pattern[key]

    def scaling_for(self, path: str) -> float:
        """What the module's B A is multiplied by: alpha / r, or alpha / sqrt(r) with ``use_rslora``."""
        return _scaling(self.rank_for(path), self.alpha_for(path), self.use_rslora)

    def with_doubled_ranks(self) -> LoraConfig:
        """The same scalings at twice the ranks, for the change of an adapter that began with a part of the base."""
        factor = math.sqrt(2) if self.use_rslora else 2
        return replace(
            self,
            r=2 * self.r,
            lora_alpha=factor * self.lora_alpha,
            rank_pattern={key: 2 * rank for key, rank in self.rank_pattern.items()},
            alpha_pattern={key: factor * alpha for key, alpha in self.alpha_pattern.items()},
            init_lora_weights=True,
        )

    def to_peft_dict(self, *, inference_mode: bool = True) -> dict[str, Any]:
        """The contents of peft's ``adapter_config.json``; what peft saves is marked for inference."""
        # Named although it is peft's default: programs that are not peft look for it.
        return {**super().to_peft_dict(inference_mode=inference_mode), "lora_bias": False}

    @classmethod
    def _amended(cls, fields: dict[str, Any]) -> dict[str, Any]:
        for name in ("rank_pattern", "alpha_pattern", "loftq_config"):
            # Older versions of peft wrote null for "none".
            if name in fields and fields[name] is None:
                fields[name] = {}
        if fields.get("use_dora", False) is None:
            fields["use_dora"] = False
        init = fields.get("init_lora_weights")
        if init in _INIT_WITHOUT_EFFECT:
            fields["init_lora_weights"] = True
        if isinstance(init, str) and init.startswith("pissa"):
            raise UnsupportedError(
                f"init_lora_weights {shown(init)} is not supported in a file: its tensors belong to the base without "
                "its principal part; have peft convert them (save_pretrained with "
                "path_initial_model_for_weight_conversion), or save them with peftrt.save, which always does"
            )
        return fields

    def _check_switches(self) -> None:
        for name in ("fan_in_fan_out", "use_rslora", "use_dora"):
            check_switch(name, getattr(self, name))
        check_number("lora_dropout", self.lora_dropout)
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout: expected a probability in [0, 1), got {self.lora_dropout}")
        if self.bias in ("all", "lora_only"):
            raise UnsupportedError(f"bias: {self.bias!r} trains the base's biases, which is not supported; use 'none'")
        if self.bias != "none":
            raise ConfigError(f"bias: expected 'none', got {self.bias!a}")
        self._check_initialisation()

    def _check_initialisation(self) -> None:
        init, loftq = self.init_lora_weights, self.loftq_config
        if not isinstance(init, bool | str):
            raise ConfigError(f"init_lora_weights: expected {initialisation.EXPECTED}, got {init!a}")
        try:
            kind = initialisation.parse(init).kind
        except ValueError:
            raise UnsupportedError(
                f"init_lora_weights: {init!a} is not supported; use {initialisation.EXPECTED} (of peft's, "
                f"{', '.join(initialisation.UNSUPPORTED)} are not there)"
            ) from None
        if not isinstance(loftq, Mapping) or (loftq and kind != "loftq"):
            raise ConfigError(f"loftq_config: expected a map, with init_lora_weights 'loftq' only, got {loftq!a}")
        if kind == "loftq":
            try:
                initialisation.loftq_iterations(loftq)
            except ValueError as error:
                raise ConfigError(str(error)) from None
            self._keep("loftq_config", {**initialisation.LOFTQ_DEFAULTS, **loftq})

    def _check_patterns(self) -> None:
        for name, check in (("rank_pattern", _rank), ("alpha_pattern", check_number)):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise ConfigError(f"{name}: expected a map from regular expressions to numbers, got {value!a}")
            if len(value) > _MAX_PATTERNS:
                raise ConfigError(f"{name}: {len(value)} entries, at most {_MAX_PATTERNS} are accepted")
            expressions = 0
            for key, number in value.items():
                if not isinstance(key, str) or not key:
                    raise ConfigError(f"{name}: keys must be strings that are not empty, got {key!a}")
                check(f"{name}[{key!a}]", number)
                if not PLAIN_NAME.fullmatch(key):
                    expressions += 1
                    compile_bounded(_path_end(key), name)
            if expressions > _MAX_EXPRESSIONS:
                raise ConfigError(f"{name}: {expressions} regular expressions, at most {_MAX_EXPRESSIONS} are accepted")
            self._keep(name, dict(value))

    def _check_layers(self) -> None:
        layers, pattern = self.layers_to_transform, self.layers_pattern
        if isinstance(self.target_modules, str) and (layers is not None or pattern is not None):
            name = "layers_to_transform" if layers is not None else "layers_pattern"
            raise ConfigError(f"{name}: cannot be used when target_modules is a string")
        if layers is not None:
            indices = check_layers("layers_to_transform", (layers,) if isinstance(layers, int) else layers)
            self._keep("layers_to_transform", layers if isinstance(layers, int) else indices)
        if pattern is not None:
            names = (pattern,) if isinstance(pattern, str) else check_names("layers_pattern", pattern)
            for entry in names:
                if entry and not _PLAIN_LAYER.fullmatch(entry):
                    raise ConfigError(f"layers_pattern: expected names such as 'layers' or 'h', got {entry!a}")
            if any(names) and layers is None:
                raise ConfigError("layers_pattern: needs layers_to_transform as well")
            self._keep("layers_pattern", pattern if isinstance(pattern, str) else names)

    def _scalings(self) -> list[tuple[str, int, float]]:
        ranks = [self.r, *self.rank_pattern.values()]
        alphas = [("", self.lora_alpha), *((f" of {key!a}", alpha) for key, alpha in self.alpha_pattern.items())]
        return [(path, min(ranks), alpha) for path, alpha in alphas]


def pattern_key(patterns: Mapping[str, Any], path: str, source: str) -> str | None:
    """The first key of a pattern that matches the end of ``path``, as peft: ``(.*\\.)?(key)$``."""
    for key in patterns:
        if PLAIN_NAME.fullmatch(key):
            if _ends_in(path, key):
                return key
        elif compile_bounded(_path_end(key), source).match(path):
            return key
    return None


def _ends_in(path: str, key: str) -> bool:
    if path == key:
        return True
    start = len(path) - len(key)
    if start < 0 or (start > 0 and path[start - 1] != ".") or "\n" in path:
        return False
    return path.endswith(key) or all(want in (".", char) for want, char in zip(key, path[start:], strict=True))


def _path_end(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _scaling(rank: int, alpha: float, use_rslora: bool) -> float:
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def _rank(name: str, value: Any) -> None:
    check_count(name, value, MAX_RANK)
