"""Batches of tensors, taken apart into samples and put together again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Sample = tuple[Tensor, ...]


class Form(NamedTuple):
    """How a batch is built: "tensor", "dict" or "tuple", and for each of its tensors a name, dtype and dimensions.

    The names of a tuple's tensors are their places; dimensions are a sample's, without the batch's own.
    """

    kind: str
    names: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    dims: tuple[int, ...]

    def __str__(self) -> str:
        parts = zip(self.names, self.dtypes, self.dims, strict=True)
        shown = ", ".join(f"{name}: {str(dtype).removeprefix('torch.')} of {dims}" for name, dtype, dims in parts)
        return f"{self.kind} ({shown} dimensions a sample)"


def take_apart(batch: Any, where: str) -> tuple[Form, list[Tensor]]:
    """A batch's form and its tensors ``[n, ...]``; arrays become tensors that share their memory.

    Args:
        batch: a tensor or array, a mapping of them by name, or a tuple or list of them.
        where: what errors begin with.

    Raises:
        TypeError: something else.
        ValueError: no tensors, one without a batch dimension, or batches of several sizes.
    """
    if isinstance(batch, Tensor | np.ndarray):
        kind, parts = "tensor", {"": batch}
    elif isinstance(batch, Mapping):
        kind, parts = "dict", dict(batch)
    elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        kind, parts = "tuple", {str(place): part for place, part in enumerate(batch)}
    else:
        expected = "a tensor, an array, or a dict, tuple or list of them"
        raise TypeError(f"{where}: a batch must be {expected}, got {type(batch).__name__}")
    tensors = []
    for name, part in parts.items():
        if not isinstance(name, str) or not isinstance(part, Tensor | np.ndarray):
            raise TypeError(f"{where}: {name!r} must be a tensor or an array, got {type(part).__name__}")
        tensor = torch.from_numpy(part) if isinstance(part, np.ndarray) else part.detach()
        if not tensor.dim() or tensor.layout is not torch.strided:
            raise ValueError(f"{where}: {name!r} must be dense, with a batch dimension, got shape {list(tensor.shape)}")
        tensors.append(tensor)
    if len({len(tensor) for tensor in tensors}) != 1:
        sizes = {name: len(tensor) for name, tensor in zip(parts, tensors, strict=True)}
        raise ValueError(f"{where}: the tensors of a batch must hold equally many samples, got {sizes}")
    dtypes, dims = tuple(t.dtype for t in tensors), tuple(t.dim() - 1 for t in tensors)
    return Form(kind, tuple(parts), dtypes, dims), tensors


def put_together(form: Form, tensors: Sequence[Tensor]) -> Any:
    """The batch of this form."""
    if form.kind == "tensor":
        return tensors[0]
    return dict(zip(form.names, tensors, strict=True)) if form.kind == "dict" else tuple(tensors)


def stack(samples: Sequence[Tensor], padding: float) -> Tensor:
    """Samples of one dtype and number of dimensions as ``[n, ...]``, each filled up to the largest of them."""
    sizes = [max(lengths) for lengths in zip(*(sample.shape for sample in samples), strict=True)]
    return torch.stack([_filled(sample, sizes, 0, padding) for sample in samples])


def join(first: Tensor, second: Tensor, padding: float) -> Tensor:
    """Two batches of one number of dimensions as one, each filled up to the larger; the second goes to the first."""
    sizes = [max(lengths) for lengths in zip(first.shape[1:], second.shape[1:], strict=True)]
    parts = (_filled(part, sizes, 1, padding) for part in (first, second.to(first.device)))
    return torch.cat(list(parts))


def _filled(tensor: Tensor, sizes: Sequence[int], begin: int, padding: float) -> Tensor:
    more = [amount for size, own in zip(sizes, tensor.shape[begin:], strict=True) for amount in (size - own, 0)]
    return F.pad(tensor, more[::-1], value=padding) if any(more) else tensor


def pack(samples: Sequence[Sample], form: Form) -> dict[str, Tensor]:
    """Samples of any shapes as two tensors each: "<name>.values", one behind the other, "<name>.shapes" [n, dims]."""
    packed = {}
    for place, name in enumerate(form.names):
        mine = [sample[place] for sample in samples]
        flat = [tensor.reshape(-1) for tensor in mine]
        packed[f"{name}.values"] = torch.cat(flat) if flat else torch.empty(0, dtype=form.dtypes[place])
        shapes = [list(tensor.shape) for tensor in mine]
        packed[f"{name}.shapes"] = torch.tensor(shapes, dtype=torch.int64).reshape(len(mine), form.dims[place])
    return packed


def unpack(get: Callable[[str], Tensor], form: Form, count: int) -> list[Sample]:
    """The inverse of :func:`pack`, of ``count`` samples.

    Raises:
        ValueError: tensors that do not belong together, named.
    """
    columns = []
    for name, dtype, dims in zip(form.names, form.dtypes, form.dims, strict=True):
        values, shapes = get(f"{name}.values"), get(f"{name}.shapes")
        if shapes.dtype != torch.int64 or tuple(shapes.shape) != (count, dims) or bool((shapes < 0).any()):
            raise ValueError(f"{name}.shapes must be int64 [{count}, {dims}], got {shapes.dtype} {list(shapes.shape)}")
        sizes = [torch.Size(shape).numel() for shape in shapes.tolist()]
        if values.dtype != dtype or tuple(values.shape) != (sum(sizes),):
            came = f"{values.dtype} {list(values.shape)}"
            raise ValueError(f"{name}.values must be {dtype} [{sum(sizes)}], as its shapes say, got {came}")
        parts = zip(values.split(sizes), shapes.tolist(), strict=True)
        columns.append([part.reshape(shape).clone() for part, shape in parts])
    return list(zip(*columns, strict=True)) if columns else []
