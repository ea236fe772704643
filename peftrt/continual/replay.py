"""ReplayBuffer: a bounded, fair choice of the samples that were seen, to rehearse."""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftrt.continual.samples import Form, Sample, join, pack, put_together, stack, take_apart, unpack
from peftrt.formats.errors import FormatError
from peftrt.formats.header import DTYPES
from peftrt.formats.safe import TensorReader
from peftrt.formats.stream import Promise, verify_checksum, write_stream
from peftrt.formats.strict_json import loads_strict

POLICIES = ("reservoir", "class-balanced")
_KIND = {"format": "pt", "kind": "peftrt.continual.ReplayBuffer", "version": "1"}
_CHECKSUM = "sha256"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ReplayBuffer:
    """At most ``capacity`` of the samples that were added, on the CPU, from which batches are drawn::

        buffer = peftrt.continual.ReplayBuffer(1000, seed=0)
        for batch in task_a:
            buffer.add(batch)
        for batch in buffer.mix(task_b, share=0.25):            # a quarter of every batch is task A's
            ...
        for new, old in buffer.beside(task_b, 8):               # or L = L_new + lambda L_replay
            loss(new) + lambda_ * loss(old)

    "reservoir": every sample that was ever added is in the buffer with the same probability (Vitter's algorithm R).
    "class-balanced": classes with enough samples hold equally many, give or take one, whatever order they came in, and
    a class's samples are a uniform choice of those that were added. What is kept and drawn depends on the seed and on
    the samples' order, not on how they were cut into batches.

    A batch is a tensor ``[n, ...]``, a dict of them, or a tuple or list of them; numpy arrays do as well. Samples may
    differ in shape from batch to batch, as padded texts do: what is drawn is filled up to the longest.

    Args:
        capacity: samples held at most.
        policy: "reservoir" or "class-balanced".
        seed: of what is kept and drawn.
        padding: what samples are filled up with: one number, or one for each name of a dict; 0 for those left out.

    Raises:
        ValueError: an argument out of its range.

    Source: Vitter 1985, "Random sampling with a reservoir", algorithm R; classes: Chrysakis and Moens 2020, "Online
    continual learning from imbalanced data", algorithm 1.
    """

    def __init__(
        self,
        capacity: int,
        policy: str = "reservoir",
        seed: int = 0,
        *,
        padding: float | Mapping[str, float] = 0,
    ) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise ValueError(f"ReplayBuffer: capacity must be an integer of at least 1, got {capacity!r}")
        if policy not in POLICIES:
            raise ValueError(f"ReplayBuffer: policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"ReplayBuffer: seed must be an integer from 0 on, got {seed!r}")
        self.capacity, self.policy, self.padding = capacity, policy, padding
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._form: Form | None = None
        self._samples: list[Sample] = []
        # of every slot; 0 where the policy looks at none
        self._labels = array("q")
        # label -> how many are held, and were added; and those that have once been the largest class of a full buffer
        self._held: dict[int, int] = {}
        self._seen: dict[int, int] = {}
        self._full: set[int] = set()

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def seen(self) -> int:
        """How many samples were added in all."""
        return sum(self._seen.values())

    @property
    def counts(self) -> dict[int, int]:
        """How many samples of each label are held; under "reservoir" all are of label 0."""
        return dict(sorted(self._held.items()))

    @property
    def nbytes(self) -> int:
        """What the samples take."""
        return sum(tensor.nbytes for sample in self._samples for tensor in sample)

    def __iter__(self) -> Iterator[Any]:
        """Every sample that is held, as it was added, without a batch dimension."""
        for sample in self._samples:
            assert self._form is not None
            yield put_together(self._form, sample)

    def add(self, batch: Any, labels: Any = None) -> None:
        """Show the buffer a batch, of which it keeps copies of what the policy chooses.

        Args:
            batch: n samples.
            labels: ``[n]`` integers; "class-balanced" needs them, "reservoir" takes none.

        Raises:
            TypeError, ValueError: a batch of another form than those before, or labels that do not fit; nothing is
                changed.
        """
        form, tensors = take_apart(batch, "ReplayBuffer.add")
        if form.kind == "dict" and self._form is not None and set(form.names) == set(self._form.names):
            # a dict's order is no part of it
            order = [form.names.index(name) for name in self._form.names]
            form, tensors = take_apart({form.names[i]: tensors[i] for i in order}, "ReplayBuffer.add")
        for name, dtype in zip(form.names, form.dtypes, strict=True):
            if dtype not in _NAMES:
                raise TypeError(f"ReplayBuffer.add: {name!r} is {dtype}, which a safetensors file cannot hold")
        if self._form is not None and form != self._form:
            raise ValueError(f"ReplayBuffer.add: expected a {self._form}, as before, got a {form}")
        classes = self._classes(labels, len(tensors[0]))
        self._form = form
        # two numbers a sample, used or not: what is kept does not depend on how batches are cut
        for index, draws in enumerate(self._random.random((len(classes), 2)).tolist()):
            slot = self._slot(classes[index], draws)
            if slot is not None:
                self._put(slot, classes[index], tuple(tensor[index].to("cpu", copy=True) for tensor in tensors))

    def _put(self, slot: int, label: int, sample: Sample) -> None:
        if slot == len(self._samples):
            self._samples.append(sample)
            self._labels.append(label)
        else:
            self._held[self._labels[slot]] -= 1
            self._samples[slot], self._labels[slot] = sample, label
        self._held[label] = self._held.get(label, 0) + 1

    def _classes(self, labels: Any, count: int) -> list[int]:
        if self.policy == "reservoir":
            if labels is not None:
                raise ValueError("ReplayBuffer.add: labels are for policy 'class-balanced'")
            return [0] * count
        if labels is None:
            raise ValueError("ReplayBuffer.add: policy 'class-balanced' needs labels")
        found = torch.as_tensor(labels)
        if found.is_floating_point() or found.is_complex() or tuple(found.shape) != (count,):
            came = f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
            raise ValueError(f"ReplayBuffer.add: labels must be integers [{count}], got {came}")
        return [int(label) for label in found.tolist()]

    def _slot(self, label: int, draws: list[float]) -> int | None:
        """Where the next sample goes; None where it is not kept."""
        self._seen[label] = seen = self._seen.get(label, 0) + 1
        if len(self._samples) < self.capacity:
            return len(self._samples)
        if self.policy == "reservoir":
            slot = int(draws[0] * seen)
            return slot if slot < self.capacity else None
        largest = max(self._held.values())
        among = sorted(other for other, count in self._held.items() if count == largest)
        self._full.update(among)
        if label in self._full:
            # algorithm R among its own
            other = label
            if int(draws[0] * seen) >= self._held[label]:
                return None
        else:
            # it takes the place of one of the largest class
            other = among[int(draws[0] * len(among))]
        places = np.flatnonzero(np.array(self._labels) == other)
        return int(places[int(draws[1] * len(places))])

    def sample(self, count: int) -> Any:
        """A batch of ``count`` different samples, each of those held as likely as any other, on the CPU.

        Raises:
            ValueError: there are fewer.
        """
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(self):
            raise ValueError(f"ReplayBuffer.sample: count must be in 1 ... {len(self)}, what is held, got {count!r}")
        assert self._form is not None
        return put_together(self._form, self._drawn(count))

    def _drawn(self, count: int) -> list[Tensor]:
        form, chosen = self._form, self._random.choice(len(self), count, replace=False)
        assert form is not None
        samples = [self._samples[i] for i in chosen]
        return [
            stack([sample[place] for sample in samples], self._padding(name)) for place, name in enumerate(form.names)
        ]

    def _padding(self, name: str) -> float:
        return self.padding.get(name, 0) if isinstance(self.padding, Mapping) else self.padding

    def mix(self, batches: Iterable[Any], share: float) -> Iterator[Any]:
        """The batches, each with samples of the buffer behind its own, on its device.

        Args:
            batches: of the form that was added, such as a DataLoader's.
            share: what part of a batch is replayed then, in (0, 1): of n samples, ``n share / (1 - share)`` more,
                rounded, or all that is held where that is less.

        Raises:
            ValueError: another share, or a batch of another form.
        """
        if not 0 < share < 1:
            raise ValueError(f"ReplayBuffer.mix: share must be between 0 and 1, got {share!r}")
        return self._mixed(batches, share)

    def _mixed(self, batches: Iterable[Any], share: float) -> Iterator[Any]:
        for batch in batches:
            count = 0
            if self._form is not None:
                form, tensors = self._of_our_form(batch)
                count = min(round(len(tensors[0]) * share / (1 - share)), len(self))
            if not count:
                yield batch
                continue
            pairs = zip(form.names, tensors, self._drawn(count), strict=True)
            yield put_together(form, [join(new, old, self._padding(name)) for name, new, old in pairs])

    def _of_our_form(self, batch: Any) -> tuple[Form, list[Tensor]]:
        form, tensors = take_apart(batch, "ReplayBuffer.mix")
        own = self._form
        assert own is not None
        if form.kind == "dict" and set(form.names) == set(own.names):
            tensors = [tensors[form.names.index(name)] for name in own.names]
            form = Form("dict", own.names, tuple(t.dtype for t in tensors), tuple(t.dim() - 1 for t in tensors))
        if form != own:
            raise ValueError(f"ReplayBuffer.mix: expected a {own}, as was added, got a {form}")
        return form, tensors

    def beside(self, batches: Iterable[Any], count: int) -> Iterator[tuple[Any, Any]]:
        """(batch, replayed): each batch as it is, and ``count`` samples of the buffer for a loss of their own.

        ``L = L_new + lambda L_replay`` keeps the two apart where their weights are to be chosen. ``replayed`` holds all
        there is where that is less, and is None where the buffer is empty.
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"ReplayBuffer.beside: count must be an integer of at least 1, got {count!r}")
        return ((batch, self.sample(min(count, len(self))) if len(self) else None) for batch in batches)

    def state_dict(self) -> dict[str, Any]:
        """All that the next call depends on: ``tensors``, and ``settings`` that JSON can hold."""
        form = self._form
        settings = {
            "capacity": self.capacity,
            "policy": self.policy,
            "random": self._random.bit_generator.state,
            "seen": [[label, count] for label, count in self._seen.items()],
            "full": sorted(self._full),
            "form": None
            if form is None
            else [form.kind, list(form.names), [_NAMES[dtype] for dtype in form.dtypes], list(form.dims)],
        }
        tensors = {} if form is None else pack(self._samples, form)
        return {
            "settings": settings,
            "tensors": {**tensors, "labels": torch.tensor(list(self._labels), dtype=torch.int64)},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go back to what :meth:`state_dict` returned: what is kept and drawn from then on is the same, bit for bit.

        Raises:
            ValueError: it is of another capacity or policy, or its parts do not belong together; nothing is changed.
        """
        settings, tensors = state_dict["settings"], state_dict["tensors"]
        for name in ("capacity", "policy"):
            own = getattr(self, name)
            if settings.get(name) != own:
                raise ValueError(f"ReplayBuffer: {name} must be {own!r}, as here, got {settings.get(name)!r}")
        random = np.random.Generator(np.random.PCG64(0))
        try:
            random.bit_generator.state = settings["random"]
            seen = {int(label): int(count) for label, count in settings["seen"]}
            full = {int(label) for label in settings["full"]}
            form = _read_form(settings["form"])
            labels = tensors["labels"].tolist()
            samples = [] if form is None else unpack(tensors.__getitem__, form, len(labels))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"ReplayBuffer: the state is incomplete: {error}") from None
        held = dict(Counter(labels))
        if len(labels) > self.capacity or any(count > seen.get(label, 0) for label, count in held.items()):
            raise ValueError(f"ReplayBuffer: {len(labels)} samples are held of {seen} seen, at most {self.capacity}")
        self._random, self._form, self._samples = random, form, samples
        self._labels, self._held, self._seen, self._full = array("q", labels), held, seen, full

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file with a checksum, whole or not at all.

        Raises:
            FormatError: ``path`` is a directory.
            OSError: the disk is full or cannot be written.
        """
        state = self.state_dict()
        tensors: dict[str, Tensor] = state["tensors"]
        promises = [Promise(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        metadata = {**_KIND, "settings": json.dumps(state["settings"])}
        write_stream(path, promises, iter(tensors.values()), metadata, checksum=_CHECKSUM)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go back to what :meth:`save` wrote.

        Raises:
            MissingFileError: there is no such file.
            FormatError: it is damaged, none of ``save``'s, or of another capacity or policy; nothing is changed.
        """
        with TensorReader(path, allow_nonfinite=True) as reader:
            verify_checksum(reader, _CHECKSUM)
            came = {key: reader.metadata.get(key) for key in _KIND}
            if came != _KIND:
                raise FormatError(f"{reader.path}: expected a file with metadata {_KIND}, got {came}")
            settings = loads_strict(reader.metadata.get("settings", "").encode(), f"{reader.path}: settings")
            tensors = {name: reader.read(name) for name in reader.entries if name != _CHECKSUM}
            try:
                self.load_state_dict({"settings": settings, "tensors": tensors})
            except ValueError as error:
                raise FormatError(f"{reader.path}: {error}") from None


def _read_form(saved: Any) -> Form | None:
    if saved is None:
        return None
    kind, names, dtypes, dims = saved
    if kind not in ("tensor", "dict", "tuple") or not all(isinstance(name, str) for name in names):
        raise ValueError(f"ReplayBuffer: the form {saved!r:.200} is none of a batch")
    return Form(kind, tuple(names), tuple(DTYPES[name] for name in dtypes), tuple(map(int, dims)))
