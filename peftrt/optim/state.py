"""The state of an optimizer in pages, seen from outside: read and written as tensors, each page once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from peftrt.formats.adamw_state import BLOCK, Moments, moments
from peftrt.optim.page_table import PageTable, Segment
from peftrt.optim.state_forms import Kept, pack_groups, parts, read_entry, read_groups, with_bits

Steps = np.ndarray[Any, np.dtype[np.int64]]


class Owner(Protocol):
    """What has the pages: ``PagedAdamW``.

    Attributes:
        table: where the state of each parameter lies.
        parameters: T of them, in the order of the groups.
        steps: int64 [T], the steps that each has had; 0 is no state yet.
        param_groups: as torch's optimizers have them.
    """

    table: PageTable
    steps: Steps
    param_groups: list[dict[str, Any]]

    @property
    def parameters(self) -> Sequence[Tensor]: ...

    def read_page(self, page: int) -> Tensor:
        """uint8 [page_bytes] on the CPU, not to be written to, valid until the next call."""

    def write_page(self, page: int, data: Tensor) -> None:
        """The inverse, of a whole page, which is copied."""

    def replacing(self, steps: Steps) -> AbstractContextManager[None]:
        """A block that writes every page, after which the Parameters have had so many steps."""


def state_dict(owner: Owner) -> dict[str, Any]:
    """The state in torch's form, copied to the CPU; ``SavedState.state_dict`` tells of it."""
    state = {
        tensor: Kept(int(owner.steps[tensor]), Moments(*kept), tuple(owner.parameters[tensor].shape)).entry()
        for tensor, kept in read_moments(owner)
    }
    return {"state": dict(sorted(state.items())), "param_groups": pack_groups(owner.param_groups)}


def to_fp32(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with every moment in fp32, which ``torch.optim.AdamW`` loads.

    Args:
        saved: a state dict of torch's AdamW, of ``PagedAdamW`` or of bitsandbytes'; it is left as it is.

    Raises:
        ValueError: it is none of these.
    """
    entries = {key: read_entry(entry, f"state of parameter {key}") for key, entry in _part(saved, "state").items()}
    state = {
        key: kept._replace(moments=with_bits(kept.moments, 32)).entry()
        for key, kept in entries.items()
        if kept is not None
    }
    return {**saved, "state": state}


def load_state_dict(owner: Owner, saved: Mapping[str, Any]) -> None:
    """Check a state dict in any of the forms, and then take it over."""
    groups, numbers = read_groups(owner.param_groups, _part(saved, "param_groups"))
    names = parameter_names(owner)
    steps = np.zeros_like(owner.steps)
    found: dict[int, Moments] = {}
    for key, entry in _part(saved, "state").items():
        if key not in numbers:
            raise ValueError(f"state: parameter {key!r} is in none of param_groups")
        tensor = numbers[key]
        kept = read_entry(entry, f"state of {names[tensor]}", owner.parameters[tensor].shape)
        if kept is not None:
            steps[tensor], found[tensor] = kept.step, kept.moments
    write_state(owner, steps, groups, lambda segment: found[segment.tensor].narrow(segment.first, segment.length))


def parameter_names(owner: Owner) -> list[str]:
    """What errors call each parameter: its number, and its name where the groups have names."""
    names: list[str] = []
    for group in owner.param_groups:
        known = group.get("param_names") or [None] * len(group["params"])
        names += [f"parameter {i}" + (f" ({name!a})" if name else "") for i, name in enumerate(known, len(names))]
    return names


def parameter_order(table: PageTable) -> list[int]:
    """The parameters as their state lies in the pages; those without elements come last."""
    first = {segment.tensor: None for page in table.pages for segment in page.segments}
    return [*first, *(tensor for tensor, places in enumerate(table.places) if not places)]


def read_moments(owner: Owner) -> Iterator[tuple[int, list[Tensor]]]:
    """Each parameter that has had a step, in ``parameter_order``, with a copy of its moments' parts, flat.

    Every page is read once, and one parameter's moments are held at a time, as a tensor's segments follow one another.
    """
    table = owner.table
    whole: Moments | None = None
    for number, page in enumerate(table.pages):
        wanted = [segment for segment in page.segments if owner.steps[segment.tensor]]
        if not wanted:
            continue
        here = moments(owner.read_page(number), page.kind.bits)
        for segment in wanted:
            size = owner.parameters[segment.tensor].numel()
            if whole is None:
                whole = _empty(size, page.kind.bits)
            _copy(here.narrow(segment.start, segment.length), whole.narrow(segment.first, segment.length))
            if segment.first + segment.length == size:
                done, whole = parts(whole), None
                yield segment.tensor, done
    for tensor, places in enumerate(table.places):
        if not places and owner.steps[tensor]:
            yield tensor, parts(_empty(0, 32))


def write_state(
    owner: Owner, steps: Steps, groups: Sequence[Mapping[str, Any]], read: Callable[[Segment], Moments]
) -> None:
    """Replace all state, writing every page once.

    Args:
        owner: what is changed.
        steps: int64 [T]; where 0, the state is zeros.
        groups: what the groups are to say, without ``params``.
        read: the moments of a segment, flat, on any device and in any form; asked for in the order of the pages.
    """
    data = torch.empty(owner.table.page_bytes, dtype=torch.uint8, device="cpu")
    with owner.replacing(steps):
        for number, page in enumerate(owner.table.pages):
            # The gaps between tensors too: a page's bytes depend on nothing that lay there before.
            data.zero_()
            here = moments(data, page.kind.bits)
            for segment in page.segments:
                if steps[segment.tensor]:
                    came = Moments(*(part.cpu() for part in parts(read(segment))))
                    _copy(with_bits(came, page.kind.bits), here.narrow(segment.start, segment.length))
            owner.write_page(number, data)
        for group, new in zip(owner.param_groups, groups, strict=True):
            group.update(new)


def _empty(size: int, bits: int) -> Moments:
    if bits == 32:
        return Moments(*(torch.empty(size, dtype=torch.float32, device="cpu") for _ in range(2)))
    scales = -(-size // BLOCK)
    kinds = ((size, torch.uint8), (size, torch.uint8), (scales, torch.float32), (scales, torch.float32))
    return Moments(*(torch.empty(count, dtype=dtype, device="cpu") for count, dtype in kinds))


def _copy(came: Moments, kept: Moments) -> None:
    for source, target in zip(parts(came), parts(kept), strict=True):
        target.copy_(source)


def _part(saved: Mapping[str, Any], key: str) -> Any:
    if not isinstance(saved, Mapping) or key not in saved:
        raise ValueError(f"expected a state dict, with 'state' and 'param_groups', got no {key!r}")
    return saved[key]
