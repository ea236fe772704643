"""The configurations of the conventional ways to fine-tune: the head alone, or everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from peftrt.adapters.configs.base import AdapterConfig, check_names
from peftrt.formats.errors import ConfigError, UnsupportedError
from peftrt.formats.sizes import expect_bytes


@dataclass(frozen=True)
class OutputLayer(AdapterConfig):
    """Train the output head alone: a copy of it, which is switched like an adapter; the rest is frozen.

    Args:
        modules: names of the modules that are trained, as of ``modules_to_save``, which it is another word for. By
            default the model's head: ``classifier``, ``score`` or ``qa_outputs``, or a language model's output
            embedding.

    Raises:
        ConfigError: a field of a wrong type or out of its range, named in the message.
    """

    modules: Sequence[str] | None = None

    peft_type: ClassVar[str] = "OUTPUT_LAYER"
    required: ClassVar[tuple[str, ...]] = ("modules_to_save",)

    def __post_init__(self) -> None:
        if self.modules is not None:
            names = check_names("modules", self.modules)
            if self.modules_to_save is not None and tuple(self.modules_to_save) != names:
                raise ConfigError("modules: another word for modules_to_save, which says something else: give one")
            self._keep("modules", names)
            self._keep("modules_to_save", names)
        super().__post_init__()


@dataclass(frozen=True)
class FeatureExtraction(OutputLayer):
    """Train the output head alone, over features that the frozen body computes once for each example.

    The body runs in ``eval()`` and without gradients. In training what it returns is kept, for each row under the bytes
    of everything that the row is made of, padding and mask included: a row that comes again is looked up. Nothing is
    kept in ``eval()``, and what is kept is forgotten where the body changes. ``print(peftrt.explain(model))`` says how
    many rows were kept ones.

    Args:
        modules: as of :class:`OutputLayer`.
        max_bytes: what may be kept, in bytes or as "1GiB"; the examples that came first stay.
        device: where it is kept; by default where it is computed.

    Raises:
        ConfigError: a field of a wrong type or out of its range, named in the message.

    Source: the feature-based approach of Devlin et al. 2019 (arXiv:1810.04805), section 5.3.
    """

    max_bytes: int | str = "1GiB"
    device: str | None = None

    peft_type: ClassVar[str] = "FEATURE_EXTRACTION"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            expect_bytes(self.max_bytes, "max_bytes")
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error)) from None
        if self.device is not None:
            try:
                torch.device(self.device)
            except (RuntimeError, TypeError):
                raise ConfigError(f"device: expected the name of a device, got {self.device!a}") from None


@dataclass(frozen=True)
class FullFineTuning(AdapterConfig):
    """Train everything that is floating point: the base itself changes.

    So there is no base to go back to, and no other adapter beside it: ``set_active(model, None)``, ``rows`` with other
    names and further adapters are refused. ``remove`` freezes the model again and keeps its weights. What was trained
    is the model, so ``save`` refuses; ``peftrt.export`` writes it.

    Raises:
        ConfigError: a field of a wrong type or out of its range, named in the message.
        UnsupportedError: ``modules_to_save``: everything is trained as it is.
    """

    peft_type: ClassVar[str] = "FULL_FINE_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modules_to_save is not None:
            raise UnsupportedError("modules_to_save: full fine-tuning trains every module in its place, not a copy")
