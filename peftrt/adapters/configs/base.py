"""What the configurations of all methods share: fields of every adapter, and how fields are checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from peftrt.adapters.configs.peft_fields import read_fields
from peftrt.formats.errors import ConfigError, named

TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
FP32_MAX = 3.4028234663852886e38
_MAX_LIST = 65536
_MAX_LAYER = 1 << 20

# A name of these alone means the same as a regular expression and letter by letter, '.' standing for any character.
PLAIN_NAME = re.compile(r"[\w.\-]+")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The fields that every method has; HF peft's names.

    Args:
        modules_to_save: names of modules that are trained and saved in full.
        task_type, base_model_name_or_path, revision, inference_mode: recorded, as in peft.

    Raises:
        ConfigError: a field of a wrong type or out of its range, named in the message.
    """

    modules_to_save: Sequence[str] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    # what an ``adapter_config.json`` calls the method; the fields that it must have; fields of peft's that the
    # configuration lacks, with the values at which they change nothing; fields that are in no file
    peft_type: ClassVar[str]
    required: ClassVar[tuple[str, ...]] = ()
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    unsaved: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.modules_to_save is not None:
            names = check_names("modules_to_save", self.modules_to_save)
            for entry in names:
                if not PLAIN_NAME.fullmatch(entry):
                    raise ConfigError(f"modules_to_save: expected names of modules, got {entry!a}")
            self._keep("modules_to_save", names or None)
        check_switch("inference_mode", self.inference_mode)
        for name in ("task_type", "base_model_name_or_path", "revision"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{name}: expected a string, got {value!a}")
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            raise ConfigError(f"task_type: expected one of {', '.join(TASK_TYPES)}, got {self.task_type!a}")

    def to_peft_dict(self, *, inference_mode: bool = True) -> dict[str, Any]:
        """The contents of ``adapter_config.json``; what peft saves is marked for inference."""
        values = {name: _json_value(getattr(self, name)) for name in self._saved_fields()}
        return {**values, "peft_type": self.peft_type, "inference_mode": inference_mode}

    @classmethod
    def from_peft_dict(cls, values: Mapping[str, Any], source: str = "adapter_config.json") -> Self:
        """Make a configuration of the contents of an ``adapter_config.json``.

        Args:
            values: the JSON object.
            source: the file, named in errors.

        Raises:
            ConfigError: ``peft_type`` or a field that must be there is missing, or a field is bad.
            UnsupportedError: another ``peft_type``, or a field that would change the result and is not supported.
        """
        kind, known = cls.peft_type, cls._saved_fields()
        fields = read_fields(values, source, kind=kind, known=known, required=cls.required, neutral=cls.neutral)
        with named(source):
            return cls(**cls._amended(fields))

    @classmethod
    def _amended(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """A file's fields with what peft means by values that it writes, and the constructor does not take."""
        return fields

    @classmethod
    def _saved_fields(cls) -> frozenset[str]:
        return frozenset(field.name for field in fields(cls)) - frozenset(cls.unsaved)

    def _keep(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def check_number(name: str, value: Any) -> None:
    """Raise ConfigError unless ``value`` is a number that float32 can hold."""
    if type(value) not in (int, float) or not abs(value) <= FP32_MAX:
        raise ConfigError(f"{name}: expected a finite number, got {value!a}")


def check_count(name: str, value: Any, most: int) -> None:
    """Raise ConfigError unless ``value`` is a whole number from 1 to ``most``."""
    if type(value) is not int or not 1 <= value <= most:
        raise ConfigError(f"{name}: expected an integer from 1 to {most}, got {value!a}")


def check_switch(name: str, value: Any) -> None:
    """Raise ConfigError unless ``value`` is true or false."""
    if type(value) is not bool:
        raise ConfigError(f"{name}: expected true or false, got {value!a}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ConfigError unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {value!a}")


def check_layers(name: str, value: Any) -> tuple[int, ...]:
    """A list of layers' indices as a tuple, in order; raises ConfigError for anything else."""
    if isinstance(value, str) or not isinstance(value, Sequence | set | frozenset):
        raise ConfigError(f"{name}: expected a list of layers' indices, got {value!a}")
    for index in value:
        if type(index) is not int or not 0 <= index < _MAX_LAYER:
            raise ConfigError(f"{name}: expected integers in [0, {_MAX_LAYER}), got {index!a}")
    return tuple(sorted(value))


def check_names(name: str, value: Any) -> tuple[str, ...]:
    """A list of names as a tuple; raises ConfigError for anything else."""
    if isinstance(value, str) or not isinstance(value, Sequence | set | frozenset):
        raise ConfigError(f"{name}: expected a list of names, got {value!a}")
    for entry in value:
        if not isinstance(entry, str) or not entry:
            raise ConfigError(f"{name}: expected names that are not empty, got {entry!a}")
    if len(value) > _MAX_LIST:
        raise ConfigError(f"{name}: {len(value)} entries, at most {_MAX_LIST} are accepted")
    # A set has no order of its own; sorted, what is saved does not depend on the run.
    return tuple(sorted(value)) if isinstance(value, set | frozenset) else tuple(value)


def _json_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
