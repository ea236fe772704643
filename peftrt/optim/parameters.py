"""The Parameters of an optimizer, looked at before every step, so that nothing is changed where one is not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftrt.ops import DTYPE_CODES

_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_CODES)


class Parameters:
    """All Parameters of an optimizer's groups, in order.

    Attributes:
        tensors, sizes: the Parameters, and their numbers of elements.
        spans: from and to which of them are a group's.
        device: of all.

    Raises:
        TypeError, ValueError: one that a kernel cannot take; the message names it.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self.tensors: list[Tensor] = []
        self.spans: list[tuple[int, int]] = []
        self._names: list[str] = []
        for number, group in enumerate(groups):
            first = len(self.tensors)
            self.tensors += group["params"]
            self.spans.append((first, len(self.tensors)))
            given = group.get("param_names") or [""] * len(group["params"])
            self._names += [
                f"parameter {i} of group {number}" + (f" ({name})" if name else "") for i, name in enumerate(given)
            ]
        self.device = self.tensors[0].device
        self.sizes = [p.numel() for p in self.tensors]
        self._dtypes = [p.dtype for p in self.tensors]
        for i in range(len(self.tensors)):
            self._check(i)
        self._addresses = np.zeros((len(self.tensors), 3), dtype=np.int64)
        self._addresses[:, 2] = [DTYPE_CODES[dtype] for dtype in self._dtypes]
        self._places = [p.data_ptr() for p in self.tensors]

    def _check(self, i: int) -> None:
        p, name = self.tensors[i], self._names[i]
        if type(p) not in (Tensor, torch.nn.Parameter) or p.layout is not torch.strided or p.is_meta:
            raise TypeError(f"PagedAdamW: {name} must be a plain dense tensor, got {type(p).__name__} of {p.layout}")
        if p.dtype not in DTYPE_CODES:
            raise TypeError(f"PagedAdamW: {name} must be one of {_NAMES}, got {p.dtype}")
        if p.device != self.device or p.device.type not in ("cpu", "cuda"):
            raise ValueError(f"PagedAdamW: {name} must be on {self.device} as the first, a CPU or CUDA, got {p.device}")
        if not p.is_contiguous():
            raise ValueError(f"PagedAdamW: {name} must be contiguous, got {list(p.shape)} of strides {p.stride()}")
        if p.dtype != self._dtypes[i] or p.numel() != self.sizes[i]:
            raise ValueError(
                f"PagedAdamW: {name} was {self._dtypes[i]} of {self.sizes[i]} elements when the optimizer was made, "
                f"and is {p.dtype} of {p.numel()} now: make a new optimizer"
            )

    def look(self) -> tuple[np.ndarray, list[Tensor | None]]:
        """Addresses, int64 ``[T, 3]`` as ``Gradients`` has them, and gradients.

        Raises:
            TypeError, ValueError: a gradient that a kernel cannot take, or a Parameter that is not what it was.
        """
        places = [p.data_ptr() for p in self.tensors]
        if places != self._places:
            for i, place in enumerate(places):
                if place != self._places[i]:
                    self._check(i)
            self._places = places
        grads = [p.grad for p in self.tensors]
        self._addresses[:, 0] = places
        self._addresses[:, 1] = [0 if grad is None else grad.data_ptr() for grad in self._fitted(grads)]
        return self._addresses, grads

    def _fitted(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        """The gradients, contiguous, also in the list itself."""
        # a pass over all of them takes a third of what a loop with a test for each takes
        fit = [grad is None or (grad.layout is torch.strided and grad.is_contiguous()) for grad in grads]
        known = [grad is None or grad.dtype is dtype for grad, dtype in zip(grads, self._dtypes, strict=True)]
        if not (all(fit) and all(known)):
            for i, grad in enumerate(grads):
                if grad is not None:
                    if grad.layout is not torch.strided or not known[i]:
                        self._refuse(i, grad)
                    # an expanded or transposed one, which autograd does not make by itself
                    grads[i] = grad.contiguous()
        return grads

    def _refuse(self, i: int, grad: Tensor) -> None:
        if grad.layout is not torch.strided:
            raise TypeError(
                f"PagedAdamW: the gradient of {self._names[i]} is sparse ({grad.layout}), expected a dense one: "
                "nn.Embedding(..., sparse=False) makes it so"
            )
        raise TypeError(f"PagedAdamW: the gradient of {self._names[i]} must be {self._dtypes[i]}, got {grad.dtype}")

    @staticmethod
    def aligned(addresses: np.ndarray) -> bool:
        """Whether all are multiples of 16."""
        return not int(np.bitwise_or.reduce(addresses[:, :2], axis=None)) & 15


def check_groups(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for a hyper-parameter that is out of its range, by group and name."""
    for number, group in enumerate(groups):
        where = f"PagedAdamW: group {number}: "
        for name in ("lr", "eps", "weight_decay"):
            value = float(group[name])
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{where}{name} must be finite and at least 0, got {group[name]!r}")
        betas = group["betas"]
        if len(betas) != 2 or not all(0 <= float(beta) < 1 for beta in betas):
            raise ValueError(f"{where}betas must be two numbers in 0 <= beta < 1, got {betas!r}")
