"""DoRA's factors of a layer's rows, remembered between calls that record no gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peftrt.ops._eager import unobserved

# A tensor, where its data was, and how often torch had counted a change in place.
_Mark = tuple[weakref.ref[Tensor], int, int]


class RememberedScales:
    """``c = m / ||W + s B A||`` by adapter, for as long as what it was computed from is the same.

    Without, a call of a single row would read the whole weight twice. The same are tensors that are the same objects,
    at the same addresses, with no change in place that torch has counted since. It counts none through ``.data``: a
    layer forgets in ``train()``, ``eval()``, ``.to()`` and ``forget()`` as well. Copies and pickles of a layer begin
    with nothing remembered.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[list[_Mark], float, Tensor]] = {}

    def __deepcopy__(self, memo: Any) -> RememberedScales:
        return RememberedScales()

    def __reduce__(self) -> tuple[type[RememberedScales], tuple[()]]:
        return RememberedScales, ()

    def forget(self) -> None:
        """Let the next call compute again."""
        self._kept.clear()

    def get(self, name: str, tensors: Sequence[Tensor], scaling: float, compute: Callable[[], Tensor]) -> Tensor:
        """The adapter's c, computed where it is not known for these tensors and this scaling."""
        if not _can_be_marked(tensors):
            return compute()
        found = self._kept.get(name)
        if found is not None and found[1] == scaling and _are_as_marked(found[0], tensors):
            return found[2]
        # marked before it is computed: what another thread changes meanwhile shows the next time
        marks = [(weakref.ref(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors]
        with torch.inference_mode(False), torch.no_grad():
            scale = compute()
        self._kept[name] = marks, scaling, scale
        return scale


def _can_be_marked(tensors: Sequence[Tensor]) -> bool:
    if not unobserved(tuple(tensors)) or any(tensor.is_inference() for tensor in tensors):
        return False
    # the replays of a captured graph must see what A, B and m are then
    return not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())


def _are_as_marked(marks: list[_Mark], tensors: Sequence[Tensor]) -> bool:
    return len(marks) == len(tensors) and all(
        ref() is tensor and address == tensor.data_ptr() and version == tensor._version
        for (ref, address, version), tensor in zip(marks, tensors, strict=True)
    )
