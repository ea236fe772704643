"""One adapter of a layer: its Parameters, their names, and how adapters are asked for."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from peftrt.nn.principal import Term

DEFAULT = "default"
# What an adapter's Parameters are called; the last only DoRA's have.
FIELDS = ("lora_A", "lora_B", "lora_magnitude")


@dataclass(frozen=True)
class Settings:
    """What a layer keeps of a LoRA adapter beside its Parameters."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool


@dataclass(frozen=True)
class Adapter:
    """One adapter of a layer: its hyper-parameters, and its Parameters as they are now.

    Attributes:
        lora_A: ``[R, K]``.
        lora_B: ``[N, R]``.
        r, lora_alpha, lora_dropout, use_rslora: as given to ``add_adapter``.
        magnitude: DoRA's m ``[N]``; None for LoRA.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    magnitude: nn.Parameter | None = None

    @property
    def scaling(self) -> float:
        """s: alpha / R, or alpha / sqrt(R) for rsLoRA."""
        return scaling_of(self.r, self.lora_alpha, self.use_rslora)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """What is trained of it: A, B, and DoRA's magnitude."""
        return (self.lora_A, self.lora_B) if self.magnitude is None else (self.lora_A, self.lora_B, self.magnitude)

    def delta(self) -> Tensor:
        """s B A, fp32 [N, K]: without the magnitude that DoRA gives its sum with W."""
        return Term(self.lora_A, self.lora_B, self.scaling).delta()


def scaling_of(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """What B A is multiplied by."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def parameter_name(field: str, name: str) -> str:
    """Name of the Parameter that holds one of ``FIELDS`` of an adapter."""
    return field if name == DEFAULT else f"{field}@{name}"


def as_weights(names: str | Mapping[str, float] | None) -> dict[str, float]:
    """What ``set_active`` takes, as name -> weight; ValueError for a weight that is not finite."""
    if names is None:
        return {}
    if isinstance(names, str):
        return {names: 1.0}
    weights = {name: float(weight) for name, weight in names.items()}
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise ValueError(f"adapter {name!r}: weight must be finite, got {weight}")
    return weights


def check_new(name: str, taken: Container[str], r: int, lora_alpha: float, lora_dropout: float) -> None:
    """Raise ValueError unless an adapter can be called and made so."""
    check_name(name, taken)
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"r must be an integer of at least 1, got {r!r}")
    if not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha must be finite, got {lora_alpha!r}")
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout!r}")


def check_name(name: str, taken: Container[str]) -> None:
    """Raise ValueError unless an adapter can be called so."""
    if not isinstance(name, str) or not name or "." in name or "@" in name:
        raise ValueError(f"adapter name must be non-empty, without '.' and '@', got {name!r}")
    if name in taken:
        raise ValueError(f"adapter {name!r} exists already")
