"""Features: a frozen body's outputs, computed once for each example and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftrt.nn.hooked import HookedAdapters
from peftrt.nn.routing import AdapterSet

_HOST = "_host"
_PLAIN = (type(None), bool, int, float, str, torch.dtype)


class FeatureStats(NamedTuple):
    """What a body's features were asked for.

    Attributes:
        hits, misses: rows that were kept, and that had to be computed.
        entries, nbytes: what is kept now.
        refused: why nothing can be kept, or "".
    """

    hits: int
    misses: int
    entries: int
    nbytes: int
    refused: str


class Share(nn.Module):
    """What one adapter says of the features: bytes to keep at most, and where; None for where they are computed."""

    def __init__(self, max_bytes: int, device: str | None) -> None:
        super().__init__()
        self.max_bytes = max_bytes
        self.device = device


class Kept:
    """Rows of outputs by their keys. A copy of a model begins with none."""

    def __init__(self) -> None:
        self.rows: dict[bytes, tuple[list[Any], Any]] = {}
        self.body: Any = None
        self.nbytes = self.hits = self.misses = 0
        self.refused = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()

    def expect(self, body: Any) -> None:
        """Forget everything where the body is not what the rows were computed with."""
        if self.body != body:
            self.rows.clear()
            self.nbytes, self.body = 0, body


class Features(HookedAdapters):
    """Runs a frozen body, its host, in ``eval()`` and without gradients, and keeps what it returns for each row.

    While the model is trained the rows of a batch that were seen before are not computed again: a row is known by the
    bytes of all tensors that the body is called with, its padding and mask among them. What is kept are the values
    that were computed when the row was first seen. In ``eval()`` nothing is kept or looked up.

    The body runs as it always does where another adapter is active, under a routing, where something in it is trained
    or a gradient is asked of its input. What is kept is forgotten when a Parameter or buffer of the body changes, or
    the adapters that are active in it.
    """

    kind = "features"

    def __init__(self, owner: AdapterSet) -> None:
        super().__init__(owner)
        self._kept = Kept()

    def hook(self, model: nn.Module, host: nn.Module) -> None:
        """Take the place of the host's ``forward``: a hook could not keep it from running."""
        # past nn.Module's own attribute, which would make the host a child of its child
        self.__dict__[_HOST] = host
        host.forward = self.forward

    def uninstall(self, model: nn.Module, host: nn.Module) -> None:
        """As of ``HookedAdapters``."""
        del host.__dict__["forward"]
        super().uninstall(model, host)

    def stats(self) -> FeatureStats:
        """Counts from the beginning on, and what is kept now."""
        kept = self._kept
        return FeatureStats(kept.hits, kept.misses, len(kept.rows), kept.nbytes, kept.refused)

    def note(self) -> str:
        """As of ``HookedAdapters``: how often a row was known."""
        stats = self.stats()
        if stats.refused:
            return stats.refused
        return f"{stats.hits} of {stats.hits + stats.misses} rows were kept ones, {stats.entries} are"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's, or what is kept of it."""
        host: nn.Module = self.__dict__[_HOST]
        run = type(host).forward
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if self.active is None or self.routing() is not None or _needs_gradient(host, tensors):
            return run(host, *args, **kwargs)
        keep = host.training and not torch.is_inference_mode_enabled()
        with torch.no_grad(), _in_eval(host):
            keys = _keys(leaves, spec) if keep else None
            if keys is None:
                return run(host, *args, **kwargs)
            return self._looked_up(host, leaves, spec, keys)

    def _looked_up(self, host: nn.Module, leaves: list[Any], spec: Any, keys: list[bytes]) -> Any:
        kept = self._kept
        kept.expect(self._body(host))
        # a row that is in the batch twice is computed once
        new = {key: i for i, key in enumerate(keys) if key not in kept.rows}
        found = {key: kept.rows[key] for key in keys if key in kept.rows}
        if new:
            whole = len(new) == len(keys)
            places = [*new.values()]
            chosen = leaves if whole else [_rows(leaf, places, len(keys)) for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(chosen, spec)
            output = type(host).forward(host, *args, **kwargs)
            parts, form = pytree.tree_flatten(output)
            kept.refused = _why_not(parts, len(places))
            if kept.refused:
                if whole:
                    return output
                args, kwargs = pytree.tree_unflatten(leaves, spec)
                return type(host).forward(host, *args, **kwargs)
            for row, key in enumerate(new):
                found[key] = ([part[row] if isinstance(part, Tensor) else part for part in parts], form)
            self._keep({key: found[key] for key in new})
        kept.hits += len(keys) - len(new)
        kept.misses += len(new)
        return _together([found[key] for key in keys], next(leaf for leaf in leaves if isinstance(leaf, Tensor)).device)

    def _keep(self, rows: dict[bytes, tuple[list[Any], Any]]) -> None:
        """Add rows as long as there is room; those that came first stay, for in every epoch all come once."""
        share, kept = self.adapter(self.active or ""), self._kept
        for key, (parts, form) in rows.items():
            size = sum(part.nbytes for part in parts if isinstance(part, Tensor))
            if kept.nbytes + size > share.max_bytes:
                return
            # copies: a row of a batch would hold on to the whole of it
            own = [_copied(part, share.device) for part in parts]
            kept.rows[key] = (own, form)
            kept.nbytes += size

    def _body(self, host: nn.Module) -> Any:
        """What the features depend on beside the input."""
        tensors = [*host.parameters(), *host.buffers()]
        others = {
            name: weight for name, weight in getattr(self.owner, "active", {}).items() if name not in self.adapter_names
        }
        return [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors], others


def _copied(part: Any, device: str | None) -> Any:
    return part.to(device or part.device, copy=True) if isinstance(part, Tensor) else part


def _needs_gradient(host: nn.Module, tensors: Sequence[Tensor]) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(tensor.requires_grad for tensor in (*tensors, *host.parameters()))


@contextmanager
def _in_eval(host: nn.Module) -> Iterator[None]:
    training = [module for module in host.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _keys(leaves: Sequence[Any], spec: Any) -> list[bytes] | None:
    """A digest of everything that each row of a call depends on; None where that cannot be told."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors or tensors[0].dim() == 0 or not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves):
        return None
    batch, device = tensors[0].shape[0], tensors[0].device.type
    casts = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
    plain = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    common = hashlib.sha256(repr((str(spec), casts, plain)).encode())
    rows: list[Tensor] = []
    for tensor in tensors:
        own = tensor.dim() > 0 and tensor.shape[0] == batch
        common.update(repr((tensor.dtype, tuple(tensor.shape[1:] if own else tensor.shape))).encode())
        raw = tensor.detach().cpu().contiguous()
        if own:
            rows.append(raw.view(batch, -1).view(torch.uint8) if raw.numel() else raw.view(batch, -1))
        else:
            common.update(raw.reshape(-1).view(torch.uint8).numpy().tobytes())
    keys = []
    for i in range(batch):
        digest = common.copy()
        for row in rows:
            digest.update(row[i].numpy().tobytes())
        keys.append(digest.digest())
    return keys


def _rows(leaf: Any, places: Sequence[int], batch: int) -> Any:
    if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch:
        return leaf[torch.tensor(places, device=leaf.device)]
    return leaf


def _why_not(parts: Sequence[Any], batch: int) -> str:
    """Why a body's output cannot be cut into rows; empty where it can."""
    for part in parts:
        if isinstance(part, Tensor):
            if part.dim() == 0 or part.shape[0] != batch:
                return f"nothing is kept: the body returns a tensor {list(part.shape)} for {batch} rows"
        elif not isinstance(part, _PLAIN):
            kind = type(part).__name__
            hint = ": set model.config.use_cache = False" if "Cache" in kind else ""
            return f"nothing is kept: the body returns a {kind}{hint}"
    return ""


def _together(rows: Sequence[tuple[list[Any], Any]], device: torch.device) -> Any:
    """The rows as one output."""
    first, form = rows[0]
    parts = [
        torch.stack([row[place].to(device) for row, _ in rows]) if isinstance(part, Tensor) else part
        for place, part in enumerate(first)
    ]
    return pytree.tree_unflatten(parts, form)
