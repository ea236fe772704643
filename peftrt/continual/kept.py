"""What elastic weight consolidation keeps of a task, and its form in a state dict and in a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peftrt.formats.strict_json import loads_strict
from peftrt.nn import AdapterLinear

KIND = {"format": "pt", "kind": "peftrt.continual.EWC", "version": "1"}
# what a Fisher may be kept in; fp16 ends at 6e-8, and most of a Fisher's values lie below
DTYPES = (torch.float32, torch.bfloat16)


class Change:
    """F of a layer's weight [N, K], and the change that its adapters made when a task ended: B* A*."""

    parts = ("fisher", "lora_A", "lora_B")

    def __init__(self, fisher: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
        self.fisher, self.lora_A, self.lora_B = fisher, lora_A, lora_B


class Value:
    """F of a Parameter, and the value theta* that it had when a task ended, both of its shape."""

    parts = ("fisher", "value")

    def __init__(self, fisher: Tensor, value: Tensor) -> None:
        self.fisher, self.value = fisher, value


Entry = Change | Value
KINDS: dict[str, type[Change] | type[Value]] = {"layer": Change, "parameter": Value}


@dataclass
class Task:
    """What is kept of one task, or of all before in one: by path and by name, and how many samples F is the mean of."""

    layers: dict[str, Change]
    parameters: dict[str, Value]
    samples: int

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """("layer.<path>" or "parameter.<name>", entry)."""
        for path, change in self.layers.items():
            yield f"layer.{path}", change
        for name, value in self.parameters.items():
            yield f"parameter.{name}", value


class _Sized(Protocol):
    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> torch.dtype: ...


def named_tensors(tasks: Iterable[Task]) -> dict[str, Tensor]:
    """Every tensor of the tasks: "0.layer.<path>.fisher", "0.parameter.<name>.value", ..."""
    return {
        f"{number}.{name}.{part}": getattr(entry, part)
        for number, task in enumerate(tasks)
        for name, entry in task.entries()
        for part in entry.parts
    }


def to_metadata(mode: str, target: str, samples: list[int]) -> dict[str, str]:
    """What a file says beside its tensors."""
    return {**KIND, "mode": mode, "target": target, "samples": json.dumps(samples)}


def from_metadata(metadata: Mapping[str, str], source: str) -> dict[str, Any]:
    """mode, target and samples of a file; ValueError where it is none of ours."""
    came = {key: metadata.get(key) for key in KIND}
    if came != KIND:
        raise ValueError(f"expected a file with metadata {KIND}, got {came}")
    samples = loads_strict(metadata.get("samples", "").encode(), f"{source}: samples")
    return {"mode": metadata.get("mode"), "target": metadata.get("target"), "samples": samples}


def read_tasks(
    saved: Mapping[str, Any],
    mode: str,
    target: str,
    entries: Mapping[str, _Sized],
    read: Callable[[str], Tensor],
    layers: Mapping[str, AdapterLinear],
    parameters: Mapping[str, nn.Parameter],
) -> list[Task]:
    """Tasks from named tensors, all of them checked against the model before the first is read.

    Args:
        saved: mode, target and samples of what was saved.
        mode, target: those of the reader.
        entries: name -> shape and dtype.
        read: a tensor of that name.
        layers, parameters: the model's.

    Raises:
        ValueError: something does not fit, named.
    """
    for name, own in (("mode", mode), ("target", target)):
        if saved.get(name) != own:
            raise ValueError(f"{name} must be {own!r}, as here, got {saved.get(name)!r}")
    samples = saved.get("samples")
    if not isinstance(samples, list) or not all(type(n) is int and 0 < n < 1 << 63 for n in samples):
        raise ValueError(f"samples must be a list of numbers from 1 on, one a task, got {samples!r:.200}")
    if mode == "online" and len(samples) > 1:
        raise ValueError(f"samples must hold one number at most in mode 'online', got {samples!r:.200}")
    found: dict[tuple[int, str, str], list[str]] = {}
    for key in entries:
        number, kind, name, part = _split(key, len(samples))
        found.setdefault((number, kind, name), []).append(part)
    for (number, kind, name), parts in found.items():
        expected = KINDS[kind].parts
        if sorted(parts) != sorted(expected):
            raise ValueError(f"{number}.{kind}.{name}: expected {', '.join(expected)}, got {', '.join(parts)}")
        sized = {part: entries[f"{number}.{kind}.{name}.{part}"] for part in expected}
        expect_fit(f"{number}.{kind}.{name}", kind, name, sized, layers, parameters)
    tasks = [Task({}, {}, count) for count in samples]
    for number, kind, name in found:
        tensors = [read(f"{number}.{kind}.{name}.{part}") for part in KINDS[kind].parts]
        if bool((tensors[0] < 0).any()):
            raise ValueError(f"{number}.{kind}.{name}.fisher: expected squares, got a negative number")
        if kind == "layer":
            tasks[number].layers[name] = Change(*tensors)
        else:
            tasks[number].parameters[name] = Value(*tensors)
    return tasks


def _split(key: str, tasks: int) -> tuple[int, str, str, str]:
    number, _, rest = key.partition(".")
    kind, _, rest = rest.partition(".")
    name, _, part = rest.rpartition(".")
    if not number.isdecimal() or not name or kind not in KINDS or int(number) >= tasks:
        raise ValueError(f"tensor {key!a} is none of EWC's for {tasks} tasks")
    return int(number), kind, name, part


def expect_fit(
    called: str,
    kind: str,
    name: str,
    sized: Mapping[str, _Sized],
    layers: Mapping[str, AdapterLinear],
    parameters: Mapping[str, nn.Parameter],
) -> None:
    """Raise ValueError unless the model has the layer or Parameter, in the shape of what is kept."""
    owner = layers.get(name) if kind == "layer" else parameters.get(name)
    if owner is None:
        what = "layer with adapters" if kind == "layer" else "Parameter"
        raise ValueError(f"{called}: the model has no {what} {name!a} (any more)")
    if isinstance(owner, AdapterLinear):
        size = (owner.out_features, owner.in_features)
        rank = tuple(sized["lora_A"].shape)[:1]
        shapes = {"fisher": size, "lora_A": (*rank, size[1]), "lora_B": (size[0], *rank)}
    else:
        shapes = dict.fromkeys(("fisher", "value"), tuple(owner.shape))
    for part, shape in shapes.items():
        entry = sized[part]
        if tuple(entry.shape) != shape or not entry.dtype.is_floating_point:
            came = f"{str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}"
            raise ValueError(f"{called}.{part}: expected floating {list(shape)} as in the model, got {came}")
