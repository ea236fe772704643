"""One generation of an adapter in a pool: what was loaded under a name at one time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from peftrt.serving.layout import Layout
from peftrt.serving.reader import Origin
from peftrt.serving.slots import Place


@dataclass(eq=False, repr=False)
class Entry:
    """An adapter and where it is. All but what does not change is read and written under the pool's lock.

    Attributes:
        name, generation: the second counts all loads of the pool.
        tenant: whose it is.
        origin: where it can be read again.
        layout, scaling: of its image.
        rank: its largest.
        image: in host memory; None where it is not there.
        place: on the device; None where it is not there.
        pinned: it stays there.
        refs: open batches that use it.
        bringing: a thread is bringing it to the device.
        retired: unloaded or replaced: it goes when the last batch ends.
        used: when it was last wanted, in batches.
        marks: behind its uses, where those may not be done.
        gone: a mark behind its last bytes' being zeroed.
    """

    name: str
    generation: int
    tenant: str | None
    origin: Origin
    layout: Layout
    scaling: Tensor
    rank: int
    image: Tensor | None = None
    place: Place | None = None
    pinned: bool = False
    refs: int = 0
    bringing: bool = False
    retired: bool = False
    used: int = 0
    marks: list[Any] = field(default_factory=list)
    gone: Any = None

    def __repr__(self) -> str:
        return f"Entry({self.name!a}, generation={self.generation}, refs={self.refs}, place={self.place})"

    @property
    def nbytes(self) -> int:
        """That it takes on the device."""
        return self.layout.nbytes

    @property
    def slot(self) -> int:
        """Its id in the tables; it must be on the device."""
        assert self.place is not None
        return self.place.slot

    @property
    def is_evictable(self) -> bool:
        """Whether it may leave the device to make room."""
        return self.place is not None and not self.pinned and self.refs == 0
