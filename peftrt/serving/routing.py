"""The routing of a pool's batch: layers compute with the pool's tables in place of adapters of their own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from peftrt import ops
from peftrt.nn import AdapterLinear
from peftrt.nn.recompute import ForwardOnly
from peftrt.nn.routing import Routing
from peftrt.serving.entry import Entry
from peftrt.serving.slots import Slots


class PoolRouting(Routing):
    """The slots of a batch's entries. To layers that are no sites of the pool, and to modules of ``modules_to_save``,
    it names no adapter: they compute their base.

    Args:
        entries: on the device, one or None for each entry of the batch.
        expand: how often each counts.
        tables: of the pool's sites.
        outer: the routing around this one.
    """

    def __init__(
        self,
        entries: Sequence[Entry | None],
        expand: int,
        tables: Mapping[AdapterLinear, ops.AdapterTable],
        outer: Routing | None,
    ) -> None:
        super().__init__([None] * len(entries), expand)
        if expand > 1:
            self.once = PoolRouting(entries, 1, tables, outer)
        self.entries = frozenset(entry for entry in entries if entry is not None)
        self._outer = outer
        self._tables = tables
        self._slots = [-1 if entry is None else entry.slot for entry in entries for _ in range(expand)]

    @property
    def remembered(self) -> ForwardOnly:
        return ForwardOnly(self.names)

    def uses(self, slots: Slots, entries: Collection[Entry] | None) -> bool:
        """Whether this block, or one around it, is of the pool with these slots and has one of the entries; of None,
        any or none.
        """
        mine = self._tables is slots.tables or self._tables is slots.plain_tables
        if mine and (entries is None or not self.entries.isdisjoint(entries)):
            return True
        return isinstance(self._outer, PoolRouting) and self._outer.uses(slots, entries)

    def table(self, layer: AdapterLinear) -> ops.AdapterTable | None:
        table = self._tables.get(layer)
        if table is not None and not layer.is_bare({}):
            raise ValueError(
                "pool: parts of a layer's weight were taken out (PiSSA) since the pool was made, and a table has no "
                "room for them"
            )
        return table

    def table_ids(self, x: Tensor) -> Tensor:
        return self._ids_per_row(None, lambda: self._slots, x)
