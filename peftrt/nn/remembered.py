"""What a layer computes of its Parameters alone, remembered between calls that record no gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from peftrt.ops._eager import unobserved

T = TypeVar("T")
# A tensor, where its data was, and how often torch had counted a change in place.
_Mark = tuple[weakref.ref[Tensor], int, int]


class Remembered(Generic[T]):
    """Values by name, each for as long as what it was computed from is the same.

    DoRA's factors: without, a call of a single row would read the whole weight twice. Adapters stacked for the rows of
    a batch: without, every step of a generation would copy them. The same are tensors that are the same objects, at the
    same addresses, with no change in place that torch has counted since. It counts none through ``.data``: a layer
    forgets in ``train()``, ``eval()``, ``.to()`` and ``forget()`` as well. Copies and pickles of a layer begin with
    nothing remembered.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[list[_Mark], Hashable, T]] = {}

    def __deepcopy__(self, memo: Any) -> Remembered[T]:
        return Remembered()

    def __reduce__(self) -> tuple[type[Remembered[T]], tuple[()]]:
        return Remembered, ()

    def forget(self) -> None:
        """Let the next call compute again."""
        self._kept.clear()

    def get(self, name: str, tensors: Sequence[Tensor], settings: Hashable, compute: Callable[[], T]) -> T:
        """The value of that name, computed where it is not known for these tensors and these settings."""
        if not _can_be_marked(tensors):
            return compute()
        found = self._kept.get(name)
        if found is not None and found[1] == settings and _are_as_marked(found[0], tensors):
            return found[2]
        # marked before it is computed: what another thread changes meanwhile shows the next time
        marks = [(weakref.ref(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors]
        with torch.inference_mode(False), torch.no_grad():
            value = compute()
        self._kept[name] = marks, settings, value
        return value


def _can_be_marked(tensors: Sequence[Tensor]) -> bool:
    if not unobserved(tuple(tensors)) or any(tensor.is_inference() for tensor in tensors):
        return False
    # the replays of a captured graph must see what the tensors are then
    return not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())


def _are_as_marked(marks: list[_Mark], tensors: Sequence[Tensor]) -> bool:
    return len(marks) == len(tensors) and all(
        ref() is tensor and address == tensor.data_ptr() and version == tensor._version
        for (ref, address, version), tensor in zip(marks, tensors, strict=True)
    )
