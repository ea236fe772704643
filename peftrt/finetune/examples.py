"""Tokenised examples, kept as flat arrays, and the order in which they are trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORE = -100  # a target that the loss leaves out, as in torch's cross_entropy
_BUCKET = 32  # batches whose examples are sorted by length together


@dataclass(frozen=True)
class Batch:
    """One padded batch.

    Attributes:
        input_ids: int64 ``[B, T]``, padded on the right.
        attention_mask: int64 ``[B, T]``, 1 where there is a token.
        labels: int64 ``[B]`` (a class each), or ``[B, T]`` (the tokens themselves, ``IGNORE`` where padded).
        tokens: how many tokens that are not padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    tokens: int

    @property
    def targets(self) -> int:
        """What the loss is averaged over: examples, or the tokens that have one before them."""
        return len(self.labels) if self.labels.dim() == 1 else self.tokens - len(self.labels)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device), self.tokens)


class Examples:
    """Token sequences of different lengths, and a class for each where the task is to classify.

    Args:
        tokens: int ``[sum of lengths]``, all the sequences one after another.
        lengths: int ``[examples]``, none of them 0.
        classes: one class index an example, or None.
        pad_id: the token that fills a batch up.
    """

    def __init__(
        self, tokens: NDArray[Any], lengths: NDArray[Any], classes: Sequence[int] | NDArray[Any] | None, pad_id: int
    ) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        self._tokens = np.asarray(tokens, np.int32)
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self._classes = None if classes is None else np.asarray(classes, np.int64)
        self.pad_id = pad_id

    @classmethod
    def of(
        cls, sequences: Sequence[Sequence[int]], classes: Sequence[int] | NDArray[Any] | None, pad_id: int
    ) -> Examples:
        """The same from one list of token ids an example."""
        lengths = np.array([len(ids) for ids in sequences], np.int64)
        tokens = np.fromiter(chain.from_iterable(sequences), np.int32, int(lengths.sum()))
        return cls(tokens, lengths, classes, pad_id)

    def select(self, indices: NDArray[np.int64]) -> Examples:
        """The examples at ``indices``."""
        classes = None if self._classes is None else self._classes[indices]
        return Examples(self._concatenated(indices), self.lengths[indices], classes, self.pad_id)

    def joined(self, other: Examples) -> Examples:
        """These, and then others of the same kind."""
        classes = None if self._classes is None else np.concatenate([self._classes, other.classes])
        tokens, lengths = np.concatenate([self._tokens, other._tokens]), np.concatenate([self.lengths, other.lengths])
        return Examples(tokens, lengths, classes, self.pad_id)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return len(self._tokens)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All that examples are made of again, but for ``pad_id``: ``tokens``, ``lengths`` and ``classes``, if any."""
        found: dict[str, NDArray[Any]] = {"tokens": self._tokens, "lengths": self.lengths}
        return found if self._classes is None else {**found, "classes": self._classes}

    @property
    def largest_token(self) -> int:
        return int(self._tokens.max())

    @property
    def classes(self) -> NDArray[np.int64]:
        assert self._classes is not None
        return self._classes

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """The examples at ``indices``, padded to the longest of them."""
        lengths = self.lengths[indices]
        ids = np.full((len(indices), int(lengths.max())), self.pad_id, np.int64)
        mask = np.arange(ids.shape[1]) < lengths[:, None]
        ids[mask] = self._concatenated(indices)
        labels = np.where(mask, ids, IGNORE) if self._classes is None else self._classes[indices]
        present = torch.from_numpy(mask.astype(np.int64))
        return Batch(torch.from_numpy(ids), present, torch.from_numpy(labels), int(lengths.sum()))

    def _concatenated(self, indices: NDArray[np.int64]) -> NDArray[np.int32]:
        return np.concatenate([self._tokens[self._starts[i] : self._starts[i + 1]] for i in indices])

    def by_length(self, batch_size: int) -> list[NDArray[np.int64]]:
        """Every example once, the longest first, cut into batches: the order to evaluate in."""
        order = np.argsort(-self.lengths, kind="stable")
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


class Order:
    """The batches of every epoch: shuffled, and of similar lengths within a batch, so that little is padding.

    A function of the seed and the epoch alone: a run that is resumed computes it again and goes on where it was.
    """

    def __init__(self, lengths: NDArray[np.int64], batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self.batches_per_epoch = math.ceil(len(lengths) / batch_size)
        self._epoch = lru_cache(maxsize=1)(self._shuffled)

    def __getitem__(self, number: int) -> NDArray[np.int64]:
        """The indices of batch ``number``, counted on through the epochs."""
        epoch, place = divmod(number, self.batches_per_epoch)
        return self._epoch(epoch)[place]

    def _shuffled(self, epoch: int) -> list[NDArray[np.int64]]:
        random = np.random.Generator(np.random.PCG64([self._seed, epoch]))
        order = random.permutation(len(self._lengths))
        batches = []
        size = self._batch_size
        for start in range(0, len(order), size * _BUCKET):
            bucket = order[start : start + size * _BUCKET]
            bucket = bucket[np.argsort(self._lengths[bucket], kind="stable")]
            batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
        return [batches[i] for i in random.permutation(len(batches))]


class Mixed:
    """The batches of an :class:`Order`, with former examples in each: other ones every time, as far as there are more.

    As an order it is a function of the seed and the batch's number alone.

    Args:
        lengths: of the new examples.
        former: how many former examples there are, behind the new ones.
        batch_size: examples a batch, of both.
        replayed: how many of them are former ones; fewer where there are fewer.
        seed: of both choices.
    """

    def __init__(self, lengths: NDArray[np.int64], former: int, batch_size: int, replayed: int, seed: int) -> None:
        self._order = Order(lengths, batch_size - replayed, seed)
        self._first, self._former = len(lengths), former
        self._replayed = min(replayed, former)
        self._seed = seed
        self.batches_per_epoch = self._order.batches_per_epoch

    def __getitem__(self, number: int) -> NDArray[np.int64]:
        """The indices of batch ``number``, counted on through the epochs."""
        # three numbers: another stream than that of any epoch's order
        random = np.random.Generator(np.random.PCG64([self._seed, number, 1]))
        former = self._first + random.choice(self._former, self._replayed, replace=False)
        return np.concatenate([self._order[number], former])
